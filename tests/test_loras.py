"""LoRAs in generating: loaded once, chosen by each request, the same video as with merged weights."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import LORA_LAYERS, lora_of
from torch import Tensor

from opensoraplan.formats.assemble import Sources, open_pipeline
from opensoraplan.formats.lora import Lora, write_lora
from opensoraplan.generate.planning import tune
from opensoraplan.generate.saved import SUFFIX, SavedLatents, is_same_video, read, write
from opensoraplan.generate.session import Session, SessionOptions
from opensoraplan.models.lora import SETTINGS_FILE, WEIGHT_FILES
from opensoraplan.models.modulation import keep_on_host
from opensoraplan.requests import Request, split_strength
from opensoraplan.runtime.loras import load_loras
from opensoraplan.runtime.placement import weight_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"frames": 9, "height": 32, "width": 32, "steps": 2, "seed": 3}


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


@pytest.mark.parametrize(("weights", "dtype"), [("whole", "fp32"), ("int8", "fp32"), ("fp8", "bf16")])
def test_a_lora_that_has_learned_nothing_changes_no_bit(
    tiny_model: Path, tmp_path: Path, weights: str, dtype: str
) -> None:
    lora, path = lora_of(tiny_model, seed=1), tmp_path / "a.safetensors"
    tensors = {name: tensor * ("lora_B" not in name) for name, tensor in lora.tensors.items()}
    write_lora(Lora(tensors, lora.config, {}), path, kind="diffusers")
    wanted = [request(), request(str(path))]
    with Session.open(options_of(tiny_model, weights=weights, dtype=dtype), wanted) as session:
        without, made = (session.run(one, output="latents").latents for one in wanted)
    assert torch.equal(made, without)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_lora_is_what_merging_it_gives(tiny_model: Path, tmp_path: Path, dora: bool) -> None:
    lora = lora_of(tiny_model, seed=1, dora=dora)
    write_lora(lora, tmp_path / "a.safetensors", kind="comfy")
    before, wanted = latents_of(tiny_model, request()), request(str(tmp_path / "a.safetensors"))
    with Session.open(options_of(tiny_model), request()) as session:
        for layer in LORA_LAYERS:
            module = session.pipeline.transformer.get_submodule(layer)
            module.weight.data = lora.merge(layer, module.weight.data)
        merged = session.run(request(), output="latents").latents
    assert (merged - before).abs().max() > 1e-2
    torch.testing.assert_close(latents_of(tiny_model, wanted), merged, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weights", ["whole", "int8"])
def test_the_bytes_of_loras_are_planned_for(tiny_model: Path, files: list[Path], weights: str) -> None:
    empty = open_pipeline(Sources.of_folder(tiny_model)).without_weights(
        torch.float32, vae_dtype=torch.float32
    )
    before = weight_bytes(empty)
    load_loras(empty.transformer, files)
    assert weight_bytes(empty) - before == sum(
        tensor.nbytes for file in files for tensor in load_file(file).values()
    )
    options = options_of(tiny_model, weights=weights)
    tune(empty, options, torch.device("cpu"), masked=None)
    with Session.open(options, request(*map(str, files))) as session:
        assert weight_bytes(empty) == weight_bytes(session.pipeline)


def test_loras_of_adaln_work_on_the_host(tiny_model: Path, tmp_path: Path) -> None:
    layers = ("transformer_blocks.0.norm1.linear", "norm_out.linear")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(paths):
        write_lora(lora_of(tiny_model, seed=seed, layers=layers), path, kind="comfy")
    a, b = map(str, paths)
    wanted = [request(a), request(f"{b}:0.5"), request(), request(b, a)]
    with Session.open(options_of(tiny_model), wanted) as session:
        latents = [session.run(one, output="latents").latents for one in wanted]
        keep_on_host(session.pipeline.transformer)
        for one, before in zip(wanted, latents, strict=True):
            assert torch.equal(session.run(one, output="latents").latents, before), one.lora
    assert len({tuple(one.flatten().tolist()) for one in latents}) == 4


def test_the_record_knows_the_loras(tiny_model: Path, files: list[Path]) -> None:
    wanted = request(f"{files[0]}:0.5")
    with Session.open(options_of(tiny_model), wanted) as session:
        plain, first = session.record(request()), session.record(wanted)
        assert "lora" not in plain
        assert not is_same_video(plain, first)
    moved = files[0].rename(files[0].with_name("moved.safetensors"))
    wanted = [request(f"{moved}:0.5"), request(str(moved)), request(f"{files[1]}:0.5")]
    with Session.open(options_of(tiny_model), wanted) as session:
        same, stronger, other = map(session.record, wanted)
    assert is_same_video(first, same)
    assert not is_same_video(first, stronger)
    assert not is_same_video(first, other)


def test_settings_beside_a_file_belong_to_the_video(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    write_lora(lora_of(tiny_model, seed=1), folder, kind="peft")
    wanted, records = request(str(folder / WEIGHT_FILES[1])), []
    for alpha in (3, 30):
        settings = json.loads((folder / SETTINGS_FILE).read_text())
        (folder / SETTINGS_FILE).write_text(json.dumps({**settings, "lora_alpha": alpha}))
        with Session.open(options_of(tiny_model), wanted) as session:
            records.append(session.record(wanted))
    assert not is_same_video(*records)


def test_a_stopped_video_with_a_lora_goes_on(tiny_model: Path, files: list[Path], tmp_path: Path) -> None:
    wanted = request(f"{files[0]}:0.5")
    with Session.open(options_of(tiny_model), wanted) as session:
        whole = session.run(wanted)
        half = session.run(wanted, should_stop=lambda: True)
        assert half.step == 1
        path = tmp_path / f"a{SUFFIX}"
        write(path, SavedLatents(half.latents, half.step, half.record, {"shift": None, "scale": None}))
        start = read(path)
        assert is_same_video(start.record, session.record(wanted))
        assert torch.equal(session.denoise(wanted, start=start), whole.latents)


def test_memory_does_not_grow_with_switches(tiny_model: Path, files: list[Path]) -> None:
    a, b = map(str, files)
    wanted = [request(a), request(f"{b}:0.5"), request(), request(a, b)]
    sizes, tensors = [], []
    with Session.open(options_of(tiny_model), wanted) as session:
        for number in range(20):
            session.run(wanted[number % 4], output="latents")
            gc.collect()
            sizes.append(psutil.Process().memory_info().rss)
            tensors.append(sum(issubclass(type(one), Tensor) for one in gc.get_objects()))
    assert sizes[-1] - sizes[4] < 20e6
    assert tensors[7::4] == [tensors[7]] * 4


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
    with pytest.raises(FileNotFoundError, match=r"there is no LoRA nowhere\.safetensors"):
        Session.open(options_of(tiny_model), request("nowhere.safetensors"))
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
