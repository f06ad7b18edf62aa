"""Functions that the tests run in several processes. They return plain values and tensors."""

from __future__ import annotations

import functools
import itertools
import os
import pickle
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import bench_alignment
import lora_ga
from lora_ga import GradientEstimate, LoraGAConfig
from lora_ga.adapter.structure import give_structure
from lora_ga.distributed.processes import Processes
from lora_ga.distributed.sharding import reshard
from lora_ga.experiments.optim import PoLoRA, param_groups
from lora_ga.files import read_tensors
from lora_ga.gradients.checkpoint import FILE_KIND
from lora_ga.layers.factors import Factor
from lora_ga.version import is_before
from toys import adapted, causal, data_folder, fused_llama, llama, logits

STEPS = 20
EXACT = LoraGAConfig(estimator="dense")


def uneven(count: int = 8) -> list[dict[str, Tensor]]:
    """Batches with different numbers of label tokens; the same in every process."""
    batches = causal(count)
    for number, batch in enumerate(batches):
        batch["labels"][:, : number % 5 + 1] = -100
    return batches


def numbers(estimate: GradientEstimate) -> dict[str, Any]:
    """The values of an estimate, which another process can compare bit for bit."""
    return {
        "layers": {name: (each.U, each.S, each.V, each.norm, each.sketch) for name, each in estimate.items()},
        "about": (estimate.batches, estimate.weight, dict(estimate.missing), dict(estimate.settled_weight)),
    }


def starts(model: nn.Module) -> list[Tensor]:
    return [module.start for module in model.modules() if isinstance(module, Factor)]


def raised(call: Callable[[], Any]) -> str:
    """The type and the message of the error that a call raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the tests compare the text)
        call()
    return f"{type(caught.value).__name__}: {caught.value}"


def warned(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result of a call, and the warnings of this library about processes and layers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [text for each in caught if re.search("process|called|no label", text := str(each.message))]


class Traffic:
    """Counts the bytes that this process passes to torch.distributed, without using the library."""

    def __init__(self) -> None:
        self.factors = self.values = 0

    def __enter__(self) -> Traffic:
        self.kept = dist.send, dist.all_gather_object
        send, gather = self.kept

        def counted_send(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.factors += tensor.nbytes
            return send(tensor, *args, **kwargs)

        def counted_gather(values: list[Any], value: Any, *args: Any, **kwargs: Any) -> Any:
            self.values += len(pickle.dumps(value)) * (len(values) - 1)
            return gather(values, value, *args, **kwargs)

        dist.send, dist.all_gather_object = counted_send, counted_gather  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        dist.send, dist.all_gather_object = self.kept


# --- estimates -------------------------------------------------------------------------------------------------------


def estimates(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Estimates on one set of batches; each process reads its share."""
    mine = uneven()[rank::size]
    found: dict[str, Any] = {}
    with Traffic() as traffic:
        found["streaming"] = numbers(lora_ga.estimate_gradients(adapted(llama()), mine))
    found["bytes"] = (traffic.factors, traffic.values)
    found["dense"] = numbers(lora_ga.estimate_gradients(adapted(llama()), mine, EXACT))
    model = adapted(llama())
    lora_ga.initialize(model, mine)
    found["starts"], found["logits"] = starts(model), logits(model, causal(1)[0])
    short = uneven(3)[rank::size]
    found["uneven"] = numbers(lora_ga.estimate_gradients(adapted(llama()), short, EXACT))
    found["at most"] = numbers(lora_ga.estimate_gradients(adapted(llama()), mine, LoraGAConfig(max_batches=size)))
    few = [{key: value[:1, :5] for key, value in batch.items()} for batch in causal(4)]
    found["few"] = numbers(lora_ga.estimate_gradients(adapted(llama()), few[rank::size]))
    probing = LoraGAConfig(estimator="probe", oversample=24)
    found["probe"] = numbers(lora_ga.estimate_gradients(fused_llama(), mine, probing))
    found["unseen"], found["said"] = warned(
        lambda: numbers(
            lora_ga.estimate_gradients(fused_llama({"q_proj"}), causal(3)[rank::size], LoraGAConfig(oversample=24))
        )
    )
    return found


class Unsized(list[Any]):
    """Batches whose length cannot be found out."""

    def __len__(self) -> int:
        raise OSError("the length is on the disk that is gone")


def bad_input(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Calls that raise an error or a warning."""
    mine = causal(4)[rank::size]
    found: dict[str, Any] = {}
    estimate = lora_ga.estimate_gradients

    def broken() -> Iterator[Any]:
        yield mine[0]
        if rank == 1:
            raise OSError("the disk of process 1 is gone")
        yield mine[1]

    unlabelled = dict(mine[0], labels=torch.full_like(mine[0]["labels"], -100))
    targets = ["q_proj"] if rank == 0 else ["v_proj"]
    silent: Any = [] if rank == 1 else mine
    alone = [dist.new_group([each]) for each in range(size)][rank]
    found["seeds"] = raised(lambda: estimate(adapted(llama()), mine, LoraGAConfig(seed=rank)))
    found["targets"] = raised(lambda: estimate(adapted(llama(), targets), mine))
    found["models"] = raised(lambda: estimate(adapted(llama(num_hidden_layers=rank + 1)), mine))
    found["gammas"] = raised(
        lambda: lora_ga.apply_estimate(
            adapted(llama()), estimate(adapted(llama()), mine), LoraGAConfig(stable_gamma=16.0 + rank)
        )
    )
    found["no adapter"] = raised(lambda: estimate(adapted(llama()) if rank == 0 else llama(), mine))
    found["raises"] = raised(lambda: estimate(adapted(llama()), broken()))
    found["not data"] = raised(lambda: estimate(adapted(llama()), "estimate.safetensors" if rank == 1 else mine))
    found["no length"] = numbers(estimate(adapted(llama()), Unsized(mine) if rank == 1 else mine))
    found["length"] = numbers(estimate(adapted(llama()), mine))
    found["rate"] = raised(lambda: lora_ga.find_rate(adapted(llama()), mine, 60))
    without_loss = [{"input_ids": mine[0]["input_ids"]}] if rank == 1 else mine
    found["no loss"] = raised(lambda: estimate(adapted(llama()), without_loss))
    one_labelled = [unlabelled, mine[0], unlabelled] if rank == 1 else mine
    found["no labels"] = warned(lambda: numbers(estimate(adapted(llama()), one_labelled)))
    found["no label anywhere"] = raised(lambda: estimate(adapted(llama()), [unlabelled]))
    found["no data"] = raised(lambda: estimate(adapted(llama()), []))
    found["idle"] = warned(lambda: numbers(estimate(adapted(llama()), silent)))
    found["same"] = warned(lambda: numbers(estimate(adapted(llama()), causal(2))))
    found["alone"] = numbers(estimate(adapted(llama()), mine, LoraGAConfig(seed=rank), process_group=alone))
    return found


def interrupted(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """An estimate that fails in one process, and then continues from its checkpoints in both."""
    mine, file = causal(8)[rank::size], folder / "state.safetensors"

    def broken() -> Iterator[Any]:
        yield from mine[:3]
        if rank == 0:
            raise OSError("broken off")
        yield from mine[3:]

    first = raised(lambda: lora_ga.estimate_gradients(adapted(llama()), broken(), checkpoint=file, every=2))
    files = sorted(path.name for path in folder.glob("state*"))
    again = lora_ga.estimate_gradients(adapted(llama()), mine, checkpoint=file, every=2)
    whole = lora_ga.estimate_gradients(adapted(llama()), mine)
    early = lora_ga.estimate_gradients(adapted(llama()), causal(1, rows=16) * 12, LoraGAConfig(tolerance=0.01))
    return {
        "error": first,
        "files": files,
        "again": numbers(again),
        "whole": numbers(whole),
        "early": (early.batches, dict(early.settled)),
    }


def real_llama() -> tuple[Any, list[dict[str, Tensor]]]:
    """A small pretrained Llama with an adapter of rank 8, and 16 batches of tinyshakespeare."""
    folder = data_folder("models", "babyllama105")
    text = data_folder("data", "text", "tinyshakespeare.txt").read_text()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return adapted(base, r=8), bench_alignment.causal_batches(folder, text, length=64, count=16)


def real(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Estimates on a pretrained model."""
    found = {}
    for estimator in ("streaming", "dense"):
        model, batches = real_llama()
        config = LoraGAConfig(estimator=estimator)
        found[estimator] = numbers(lora_ga.estimate_gradients(model, batches[rank::size], config))
    return found


def all_of(names: Sequence[str]) -> Callable[[int, int, Path], dict[str, Any]]:
    """A worker that runs several others."""
    return functools.partial(_all_of, tuple(names))


def _all_of(names: tuple[str, ...], rank: int, size: int, folder: Path) -> dict[str, Any]:
    return {name: globals()[name](rank, size, folder) for name in names}


# --- wrapped models --------------------------------------------------------------------------------------------------


def curve(model: nn.Module, batches: list[dict[str, Tensor]], rank: int, size: int) -> list[float]:
    """Train by SGD with momentum on a share of each batch's rows; returns the losses averaged over the processes."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)
    losses = []
    for step in range(STEPS):
        batch = {key: value[rank::size] for key, value in batches[step % len(batches)].items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if size > 1:
            dist.all_reduce(total)
        losses.append(total.item() / size)
    return losses


def sharded(model: Any, size: int, **settings: Any) -> Any:
    """Shard the model by FSDP2, layer by layer."""
    mesh = init_device_mesh("cpu", (size,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def save(model: Any, folder: Path, *, main: bool) -> None:
    """Save through the full state dict of FSDP2."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    model.save_pretrained(folder, state_dict=state, is_main_process=main)


def wrapped(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Initialisation and training with DistributedDataParallel and FSDP2, wrapped before and after initialisation."""
    batches = causal(4)
    found: dict[str, Any] = {}
    for name in ("ddp, before", "ddp, after", "fsdp, before", "fsdp, after"):
        kind, when = name.split(", ")
        wrap: Callable[[Any], Any] = DistributedDataParallel if kind == "ddp" else lambda model: sharded(model, size)
        model = adapted(llama())
        model = wrap(model) if when == "before" else model
        estimate = lora_ga.initialize(model, batches[rank::size], EXACT)
        model = wrap(model) if when == "after" else model
        inner = model.module if kind == "ddp" else model
        found[name] = {
            "estimate": numbers(estimate),
            "starts": starts(model),
            "logits": logits(model, batches[0]),
            "curve": curve(model, batches, rank, size),
        }
        if kind == "fsdp":
            save(inner, folder / name, main=rank == 0)
        elif rank == 0:
            inner.save_pretrained(folder / name)
        dist.barrier()
        found[name]["trained"] = logits(model, batches[0])
    half = sharded(adapted(llama()), size, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    share = [] if rank == 1 else batches
    estimate, said = warned(lambda: lora_ga.initialize(half, share, EXACT))
    before = logits(half, batches[0])
    with half.disable_adapter():
        found["mixed"] = {"base": logits(half, batches[0]), "before": before, "said": said}
    found["mixed"] |= {"estimate": numbers(estimate), "losses": curve(half, batches, rank, size)}
    unlabelled = dict(batches[0], labels=torch.full_like(batches[0]["labels"], -100))
    model = sharded(adapted(llama()), size)
    refused = {"input_ids": batches[0]["input_ids"]} if rank == 1 else batches[0]
    found["refused"] = raised(lambda: lora_ga.initialize(model, [refused]))
    share = [unlabelled, batches[1]] if rank == 1 else [batches[0]]
    estimate, said = warned(lambda: lora_ga.estimate_gradients(model, share, EXACT))
    found["unlabelled"] = {"estimate": numbers(estimate), "said": said}
    parallel = adapted(llama())
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    parallelize_module(parallel.base_model.model.model.layers[1].mlp.up_proj.base_layer, mesh, ColwiseParallel())
    found["parallel"] = raised(lambda: lora_ga.initialize(parallel, batches))
    found["base"] = raised(lambda: lora_ga.initialize(model, batches, LoraGAConfig(offset="base")))
    return found


def state_dicts(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """What the functions of torch.distributed.checkpoint load from a trained model into one of another start.

    With offset="base" it has the same start, since that is in its base weight.
    """
    batches, found = causal(4), {}
    full: dict[str, Any] = {"full_state_dict": True}
    saved: list[dict[str, Any]] = [{}, full, full | {"cpu_offload": True}]
    loaded: list[list[dict[str, Any]]] = [[{}], [{}, {"broadcast_from_rank0": True}], [{"broadcast_from_rank0": True}]]
    for name in ("ddp", "ddp itself", "fsdp, before", "fsdp, after", "fsdp, base"):
        config = LoraGAConfig(estimator="dense", offset="base" if name == "fsdp, base" else "adapter")

        def made(batches: list[Any], name: str = name, config: LoraGAConfig = config) -> Any:
            tied: dict[str, Any] = {"ensure_weight_tying": True} if name in ("ddp itself", "fsdp, after") else {}
            if is_before("peft", "0.19"):
                tied = {}
            base = llama(num_hidden_layers=1, tie_word_embeddings=bool(tied))
            model = adapted(base, ["q_proj", "up_proj", *["embed_tokens"] * bool(tied)], **tied)
            model = sharded(model, size) if name == "fsdp, before" else model
            lora_ga.initialize(model, batches, config)
            if name == "ddp itself":
                return DistributedDataParallel(model)
            return sharded(model, size) if name in ("fsdp, after", "fsdp, base") else model

        model = made(batches[rank:2:size])
        curve(DistributedDataParallel(model) if name == "ddp" else model, batches, rank, size)
        trained = logits(model, batches[0])
        for settings, ways in zip(saved, loaded, strict=True):
            state = get_model_state_dict(model, options=StateDictOptions(**settings))
            for way, strict in itertools.product(ways, (True, False)):
                other = made(batches[rank:2:size] if name == "fsdp, base" else batches[2 + rank :: size])
                before = logits(other, batches[0])
                reshard(other)  # torch cannot load into the parameters that a forward pass has gathered
                options = StateDictOptions(**settings, **way, strict=strict)
                given = {} if way and rank else dict(state)
                set_model_state_dict(other, given, options=options)
                found[f"{name}, {options}"] = (before, trained, logits(other, batches[0]))
    return found


def names_of_factors(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """What modules name in a process group, and what torch saves of an adapter whose factors A, or all, are frozen."""
    model = adapted(llama(num_hidden_layers=1), ["q_proj", "embed_tokens"])
    lora_ga.initialize(model, causal(1), EXACT)
    plain = set(get_model_state_dict(model))
    found: dict[str, Any] = {
        "buffers": [name for module in model.modules() for name, _ in module.named_buffers(recurse=False)],
        "children": [name for name, _ in model.named_modules() if name.endswith("lora_embedding_A.default")],
    }
    for frozen in ("none", "lora_A", "lora_"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name and (frozen not in name.replace("embedding_", "")))
        found[frozen] = (
            sorted(get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))),
            set(get_model_state_dict(model)) == plain,
        )
    return found


def accelerated(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """An Accelerate loop with gradient accumulation, initialised after `prepare`; 4 rows a step over all processes."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = adapted(llama())
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    rows = [{key: value[0].tolist() for key, value in batch.items()} for batch in causal(16, rows=1)]
    loader: Any = DataLoader(Dataset.from_list(rows).with_format("torch"), batch_size=4 // size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    config = LoraGAConfig(estimator="dense", max_batches=2 * size)  # 8 rows
    estimate = lora_ga.initialize(model, loader, config)
    losses, steps = [], 0
    for batch in itertools.chain(loader, loader):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        steps += accelerator.sync_gradients
    return {"estimate": numbers(estimate), "losses": losses, "steps": steps, "kind": type(model).__name__}


# --- a tensor-parallel plan ------------------------------------------------------------------------------------------


def parallel(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Estimate, initialise, train and save under a tensor-parallel plan; all processes read the same batches."""
    plain, batches = folder / "base", causal(4)
    found: dict[str, Any] = {}
    if rank == 0:
        llama().save_pretrained(plain)
    dist.barrier()
    estimate = lora_ga.estimate_gradients

    def split(**rules: str) -> Any:
        plan = {f"model.layers.*.mlp.{name}": rule for name, rule in rules.items()}
        settings = DistributedConfig(tp_size=size, tp_plan=plan or None)
        return AutoModelForCausalLM.from_pretrained(plain, distributed_config=settings).eval()

    for name, config in (("dense", EXACT), ("streaming", LoraGAConfig())):
        with Traffic() as traffic:
            found[name] = numbers(estimate(adapted(split()), batches, config))
        found[f"bytes, {name}"] = traffic.factors
    found["at most"] = numbers(estimate(adapted(split()), batches, LoraGAConfig(max_batches=3)))
    whole = split(gate_proj="replicate", up_proj="replicate", down_proj="replicate")
    found["in part"] = numbers(estimate(adapted(whole), batches, EXACT))
    model = adapted(split())
    before = logits(split(), batches[0])
    lora_ga.initialize(model, batches, EXACT)
    found["starts"], found["logits"] = starts(model), (before, logits(model, batches[0]))
    with model.disable_adapter():
        found["disabled"] = logits(model, batches[0])
    late = adapted(split())
    give_structure(late, EXACT, "default")
    lora_ga.initialize(late, batches, EXACT)
    found["late"] = (starts(late), logits(late, batches[0]))
    found["curve"] = curve(model, batches, 0, 1)
    found["trained"] = logits(model, batches[0])
    model.save_pretrained(folder / "parallel", is_main_process=rank == 0)
    dist.barrier()
    again = lora_ga.load(split(), folder / "parallel", is_trainable=True)
    found["again"] = logits(again, batches[0])
    found["different"] = raised(lambda: estimate(adapted(split()), batches[rank:]))
    found["fewer"] = raised(lambda: estimate(adapted(split()), batches[: 2 + rank]))
    found["tolerance"] = raised(lambda: estimate(adapted(split()), batches, LoraGAConfig(tolerance=0.01)))
    alone = [dist.new_group([each]) for each in range(size)][rank]
    found["alone"] = raised(lambda: estimate(adapted(split()), batches, process_group=alone))
    found["head"] = raised(lambda: estimate(adapted(split(), ["lm_head"]), batches))
    found["base"] = raised(lambda: lora_ga.initialize(adapted(split()), batches, LoraGAConfig(offset="base")))
    return found


# --- one process reads for all ---------------------------------------------------------------------------------------


class Rows(IterableDataset[Any]):
    """A stream of rows; `fail` is called in the place of the row `fails_at`."""

    def __init__(self, rows: Tensor, fails_at: int | None = None, fail: Callable[[], None] = lambda: None) -> None:
        self.rows, self.fails_at, self.fail = rows, fails_at, fail

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number, row in enumerate(self.rows):
            if number == self.fails_at:
                self.fail()
            yield {"input_ids": row, "labels": row}


def dispatching(rows: IterableDataset[Any]) -> Any:
    """A loader whose rows process 0 reads for all."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    loader = accelerator.prepare(DataLoader(rows, batch_size=2))
    assert type(loader).__name__ == "DataLoaderDispatcher"
    return loader


def failing_reader(way: str, fails_at: int) -> Callable[[int, int, Path], dict[str, Any]]:
    """A worker that reads a stream which fails in process 0 before the row `fails_at`."""
    return functools.partial(_failing_reader, way, fails_at)


def _failing_reader(way: str, fails_at: int, rank: int, size: int, folder: Path) -> dict[str, Any]:
    events: list[str] = []
    model, gather = adapted(llama()), dist.all_gather_object

    def fail() -> None:
        events.append("failed")
        raise OSError("the stream broke")

    stream = Rows(causal(1, rows=32)[0]["input_ids"], fails_at, fail)

    def noted(*args: Any, **kwargs: Any) -> None:
        events.append("exchange")
        gather(*args, **kwargs)

    dist.all_gather_object = noted

    def call() -> Any:
        if way == "trainer":
            given = TrainingArguments(str(folder / "run"), max_steps=4, per_device_train_batch_size=2, use_cpu=True)
            return Trainer(model, given, train_dataset=stream, callbacks=[lora_ga.LoraGACallback()]).train()
        loader = dispatching(stream)
        config = LoraGAConfig(estimator="probe" if way == "probe" else "streaming")
        data = itertools.islice((dict(batch) for batch in loader), 10) if way == "wrapped" else loader
        return lora_ga.initialize(model, data, config)

    return {"error": raised(call), "events": events}


def resumed_reader(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Estimates that go on from files which stand at different batches; process 0 reads for all."""
    rows = causal(1, rows=40)[0]["input_ids"]
    # Process 0 gets the same two rows in each batch, so its layers converge early.
    steady = torch.cat([torch.cat([rows[:2], rows[at : at + 2]]) for at in range(2, 40, 2)])
    return {
        "all": _resumed_reader(Rows(rows), EXACT, rank, folder / "all.safetensors"),
        "early": _resumed_reader(Rows(steady), LoraGAConfig(tolerance=0.1), rank, folder / "early.safetensors"),
    }


def _resumed_reader(rows: Rows, config: LoraGAConfig, rank: int, file: Path) -> dict[str, Any]:
    passes = itertools.count(1)

    def loss(model: Any, batch: Any) -> Tensor:
        if rank == 1 and next(passes) == 6:
            raise KeyError("broken off")
        return model(**batch).loss

    def estimate(**settings: Any) -> Any:
        return lora_ga.estimate_gradients(adapted(llama()), dispatching(rows), config, **settings)

    error = raised(lambda: estimate(loss_fn=loss, checkpoint=file, every=1 + 2 * rank))
    progress = read_tensors(Processes(rank, 2).own_file(file), FILE_KIND)[1]["progress"]
    return {
        "error": error,
        "at": (progress["batches"], len(progress["settled"])),
        "again": numbers(estimate(checkpoint=file)),
        "whole": numbers(estimate()),
    }


# --- errors inside of a pass that communicates ------------------------------------------------------------------------


class FailsInBackward(torch.autograd.Function):
    """The identity, whose backward pass fails."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise ZeroDivisionError("in the backward pass")


def failing_pass(way: str) -> Callable[[int, int, Path], str]:
    """A worker whose model is sharded, and whose loss fails in process 1."""
    return functools.partial(_failing_pass, way)


def _failing_pass(way: str, rank: int, size: int, folder: Path) -> str:
    def loss(model: Any, batch: Any) -> Tensor:
        if rank == 1 and way == "before":
            raise ZeroDivisionError("before the forward pass")
        found = model(**batch).loss
        return FailsInBackward.apply(found) if rank == 1 else found

    model = sharded(adapted(llama()), size)
    return raised(lambda: lora_ga.estimate_gradients(model, causal(4)[rank::size], loss_fn=loss))


class Gathering:
    """A loss that gathers values of all processes, in another function. It fails in process 1 at its second batch."""

    def __init__(self, rank: int, fails: str = "") -> None:
        self.rank, self.fails, self.accelerator = rank, fails, Accelerator(cpu=True)
        self.passes = itertools.count(1)

    def __call__(self, model: Any, batch: Any) -> Tensor:
        fails = self.fails if self.rank == 1 and next(self.passes) == 2 else ""
        loss = model(**batch).loss
        if fails == "before":
            raise ZeroDivisionError("before the gathering")
        self.note(loss.detach())
        if fails == "after":
            raise ZeroDivisionError("after the gathering")
        return FailsInBackward.apply(loss) if fails == "backward" else loss

    def note(self, value: Tensor) -> None:
        self.accelerator.gather(value)


def failing_gathering(fails: str) -> Callable[[int, int, Path], str]:
    """A worker whose loss gathers, and fails in process 1."""
    return functools.partial(_failing_gathering, fails)


def _failing_gathering(fails: str, rank: int, size: int, folder: Path) -> str:
    loss = Gathering(rank, fails)
    return raised(lambda: lora_ga.estimate_gradients(adapted(llama()), causal(4)[rank::size], loss_fn=loss))


def gathering(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Estimates on uneven shares, with the model's loss, with one that gathers, and with one beside the model."""
    share = causal(6)[:4] if rank == 0 else causal(6)[4:]
    loss = Gathering(rank)

    def beside(model: Any, batch: Any) -> Tensor:
        inner = model.base_model.model
        scores = inner.lm_head(inner.model(input_ids=batch["input_ids"]).last_hidden_state)
        return functional.cross_entropy(scores[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def layers_sharded() -> Any:
        model = adapted(llama())
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (size,)))
        return model

    estimate = lora_ga.estimate_gradients
    return {
        "plain": numbers(estimate(adapted(llama()), share, EXACT)),
        "gathering": numbers(estimate(adapted(llama()), share, EXACT, loss_fn=loss)),
        "all in one": numbers(estimate(adapted(llama()), [] if rank else causal(6), EXACT, loss_fn=Gathering(rank))),
        "beside": numbers(estimate(adapted(llama()), share, EXACT, loss_fn=beside)),
        "beside, in shards": numbers(estimate(layers_sharded(), share, EXACT, loss_fn=beside)),
        "passes": next(loss.passes) - 1 if rank == 1 else None,
    }


# --- processes that die ----------------------------------------------------------------------------------------------


def dying(rank: int, size: int, folder: Path) -> Any:
    """Process 1 ends in the middle of its batches; the others must notice it."""
    model, mine = adapted(llama()), causal(4)

    def data() -> Iterator[Any]:
        yield mine[0]
        if rank == 1:
            os._exit(3)
        yield mine[1]

    began = time.monotonic()
    said = raised(lambda: lora_ga.initialize(model, data()))
    return {"error": said, "seconds": time.monotonic() - began, "touched": bool(starts(model))}


# --- optimizers ------------------------------------------------------------------------------------------------------


def stepped_by_pairs(rank: int, size: int, folder: Path) -> list[Tensor]:
    """The changes of A and B after three steps of PoLoRA, on batches of which each process has its share of rows."""
    model = adapted(llama(num_hidden_layers=1), ["q_proj", "up_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora_ga.apply_estimate(model, lora_ga.estimate_gradients(model, causal(1)), LoraGAConfig())
    optimizer = PoLoRA(param_groups(model), lr=0.05)
    network: Any = DistributedDataParallel(model) if size > 1 else model
    for batch in causal(3):
        network(**{name: tensor[rank::size] for name, tensor in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [module.delta().detach() for module in model.modules() if isinstance(module, Factor)]
