"""Files and folders are written with the permissions that any new file of the process gets."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora_ga
from lora_ga.experiments.suites.trained import save as save_trained
from lora_ga.files import new_folder, write_atomically, write_safetensors, write_tensors
from toys import adapted, causal, llama, saved

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no umask")


@pytest.fixture(params=[0o077, 0o022, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_every_file_and_folder_follows_the_umask(umask: int, tmp_path: Path) -> None:
    write_atomically(tmp_path / "bytes", b"x")
    write_safetensors(tmp_path / "plain.safetensors", {"x": torch.ones(2)}, {"format": "pt"})
    write_tensors(tmp_path / "record.safetensors", "a test", {"x": torch.ones(2)}, {})
    with new_folder(tmp_path / "folder") as folder:
        (folder / "inner").write_text("x")
    files = [*tmp_path.glob("*.safetensors"), tmp_path / "bytes", tmp_path / "folder" / "inner"]
    assert len(files) == 4
    assert {mode(file) for file in files} == {0o666 & ~umask}
    assert mode(tmp_path / "folder") == 0o777 & ~umask
    assert {path.name for path in tmp_path.iterdir()} == {"bytes", "folder", "plain.safetensors", "record.safetensors"}


def test_what_is_replaced_keeps_its_permissions(umask: int, tmp_path: Path) -> None:
    for name in ("bytes", "x.safetensors"):
        (tmp_path / name).touch(0o600)
    (tmp_path / "folder").mkdir(0o700)
    write_atomically(tmp_path / "bytes", b"new")
    write_safetensors(tmp_path / "x.safetensors", {"x": torch.ones(2)}, {})
    with new_folder(tmp_path / "folder"):
        pass
    assert [mode(tmp_path / name) for name in ("bytes", "x.safetensors", "folder")] == [0o600, 0o600, 0o700]
    assert (tmp_path / "bytes").read_bytes() == b"new"
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], torch.ones(2))


@pytest.mark.parametrize("umask", [0o027], ids=oct, indirect=True)
def test_what_users_save_follows_the_umask(umask: int, tmp_path: Path) -> None:
    model = saved(tmp_path / "adapter")
    lora_ga.compress_adapter(tmp_path / "adapter", tmp_path / "small", rank=4)
    state = tmp_path / "state.safetensors"
    estimate = lora_ga.estimate_gradients(adapted(llama()), causal(1), checkpoint=state, every=1)
    estimate.save(tmp_path / "estimate.safetensors")
    save_trained(tmp_path / "trained", model, {}, {})
    ours = [*(tmp_path / "small").iterdir(), *(tmp_path / "trained").iterdir(), *tmp_path.glob("*.safetensors")]
    ours.append(tmp_path / "adapter" / "lora_ga.safetensors")  # the adapter's other files are PEFT's
    assert len(ours) >= 7
    assert {file.name: mode(file) for file in ours} == {file.name: 0o666 & ~umask for file in ours}
