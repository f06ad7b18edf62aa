"""What the package does with other people's code: whose attributes it writes, and which private names it reads."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "lora_ga"
# Only these may write attributes of modules that belong to PEFT, Transformers or the user.
WRITERS = ("adapter/", "gradients/isolation.py")
# What other files write: file → the objects, none of which is such a module.
OTHER_OBJECTS = {
    # Objects of our own classes.
    "gradients/checkpoint.py": {"total"},
    "gradients/loop.py": {"recorder", "probes"},
    "gradients/probe.py": {"recorder", "sums", "leaf"},
    "gradients/recording.py": {"recorded"},
    "experiments/suites/run.py": {"run"},
    "layers/factors.py": {"factor"},
    # bitsandbytes' record of a weight, which it gave a wrong shape, and whether it packs weights in evaluation.
    "layers/kinds.py": {"state", "module"},
    "linalg/streaming.py": {"stream"},
    "linalg/tensor_cores.py": {"setting"},  # torch's setting for products, for the length of two lines
    # FSDP2's record of where a parameter is, in the one function that checks its layout first.
    "distributed/sharding.py": {"info"},
    "gradients/loader.py": {"part"},  # of a data loader
    # A trainer, its arguments and its state, none of them a module; PEFT's configuration.
    "integrations/trainer.py": {"trainer"},
    "integrations/trainer_data.py": {"trainer"},
    "integrations/trainer_rate.py": {"twin"},
    "integrations/trainer_state.py": {"arguments", "attributes", "trainer", "twin"},
    "integrations/peft.py": {"lora_config"},
    "export/merge.py": {"config"},  # the configuration of the merged model, not a module
    # The command line and the experiments load their models, tokenizers and trainers themselves.
    "cli/callbacks.py": {"control"},
    "cli/export.py": {"base"},
    "cli/finetune.py": {"settings", "trainer"},
    "cli/main.py": {"warnings"},  # for the time of the command
    "cli/models.py": {"tokenizer", "model", "parameter"},
    "cli/tasks.py": {"tokenizer"},
    # A function of our own.
    "cli/parsing.py": {"read"},
    "experiments/suites/stack.py": {"parameter", "stacked"},
    "experiments/suites/training.py": {"parameter"},
}
SETTERS = {"setattr", "delattr"}
CHANGES = {"update", "pop", "setdefault", "clear"}
METHODS = {"add_module", "register_module", "register_parameter", "register_buffer", "__setattr__", "__delattr__"}


def sources() -> dict[str, ast.Module]:
    """Path below the package → its syntax tree."""
    return {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


def base_name(node: ast.AST) -> str:
    """The variable that an expression such as `a.b[c].d` begins with."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        if isinstance(node, ast.Call):
            node = (
                node.args[0] if isinstance(node.func, ast.Name) and node.args else node.func
            )  # vars(a), getattr(a, …)
        else:
            node = node.value
    return node.id if isinstance(node, ast.Name) else "?"


def is_dict(node: ast.AST) -> bool:
    """Whether a node is `x.__dict__` or `vars(x)`."""
    named = isinstance(node, ast.Attribute) and node.attr == "__dict__"
    return named or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "vars")


def targets(node: ast.AST) -> list[ast.AST]:
    """What a statement assigns to or deletes."""
    found: list[ast.AST] = []
    if isinstance(node, (ast.Assign, ast.Delete)):
        found = list(node.targets)
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        found = [node.target]
    return [each for one in found for each in (one.elts if isinstance(one, ast.Tuple) else [one])]


def owners_written(tree: ast.AST) -> Iterator[str]:
    """The variables whose attributes the code writes."""
    for node in ast.walk(tree):
        for target in targets(node):
            if isinstance(target, ast.Attribute) or (isinstance(target, ast.Subscript) and is_dict(target.value)):
                yield base_name(target)
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in SETTERS:
                yield base_name(node.args[0])
            if isinstance(function, ast.Attribute) and function.attr in METHODS:
                yield base_name(function.value)
            if isinstance(function, ast.Attribute) and function.attr in CHANGES and is_dict(function.value):
                yield base_name(function.value)


def written() -> dict[str, set[str]]:
    """File → the variables whose attributes it writes, other than `self`, `cls` and `ctx`."""
    found = {
        path: set(owners_written(tree)) - {"self", "cls", "ctx"}
        for path, tree in sources().items()
        if not path.startswith(WRITERS)
    }
    return {path: owners for path, owners in found.items() if owners}


def test_only_adapter_and_isolation_write_attributes_of_other_peoples_modules() -> None:
    assert written() == OTHER_OBJECTS


@pytest.mark.parametrize(
    "statement",
    [
        "layer.forward = f",
        "layer.training, x = False, 1",
        "layer.scale += 1",
        "del layer.hook",
        "layer.__dict__['forward'] = f",
        "vars(layer)['forward'] = f",
        "layer.__dict__.update(a=1)",
        "setattr(layer, 'a', 1)",
        "layer.lora_A.add_module('default', factor)",
        "layer.config.use_cache = False",
    ],
)
def test_a_write_to_a_module_is_recognised(statement: str) -> None:
    assert "layer" in set(owners_written(ast.parse(statement)))


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != ""


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """Private names that the package defines: functions, classes, methods and attributes of `self`."""
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    names = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return names | {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and base_name(node) == "self"
    }


def private_names_read(tree: ast.AST) -> set[str]:
    """Private attributes, strings that name one, and private imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
    return {name for name in found if private(name)}


def test_every_private_name_of_another_library_has_a_row_in_the_docs() -> None:
    trees, page = sources(), (ROOT / "docs" / "internals.md").read_text()
    own = own_names(trees)
    read = {name for tree in trees.values() for name in private_names_read(tree)} - own
    assert {"_hf_hook", "_get_fsdp_state", "_prepare_inputs"} <= read  # the scan finds attributes and strings
    named = set(re.findall(r"\b_\w+", page))
    assert read - named == set()


def test_the_tests_that_the_page_of_private_names_mentions_exist() -> None:
    page = (ROOT / "docs" / "internals.md").read_text()
    mentioned = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(mentioned) > 20
    for path, test in mentioned:
        text = (ROOT / path).read_text()
        assert f"def {test}" in text or not test, (path, test)


def test_the_files_that_the_page_of_private_names_mentions_exist() -> None:
    page = (ROOT / "docs" / "internals.md").read_text()
    files = re.findall(
        r"`((?:adapter|cli|distributed|experiments|export|gradients|integrations|layers)/[\w/]+\.py)`", page
    )
    assert len(files) > 20
    assert [path for path in files if not (SOURCE / path).is_file()] == []
