"""Damaged and hand-made files of every format: refused by name, in bounded memory and time; nothing is executed."""

from __future__ import annotations

import copy
import functools
import gzip
import json
import os
import random
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import lora_ga
from campaign.commands import WORLD
from campaign.faults import Result, forked, last_line, limit_memory, lost, new_folder
from lora_ga import GradientEstimate
from lora_ga.adapter import save as sidecar
from lora_ga.cli.checkpoints import read_trainer_state
from lora_ga.cli.parsing import parse_with_config
from lora_ga.cli.train import make_parser
from lora_ga.experiments.records import gzip_lines
from lora_ga.experiments.records.runs import load_run
from lora_ga.experiments.records.store import Store
from lora_ga.experiments.suites import trained
from lora_ga.experiments.suites.spec import load_suite
from lora_ga.export.convert import convert_run
from lora_ga.export.saved_adapter import read_adapter
from lora_ga.files import read_labels, write_tensors
from lora_ga.gradients import checkpoint, result

BATCH = 100  # mutations in one process
SECONDS, MEMORY = 10, 1024  # of processor time for one file; MiB more than at the start
# What a file must never cause. Imports execute code too, but that of a source file.
FORBIDDEN = {"pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork"}
LEAVES: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    float("nan"),
    float("inf"),
    10**30,
    "",
    "x" * 300,
    [],
    {},
    [[[]]],
    {"a": 1},
]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        source: The valid file.
        name: Its name where it is read.
        read: The folder that holds it → what it says.
        companions: Other files of the folder.
        exact: Whether checksums must notice every change of the content.
    """

    source: Path
    name: str
    read: Callable[[Path], Any]
    companions: tuple[Path, ...] = ()
    exact: bool = False


def _estimate(folder: Path) -> Any:
    found = GradientEstimate.load(folder / "e.safetensors")
    layers = {name: [each.U.tolist(), each.S.tolist(), each.V.tolist(), each.norm] for name, each in found.items()}
    return [layers, found.config, found.fingerprint, found.weight, found.batches, dict(found.missing)]


def _sidecar(folder: Path) -> Any:
    tensors, record = sidecar.read_sidecar(folder) or ({}, {})
    return {name: tensor.tolist() for name, tensor in tensors.items()} | {"record": record}


def _state(folder: Path) -> Any:
    identity = json.loads((WORLD / "identity.json").read_text())
    progress, tensors = checkpoint.Checkpoint(folder / "state.safetensors", 1, identity).load()
    return {name: tensor.tolist() for name, tensor in tensors.items()} | {"progress": progress}


def _adapter(folder: Path) -> Any:
    config, tensors = read_adapter(folder)
    return [config.to_dict(), sorted(tensors)]


def _load(folder: Path) -> Any:
    layers = {name: torch.nn.Linear(16, 16) for name in ("q_proj", "v_proj")}
    return lora_ga.load(torch.nn.ModuleDict(layers), folder, is_trainable=True) and None


def _compress(folder: Path) -> Any:
    with new_folder(folder.parent) as out:
        return sorted(lora_ga.compress_adapter(folder, out / "small", rank=1))


def _convert(folder: Path) -> Any:
    with new_folder(folder.parent) as out:
        return sorted(convert_run(WORLD / "init", folder, out / "converted"))


def _trained(folder: Path) -> Any:
    return trained.restore(folder, torch.nn.Linear(2, 2))


def _options(folder: Path) -> Any:
    return parse_with_config(make_parser(), [], config=str(folder / "config.yaml"))


ADAPTER = tuple(WORLD / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
FINAL = tuple(WORLD / "final" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
TRAINED = tuple(WORLD / "trained" / name for name in ("facts.json", "model.safetensors"))
STORE = tuple(WORLD / "files" / "store" / name for name in ("store.json", "a.jsonl.gz"))
TINY = tuple(WORLD / "tiny" / name for name in ("adapter_config.json", "adapter_model.safetensors", sidecar.FILE))
FORMATS = {
    "estimate": Format(WORLD / "estimate-0.safetensors", "e.safetensors", _estimate, exact=True),
    "state of an estimate": Format(WORLD / "state.safetensors", "state.safetensors", _state, exact=True),
    "sidecar": Format(WORLD / "adapter" / sidecar.FILE, sidecar.FILE, _sidecar, exact=True),
    "adapter": Format(ADAPTER[1], ADAPTER[1].name, _adapter, ADAPTER),
    "adapter, compressed": Format(ADAPTER[1], ADAPTER[1].name, _compress, ADAPTER),
    "adapter, converted": Format(FINAL[1], FINAL[1].name, _convert, FINAL),
    "adapter, loaded": Format(TINY[1], TINY[1].name, _load, TINY),
    "sidecar, loaded": Format(TINY[2], TINY[2].name, _load, TINY),
    "adapter configuration": Format(ADAPTER[0], ADAPTER[0].name, _adapter, ADAPTER),
    "adapter configuration, converted": Format(FINAL[0], FINAL[0].name, _convert, FINAL),
    "trained model": Format(TRAINED[1], TRAINED[1].name, _trained, TRAINED),
    "facts of a trained model": Format(TRAINED[0], TRAINED[0].name, _trained, TRAINED),
    "run": Format(WORLD / "files" / "run.json", "run.json", load_run),
    "store": Format(STORE[1], STORE[1].name, lambda folder: Store(folder).records(), STORE),
    "store header": Format(STORE[0], STORE[0].name, lambda folder: Store(folder).records(), STORE),
    "options": Format(WORLD / "files" / "config.yaml", "config.yaml", _options),
    "suite": Format(WORLD / "suite.yaml", "suite.yaml", lambda folder: load_suite(str(folder / "suite.yaml"))),
    "class names": Format(WORLD / "files" / "labels.json", "labels.json", read_labels),
    "trainer state": Format(WORLD / "files" / "trainer_state.json", "trainer_state.json", read_trainer_state),
}


def write_files() -> None:
    """The valid files that the world does not have yet."""
    folder = WORLD / "files"
    (folder / "store").mkdir(parents=True)
    import runs
    from golden_set import ADAPTERS, adapted, batches, broken_off

    runs.write_run(folder / "run")
    (folder / "run" / "run.json").rename(folder / "run.json")
    record = {"schema": 1, "suite": "a", "status": "done", "attempt": 1, "metrics": {"tune": {"loss": 1.0}}}
    for number in range(4):
        gzip_lines.append(folder / "store" / "a.jsonl.gz", {**record, "digest": f"{number:012d}"})
    (folder / "store" / "store.json").write_text('{"schema": 2, "kind": "lora-ga runs"}\n')
    options = {"model": "base", "task": "causal-lm", "train_file": "data.jsonl", "output_dir": "out", "rank": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump({**options, "target_modules": ["q_proj"], "seed": 0}))
    (folder / "labels.json").write_text('{"0": "good", "1": "bad"}')
    log = [{"step": step, "loss": 1.0, "epoch": 0.1} for step in range(3)]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2, "max_steps": 4, "log_history": log}))
    trained.save(WORLD / "trained", torch.nn.Linear(2, 2), {}, {"curves": {}})
    layers = {name: torch.nn.Linear(16, 16) for name in ("q_proj", "v_proj")}
    from peft import LoraConfig, get_peft_model

    class Both(torch.nn.ModuleDict):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self["v_proj"](self["q_proj"](x))

    model = get_peft_model(Both(layers), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    data = [torch.randn(8, 16, generator=torch.Generator().manual_seed(0))]
    lora_ga.initialize(model, data, loss_fn=lambda network, x: network(x).square().mean())
    model.save_pretrained(WORLD / "tiny")
    os.chdir(WORLD)
    model = adapted(ADAPTERS["delta"][0])
    try:
        lora_ga.estimate_gradients(model, broken_off(batches(4), 2), checkpoint="state.safetensors", every=1)
    except InterruptedError:
        os.chdir("..")
    _, about = lora_ga.files.read_tensors(WORLD / "state.safetensors", checkpoint.FILE_KIND)
    (WORLD / "identity.json").write_text(json.dumps(about["identity"]))


# --- mutations -------------------------------------------------------------------------------------------------------


def mutated(content: bytes, name: str, draw: random.Random) -> bytes:
    """A damaged copy of a file: by chance anywhere, or in its structure."""
    structured = {".json": _json, ".yaml": _yaml, ".safetensors": _safetensors, ".gz": _gzip}[Path(name).suffix]
    return draw.choice([_anywhere, structured])(content, draw)


def _anywhere(content: bytes, draw: random.Random) -> bytes:
    data, place = bytearray(content), draw.randrange(len(content))
    early = draw.randrange(min(len(content), 2000))  # headers are at the beginning
    end = place + draw.randint(1, 64)
    kind = draw.randrange(7)
    if kind == 0:
        return content[:place]
    if kind == 1:
        for _ in range(draw.randint(1, 8)):
            data[draw.choice([early, draw.randrange(len(data))])] ^= 1 << draw.randrange(8)
    elif kind == 2:
        data[place:end] = bytes(len(data[place:end]))
    elif kind == 3:
        data[early:early] = draw.randbytes(draw.randint(1, 16))
    elif kind == 4:
        data[place:place] = data[place:end]
    elif kind == 5:
        data[:8] = draw.choice([b"\xff" * 8, (2**62).to_bytes(8, "little"), (2**30).to_bytes(8, "little"), bytes(8)])
    else:
        data[early : early + 1] = draw.choice([b"[" * 20000, b'"', b"{", b"NaN", b"-", b"9" * 400])
    return bytes(data)


def _leaf(value: Any, draw: random.Random) -> Any:
    """A nested value with one change somewhere."""
    value = copy.deepcopy(value)
    parents = [(None, None)] + [(each, key) for each in _containers(value) for key in _keys(each)]
    parent, key = draw.choice(parents)
    if parent is None:
        return draw.choice(LEAVES)
    kind = draw.randrange(4)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[draw.choice(["extra", "__class__", "schema", ""])] = draw.choice(LEAVES)
    else:
        parent[key] = draw.choice(LEAVES)
    return value


def _containers(value: Any) -> list[Any]:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [value] if isinstance(value, (dict, list)) and value else []
    return own + [each for one in inner for each in _containers(one)]


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value)))


def _json(content: bytes, draw: random.Random) -> bytes:
    if draw.randrange(10) == 0:
        return b'{"a":' * 3000 + b"1" + b"}" * 3000
    text = json.dumps(_leaf(json.loads(content), draw))
    if draw.randrange(5) == 0:  # a name twice
        text = text.replace("{", '{"schema": 1, "schema": 2, ', 1)
    return text.encode(draw.choice(["utf-8", "utf-8", "utf-16"]))


def _yaml(content: bytes, draw: random.Random) -> bytes:
    kind = draw.randrange(6)
    if kind == 0:
        return content + b"\nextra: !!python/object/apply:os.system ['true']\n"
    if kind == 1:  # every level ten times the one before
        lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
        lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
        return (
            content
            + ("\ntarget_modules: *a8\n" if draw.randrange(2) else "\nseeds: *a8\n")
            .join(["\n" + "\n".join(lines), ""])
            .encode()
        )
    return yaml.safe_dump(_leaf(yaml.safe_load(content), draw)).encode()


def _gzip(content: bytes, draw: random.Random) -> bytes:
    lines = [json.loads(line) for line in gzip.decompress(content).splitlines()]
    if draw.randrange(8) == 0:
        return _many_zeros()
    changed = _leaf(lines, draw)
    changed = changed if isinstance(changed, list) else [changed]
    return gzip.compress("".join(json.dumps(each) + "\n" for each in changed).encode(), mtime=0)


@functools.cache
def _many_zeros() -> bytes:
    """300 MiB, which take 300 KiB when they are compressed."""
    return gzip.compress(bytes(2**20 * 300), mtime=0)


def _safetensors(content: bytes, draw: random.Random) -> bytes:
    """Another header, which fits its length; and for this library's files other content with right checksums."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    about = header.get("__metadata__", {})
    if "kind" in about and draw.randrange(2):
        return _rewritten(content, about, draw)
    name = draw.choice([key for key in header if key != "__metadata__"])
    kind = draw.randrange(7)
    if kind == 0:
        header[name]["dtype"] = draw.choice(["I32", "F16", "F64", "BOOL", "F8_E4M3", "F4", "U8", "C64", "X"])
    elif kind == 1:
        header[name]["shape"] = draw.choice([[], [0], [-1], [2**62, 2**62], header[name]["shape"][::-1], "x", None])
    elif kind == 2:
        header[name]["data_offsets"] = draw.choice([[0, 2**62], [0, 0], [8, 4], [-1, 1], None])
    elif kind == 3:
        header[name.replace("A", "C")] = header.pop(name)
    elif kind == 4:
        header = _leaf(header, draw)
    elif kind == 5:
        data = data[: len(data) // 2] + b"\xff\xff\xff\x7f" * 64 + data[len(data) // 2 + 256 :]  # NaN
    text = json.dumps(header)
    if kind == 6:
        text = text[:1] + f'"{name}": {json.dumps(header[name])}, ' + text[1:]
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data


def _rewritten(content: bytes, about: dict[str, str], draw: random.Random) -> bytes:
    """A file of this library with one change in its tensors or its record, and with right checksums."""
    from safetensors.torch import load

    tensors, record = load(content), json.loads(about["record"])
    name, kind = draw.choice(sorted(tensors)), draw.randrange(6)
    if kind == 0:
        tensors[name] = tensors[name].flatten()[:1] if draw.randrange(2) else tensors[name].T.contiguous()
    elif kind == 1:
        tensors[name] = tensors[name].to(draw.choice([torch.int32, torch.bool, torch.float16, torch.complex64]))
    elif kind == 2 and tensors[name].is_floating_point():
        tensors[name].view(-1)[0] = draw.choice([float("nan"), float("inf")])
    elif kind == 3:
        del tensors[name]
    elif kind == 4:
        tensors[name + "x"] = tensors[name].clone()
    else:
        record = _leaf(record, draw)
    path = Path("rewritten.safetensors")
    write_tensors(path, about["kind"], tensors, record)
    return path.read_bytes()


# --- reading ---------------------------------------------------------------------------------------------------------


def case(number: int, draw: random.Random) -> Result:
    """Read a batch of damaged files of one format in one process."""
    if not (WORLD / "files").exists() and forked(write_files, Path("log")):
        raise RuntimeError(f"the valid files could not be written: {last_line(Path('log'))}")
    name = [*FORMATS][number % len(FORMATS)]
    seed, found = draw.random(), Path("found.json")
    found.write_text("{}")
    code = forked(lambda: read_batch(FORMATS[name], seed, found), Path("log"))
    if code:
        at = json.loads(found.read_text() or "{}").get("at", "?")
        return lost(f"{name}: the process ended with {code} at mutation {at}: {last_line(Path('log'))}", BATCH)
    told = json.loads(found.read_text())
    return Result(BATCH, told["survived"], told["refused"], lost=f"{name}: {told['lost']}" if told["lost"] else "")


def read_batch(form: Format, seed: float, found: Path) -> int:
    """Read `BATCH` damaged files; write what became of them."""
    draw, executed = random.Random(seed), []
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path("read")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for each in form.companions:
        shutil.copy(each, folder)
    content = form.source.read_bytes()
    (folder / form.name).write_bytes(content)
    right = form.read(folder)
    sys.addaudithook(lambda event, arguments: executed.append(event) if event in FORBIDDEN else None)
    limit_memory(MEMORY)

    def too_long(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGVTALRM, too_long)
    total: dict[str, Any] = {"survived": 0, "refused": 0, "lost": ""}
    for at in range(BATCH):
        changed = mutated(content, form.name, draw)
        (folder / form.name).write_bytes(changed)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        said = read_one(form, folder, right)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if said in {"survived", "refused"} and not executed:
            total[said] += 1
            continue
        text = f"mutation {at}: {said} {' '.join(executed)}"
        print(text)
        if said not in total["lost"] and total["lost"].count("; ") < 4:
            total["lost"] += text + "; "
        executed.clear()
    found.write_text(json.dumps(total))
    return 0


def read_one(form: Format, folder: Path, right: Any) -> str:
    """Read one file.

    Returns:
        "survived", "refused", or what is wrong.
    """
    try:
        now = form.read(folder)
    except (ValueError, FileNotFoundError) as error:
        # Options that a file lacks may be on the command line: an error about them names the option.
        named = str(folder) in str(error) or (form.name == "config.yaml" and "--" in str(error))
        return "refused" if named else f"the error does not name the file: {type(error).__name__}: {error}"[:300]
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    if form.exact and repr(now) != repr(right) and not _is_valid(form, folder):
        return "read as something else, without an error"
    return "survived"


def _is_valid(form: Format, folder: Path) -> bool:
    """Whether a file was made by hand with right checksums: then its other content is meant."""
    kinds = {
        "e.safetensors": result.FILE_KIND,
        "state.safetensors": checkpoint.FILE_KIND,
        sidecar.FILE: sidecar.FILE_KIND,
    }
    path = Path("rewritten.safetensors")
    if not path.exists() or (folder / form.name).read_bytes() != path.read_bytes():
        return False
    return bool(lora_ga.files.read_tensors(path, kinds[form.name]))
