"""Training a LoRA or DoRA in place of all weights: what is trained and kept, and its files."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import logging as diffusers_logging
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor

from opensoraplan.data.video import read_frames
from opensoraplan.formats.assemble import component_of
from opensoraplan.formats.lora import LORA_FORMATS, ORIGIN_KEY
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.learner.adapter import target_layers
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.export import ExportOptions, PromptDefaults, export_run
from opensoraplan.train.run.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")
MakeRun = Callable[..., TrainSettings]
LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "alpha": 2}
DORA: dict[str, Any] = {"kind": "dora", "rank": 2, "targets": [r"attn1\.to_q$", r"blocks\.3\.ff\."]}
ADAPTERS = {"LoRA": LORA, "DoRA": DORA}


def logged(run: TrainSettings, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@torch.no_grad()
def velocity(model: SparseUMMDiT) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    config = model.config
    shapes = {
        "hidden_states": (1, config["in_channels"], 3, 8, 8),
        "encoder_hidden_states": (1, 6, config["caption_channels"]),
        "pooled_projections": (1, config["pooled_projection_dim"]),
    }
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return model.eval()(**tensors, timestep=torch.tensor([500.0])).sample


def denoiser_of(path: Path) -> SparseUMMDiT:
    return SparseUMMDiT.from_pretrained(component_of(path, "transformer"))


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_a_first_step_has_the_loss_of_the_model_itself(tiny_run: MakeRun, adapter: dict[str, Any]) -> None:
    """Nothing is added yet; DoRA divides by norms and multiplies by them."""
    whole, adapted = tiny_run("whole", optimizer={"steps": 1}), tiny_run("b", adapter=adapter)
    train(whole)
    train(adapted)
    exact = {"rtol": 0, "atol": 0} if adapter is LORA else {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(logged(adapted)[0], logged(whole)[0], **exact)
    saved = checkpoint.load(adapted.output, 6).parts
    assert all(".lora_" in name for part in ("model", "ema") for name in saved[part])
    assert all(".lora_" in name for name in saved["optimizer"])
    zero = [name for name, tensor in saved["model"].items() if ".lora_B." in name and not tensor.any()]
    # Nothing reads what the last block's text stream asks for.
    assert [name for name in zero if "add_q_proj" not in name] == []


@pytest.mark.parametrize("adapter", [LORA | {"dropout": 0.3}, DORA], ids=["LoRA with dropout", "DoRA"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_undisturbed_one(
    tiny_run: MakeRun, adapter: dict[str, Any], compute: str
) -> None:
    model = {"compute": compute}
    whole = tiny_run("whole", adapter=adapter, model=model, optimizer={"steps": 4})
    broken = tiny_run("broken", adapter=adapter, model=model, optimizer={"steps": 2})
    train(whole)
    train(broken)
    longer = tiny_run("broken", adapter=adapter, model=model, optimizer={"steps": 4})
    train(longer, resume="latest")
    one, two = (checkpoint.load(run.output, 4).parts for run in (whole, longer))
    assert set(one) == set(two) == {"model", "ema", "optimizer"}
    for part, tensors in one.items():
        assert all(torch.equal(tensor, two[part][name]) for name, tensor in tensors.items()), part


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recompute_changes_nothing(tiny_run: MakeRun, dropout: float) -> None:
    adapter = LORA | {"dropout": dropout}
    plain = tiny_run("plain", adapter=adapter, optimizer={"steps": 2})
    recomputed = tiny_run("b", adapter=adapter, optimizer={"steps": 2}, memory={"recompute_blocks": 4})
    train(plain)
    train(recomputed)
    assert logged(plain) == logged(recomputed)
    assert logged(plain, "grad_norm") == pytest.approx(logged(recomputed, "grad_norm"), rel=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_every_format_and_the_merged_model_are_the_same(
    tiny_run: MakeRun, tiny_model: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    run = tiny_run(adapter=adapter, optimizer={"steps": 3, "lr": 0.02})
    train(run)
    export_run(run.output, tmp_path / "merged", ExportOptions(to="diffusers"))
    before, expected = velocity(denoiser_of(tiny_model)), velocity(denoiser_of(tmp_path / "merged"))
    assert (expected - before).abs().max() > 1e-3
    for kind in LORA_FORMATS:
        path = tmp_path / (kind if kind == "peft" else f"{kind}.safetensors")
        to = "lora" if kind == "diffusers" else f"lora-{kind}"
        export_run(run.output, path, ExportOptions(to=to))  # type: ignore[arg-type]
        model = denoiser_of(tiny_model)
        model.load_lora_adapter(path)
        torch.testing.assert_close(velocity(model), expected, atol=1e-5, rtol=1e-5)
    peft = PeftModel.from_pretrained(denoiser_of(tiny_model), str(tmp_path / "peft"))
    torch.testing.assert_close(velocity(peft.base_model.model), expected, atol=1e-5, rtol=1e-5)
    with safe_open(tmp_path / "kohya.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["ss_network_dim"] == str(adapter["rank"])
    assert json.loads(header[ORIGIN_KEY])["step"] == 3


def test_what_diffusers_itself_loads_is_all_of_it(
    tiny_run: MakeRun, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own loader warns of keys that have no place, and goes on without them."""
    run = tiny_run(adapter=LORA, optimizer={"steps": 3, "lr": 0.02})
    train(run)
    export_run(run.output, tmp_path / "a.safetensors")
    model, own = denoiser_of(tiny_model), denoiser_of(tiny_model)
    own.load_lora_adapter(tmp_path / "a.safetensors")
    diffusers_logging.enable_propagation()
    PeftAdapterMixin.load_lora_adapter(model, str(tmp_path / "a.safetensors"), use_safetensors=True)
    assert not caplog.messages
    assert torch.equal(velocity(model), velocity(own))


def test_sample_videos_are_made_with_the_adapter(tiny_run: MakeRun) -> None:
    video = {"every": 2, "prompts": ["a"], "frames": 9, "height": 32, "width": 32, "sampling_steps": 2}
    run = tiny_run(adapter=LORA, optimizer={"steps": 2, "lr": 0.05}, validation=video)
    train(run)
    whole = tiny_run("whole", optimizer={"steps": 2, "lr": 1e-9}, validation=video)
    train(whole)
    one, two = (read_frames(run.output / "samples" / "step-00000002-0.mp4") for run in (run, whole))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"kind": "lora", "targets": ["to_quack"]}, "no linear layer of the model matches 'to_quack'"),
        ({"kind": "lora", "rank": 128}, r"adapter\.rank is 128, but .* is 64 x 64: use at most 64"),
    ],
)
def test_adapters_that_do_not_fit_the_model(tiny_run: MakeRun, adapter: dict[str, Any], message: str) -> None:
    run = tiny_run(adapter=adapter)
    with pytest.raises(ValueError, match=message):
        train(run)
    assert not run.output.exists()


def test_an_adapter_without_peft_is_refused_before_anything_is_read(
    tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    run = tiny_run(adapter=LORA, vae={"pretrained": "nowhere"})
    with pytest.raises(ValueError, match=r"LoRAs need the package peft .*\[lora\]"):
        train(run)
    assert not run.output.exists()


def test_settings_that_no_adapter_has(tiny_run: MakeRun) -> None:
    with pytest.raises(ValueError, match='rank needs kind = "lora" or "dora"'):
        tiny_run(adapter={"rank": 4})
    with pytest.raises(ValueError, match=r"parallel\.tp 2 splits the layers of an adapter"):
        tiny_run(adapter=LORA, parallel={"tp": 2})
    with pytest.raises(ValueError, match=r"needs model\.pretrained"):
        tiny_run(adapter=LORA, model={"pretrained": None, "config": {}})
    with pytest.raises(ValueError, match="is no regular expression"):
        tiny_run(adapter={"kind": "lora", "targets": ["("]})


def test_a_run_goes_on_with_its_own_adapter_only(tiny_run: MakeRun, tmp_path: Path) -> None:
    train(tiny_run(adapter=LORA, optimizer={"steps": 2}))
    with pytest.raises(ValueError, match=r"adapter\.rank: 4 -> 8"):
        train(tiny_run(adapter=LORA | {"rank": 8}), resume="latest")
    whole = tiny_run("whole", optimizer={"steps": 1})
    train(whole)
    with pytest.raises(ValueError, match="has trained all weights, no LoRA"):
        export_run(whole.output, tmp_path / "a.safetensors", ExportOptions(to="lora"))
    with pytest.raises(ValueError, match=r"got --out .*/a: use .*/a\.safetensors"):
        export_run(tmp_path / "run", tmp_path / "a")


def test_up_matrices_may_learn_faster(tiny_run: MakeRun) -> None:
    """After one step of AdamW without weight decay, each has moved by about its rate."""
    run = tiny_run(
        adapter=LORA | {"up_lr_ratio": 16},
        optimizer={"steps": 1, "lr": 1e-4, "weight_decay": 0, "warmup_steps": 0},
    )
    train(run)
    saved = checkpoint.load(run.output, 1).parts["model"]
    moved = torch.cat([tensor.flatten() for name, tensor in saved.items() if ".lora_B." in name]).abs()
    assert moved[moved > 0].median().item() == pytest.approx(16e-4, rel=0.01)
    assert logged(run, "lr") == [1e-4]


def test_the_best_checkpoint_is_exported(
    tiny_run: MakeRun, tiny_clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run(
        adapter=LORA | {"alpha": 4000},  # far too much: all steps but the first are skipped
        optimizer={"steps": 4, "lr": 0.1, "ema_decay": None},
        checkpoint={"every": 1, "keep": 1},
        validation={"every": 1, "manifest": tiny_clips},
    )
    caplog.set_level("INFO", "opensoraplan")
    train(run)
    scores = logged(run, "validation_loss")
    best = scores.index(min(scores)) + 1
    assert best < 4
    assert checkpoint.steps(run.output) == [best, 4]
    assert f"lowest held-out loss is {checkpoint.path_of(run.output, best)}" in caplog.text
    export_run(run.output, tmp_path / "a.safetensors", ExportOptions(step="best", ema=False))
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()[ORIGIN_KEY])["step"] == best


def test_a_run_goes_on_with_its_own_base_only(tiny_run: MakeRun, tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    run = tiny_run(adapter=LORA, model={"pretrained": base}, optimizer={"steps": 2})
    train(run)
    model = denoiser_of(base)
    model.proj_out.bias.data += 1
    shutil.rmtree(base / "transformer")
    model.save_pretrained(base / "transformer")
    longer = tiny_run(adapter=LORA, model={"pretrained": base}, optimizer={"steps": 4})
    with pytest.raises(ValueError, match=r"model\.pretrained is not the model .*weights were replaced"):
        train(longer, resume="latest")
    assert checkpoint.steps(run.output) == [2]


def test_options_of_diffusers_folders_are_for_these(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run(adapter=LORA, optimizer={"steps": 1})
    train(run)
    out = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"max_shard_size 5MB go with a diffusers folder, .* is lora:"):
        export_run(run.output, out, ExportOptions(max_shard_size="5MB"))
    with pytest.raises(ValueError, match=r"prompt settings go with a diffusers folder, .* is megatron:"):
        export_run(run.output, out, ExportOptions(to="megatron", prompts=PromptDefaults("{}")))
    assert not out.exists()


def test_default_targets_of_the_release() -> None:
    """Both streams' attention and feed-forwards; the last block's text stream ends in attention."""
    with torch.device("meta"):
        model = SparseUMMDiT()
    layers = target_layers(model, ())
    assert sum(32 * (outputs + inputs) for outputs, inputs in layers.values()) == 112_066_560
    ends = {name.partition("transformer_blocks.")[2].partition(".")[2] for name in layers}
    assert not any(word in name for name in ends for word in ("norm", "skip", "proj_out", "caption"))
