"""Reading checkpoints: every dialect, every nesting, and every damaged file that a user may have.

Shards are written here by hand, by section 7 of docs/model.md, not by the package's tables.
"""

import argparse
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import DENOISER
from torch import Tensor, nn

from opensoraplan.convert import load_checkpoint, open_checkpoint
from opensoraplan.formats import infer
from opensoraplan.formats.assemble import empty_denoiser, empty_vae
from opensoraplan.models import original
from opensoraplan.models.sparse_ummdit import SparseUMMDiT

Weights = dict[str, Tensor]

SPLIT_ROWS = re.compile(
    r"attn1\.(to_[qkv]|add_[qkv]_proj)\.(weight|bias)|net\.0\.proj\.weight|norm[12]\.linear\.|^norm_out\.linear\."
)
SPLIT_COLUMNS = re.compile(r"(attn1\.to_out\.0|attn1\.to_add_out|net\.2)\.weight$")
MINDSPEED = {
    "to_q": "proj_q",
    "to_k": "proj_k",
    "to_v": "proj_v",
    "add_q_proj": "added_proj_q",
    "add_k_proj": "added_proj_k",
    "add_v_proj": "added_proj_v",
    "norm_q": "norm_proj_q",
    "norm_k": "norm_proj_k",
    "norm_added_q": "norm_added_proj_q",
    "norm_added_k": "norm_added_proj_k",
    "to_out.0": "proj_out",
    "to_add_out": "added_proj_out",
}


@pytest.fixture(scope="module")
def denoiser(tiny_release: Path) -> Weights:
    """A denoiser of stages [2, 4, 2], in a dtype that is not torch's default."""
    flat = torch.load(tiny_release / "model_ema.pt", weights_only=True)
    return {name: value.bfloat16() for name, value in flat.items()}


@pytest.fixture(scope="module")
def weights(denoiser: Weights) -> Weights:
    """As much of it as reading needs: all but the first two stages."""
    return {n: value for n, value in denoiser.items() if not re.match(r"transformer_blocks\.[01]\.", n)}


@pytest.fixture(scope="module")
def few(weights: Weights) -> Weights:
    """One attention and the output: for what does not depend on how many tensors there are."""
    return {n: value for n, value in weights.items() if ".2.1.attn1." in n or n.startswith("proj_out")}


@pytest.fixture(scope="module")
def vae_weights(tiny_release: Path) -> Weights:
    return torch.load(tiny_release / "wfvae.ckpt", weights_only=True)["state_dict"]["gen_model"]


def assert_same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def save(content: Any, path: Path, *, legacy: bool = False) -> Path:  # noqa: ANN401 (whatever is pickled)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def with_mindspeed_names(weights: Weights) -> Weights:
    def rename(name: str) -> str:
        before, attention, rest = name.partition(".attn1.")
        module, _, leaf = rest.rpartition(".")
        return f"{before}{attention}{MINDSPEED[module]}.{leaf}" if attention else name

    return {rename(name): value for name, value in weights.items()}


def with_extras(weights: Weights) -> Weights:
    """With what tensor-parallel checkpoints have for the last block (stage 2, block 1) and nothing reads."""
    unread = ("attn1.to_add_out.", "ff_enc.", "norm2.norm_enc.")
    before = "transformer_blocks.2.0."
    copies = {n: v for n, v in weights.items() if n.startswith(tuple(before + part for part in unread))}
    return weights | {n.replace(before, "transformer_blocks.2.1."): v for n, v in copies.items()}


def cut(weights: Weights, ranks: int) -> list[Weights]:
    def part(name: str, value: Tensor, rank: int) -> Tensor:
        if SPLIT_ROWS.search(name):
            return value.chunk(ranks, 0)[rank]
        return value.chunk(ranks, 1)[rank] if SPLIT_COLUMNS.search(name) else value

    return [{name: part(name, value, rank) for name, value in weights.items()} for rank in range(ranks)]


@contextmanager
def framework(**members: Any) -> Iterator[None]:  # noqa: ANN401 (classes and functions)
    """Modules that there are while a checkpoint is saved, as in the process that trained, and not afterwards.
    `members`: classes and functions by full name, with __ for the dots.
    """
    added: list[str] = []
    for path, value in members.items():
        *parts, name = path.split("__")
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            if module not in sys.modules:
                sys.modules[module] = ModuleType(module)
                added.append(module)
        value.__module__, value.__qualname__ = ".".join(parts), name
        setattr(sys.modules[value.__module__], name, value)
    try:
        yield
    finally:
        for module in added:
            del sys.modules[module]


class ModelType(Enum):
    encoder_or_decoder = 1


class Config:
    """An object with a state, as frameworks put into `args`."""

    def __init__(self) -> None:
        self.hidden_size = 3072


def write_shards(
    folder: Path,
    shards: list[dict[str, Any]],
    *,
    iteration: str = "release",
    pipeline: int = 1,
    **more: object,
) -> Path:
    """Megatron's folder. `shards`: what each file holds, tensor-parallel ranks first, then pipeline ranks."""
    tensor = len(shards) // pipeline
    arguments = argparse.Namespace(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        lr=1e-5,
        data_path=["data.txt"],
        params_dtype=torch.bfloat16,
        **more,
    )
    rng = {"np_rng_state": np.random.get_state(), "random_rng_state": (3, (1, 2), None)}
    name = iteration if iteration == "release" else f"iter_{int(iteration):07d}"
    for index, shard in enumerate(shards):
        tp, pp = index % tensor, index // tensor
        rank = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if pipeline > 1 else "")
        content = {**shard, "args": arguments, "rng_state": [rng], "checkpoint_version": 3.0}
        save(content, folder / name / rank / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    return folder


# --- One file -----------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Weights], Any]] = {
    "flat": lambda w: w,
    "ordered, parameters": lambda w: OrderedDict((name, nn.Parameter(value)) for name, value in w.items()),
    "ema": lambda w: {"ema_state_dict": w},
    "ema, prefix": lambda w: {"ema_state_dict": {f"module.{name}": value for name, value in w.items()}},
    "prefix twice": lambda w: {f"module.module.{name}": value for name, value in w.items()},
    "model": lambda w: {"model": w, "iteration": 3, "opt": {"state": {0: {"step": torch.tensor(3)}}}},
    "mindspeed-mm": with_mindspeed_names,
    "extra states": lambda w: {
        **w,
        "a._extra_state": None,
        "b._extra_state": torch.zeros(3, dtype=torch.uint8),
        "module.c._extra_state": io.BytesIO(b"state"),
    },
}


def test_only_the_first_parts_of_a_name_are_a_prefix(tmp_path: Path) -> None:
    torch.save({"module.encoder.submodule.module.weight": torch.ones(2)}, tmp_path / "model.pt")
    assert list(open_checkpoint(tmp_path / "model.pt")) == ["encoder.submodule.module.weight"]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_release_file(form: str, legacy: bool, few: Weights, tmp_path: Path) -> None:
    path = save(FORMS[form](few), tmp_path / "model.pt", legacy=legacy)
    checkpoint = open_checkpoint(path)
    assert_same(dict(checkpoint), few)
    assert_same(load_checkpoint(str(path)), few)
    assert checkpoint.info.dialect == "release"
    assert checkpoint.info.names == ("mindspeed-mm" if form == "mindspeed-mm" else "release")
    assert checkpoint.info.ema == checkpoint.info.has_ema == form.startswith("ema")
    assert checkpoint.info.extra_states == (3 if form == "extra states" else 0)
    assert checkpoint.shapes == {name: tuple(value.shape) for name, value in few.items()}
    assert checkpoint.dtypes == {torch.bfloat16}


@pytest.mark.parametrize(
    "place", ["model_ema.pt", "transformers/mp_rank_00/model_states.pt", "mp_rank_00/model_states.pt"]
)
def test_release_folder(place: str, few: Weights, tmp_path: Path) -> None:
    save(few, tmp_path / place)
    assert_same(load_checkpoint(tmp_path), few)


@pytest.mark.parametrize("legacy", [False, True])
def test_vae_nestings(legacy: bool, vae_weights: Weights, tmp_path: Path) -> None:
    vae_weights = dict(list(vae_weights.items())[-30:])
    ema = {f"module.{name}": value + 1 for name, value in vae_weights.items()}
    other = {name: value - 1 for name, value in vae_weights.items()}
    nestings = {
        "ema": {"ema_state_dict": ema, "state_dict": {"gen_model": vae_weights}},
        "gen_model": {"ema_state_dict": {}, "state_dict": {"gen_model": vae_weights, "dics_model": other}},
        "state_dict": {"state_dict": vae_weights, "epoch": 3, "sampler_state": {"seed": 1}},
        "flat": vae_weights,
    }
    for name, content in nestings.items():
        path = save(content, tmp_path / f"{name}.ckpt", legacy=legacy)
        wanted = {n: v + 1 for n, v in vae_weights.items()} if name == "ema" else vae_weights
        assert_same(load_checkpoint(path), wanted)
        assert_same(load_checkpoint(path, ema=False), vae_weights)
        assert open_checkpoint(path).info.has_ema == (name == "ema")


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_every_kind(legacy: bool, tmp_path: Path) -> None:
    base = torch.randn(10, 12)
    tensors = {
        "view": base[2:4, 1:3],
        "transposed": base.T,
        "same storage": base,
        "row": base[7],
        "number": torch.tensor(3.5),
        "expanded": torch.tensor([[2.0]]).expand(4, 3),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(base[:, 5].double()),
        "half": base.half()[1:, ::2],
        "bf16": base.bfloat16(),
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }
    if not legacy:  # that format is older than such numbers
        tensors["eight bits"] = base.to(torch.float8_e4m3fn)
    path = save(tensors, tmp_path / "model.pt", legacy=legacy)
    read = load_checkpoint(path)
    assert set(read) == set(tensors)
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert read[name].is_contiguous()
        assert not read[name].requires_grad
        assert torch.equal(read[name].float(), value.float()), name
    storages = {value.untyped_storage().data_ptr() for value in read.values() if value.numel()}
    assert len(storages) == len(tensors) - 1  # what shared a storage in the file does not in memory


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_repacked_archives(compression: int, few: Weights, tmp_path: Path) -> None:
    """Other tools put the values at other places than torch, or compress them."""
    path = save(few, tmp_path / "model.pt")
    repacked = tmp_path / "repacked.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(repacked, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert_same(load_checkpoint(repacked), few)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_saved_on_ascend(legacy: bool, few: Weights, tmp_path: Path) -> None:
    """torch_npu pickles its tensors by a function of its own; it must not be needed to read them."""

    def rebuild(*arguments: Any) -> Tensor:  # noqa: ANN401 (as torch_npu calls it)
        raise AssertionError(arguments)

    class Format(Enum):
        ND = 2

    class OnAscend:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def __reduce_ex__(self, _: Any) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:  # noqa: ANN401
            t = self.tensor
            layout = (t.storage_offset(), tuple(t.shape), t.stride())
            return rebuild, (t._typed_storage(), *layout, False, OrderedDict(), Format.ND)

    with framework(torch_npu__npu__Format=Format, torch_npu__utils__storage__rebuild=rebuild):
        rebuild.__qualname__ = rebuild.__name__ = "_rebuild_npu_tensor"
        sys.modules["torch_npu.utils.storage"]._rebuild_npu_tensor = rebuild  # type: ignore[attr-defined]
        path = save(
            {name: OnAscend(value) for name, value in few.items()}, tmp_path / "npu.pt", legacy=legacy
        )
    assert_same(load_checkpoint(path), few)
    assert "torch_npu" not in sys.modules


def test_safetensors(few: Weights, tmp_path: Path) -> None:
    for name, content in (("plain", few), ("mindspeed-mm", with_mindspeed_names(few))):
        save_file({n: v.contiguous() for n, v in content.items()}, tmp_path / f"{name}.safetensors")
        checkpoint = open_checkpoint(tmp_path / f"{name}.safetensors")
        assert_same(dict(checkpoint), few)
        assert checkpoint.info.dialect == "safetensors"


def test_diffusers_components(tiny_model: Path, tiny_release: Path) -> None:
    for component, file in (("transformer", "model_ema.pt"), ("vae", "wfvae.ckpt")):
        released = load_checkpoint(tiny_release / file)
        checkpoint = open_checkpoint(tiny_model / component)
        read = {name for name in released if "wavelet_transform" not in name}
        assert_same(dict(checkpoint), {name: released[name] for name in read})
        assert checkpoint.info.dialect == "diffusers"
        assert checkpoint.info.config == json.loads((tiny_model / component / "config.json").read_text())


# --- Megatron shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["release", "mindspeed-mm"])
@pytest.mark.parametrize(("ranks", "iteration"), [(1, "release"), (2, "1000"), (4, "12345678")])
def test_tensor_parallel_shards(
    ranks: int, iteration: str, names: str, weights: Weights, tmp_path: Path
) -> None:
    whole = with_extras(weights) if ranks > 1 else weights
    shards = cut(whole, ranks)
    if names == "mindspeed-mm":
        shards = [with_mindspeed_names(shard) for shard in shards]
    folder = write_shards(tmp_path, [{"model": shard} for shard in shards], iteration=iteration)
    checkpoint = open_checkpoint(folder)
    assert_same(dict(checkpoint), whole)
    assert checkpoint.shapes == {name: tuple(value.shape) for name, value in whole.items()}
    info = checkpoint.info
    assert (info.dialect, info.names, info.iteration) == ("megatron", names, iteration)
    assert (info.tensor_parallel, info.pipeline_parallel) == (ranks, 1)
    inner = folder / ("release" if iteration == "release" else f"iter_{int(iteration):07d}")
    assert inner.is_dir()
    assert_same(load_checkpoint(inner), whole)


def test_ema_of_shards(few: Weights, tmp_path: Path) -> None:
    ema = {name: value + 1 for name, value in few.items()}
    pairs = zip(cut(few, 2), cut(ema, 2), strict=True)
    both = write_shards(tmp_path / "both", [{"model": a, "ema_model": b} for a, b in pairs])
    assert_same(load_checkpoint(both), ema)
    assert_same(load_checkpoint(both, ema=True), ema)
    assert_same(load_checkpoint(both, ema=False), few)
    assert open_checkpoint(both).info.ema
    assert not open_checkpoint(both, ema=False).info.ema
    assert open_checkpoint(both, ema=False).info.has_ema

    plain = write_shards(tmp_path / "plain", [{"model": part} for part in cut(few, 2)])
    assert_same(load_checkpoint(plain), few)
    with pytest.raises(ValueError, match=r"plain.*mp_rank_00.*has no EMA weights .*ema is True"):
        open_checkpoint(plain, ema=True)

    only = write_shards(tmp_path / "only", [{"ema_model": part} for part in cut(ema, 2)])
    assert_same(load_checkpoint(only), ema)
    with pytest.raises(ValueError, match=r"only.*has EMA weights only .*ema is False"):
        open_checkpoint(only, ema=False)

    first, second = cut(few, 2)
    mixed = write_shards(tmp_path / "mixed", [{"model": first, "ema_model": first}, {"model": second}])
    with pytest.raises(ValueError, match="only some of the shards have EMA weights"):
        open_checkpoint(mixed)
    assert_same(load_checkpoint(mixed, ema=False), few)


def test_objects_of_the_training_framework(few: Weights, tmp_path: Path) -> None:
    """`args` holds classes of Megatron and values of the standard library; none of them is needed."""
    with framework(megatron__core__enums__ModelType=ModelType, megatron__core__Config=Config):
        folder = write_shards(
            tmp_path,
            [{"model": part} for part in cut(few, 2)],
            model_type=ModelType.encoder_or_decoder,
            config=Config(),
            loss=np.float64(0.25),
            save=Path("/data/out"),
            more=SimpleNamespace(a=1),
        )
    assert not any(name.split(".")[0] == "megatron" for name in sys.modules)
    assert_same(load_checkpoint(folder), few)
    assert not any(name.split(".")[0] == "megatron" for name in sys.modules)


@pytest.mark.parametrize("ranks", [1, 2])
def test_pipeline_shards(ranks: int, tmp_path: Path) -> None:
    """The second of two pipeline ranks has the last of five stages and the last of two skip Linears, and
    counts both from 0.
    """

    def build() -> SparseUMMDiT:
        return SparseUMMDiT(**{**DENOISER, "num_layers": [2, 2, 2, 2, 2], "sparse_n": None})

    model = build()
    rename = model.original_format().rename
    whole = {rename(name): value for name, value in model.state_dict().items()}
    moved = {
        "transformer_blocks.4.": "transformer_blocks.0.",
        "skip_norm_linear.1.": "skip_norm_linear.0.",
        "skip_norm_linear_enc.1.": "skip_norm_linear_enc.0.",
        "norm_": "norm_",
        "proj_out": "proj_out",
    }
    parts: tuple[Weights, Weights] = {}, {}
    for name, value in whole.items():
        start = next((start for start in moved if name.startswith(start)), None)
        if start is None:
            parts[0][name] = value
        else:
            parts[1][moved[start] + name.removeprefix(start)] = value
    assert len(parts[0]) + len(parts[1]) == len(whole)

    shards = [{"model": shard} for part in parts for shard in cut(part, ranks)]
    checkpoint = open_checkpoint(write_shards(tmp_path, shards, pipeline=2))
    assert_same(dict(checkpoint), whole)
    assert (checkpoint.info.tensor_parallel, checkpoint.info.pipeline_parallel) == (ranks, 2)
    with torch.device("meta"):
        empty = build()
    original.load(empty, checkpoint)
    assert_same(empty.state_dict(), model.state_dict())


def test_extras_are_dropped_with_one_line(
    denoiser: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = with_extras(denoiser)
    assert len(whole) == len(denoiser) + 6  # to_add_out (2), ff_enc (2), norm2.norm_enc (2)
    shards = [{"model": {**part, "patch_embed._extra_state": None}} for part in cut(whole, 2)]
    checkpoint = open_checkpoint(write_shards(tmp_path, shards))
    assert checkpoint.info.extra_states == 2  # one of each rank
    with caplog.at_level(logging.INFO):
        model = empty_denoiser(checkpoint, None, rates=[1, 2, 1])
        original.load(model, checkpoint)
    (line,) = [text for text in caplog.messages if "nothing reads" in text]
    assert line.startswith("dropped 6 tensors that nothing reads: transformer_blocks.2.1.")
    assert_same({model.original_format().rename(n): v for n, v in model.state_dict().items()}, denoiser)


def test_replicas_that_differ(few: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = cut(few, 2)
    for name in ("proj_out.bias", "proj_out.weight"):
        shards[1] = {**shards[1], name: few[name] + 1}
    folder = write_shards(tmp_path, [{"model": part} for part in shards])
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(folder)
        assert not caplog.records  # nothing is read yet
        assert_same(dict(checkpoint), few)
    (record,) = caplog.records
    assert "differs between tensor-parallel ranks" in record.getMessage()


def test_ranks_that_do_not_agree(few: Weights, tmp_path: Path) -> None:
    first, second = cut(few, 2)
    odd = {name: value for name, value in second.items() if name != "proj_out.bias"}
    folder = write_shards(tmp_path / "names", [{"model": first}, {"model": odd}])
    with pytest.raises(ValueError, match=r"names.*rank 1 and rank 0 differ in proj_out\.bias$"):
        open_checkpoint(folder)

    odd = {**second, "proj_out.weight": second["proj_out.weight"][:-1]}
    folder = write_shards(tmp_path / "shapes", [{"model": first}, {"model": odd}])
    with pytest.raises(ValueError, match=r"shapes.*have different proj_out\.weight: \[16, 64\].*\[15, 64\]"):
        open_checkpoint(folder)


@pytest.mark.parametrize("gone", [0, 1, 3])
def test_missing_rank(gone: int, few: Weights, tmp_path: Path) -> None:
    """The last rank, too: how many there were stands in `args`."""
    folder = write_shards(tmp_path, [{"model": part} for part in cut(few, 4)])
    shard = folder / f"release/mp_rank_{gone:02d}/model_optim_rng.pt"
    shard.unlink()
    with pytest.raises(ValueError, match=f"shards are missing: .*mp_rank_{gone:02d}"):
        open_checkpoint(folder)
    shard.parent.rmdir()
    problem = r"sizes \(3, 1\).*saved with \(4, 1\)" if gone == 3 else rf"lacks .* ranks: \[\({gone}, 0\)\]"
    with pytest.raises(ValueError, match=problem):
        open_checkpoint(folder)


def test_one_shard_of_many(few: Weights, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [{"model": part} for part in cut(few, 2)])
    for path in (folder / "release/mp_rank_01", folder / "release/mp_rank_01/model_optim_rng.pt"):
        with pytest.raises(ValueError, match=r"mp_rank_01.*is one shard .* sizes \(2, 1\): give the folder"):
            open_checkpoint(path)


def test_trackers(few: Weights, tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [{"model": few}], iteration="1000")
    tracker = folder / "latest_checkpointed_iteration.txt"
    for text, problem in (
        ("2000", r"says '2000', but there is no folder .*iter_0002000"),
        ("release", r"says 'release', but there is no folder .*release"),
        ("../secrets", r"must contain a number or release, not '\.\./secrets'"),
        ("", "must contain a number or release, not ''"),
    ):
        tracker.write_text(text)
        with pytest.raises(ValueError, match=problem):
            open_checkpoint(folder)
    (folder / "iter_0003000").mkdir()
    tracker.write_text("3000")
    with pytest.raises(ValueError, match=r"iter_0003000 has no mp_rank_XX folders"):
        open_checkpoint(folder)
    tracker.write_text("1000\n")
    copy = folder / "iter_0001000/mp_rank_00_000"
    copy.mkdir()
    with pytest.raises(ValueError, match=r"mp_rank_00 and .*mp_rank_00_000 are the same rank"):
        open_checkpoint(folder)


# --- Files that are no checkpoint, or a damaged one ---------------------------------------------------------


class Code:
    """Unpickling this runs a command."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.witness}'",)


@pytest.mark.parametrize("protocol", [0, 4])
def test_code_is_the_reason_whatever_else_torch_cannot_read(protocol: int, tmp_path: Path) -> None:
    witness, path = tmp_path / "it ran", tmp_path / "code.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("code/data.pkl", pickle.dumps({"x": Code(witness)}, protocol=protocol))
    with pytest.raises(ValueError, match=r"code\.pt holds code .*\((posix|nt|os)\.system\): refused"):
        open_checkpoint(path)
    assert not witness.exists()


def test_a_rank_from_nowhere_does_not_fill_the_memory(few: Weights, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [{"model": few}])
    (folder / "release/mp_rank_99999_99999").mkdir()
    with pytest.raises(ValueError, match=r"lacks the shards .*\[\(0, 1\), .*\] and 9,999,999,993 more"):
        open_checkpoint(folder)


@pytest.mark.parametrize("what", ["99999999999999999999", "é".encode("latin-1"), "-1", ""])
def test_a_tracker_that_names_no_iteration(what: str | bytes, few: Weights, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [{"model": few}])
    tracker = folder / "latest_checkpointed_iteration.txt"
    tracker.write_bytes(what if isinstance(what, bytes) else what.encode())
    with pytest.raises(ValueError, match=r"iteration\.txt (must contain a number|is not UTF-8)"):
        open_checkpoint(folder)


def test_a_block_from_nowhere_does_not_fill_the_memory(tmp_path: Path) -> None:
    names = ("patch_embed.proj.weight", "transformer_blocks.99999999.0.attn1.norm_q.weight")
    path = save({name: torch.ones(2, 2) for name in names}, tmp_path / "some.pt")
    with pytest.raises(ValueError, match="the blocks are not nested"):
        infer.config_of(open_checkpoint(path))


def test_a_small_file_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("bomb/data/0", "w", force_zip64=True) as record,
    ):
        for _ in range(300):
            record.write(bytes(2**20))
    with pytest.raises(ValueError, match=r"bomb\.pt .*would become 0\.315 GB"):
        open_checkpoint(path)


def test_weights_that_are_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model_ema.pt")
    for path in (tmp_path, tmp_path / "model_ema.pt"):
        with pytest.raises(ValueError, match=r"model_ema\.pt is not a regular file"):
            open_checkpoint(path)


@pytest.mark.parametrize("content", [b"hello", b"null", b"\0" * 70, b"\x89PNG"])
def test_files_that_are_no_pickle_are_told_so(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pt is not .*: it begins neither as a zip"):
        open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_refused_and_not_run(legacy: bool, few: Weights, tmp_path: Path) -> None:
    witness = tmp_path / "it ran"
    names = {"value": {**few, "x": Code(witness)}, "args": {"model": few, "args": Code(witness)}}
    for name, content in names.items():
        path = save(content, tmp_path / f"{name}.pt", legacy=legacy)
        with pytest.raises(ValueError, match=rf"{name}\.pt holds code .*\((posix|nt|os)\.system\): refused"):
            open_checkpoint(path)
        assert not witness.exists()
    shards = [{"model": cut(few, 2)[0]}, {"model": cut(few, 2)[1], "rng": Code(witness)}]
    with pytest.raises(ValueError, match=r"mp_rank_01.*system\): refused"):
        open_checkpoint(write_shards(tmp_path / "shards", shards))
    assert not witness.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_bare_pickles_with_code(protocol: int, tmp_path: Path) -> None:
    path, witness = tmp_path / "bare.pt", tmp_path / "it ran"
    path.write_bytes(pickle.dumps({"x": Code(witness)}, protocol=protocol))
    with pytest.raises(ValueError, match=r"bare\.pt holds code .*system\): refused") as caught:
        open_checkpoint(path)
    assert "weights_only" not in str(caught.value)  # torch's own text advises to switch that off
    assert not witness.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("left", [0, 1, 3, 5, 60, 1000, 0.3, 0.5, 0.9, -300, -22, -1])
def test_truncated_files(left: float, legacy: bool, few: Weights, tmp_path: Path) -> None:
    path = save(few, tmp_path / "model.pt", legacy=legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    with pytest.raises(ValueError, match=r"model\.pt is (empty|not a readable checkpoint)"):
        load_checkpoint(path)


def test_file_that_shrinks_after_it_was_opened(few: Weights, tmp_path: Path) -> None:
    path = save(few, tmp_path / "model.pt")
    checkpoint = open_checkpoint(path)
    os.truncate(path, path.stat().st_size // 4)
    with pytest.raises(ValueError, match=r"model\.pt is truncated: it ends before byte \d+"):
        dict(checkpoint)


@pytest.mark.parametrize("content", [b"garbage", b"<html>404</html>", b"\x80\x02", b"PK\x03\x04", bytes(999)])
def test_garbage(content: bytes, tmp_path: Path) -> None:
    for name in ("model.pt", "model.ckpt", "model.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is not a readable"):
            load_checkpoint(path)


def test_random_damage(few: Weights, tmp_path: Path) -> None:
    """Whatever bytes a file has: it is read, or it is a ValueError that names it."""
    path = tmp_path / "model.pt"
    wholes = [save(dict(list(few.items())[:9]), path, legacy=legacy).read_bytes() for legacy in (True, False)]
    generator = np.random.default_rng(0)
    refused: list[str] = []
    for trial in range(120):
        content = bytearray(wholes[trial % 2])
        for position in generator.integers(0, 600, size=4):
            content[position if trial % 3 else -position - 1] = generator.integers(256)
        path.write_bytes(content)
        try:
            load_checkpoint(path)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert all(str(path) in text for text in refused)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17009322240\n")
    with pytest.raises(ValueError, match=r"model\.pt is only a Git LFS pointer.*git lfs pull"):
        open_checkpoint(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt is not a readable checkpoint.*TorchScript"):
        open_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([torch.ones(2)], "contains a list, not a dict of tensors"),
        (torch.ones(2), "contains a tensor, not a dict of tensors"),
        (None, "contains a NoneType, not a dict of tensors"),
        ({}, "it has no tensors"),
        ({"model": {}}, "it has no tensors"),
        ({"a._extra_state": None}, "it has no tensors"),
        ({"a": torch.ones(2), "epoch": 3}, "these entries are not tensors: 'epoch'$"),
        ({"model": {"encoder": {"w": torch.ones(2)}}}, "these entries are not tensors: 'encoder'$"),
        ({n: n for n in "abcdefg"}, "these entries are not tensors: 'a', 'b', 'c', 'd', 'e' and 2 more"),
        ({3: torch.ones(2)}, "these entries are not tensors: 3$"),
        ({"w": torch.ones(2), "module.w": torch.ones(2)}, "has w twice"),
        ({"w": torch.ones(2), "v": torch.ones(2).int()}, r"not floating-point: v \(torch\.int32\)$"),
        ({"a.attn1.to_q.weight": torch.ones(2), "a.attn1.proj_q.weight": torch.ones(2)}, r"a\.attn1\.proj_q"),
    ],
)
def test_files_without_weights(content: object, problem: str, tmp_path: Path) -> None:
    path = save(content, tmp_path / "some.pt")
    with pytest.raises(ValueError, match=rf"some\.pt .*{problem}"):
        open_checkpoint(path)


def test_whole_objects(tmp_path: Path) -> None:
    """A model that was pickled itself: of a framework, or of anybody."""
    with framework(mindspeed__models__Config=Config):
        path = save(Config(), tmp_path / "object.pt")
    with pytest.raises(ValueError, match=r"object\.pt contains a pickled object, not a dict of tensors"):
        open_checkpoint(path)
    with framework(somebody__models__Config=Config):
        path = save({"w": torch.ones(2), "c": Config()}, tmp_path / "object.pt")
    with pytest.raises(ValueError, match=r"object\.pt holds code or .*\(somebody\.models\.Config\): refused"):
        open_checkpoint(path)


def test_paths_that_do_not_exist(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.pt", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"{path} does not exist"):
            load_checkpoint(path)


def test_folders_without_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no checkpoint: expected .*latest_checkpointed_iteration"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"is a whole pipeline: give .*transformer or .*vae"):
        open_checkpoint(tiny_model)
    with pytest.raises(ValueError, match=r"config\.json is of \['T5EncoderModel'\], not of a SparseUMMDiT"):
        open_checkpoint(tiny_model / "text_encoder")


def test_ema_where_there_is_one_set(tiny_model: Path, few: Weights, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({name: value.contiguous() for name, value in few.items()}, file)
    for path in (file, tiny_model / "transformer"):
        with pytest.raises(ValueError, match=f"{path} has one set of weights.*ema is True"):
            open_checkpoint(path, ema=True)
        assert not open_checkpoint(path, ema=False).info.ema


def test_damaged_diffusers_components(few: Weights, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        open_checkpoint(tmp_path)
    config.write_text('{"_class_name": "SparseUMMDiT"}')
    with pytest.raises(ValueError, match="there are no safetensors files in"):
        open_checkpoint(tmp_path)

    pieces = {"one": {"proj_out.bias": few["proj_out.bias"]}, "two": {"w": torch.ones(2)}}
    for name, piece in pieces.items():
        save_file(piece, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        ValueError, match=r"more than one set of weights \(one.safetensors, two.safetensors\)"
    ):
        open_checkpoint(tmp_path)
    with pytest.raises(
        ValueError, match=r"one.safetensors is a part of a diffusers component: give its folder"
    ):
        open_checkpoint(tmp_path / "one.safetensors")

    index = tmp_path / "model.safetensors.index.json"
    for content, problem in (
        ({}, "has no weight_map"),
        ({"weight_map": {"w": "three.safetensors"}}, "shards that are not there: three.safetensors"),
        ({"weight_map": {"w": "two.safetensors", "v": "two.safetensors"}}, "tensors that are in no shard: v"),
        ({"weight_map": {"w": "two.safetensors"}}, "config.json has no num_layers"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=problem):
            open_checkpoint(tmp_path)
    config.write_text('{"_class_name": "SparseUMMDiT", "num_layers": [2, 2, 2]}')
    assert_same(dict(open_checkpoint(tmp_path)), pieces["two"])

    whole = (tmp_path / "two.safetensors").read_bytes()
    (tmp_path / "two.safetensors").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=r"two.safetensors is not a readable safetensors file"):
        open_checkpoint(tmp_path)


# --- Checkpoints that do not fit ----------------------------------------------------------------------------


def refit(content: Weights, path: Path) -> None:
    checkpoint = open_checkpoint(save(content, path))
    original.match(empty_denoiser(checkpoint, None, rates=[1, 2, 1]), checkpoint)


def test_one_tensor_that_does_not_fit(denoiser: Weights, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    name = "transformer_blocks.1.2.attn1.to_k.bias"
    missing = {n: value for n, value in denoiser.items() if n != name}
    cases = {
        f"missing {name} [64]": missing,
        f"unexpected {name}s [64]": {**denoiser, f"{name}s": denoiser[name]},
        f"{name} is [63], the config needs [64]": {**denoiser, name: denoiser[name][:-1]},
    }
    for line, content in cases.items():
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared)
            refit(content, path)
        assert str(caught.value) == f"1 tensor does not fit SparseUMMDiT ({path}):\n  {line}"


@pytest.mark.parametrize(
    "name",
    ["norm_final.bias", "skip_norm_linear.0.1.weight", "transformer_blocks.0.0.ff_enc.net.2.weight"],
)
def test_missing_tensors_from_which_the_config_is_told(name: str, denoiser: Weights, tmp_path: Path) -> None:
    """One that is missing must not make it another model, of which all the others would be wrong."""
    with pytest.raises(ValueError, match=rf"1 tensor does not fit .*\n  missing {re.escape(name)} \["):
        refit({n: value for n, value in denoiser.items() if n != name}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: the tensor caption_projection\.weight is missing"):
        refit(
            {n: value for n, value in denoiser.items() if n != "caption_projection.weight"},
            tmp_path / "model.pt",
        )


def test_another_width_names_every_tensor(denoiser: Weights, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(denoiser, tmp_path / "model.pt"))
    with torch.device("meta"):
        other = SparseUMMDiT(**{**DENOISER, "num_layers": [2, 4, 2]})
    rename = other.original_format().rename
    differing = [n for n, v in other.state_dict().items() if checkpoint.shapes[rename(n)] != tuple(v.shape)]
    with pytest.raises(ValueError, match=f"{len(differing)} tensors do not fit SparseUMMDiT") as caught:
        original.load(other, checkpoint)
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.split()[0] for line in lines) == sorted(rename(n) for n in differing)
    assert len(differing) > 250
    assert all(value.is_meta for value in other.state_dict().values())  # nothing was loaded


def test_haar_filters(vae_weights: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "vae.ckpt"
    filters = [name for name in vae_weights if "wavelet_transform" in name]
    assert len(filters) == 48
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        checkpoint = open_checkpoint(save({n: v.to(dtype) for n, v in vae_weights.items()}, path))
        with caplog.at_level(logging.INFO):
            caplog.clear()
            original.match(empty_vae(checkpoint, None), checkpoint)
        assert [r.getMessage() for r in caplog.records] == [
            "dropped 48 fixed Haar filters, their values checked"
        ]

    without = open_checkpoint(save({n: v for n, v in vae_weights.items() if n not in filters}, path))
    original.match(empty_vae(without, None), without)

    altered = {**vae_weights, filters[5]: -vae_weights[filters[5]]}
    checkpoint = open_checkpoint(save(altered, path))
    with pytest.raises(ValueError, match=rf"vae\.ckpt: these fixed tensors .*: {re.escape(filters[5])}$"):
        original.match(empty_vae(checkpoint, None), checkpoint)
    checkpoint = open_checkpoint(save({**vae_weights, filters[5]: torch.ones(1, 1, 2, 2)}, path))
    with pytest.raises(ValueError, match=rf"{re.escape(filters[5])} is \[1, 1, 2, 2\], the config needs"):
        original.match(empty_vae(checkpoint, None), checkpoint)


def test_swapped_and_foreign_weights(tiny_release: Path, tmp_path: Path) -> None:
    denoiser, vae = (open_checkpoint(tiny_release / name) for name in ("model_ema.pt", "wfvae.ckpt"))
    with pytest.raises(ValueError, match=r"wfvae\.ckpt: these are the weights of a VAE, .* swapped"):
        empty_denoiser(vae, None, rates=[1, 2, 1])
    with pytest.raises(ValueError, match=r"model_ema\.pt: these are the weights of a denoiser, .* swapped"):
        empty_vae(denoiser, None)
    other = open_checkpoint(save({"layer.weight": torch.ones(2)}, tmp_path / "other.pt"))
    with pytest.raises(ValueError, match=r"other\.pt: these are the tensors of neither .*layer\.weight"):
        empty_vae(other, None)
    flat = {"patch_embed.proj.weight": torch.ones(1), "transformer_blocks.0.attn1.to_q.weight": torch.ones(1)}
    save_file(flat, tmp_path / "flat.safetensors")
    with pytest.raises(ValueError, match=r"flat\.safetensors: the blocks are not nested by stage"):
        empty_denoiser(open_checkpoint(tmp_path / "flat.safetensors"), None)


def test_unknown_rates(tiny_release: Path) -> None:
    checkpoint = open_checkpoint(tiny_release / "model_ema.pt")
    with pytest.raises(
        ValueError,
        match=r"model_ema\.pt: .* the Skiparse rates of the stages \[2, 4, 2\].*--sparse-n",
    ):
        empty_denoiser(checkpoint, None)
    assert empty_denoiser(checkpoint, None, rates=(1, 4, 1)).config["sparse_n"] == [1, 4, 1]
    with pytest.raises(ValueError, match=r"model_ema\.pt: sparse_n needs 3 rates"):
        empty_denoiser(checkpoint, None, rates=(1, 4))


# --- Memory -------------------------------------------------------------------------------------------------


def test_tensors_are_read_when_they_are_taken(few: Weights, tmp_path: Path) -> None:
    path = save(few, tmp_path / "model.pt")
    checkpoint = open_checkpoint(path)
    save({name: value + 1 for name, value in few.items()}, path)
    assert_same(dict(checkpoint), {name: value + 1 for name, value in few.items()})
    assert checkpoint["proj_out.bias"] is not checkpoint["proj_out.bias"]


def test_a_file_larger_than_memory_is_opened(tmp_path: Path) -> None:
    """Training checkpoints are: their optimizer's states are not read. Nothing but names is written here."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    states = {index: torch.empty(memory // 8, dtype=torch.int8) for index in range(20)}
    path = tmp_path / "model.pt"
    with torch.serialization.skip_data():
        torch.save({"model": {"w": torch.empty(4, 4)}, "optimizer": states}, path)
    assert path.stat().st_size > 2 * memory
    assert_same(load_checkpoint(path), {"w": torch.zeros(4, 4)})
    path.unlink()


MEASURE = """
import json, os, resource, sys

import torch

from opensoraplan.convert import open_checkpoint
from opensoraplan.models.sparse_ummdit import SparseUMMDiT

UNIT = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in MiB


def load(path, config, dtype):
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / UNIT

    before = peak()
    checkpoint = open_checkpoint(path)
    opened = peak()
    model = SparseUMMDiT.from_original(config, checkpoint, dtype=dtype and getattr(torch, dtype))
    assert not any(value.is_meta for value in model.state_dict().values())
    return {"opened": opened - before, "peak": peak() - before}


results = []
for arguments in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    if os.fork() == 0:  # each from the same start; this process starts no threads
        os.write(writer, json.dumps(load(*arguments)).encode())
        os._exit(0)
    os.wait()
    os.close(writer)
    with open(reader) as pipe:
        results.append(json.loads(pipe.read()))
print(json.dumps(results))
"""


def test_peak_memory_is_the_model_and_one_tensor(tmp_path: Path) -> None:
    """Of a checkpoint of 1 GB, loaded as it is, and of two tensor-parallel shards, converted on the way."""

    def blank(heads: int) -> tuple[dict[str, Any], Weights]:
        config = {"num_heads": heads, "num_layers": [2], "sparse_n": [1], "timestep_embed_dim": 1536}
        with torch.device("meta"):
            model = SparseUMMDiT(**original.denoiser_config(config))
        rename = model.original_format().rename
        return config, {rename(n): v.to(torch.bfloat16) for n, v in model.state_dict().items()}

    config, flat = blank(24)
    other_config, other = blank(12)
    shards = [
        {n: torch.empty_like(v, memory_format=torch.contiguous_format) for n, v in part.items()}
        for part in cut(other, 2)
    ]
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        save({n: torch.empty_like(v, device="cpu") for n, v in flat.items()}, tmp_path / "model_ema.pt")
        real = [{n: torch.empty_like(v, device="cpu") for n, v in shard.items()} for shard in shards]
        write_shards(tmp_path / "shards", [{"model": shard} for shard in real])

    cases = [
        (str(tmp_path / "model_ema.pt"), config, None),
        (str(tmp_path / "shards"), other_config, "float16"),
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    for path in tmp_path.rglob("*.pt"):
        path.unlink()
    assert done.returncode == 0, done.stderr
    for weights, result in zip((flat, other), json.loads(done.stdout), strict=True):
        sizes = [value.numel() * value.itemsize / 2**20 for value in weights.values()]
        sys.stdout.write(f"MiB: model {sum(sizes):.0f}, largest tensor {max(sizes):.0f}, {result}\n")
        assert result["opened"] < 24  # what torch needs to look into any file
        assert sum(sizes) < result["peak"] < sum(sizes) + max(sizes) + 24
    assert sum(value.numel() for value in flat.values()) * 2 > 0.95e9
