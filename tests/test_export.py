"""Writing checkpoints: every round trip gives the same bits, and nothing is left of what fails."""

import argparse
import json
import logging
import os
import re
import resource
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from command import Running
from safetensors.torch import load_file, save_file
from tiny_models import DENOISER, VAE
from tiny_release import sources_of
from torch import Tensor

from opensoraplan.convert import load_checkpoint, open_checkpoint
from opensoraplan.formats.assemble import (
    OpenedPipeline,
    Sources,
    export_denoiser,
    export_release,
    load_pipeline,
    load_vae,
    open_pipeline,
    save_diffusers,
)
from opensoraplan.formats.export import (
    WeightFiles,
    new_folder,
    write_component,
    write_megatron,
    write_release,
)
from opensoraplan.formats.infer import empty_model
from opensoraplan.formats.stored import StoredTensors
from opensoraplan.models import original
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.wfvae import WFVAE

Weights = dict[str, Tensor]

DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")
SPLIT_ROWS = re.compile(
    r"attn1\.(to_[qkv]|add_[qkv]_proj)\.|net\.0\.proj\.|norm[12]\.linear\.|^norm_out\.linear\."
)
SPLIT_COLUMNS = re.compile(r"(attn1\.to_out\.0|attn1\.to_add_out|net\.2)\.weight$")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def models(
    tiny_model: Path, tiny_release: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[torch.dtype, Path]:
    """The tiny model's folder in each dtype."""
    half = tmp_path_factory.mktemp("bf16") / "model"
    save_diffusers(sources_of(tiny_release), half, dtype=torch.bfloat16)
    return {torch.float32: tiny_model, torch.bfloat16: half}


@pytest.fixture(scope="module")
def released(tiny_release: Path) -> Weights:
    """The denoiser's weights as the release has them."""
    return torch.load(tiny_release / "model_ema.pt", weights_only=True)


@pytest.fixture
def sources(tiny_release: Path, tiny_model: Path) -> Sources:
    """The tiny release with parts that open faster than pickles, where it does not matter."""
    parts = {"transformer": tiny_model / "transformer", "vae": tiny_model / "vae"}
    return replace(sources_of(tiny_release), **parts, transformer_config=None, vae_config=None)


def assert_same(got: Weights, wanted: Weights) -> None:
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def without_filters(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if "wavelet_transform" not in name}


# --- diffusers folders --------------------------------------------------------------------------------------


def test_parts_of_the_diffusers_folder(tiny_model: Path) -> None:
    index = json.loads((tiny_model / "model_index.json").read_text())
    assert index["_class_name"] == ["opensoraplan.pipeline", "OpenSoraPlanPipeline"] or (
        index["_class_name"] == "OpenSoraPlanPipeline"
    )
    for name in (
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
    ):
        assert index[name][0] is not None
        assert any((tiny_model / name).iterdir())
    assert [path.name for path in tiny_model.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_folder_loaded_and_saved_again(
    dtype: torch.dtype, models: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    for name, model_class in (("transformer", SparseUMMDiT), ("vae", WFVAE)):
        folder = models[dtype] / name
        model = model_class.from_pretrained(folder, dtype=dtype)
        model.save_pretrained(tmp_path / name)
        first = load_file(folder / WEIGHTS)
        assert_same(load_file(tmp_path / name / WEIGHTS), first)
        assert {value.dtype for value in first.values()} == {dtype}
        assert_same(dict(model.state_dict()), first)
        one, two = (
            json.loads((path / name / "config.json").read_text()) for path in (models[dtype], tmp_path)
        )
        assert {k: v for k, v in one.items() if k[0] != "_"} == {k: v for k, v in two.items() if k[0] != "_"}


def test_weights_and_configs_of_the_release(tiny_release: Path, tiny_model: Path) -> None:
    for component, file in (("transformer", "model_ema.pt"), ("vae", "wfvae.ckpt")):
        released = without_filters(load_checkpoint(tiny_release / file))
        assert_same(load_checkpoint(tiny_model / component), released)
    config = json.loads((tiny_model / "vae/config.json").read_text())
    assert config["shift"] == [-0.2, 0.1, 0.6, -0.9]


def test_a_folder_from_its_own_components(sources: Sources, tiny_model: Path, tmp_path: Path) -> None:
    save_diffusers(sources, tmp_path / "again")
    for name in ("transformer", "vae"):
        assert (tmp_path / "again" / name / WEIGHTS).read_bytes() == (
            tiny_model / name / WEIGHTS
        ).read_bytes()
        assert (tmp_path / "again" / name / "config.json").read_bytes() == (
            tiny_model / name / "config.json"
        ).read_bytes()


def test_each_tensor_keeps_its_dtype(sources: Sources, tmp_path: Path) -> None:
    mixed = {
        name: value.bfloat16() if value.ndim > 1 else value
        for name, value in load_checkpoint(sources.transformer).items()
    }
    save_file(mixed, tmp_path / "model.safetensors")
    mixed_sources = replace(sources, transformer=tmp_path / "model.safetensors", sparse_n=(1, 2, 1))
    save_diffusers(mixed_sources, tmp_path / "out")
    assert_same(load_checkpoint(tmp_path / "out/transformer"), mixed)


def test_sharded_safetensors(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model / "transformer")
    model = empty_model(checkpoint)
    names = original.match(model, checkpoint)
    write_component(model, names, checkpoint, tmp_path, WeightFiles(max_shard_size="1MB"))
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(4 * v.numel() for v in model.state_dict().values())
    assert all((tmp_path / file).stat().st_size < 1.1e6 for file in files)
    assert_same(dict(open_checkpoint(tmp_path)), dict(checkpoint))
    loaded = SparseUMMDiT.from_pretrained(tmp_path)
    assert_same(dict(loaded.state_dict()), load_file(tiny_model / "transformer" / WEIGHTS))
    (tmp_path / files[1]).unlink()
    with pytest.raises(ValueError, match=f"shards that are not there: {files[1]}"):
        open_checkpoint(tmp_path)


def test_straight_from_the_releases_files(tiny_release: Path, released: Weights) -> None:
    sources = sources_of(tiny_release)
    pipeline = load_pipeline(
        open_pipeline(sources), dtype=torch.bfloat16, vae_dtype=torch.float32, device=CPU
    )
    rename = pipeline.transformer.original_format().rename
    weights = {rename(name): value for name, value in pipeline.transformer.state_dict().items()}
    assert_same(weights, {name: value.bfloat16() for name, value in released.items()})
    assert_same(dict(pipeline.vae.state_dict()), without_filters(load_checkpoint(sources.vae)))
    assert pipeline.transformer.config["sparse_n"] == [1, 2, 1]
    assert pipeline.text_encoder.dtype == pipeline.text_encoder_2.dtype == torch.bfloat16
    assert not any(part.training for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder))


def test_rates_instead_of_the_configs(sources: Sources, tmp_path: Path) -> None:
    save_diffusers(replace(sources, sparse_n=(1, 4, 1)), tmp_path / "out")
    assert json.loads((tmp_path / "out/transformer/config.json").read_text())["sparse_n"] == [1, 4, 1]


def test_a_vae_whose_shift_nobody_knows(
    sources: Sources, tiny_release: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="opensoraplan"):
        load_vae(tiny_release / "wfvae.ckpt", dtype=torch.float32, device=CPU)
        assert not caplog.records  # nothing there needs them
        save_diffusers(replace(sources, vae=tiny_release / "wfvae.ckpt"), tmp_path / "without")
    (record,) = caplog.records
    assert "wfvae.ckpt: the file has no shift and scale of the latents: none are used" in record.getMessage()
    assert json.loads((tmp_path / "without/vae/config.json").read_text())["shift"] is None


def test_vaes_of_every_form(tiny_release: Path, tiny_model: Path) -> None:
    wanted = without_filters(load_checkpoint(tiny_release / "wfvae.ckpt"))
    for path in (tiny_release / "wfvae.ckpt", tiny_model, tiny_model / "vae"):
        assert_same(dict(load_vae(path, dtype=torch.float32, device=CPU).state_dict()), wanted)
    half = load_vae(tiny_model, dtype=torch.bfloat16, device=CPU)
    assert (half.dtype, half.training) == (torch.bfloat16, False)
    with pytest.raises(ValueError, match=r"model_ema\.pt: these are the weights of a denoiser"):
        load_vae(tiny_release / "model_ema.pt", dtype=torch.float32, device=CPU)


# --- Back to the original's files ---------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "dtype"), [(1, DTYPES[1]), (2, DTYPES[0]), (4, DTYPES[0]), (4, DTYPES[1])])
def test_megatron_shards(
    ranks: int, dtype: torch.dtype, models: dict[torch.dtype, Path], released: Weights, tmp_path: Path
) -> None:
    """Release -> diffusers -> Megatron -> merged; and the shards themselves, as Megatron would read them."""
    export_denoiser(models[dtype], tmp_path / "shards", tensor_parallel=ranks)
    released = {name: value.to(dtype) for name, value in released.items()}
    merged = load_checkpoint(tmp_path / "shards")
    assert_same({name: merged[name] for name in released}, released)
    extras = sorted(set(merged) - set(released))
    last = "transformer_blocks.2.1."
    unread = ["attn1.to_add_out.bias", "attn1.to_add_out.weight", "ff_enc.net.0.proj.weight"]
    unread += ["ff_enc.net.2.weight", "norm2.norm_enc.bias", "norm2.norm_enc.weight"]
    assert extras == ([last + name for name in unread] if ranks > 1 else [])
    assert {merged[name].dtype for name in extras} <= {dtype}
    assert open_checkpoint(tmp_path / "shards").info.tensor_parallel == ranks

    assert (tmp_path / "shards/latest_checkpointed_iteration.txt").read_text() == "release"
    folders = sorted(path.name for path in (tmp_path / "shards/release").iterdir())
    assert folders == [f"mp_rank_{rank:02d}" for rank in range(ranks)]
    for rank, folder in enumerate(folders):
        path = tmp_path / "shards/release" / folder / "model_optim_rng.pt"
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, weights_only=True)
        assert content["args"].tensor_model_parallel_size == ranks
        assert content["args"].pipeline_model_parallel_size == 1
        assert set(content["model"]) == set(merged)
        for name, value in content["model"].items():
            dim = 0 if SPLIT_ROWS.search(name) else 1 if SPLIT_COLUMNS.search(name) else None
            part = merged[name] if dim is None else merged[name].chunk(ranks, dim)[rank]
            assert torch.equal(value, part), name
            assert value.untyped_storage().nbytes() == value.numel() * value.itemsize  # no more than its part


def test_shards_to_a_folder_again(sources: Sources, tiny_model: Path, tmp_path: Path) -> None:
    export_denoiser(tiny_model, tmp_path / "shards", tensor_parallel=2)
    shards = replace(sources, transformer=tmp_path / "shards", sparse_n=(1, 2, 1))
    save_diffusers(shards, tmp_path / "again")
    again = tmp_path / "again/transformer"
    assert (again / WEIGHTS).read_bytes() == (tiny_model / "transformer" / WEIGHTS).read_bytes()
    assert (again / "config.json").read_text() == (tiny_model / "transformer/config.json").read_text()


@pytest.mark.parametrize("dtype", DTYPES)
def test_release_again(
    dtype: torch.dtype, models: dict[torch.dtype, Path], tiny_release: Path, tmp_path: Path
) -> None:
    export_release(models[dtype], tmp_path / "release")
    assert sorted(path.name for path in (tmp_path / "release").iterdir()) == [
        "model_ema.pt",
        "wfvae_888_dim32.ckpt",
    ]
    for name, old in (("model_ema.pt", "model_ema.pt"), ("wfvae_888_dim32.ckpt", "wfvae.ckpt")):
        wanted = {key: value.to(dtype) for key, value in load_checkpoint(tiny_release / old).items()}
        assert_same(load_checkpoint(tmp_path / "release" / name), wanted)
    plain = torch.load(tmp_path / "release/model_ema.pt", weights_only=True)
    assert len(plain) == 306
    vae = torch.load(tmp_path / "release/wfvae_888_dim32.ckpt", weights_only=True)["state_dict"]["gen_model"]
    filters = {name: value for name, value in vae.items() if "wavelet_transform" in name}
    assert len(filters) == 48
    assert sum(value.numel() for value in filters.values()) == 2 * 192


def test_export_needs_no_rates(tiny_release: Path, released: Weights, tmp_path: Path) -> None:
    export_denoiser(tiny_release / "model_ema.pt", tmp_path / "shards", tensor_parallel=2)
    merged = load_checkpoint(tmp_path / "shards")
    assert_same({name: merged[name] for name in released}, released)


def test_what_cannot_be_exported(
    tiny_release: Path, tiny_model: Path, released: Weights, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for ranks in (0, 3, 8):
        with pytest.raises(ValueError, match=rf"must divide the 4 heads \(1, 2, 4\), got {ranks}"):
            export_denoiser(tiny_model, out, tensor_parallel=ranks)
    with pytest.raises(ValueError, match=r"wfvae\.ckpt has the weights of a VAE"):
        export_denoiser(tiny_release / "wfvae.ckpt", out, tensor_parallel=1)
    with pytest.raises(ValueError, match=r"release is not a model folder .* no model_index\.json"):
        export_release(tiny_release, out)
    part = {name: value for name, value in released.items() if name != "proj_out.bias"}
    torch.save(part, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"1 tensor does not fit .*\n  missing proj_out\.bias \[16\]"):
        export_denoiser(tmp_path / "x.pt", out, tensor_parallel=2)
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_models_in_memory_are_written_too(tmp_path: Path) -> None:
    """As training does it: a real model and its own tensors, of which some share a storage."""
    model = SparseUMMDiT(**DENOISER)
    rename = model.original_format().rename
    weights = {rename(name): value for name, value in model.state_dict().items()}
    biases = [name for name in weights if name.endswith("attn1.to_q.bias")]
    weights |= zip(biases, torch.randn(len(biases), 32).unbind(), strict=True)
    write_megatron(model, weights, tmp_path / "shards", tensor_parallel=2)
    merged = load_checkpoint(tmp_path / "shards")
    assert_same({name: merged[name] for name in weights}, weights)
    assert_same(load_checkpoint(write_release(model, weights, tmp_path / "release")), weights)
    write_component(model, original.match(model, weights), weights, tmp_path / "component")
    assert_same(load_checkpoint(tmp_path / "component"), weights)


# --- What goes wrong ----------------------------------------------------------------------------------------


def test_existing_folders_are_refused(sources: Sources, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in (out, tmp_path / "file"):
        for write in (
            lambda path: save_diffusers(sources, path),
            lambda path: export_denoiser(tiny_model, path, tensor_parallel=2),
            lambda path: export_release(tiny_model, path),
        ):
            with pytest.raises(ValueError, match=f"{path} exists and is not empty: use another folder"):
                write(path)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]
    (out / "mine.txt").unlink()
    export_release(tiny_model, out)  # an empty one is taken
    assert (out / "model_ema.pt").exists()


def test_a_parent_that_is_a_file(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=rf"cannot write to {tmp_path}/file(/sub)?: "):
        save_diffusers(sources, tmp_path / "file/out")
    with pytest.raises(ValueError, match=rf"cannot write to {tmp_path}/file/sub: "):
        save_diffusers(sources, tmp_path / "file/sub/out")
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_is_left_of_a_failure(
    sources: Sources, tiny_release: Path, released: Weights, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_release / "clip", broken)
    for shard in broken.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:100])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError)):
        save_diffusers(replace(sources, text_encoder_2=broken), tmp_path / "new/deep/out")
    assert sorted(tmp_path.rglob("*")) == before

    torch.save(released, tmp_path / "model.pt")
    checkpoint = open_checkpoint(tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:400_000])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="is truncated"), new_folder(tmp_path / "new/out") as folder:
        write_release(empty_model(checkpoint), checkpoint, folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_folder(tmp_path / "a/b/out") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a/b/out").exists()
    assert (tmp_path / "a/b/out/x").read_text() == "1"

    # A neighbour's file keeps the parent that both share.
    def interrupted() -> None:
        with new_folder(tmp_path / "c/d/out"):
            (tmp_path / "c/theirs").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["theirs"]

    # What a killed attempt left is not in the way.
    (tmp_path / ".osp-0123456789abcdef.partial/late").mkdir(parents=True)
    with new_folder(tmp_path / "late") as folder:
        (folder / "y").write_text("3")
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["y"]

    # An empty folder under another name: a link, or the current one.
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with new_folder(tmp_path / "link") as folder:
        (folder / "z").write_text("4")
    assert (tmp_path / "empty/z").read_text() == "4"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(Path()) as folder:
        (folder / "z").write_text("5")
    assert (tmp_path / "here/z").read_text() == "5"


@pytest.mark.parametrize("form", ["safetensors", "release", "megatron"])
def test_full_disk(form: str, tiny_model: Path, tmp_path: Path) -> None:
    """A limit of the size of a file stands in for a disk without space."""
    checkpoint = open_checkpoint(tiny_model / "transformer")
    model = empty_model(checkpoint)
    assert isinstance(model, SparseUMMDiT)

    def write() -> None:
        with new_folder(tmp_path / "out") as folder:
            if form == "safetensors":
                write_component(model, original.match(model, checkpoint), checkpoint, folder)
            elif form == "release":
                write_release(model, checkpoint, folder)
            else:
                write_megatron(model, checkpoint, folder, tensor_parallel=2)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/out'"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_missing_parts_are_all_named(tiny_release: Path, tmp_path: Path) -> None:
    sources = replace(sources_of(tiny_release), vae=tmp_path / "no.ckpt", tokenizer_2=tmp_path / "no folder")
    for job in (
        lambda: save_diffusers(sources, tmp_path / "out"),
        lambda: load_pipeline(open_pipeline(sources), dtype=torch.float32, device=CPU),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            job()
        assert str(caught.value) == (
            f"these paths do not exist: vae: {tmp_path / 'no.ckpt'}; tokenizer_2: {tmp_path / 'no folder'}"
        )
    assert not list(tmp_path.iterdir())


def test_parts_that_do_not_fit_each_other(tiny_release: Path, tmp_path: Path) -> None:
    sources = sources_of(tiny_release)
    swapped = replace(sources, transformer=sources.vae, vae=sources.transformer)
    with pytest.raises(ValueError, match=r"wfvae\.ckpt: these are the weights of a VAE"):
        save_diffusers(swapped, tmp_path / "out")

    other = WFVAE(**{**VAE, "latent_channels": 6, "shift": None, "scale": None})
    torch.save(other.state_dict(), tmp_path / "other.ckpt")
    sources = replace(sources, vae=tmp_path / "other.ckpt", vae_config=None)
    for job in (
        lambda: save_diffusers(sources, tmp_path / "out"),
        lambda: load_pipeline(open_pipeline(sources), dtype=torch.float32, device=CPU),
    ):
        with pytest.raises(ValueError, match=r"needs 4 channels \(in_channels\), .* latents have 6"):
            job()
    assert [path.name for path in tmp_path.iterdir()] == ["other.ckpt"]


def test_weights_that_do_not_fit_the_host_are_not_read(
    tiny_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = sources_of(tiny_release)
    pipeline = load_pipeline(
        open_pipeline(sources), dtype=torch.bfloat16, vae_dtype=torch.float32, device=CPU
    )
    models = pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2
    needed = sum(parameter.nbytes for model in models for parameter in model.parameters())
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=1000))
    for short in (0, 1):
        available = SimpleNamespace(available=needed - 1000 - short)
        monkeypatch.setattr(psutil, "virtual_memory", lambda available=available: available)
        with pytest.raises(MemoryError, match=r"GB of host memory") if short else nullcontext():
            load_pipeline(open_pipeline(sources), dtype=torch.bfloat16, vae_dtype=torch.float32, device=CPU)


def test_weights_go_to_another_device_one_by_one(tiny_release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host needs no room for all of them."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    opened = open_pipeline(sources_of(tiny_release))
    denoiser, vae = opened.denoiser, opened.vae
    on_host: list[int] = []

    class Watched(StoredTensors):
        def __getitem__(self, name: str) -> Tensor:
            models = denoiser.model, vae.model
            on_host.append(sum(not p.is_meta for model in models for p in model.parameters()))
            return super().__getitem__(name)

    watched = (replace(part, tensors=Watched(part.tensors.stored)) for part in (denoiser, vae))  # type: ignore[attr-defined]
    load_pipeline(OpenedPipeline(opened.sources, *watched), dtype=torch.bfloat16, device=torch.device("meta"))
    assert len(on_host) == len(denoiser.names) + len(vae.names)
    assert set(on_host) == {0}


def test_config_of_another_width(tiny_release: Path, tmp_path: Path) -> None:
    sources = sources_of(tiny_release)
    assert sources.transformer_config is not None
    wrong = replace(sources, transformer_config=sources.transformer_config | {"num_attention_heads": 2})
    with pytest.raises(ValueError, match=r"\d\d\d tensors do not fit SparseUMMDiT \(.*model_ema\.pt\)"):
        save_diffusers(wrong, tmp_path / "out")
    typo = replace(sources, transformer_config=sources.transformer_config | {"num_layer": [2, 4, 2]})
    with pytest.raises(ValueError, match=r"model_ema\.pt: unknown key .*'num_layer' .*'num_layers'"):
        save_diffusers(typo, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ema_is_chosen(sources: Sources, released: Weights, tmp_path: Path) -> None:
    plain = {name: value + 1 for name, value in released.items()}
    torch.save({"ema_state_dict": released, "state_dict": plain}, tmp_path / "both.pt")
    both = replace(sources, transformer=tmp_path / "both.pt", sparse_n=(1, 2, 1))
    save_diffusers(replace(both, ema=False), tmp_path / "plain")
    assert_same(load_checkpoint(tmp_path / "plain/transformer"), plain)
    with pytest.raises(ValueError, match=r"transformer has one set of weights and no separate EMA"):
        save_diffusers(replace(sources, ema=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_processes_that_convert_into_one_folder(
    start: Callable[..., Running], tiny_model: Path, tmp_path: Path
) -> None:
    """One writes it, the other says why not, and nothing else is there."""
    both = [start("convert", "--model", tiny_model, "--to", "release", "--out", "out") for _ in range(2)]
    assert sorted(process.wait() for process in both)[0] == 0
    refused = next(process.said() for process in both if process.code)
    assert "another process (" in refused or "exists and is not empty" in refused
    assert "Traceback" not in refused
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["model_ema.pt", "wfvae_888_dim32.ckpt"]
