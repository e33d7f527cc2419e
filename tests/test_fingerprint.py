"""The identity of weights and clips: the same for copies, another for any change, and cheap."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensoraplan import fingerprint
from opensoraplan.disk import user_cache_folder
from opensoraplan.fingerprint import fingerprint_file, fingerprint_parts, fingerprint_weights, other_parts

# 4 MB of fp32: more than is read whole of clips. TENSORS of them are more than is read whole of weights.
SIDE, TENSORS = 1000, 4


def tensors_of(*, changed: int | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {f"block.{n}": torch.randn(SIDE, SIDE, generator=generator) for n in range(TENSORS)}
    if changed is not None:
        made[f"block.{changed}"] *= 1.0 + 2**-20
    return made


def write_safetensors(path: Path, *, changed: int | None = None) -> Path:
    save_file(tensors_of(changed=changed), path, metadata={"format": "pt"})
    return path


def write_pickle(path: Path, *, changed: int | None = None) -> Path:
    torch.save(tensors_of(changed=changed), path)
    return path


def write_legacy(path: Path, *, changed: int | None = None) -> Path:
    torch.save(tensors_of(changed=changed), path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("write", [write_safetensors, write_pickle, write_legacy])
def test_any_tensor_that_changes_is_another_file(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(tmp_path / "model")
    first = fingerprint_weights(path)
    assert len(first) == 32
    assert fingerprint_weights(Path(shutil.copyfile(path, tmp_path / "copy"))) == first
    others = {fingerprint_weights(write(path, changed=n)) for n in range(TENSORS)}
    assert len({first, *others}) == TENSORS + 1


def test_one_value_of_a_pickle_is_in_its_directory(tmp_path: Path) -> None:
    tensors = tensors_of()
    path = tmp_path / "model.pt"
    torch.save(tensors, path)
    before = fingerprint_weights(path)
    tensors["block.2"][17, 3] += 1  # far from every sample
    torch.save(tensors, path)
    assert fingerprint_weights(path) != before


def test_small_files_are_read_whole(tmp_path: Path) -> None:
    content = bytearray(os.urandom(5 << 20))
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    before = fingerprint_weights(path)
    content[3_000_001] ^= 1
    path.write_bytes(content)
    assert fingerprint_weights(path) != before


def make_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"layers": 2}')
    write_safetensors(folder / "model.safetensors")
    return folder


def test_a_folder_is_the_same_by_any_path_and_as_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    expected = fingerprint_weights(model)
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    for path in (Path("model"), Path("./model/../model"), tmp_path / "link"):
        assert fingerprint_weights(path) == expected
    assert fingerprint_weights(Path(shutil.copytree(model, tmp_path / "copy"))) == expected
    (model / "README.md").write_text("of interest to people")
    (model / ".gitattributes").write_text("")
    (model / "circle").symlink_to(model)
    assert fingerprint_weights(model) == expected
    (model / "config.json").write_text('{"_name_or_path": "/elsewhere/model", "layers": 2}')
    assert fingerprint_weights(model) == expected
    (model / "config.json").write_text('{"layers": ')
    assert fingerprint_weights(model) != expected
    (model / "config.json").write_text('{"layers": 3}')
    assert fingerprint_weights(model) != expected


def test_parts_that_differ_have_names(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    before = fingerprint_parts({"vae": model, "transformer": model})
    write_safetensors(model / "model.safetensors", changed=1)
    now = fingerprint_parts({"vae": model})
    assert other_parts(before, now) == ["vae"]
    assert other_parts(before, before) == []


def test_large_weights_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_safetensors(tmp_path / "model.safetensors")
    made = fingerprint_weights(path)
    assert not user_cache_folder().exists()  # a second write of this moment might have the same time
    monkeypatch.setattr(fingerprint, "_SETTLED_S", -60.0)
    assert fingerprint_weights(path) == made
    (entry,) = (user_cache_folder() / "fingerprints").iterdir()
    assert entry.read_text() == made
    entry.write_text("0" * 32)
    assert fingerprint_weights(path) == "0" * 32
    entry.write_text("damaged")
    assert fingerprint_weights(path) == made

    # The same size and modification time: what an archive or rsync leaves of other weights.
    status = path.stat()
    write_safetensors(path, changed=0)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint_weights(path) != made


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(fingerprint, "_SETTLED_S", -60.0)
    path = write_safetensors(tmp_path / "model.safetensors")
    assert fingerprint_weights(path) == fingerprint_file(path)


@pytest.mark.parametrize("header", [b"[]", b'{"a": {"data_offsets": [0, "x"]}}', b"[" * 10000, b"\xff"])
def test_damaged_headers_are_sampled(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "model.safetensors"
    content = len(header).to_bytes(8, "little") + header + bytes(9 << 20)
    path.write_bytes(content)
    before = fingerprint_weights(path)
    path.write_bytes(content[:-1] + b"x")
    assert fingerprint_weights(path) != before


def test_offsets_outside_of_the_file_are_no_error(tmp_path: Path) -> None:
    header = json.dumps({"a": {"data_offsets": [-(10**30), 10**40]}, "b": {"data_offsets": [-9, 0]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(9 << 20))
    assert len(fingerprint_weights(path)) == 32


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        fingerprint_file(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        fingerprint_weights(tmp_path / "nowhere")
