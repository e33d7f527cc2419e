"""LoRAs in generating: loaded once, chosen by each request, the same video as with merged weights."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from opensoraplan.formats.lora import Lora, write_lora
from opensoraplan.generate.session import Session, SessionOptions
from opensoraplan.models.lora import linear_layers
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.requests import Request, split_strength

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"frames": 9, "height": 32, "width": 32, "steps": 2, "seed": 3}
LAYERS = ("transformer_blocks.1.attn1.to_q", "transformer_blocks.3.ff.net.2", "caption_projection")


def lora_of(model: Path, *, seed: int, rank: int = 2, dora: bool = False, base: str = "") -> Lora:
    shapes = linear_layers(SparseUMMDiT.from_pretrained(model / "transformer"))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in LAYERS:
        outputs, inputs = shapes[layer]
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) / 4
        tensors[f"{layer}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) / 4
        if dora:
            tensors[f"{layer}.lora_magnitude_vector"] = torch.rand(outputs, generator=generator) + 0.5
    config = {"r": rank, "lora_alpha": 3, "target_modules": list(LAYERS), "use_dora": dora}
    return Lora(tensors, config, {"base_fingerprint": base})


@pytest.fixture
def files(tiny_model: Path, tmp_path: Path) -> list[Path]:
    """Two LoRAs."""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(paths):
        write_lora(lora_of(tiny_model, seed=seed), path, kind="diffusers")
    return paths


def request(*loras: str) -> Request:
    return Request(prompt="a cat", lora=loras, **SMALL)


def options_of(model: Path, **changes: Any) -> SessionOptions:  # noqa: ANN401
    return SessionOptions(model, device="cpu", progress=False, **{"dtype": "fp32", **changes})


def latents_of(model: Path, wanted: Request, **changes: Any) -> Tensor:  # noqa: ANN401
    """By a session of its own."""
    with Session.open(options_of(model, **changes), wanted) as session:
        return session.run(wanted, output="latents").latents


@pytest.mark.parametrize("weights", ["whole", "int8"])
def test_each_request_has_its_own_loras(tiny_model: Path, files: list[Path], weights: str) -> None:
    a, b = map(str, files)
    wanted = [
        request(),
        request(a),
        request(f"{a}:0.5"),
        request(b, f"{a}:-1"),
        request(b),
        request(),
        request(a),
    ]
    alone = {one.lora: latents_of(tiny_model, one, weights=weights) for one in wanted}
    with Session.open(options_of(tiny_model, weights=weights), wanted) as session:
        for one in wanted:
            assert torch.equal(session.run(one, output="latents").latents, alone[one.lora]), one.lora
    assert len({tuple(latents.flatten().tolist()) for latents in alone.values()}) == len(alone) == 5


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_lora_is_what_merging_it_gives(tiny_model: Path, tmp_path: Path, dora: bool) -> None:
    lora = lora_of(tiny_model, seed=1, dora=dora)
    write_lora(lora, tmp_path / "a.safetensors", kind="comfy")
    before, wanted = latents_of(tiny_model, request()), request(str(tmp_path / "a.safetensors"))
    with Session.open(options_of(tiny_model), request()) as session:
        for layer in LAYERS:
            module = session.pipeline.transformer.get_submodule(layer)
            module.weight.data = lora.merge(layer, module.weight.data)
        merged = session.run(request(), output="latents").latents
    assert (merged - before).abs().max() > 1e-2
    torch.testing.assert_close(latents_of(tiny_model, wanted), merged, atol=1e-4, rtol=1e-4)


def test_the_record_knows_the_loras(tiny_model: Path, files: list[Path]) -> None:
    with Session.open(options_of(tiny_model), request(f"{files[0]}:0.5")) as session:
        assert "lora" not in session.record(request())
        (first,) = session.record(request(f"{files[0]}:0.5"))["lora"]
        assert (first["file"], first["strength"]) == ("a.safetensors", 0.5)
        files[1].rename(files[0])  # another one of the same name
        (second,) = session.record(request(str(files[0])))["lora"]
    assert first["fingerprint"] != second["fingerprint"]


def test_memory_does_not_grow_with_switches(tiny_model: Path, files: list[Path]) -> None:
    a, b = map(str, files)
    wanted = [request(a), request(f"{b}:0.5"), request(), request(a, b)]
    sizes = []
    with Session.open(options_of(tiny_model), wanted) as session:
        for number in range(20):
            session.run(wanted[number % 4], output="latents")
            gc.collect()
            sizes.append(psutil.Process().memory_info().rss)
    assert sizes[-1] - sizes[4] < 20e6


def test_a_lora_of_another_model_is_told(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.safetensors"
    write_lora(lora_of(tiny_model, seed=1, base="f" * 32), path, kind="kohya")
    with Session.open(options_of(tiny_model), request(str(path))):
        pass
    assert sum("was trained on another model" in message for message in caplog.messages) == 1


def test_loras_that_cannot_be_used(tiny_model: Path, tmp_path: Path, files: list[Path]) -> None:
    dora, foreign = tmp_path / "dora.safetensors", tmp_path / "foreign.safetensors"
    write_lora(lora_of(tiny_model, seed=1, dora=True), dora, kind="diffusers")
    with pytest.raises(ValueError, match="is a DoRA, which needs whole weights, not int8"):
        Session.open(options_of(tiny_model, weights="int8"), request(str(dora)))
    lora = lora_of(tiny_model, seed=1)
    renamed = {name.replace(".1.", ".99."): tensor for name, tensor in lora.tensors.items()}
    write_lora(Lora(renamed, lora.config, {}), foreign, kind="diffusers")
    with pytest.raises(ValueError, match=r"foreign\.safetensors: .*\n.*blocks\.99"):
        Session.open(options_of(tiny_model), request(str(foreign)))
    session = Session.open(options_of(tiny_model), request())
    with pytest.raises(ValueError, match=r"not opened for a request with the LoRA .*a\.safetensors"):
        session.run(request(str(files[0])))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("b/a.safetensors:0.8", ("b/a.safetensors", 0.8)),
        ("c:/a", ("c:/a", 1.0)),
        ("a:-2", ("a", -2.0)),
        ("a:x", None),
        ("a:nan", None),
        ("a:1e9", None),
        (":1", None),
    ],
)
def test_strengths_are_written_behind_a_colon(text: str, expected: tuple[str, float] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="the strength of a LoRA is a number from -100 to 100"):
            split_strength(text)
        return
    assert split_strength(text) == (Path(expected[0]), expected[1])


def test_the_command_takes_loras(
    osp: Callable[..., Any], tiny_model: Path, files: list[Path], tmp_path: Path
) -> None:
    common = (
        "--model",
        tiny_model,
        "--device",
        "cpu",
        *(f"--{name}={value}" for name, value in SMALL.items()),
    )
    rows = [{"prompt": "a cat"}, {"prompt": "a cat", "seed": 3, "lora": [f"{files[0]}:0.5", str(files[1])]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert osp("generate", "rows.jsonl", *common, "--out", "many").code == 0
    assert len(list((tmp_path / "many").glob("*.mp4"))) == 2
    assert (
        osp("generate", "a cat", *common, "--out", "a.mp4", "--lora", f"{files[0]}:0.5", files[1]).code == 0
    )
    outcome = osp("generate", "a cat", *common, "--out", "b.mp4", "--lora", "nowhere.safetensors")
    assert (outcome.code, "nowhere.safetensors does not exist" in outcome.err) == (2, True)
    outcome = osp("generate", "a cat", *common, "--out", "b.mp4", "--lora", files[0], f"{files[0]}:2")
    assert (outcome.code, "is named twice" in outcome.err) == (2, True)
