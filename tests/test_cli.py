"""The command `osp`: whole jobs on the tiny release, and what it says to mistakes."""

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from importlib.metadata import entry_points, version
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import av
import psutil
import pytest
import torch
from av.video.stream import VideoStream
from command import Command, mistake
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_release import DENOISER, VAE
from torch.nn.modules.module import register_module_forward_pre_hook

from opensoraplan import OpenSoraPlanPipeline
from opensoraplan.cli import generating
from opensoraplan.cli.verbs import VERBS
from opensoraplan.data.video import read_frames
from opensoraplan.fingerprint import fingerprint_parts
from opensoraplan.formats.checkpoints import load_checkpoint
from opensoraplan.generate import saved
from opensoraplan.generate.job import run
from opensoraplan.generate.planning import advice_for_full_host, report_peak
from opensoraplan.generate.session import Session
from opensoraplan.requests import Request
from opensoraplan.runtime.placement import Plan

pytestmark = pytest.mark.usefixtures("one_thread")

GUIDE = Path(__file__).parent / "golden/inference_t2v_model1_5.json"
SMALL = ["--frames", "9", "--height", "32", "--width", "32", "--steps", "1", "--device", "cpu"]


def changed_sizes() -> list[str]:
    """What turns the guide's config into one of the tiny release's size."""
    sections = {"predictor": DENOISER, "ae": VAE}
    return [
        f"{name}.{key}={json.dumps(value)}"
        for name, section in sections.items()
        for key, value in section.items()
    ]


def part_paths(release: Path) -> list[object]:
    return [
        "--transformer", release / "model_ema.pt", "--vae", release / "wfvae.ckpt",
        "--text-encoder", release / "t5", "--text-encoder-2", release / "clip",
    ]  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


# --- Whole jobs ---------------------------------------------------------------------------------------------


def test_osp_is_this_command() -> None:
    (command,) = entry_points(group="console_scripts", name="osp")
    assert command.value == "opensoraplan.cli:main"


def test_the_guides_file_as_printed(osp: Command, tiny_release: Path, tmp_path: Path) -> None:
    """Only paths, device and sizes are overridden. Stopped by Ctrl-C, and continued by the same command."""

    def write_prompts(steps: int) -> None:
        """The second takes for ever, or one step."""
        rows = [{"prompt": "a red ball"}, {"prompt": "two dogs", "steps": steps}]
        (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))

    write_prompts(10_000)
    command = [
        "generate", "prompts.jsonl", "--config", GUIDE, *part_paths(tiny_release), *SMALL, "--out", "out",
        "--save-every", 0, "--set", *changed_sizes(),
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "opensoraplan", *map(str, command)],
        cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True,
        # A job in the background, which the tests may be, passes on that it ignores Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "2 of 2" in said and "denoising" in line:
            break
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=60)[1]

    assert process.returncode == 130, said
    assert said.endswith("stopped after 1 of 2 videos: continue with the same command\nosp: stopped\n")
    # What the guide's file has that means nothing here is named, and fp16 is warned of once.
    assert "without meaning here" in said
    assert "micro_batch_size" in said
    assert said.count("computing in bf16") == 1
    assert "1 of 2: 'a red ball', seed 0" in said
    assert "denoising: 100%" in said
    assert "wrote out/0000_a-red-ball_seed0.mp4\n" in said
    for noise in ("Traceback", "Warning", "Loading weights", "LOAD REPORT", "deprecated"):
        assert noise not in said
    assert names(tmp_path / "out") == ["0000_a-red-ball_seed0.json", "0000_a-red-ball_seed0.mp4"]

    record = json.loads((tmp_path / "out/0000_a-red-ball_seed0.json").read_text())
    wanted = {"prompt": "a red ball", "steps": 1, "guidance": 8.0, "fps": 24.0, "dtype": "bfloat16"}
    assert {key: record[key] for key in wanted} == wanted
    assert record["model"]["transformer"] == str(tiny_release / "model_ema.pt")
    assert record["scheduler"]["shift"] == 7.0
    with av.open(str(tmp_path / "out/0000_a-red-ball_seed0.mp4")) as container:
        stream = cast(VideoStream, container.streams.video[0])
        assert (stream.width, stream.height, stream.average_rate) == (32, 32, Fraction(24))
        assert stream.codec_context.codec.canonical_name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert len(list(container.decode(stream))) == 9

    write_prompts(1)
    outcome = osp(*command)
    assert outcome.code == 0, outcome
    assert "1 of 2 is done: out/0000_a-red-ball_seed0.mp4" in outcome.log
    assert names(tmp_path / "out")[2:] == ["0001_two-dogs_seed1.json", "0001_two-dogs_seed1.mp4"]


def test_the_releases_own_config(osp: Command, tiny_release: Path, tmp_path: Path) -> None:
    """Its prompt file, paths and fp32 hold where nothing else is said."""
    config = tiny_release / "inference.json"
    outcome = osp("generate", "--config", config, *SMALL, "--out", "out", "--set", "diffusion.shift=3")
    assert outcome.code == 0, outcome
    first, second = sorted((tmp_path / "out").glob("*.json"))
    assert first.name == "0000_a-red-ball-rolls-over-green-grass_seed0.json"
    record = json.loads(second.read_text())
    assert (record["seed"], record["dtype"], record["scheduler"]["shift"]) == (1, "float32", 3)
    assert "2 of 2: 'a drone view" in outcome.log


def test_the_vae_decodes_in_its_own_precision(osp: Command, tiny_release: Path, tmp_path: Path) -> None:
    """That of the option, else `ae.dtype` of the config, else that of the denoiser."""
    config = ["--config", tiny_release / "inference.json", *SMALL, "--frames", "1"]
    ways = {
        "plain": ([], "float32"),
        "config": (["--set", "ae.dtype=bf16"], "bfloat16"),
        "option": (["--vae-dtype", "fp32", "--set", "ae.dtype=bf16"], "float32"),
        "fp16": (["--vae-dtype", "fp16"], "bfloat16"),
    }
    pixels = {}
    for name, (options, dtype) in ways.items():
        outcome = osp("generate", "a cat", *config, "--out", f"{name}.png", *options)
        assert outcome.code == 0, outcome
        assert ("decoding in bf16" in outcome.log) == (name == "fp16")
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert (record["dtype"], record["vae_dtype"]) == ("float32", dtype)
        with Image.open(tmp_path / f"{name}.png") as picture:
            pixels[name] = picture.tobytes()
    assert pixels["plain"] == pixels["option"] != pixels["config"] == pixels["fp16"]


def test_a_converted_model_makes_the_same_video(osp: Command, tiny_release: Path, tmp_path: Path) -> None:
    config = ["--config", tiny_release / "inference.json"]
    sampling = [*SMALL, "--dtype", "fp32", "--frames", "1", "--guidance", "3"]
    assert osp("convert", *config, "--out", "model").code == 0
    assert osp("generate", "a cat", *config, *sampling, "--out", "a.png").code == 0
    assert osp("generate", "a cat", "--model", "model", *sampling, "--out", "b.png").code == 0
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert a.tobytes() == b.tobytes()
    records = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    models = [record.pop("model") for record in records]
    files = [record.pop("fingerprint") for record in records]
    assert records[0] == records[1]
    assert models[1] == "model"
    assert files[0].keys() == files[1].keys()


def test_options_reach_the_pipeline(osp: Command, tiny_model: Path, tmp_path: Path) -> None:
    outcome = osp(
        "generate", "A  CAT", "--model", tiny_model, *SMALL, "--width", "272", "--out", "new/folder",
        "--frames", "1",
        "--videos-per-prompt", "2", "--seed", "7", "--dynamic-shift", "True", "--batched-guidance",
        "--guidance", "2.5", "--guidance-rescale", "0.1", "--guidance-interval", "0", "0.5",
        "--negative-prompt", "rain", "--prompt-template", "{}", "--default-negative-prompt", "",
        "--no-clean-prompts", "--tiling", "--dtype", "fp16",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    assert outcome.log.count("computing in bf16") == 1
    first, second = sorted((tmp_path / "new/folder").glob("*.json"))
    assert (first.stem, second.stem) == ("0000_a-cat_seed7", "0001_a-cat_seed8")
    record = json.loads(first.read_text())
    wanted = {
        "model": str(tiny_model),
        "prompt": "A  CAT",
        "negative_prompt": "rain",
        "guidance": 2.5,
        "guidance_rescale": 0.1,
        "guidance_interval": [0.0, 0.5],
        "batched_guidance": True,
        "dynamic_shift": True,
        "shift": None,
        "seed": 7,
        "dtype": "bfloat16",
        "vae_tiling": [256, 64],
        "prompt_settings": {"template": "{}", "negative_prompt": "", "clean": False, "keep_chinese": False},
    }
    assert {key: record[key] for key in wanted} == wanted


CHINESE = "一只猫在海滩上奔跑"


def test_what_cleaning_takes_of_prompts_is_said_once(osp: Command, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"a cat 1920x1080\na dog\n{CHINESE}, a bird\n")
    command = ["generate", "prompts.txt", "--model", tiny_model, *SMALL, "--negative-prompt", "雨, rain"]
    outcome = osp(*command, "--videos-per-prompt", 2, "--out", "out")
    assert outcome.code == 0, outcome
    removed = re.findall(
        "cleaning removes (.*?) from the (.*?): the model reads '(.*?)'; (--[a-z-]+)", outcome.log
    )
    assert [found[:2] for found in removed] == [
        ("1920x1080", "prompt 'a cat 1920x1080'"),
        (CHINESE, f"prompt '{CHINESE}, a bird'"),
        ("雨", "negative prompt '雨, rain'"),
    ]
    assert [found[3] for found in removed] == ["--no-clean-prompts", "--keep-chinese", "--keep-chinese"]
    record = json.loads(sorted((tmp_path / "out").glob("*.json"))[4].read_text())
    assert record["prompt"] == f"{CHINESE}, a bird"
    assert record["encoded_prompt"] == removed[1][2] == "high quality, , a bird"
    assert removed[2][2] == "rain"
    assert record["encoded_negative_prompt"].endswith("underexposed. , rain")


def test_a_prompt_of_which_nothing_is_left_makes_no_video(
    osp: Command, tiny_model: Path, tmp_path: Path
) -> None:
    command = ["generate", CHINESE, "--model", tiny_model, *SMALL]
    said = mistake(osp(*command, "--out", "a.mp4"))
    assert f"cleaning leaves nothing of the prompt '{CHINESE}'" in said
    assert "--keep-chinese" in said
    assert names(tmp_path) == []
    for options in (["--keep-chinese"], ["--no-clean-prompts"]):
        outcome = osp(*command, *options, "--out", f"a{options[0]}.mp4")
        assert outcome.code == 0, outcome
        assert "cleaning" not in outcome.log
        record = json.loads((tmp_path / f"a{options[0]}.json").read_text())
        assert record["encoded_prompt"] == f"high quality, {CHINESE}"


def test_cleaning_is_the_models_unless_it_is_given(osp: Command, tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(
        json.dumps(index | {"clean_prompts": False, "keep_chinese": True})
    )
    read = {(): "high quality, A CAT", ("--clean-prompts",): "high quality, a cat"}
    for options, encoded in read.items():
        outcome = osp("generate", "A CAT", "--model", model, *SMALL, *options, "--out", f"{len(options)}.mp4")
        assert outcome.code == 0, outcome
        record = json.loads((tmp_path / f"{len(options)}.json").read_text())
        assert record["encoded_prompt"] == encoded
        assert record["prompt_settings"]["keep_chinese"] is True
    (model / "model_index.json").write_text(json.dumps(index | {"clean_prompts": "yes"}))
    said = mistake(osp("generate", "a cat", "--model", model))
    assert "clean_prompts: Input should be a valid boolean, got 'yes'" in said


def test_a_swapped_scheduler_is_used(osp: Command, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    index = tmp_path / "model/model_index.json"
    index.write_text(
        index.read_text().replace("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
    )
    assert osp("generate", "a cat", "--model", "model", *SMALL, "--out", "a.mp4").code == 0
    assert (
        json.loads((tmp_path / "a.json").read_text())["scheduler"]["name"] == "FlowMatchHeunDiscreteScheduler"
    )


def test_a_prompt_file_of_one_continues_too(osp: Command, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,frames\na cat,1\n")
    for _ in range(2):
        assert osp("generate", "p.csv", "--model", tiny_model, *SMALL, "--out", "a.png").code == 0
    assert names(tmp_path) == ["a.json", "a.png", "p.csv"]
    command = ["generate", "p.csv", "--model", tiny_model, *SMALL, "--out", "a.png"]
    assert "--fps has no effect: pictures (--frames 1) have no frame rate" in mistake(
        osp(*command, "--fps", "12")
    )
    assert osp(*command, "--no-resume").code == 0
    assert names(tmp_path) == ["a.json", "a.png", "a_1.json", "a_1.png", "p.csv"]


def test_a_model_is_its_weights_not_its_path(osp: Command, tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\n")

    def generate(path: object) -> str:
        outcome = osp("generate", "prompts.txt", "--model", path, *SMALL, "--out", "out")
        assert outcome.code == 0, outcome
        return outcome.log

    assert "wrote out/a-cat_seed0.mp4" in generate("model")
    for path in (model, "./out/../model/", tiny_model):
        assert "1 of 1 is done" in generate(path)
    change_weights(model / "transformer")
    assert "a-cat_seed0.mp4 was made by another model (transformer): making a new video" in generate(model)
    assert "1 of 1 is done: out/a-cat_seed0_1.mp4" in generate(model)


def test_a_vae_that_was_replaced_is_told_before_decoding(
    osp: Command, tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    record = {
        "model": str(model), "steps": 1, "frames": 1, "height": 32, "width": 32, "prompt": "a cat", "fps": 24,
        "seed": 0,
        "fingerprint": fingerprint_parts({"vae": model / "vae"}),
    }  # fmt: skip
    latents = saved.SavedLatents(
        torch.zeros(1, VAE["latent_dim"], 1, 4, 4), 1, record, {"shift": None, "scale": None}
    )
    saved.write(tmp_path / "a.latents.safetensors", latents)
    assert "is not the VAE" not in osp("decode", "a.latents.safetensors").log
    change_weights(model / "vae")
    outcome = osp("decode", "a.latents.safetensors")
    assert outcome.code == 0, outcome
    assert "model/vae is not the VAE of the model that made the latents" in outcome.log


def change_weights(component: Path) -> None:
    """One tensor a little, in the same file of the same size."""
    (path,) = component.glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name] + 1e-3}, path, metadata={"format": "pt"})


def test_latents_of_a_failed_decode_become_the_video(osp: Command, tiny_model: Path, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    pipeline = OpenSoraPlanPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    pipeline.vae.decoder.register_forward_hook(full)
    request = Request(prompt="a cat", frames=9, height=32, width=32, steps=1)
    fingerprints = fingerprint_parts({"vae": tiny_model / "vae"})
    session = Session(pipeline, str(tiny_model), fingerprints=fingerprints)
    with pytest.raises(OSError, match="No space left"):
        run(session, [request], [tmp_path / "a.mp4"], resume=False)
    assert names(tmp_path) == ["a.latents.safetensors"]
    outcome = osp("decode", "a.latents.safetensors")  # in the precision of the run
    assert (outcome.code, "another VAE" in outcome.log) == (0, False)
    command = ["generate", "a cat", "--model", tiny_model, *SMALL, "--dtype", "fp32"]
    assert osp(*command, "--out", "b.mp4").code == 0
    assert torch.equal(read_frames(tmp_path / "a.mp4"), read_frames(tmp_path / "b.mp4"))
    outcome = osp("decode", "b.mp4")
    assert (outcome.code, "b.mp4 is not a latents file of osp generate" in outcome.err) == (2, True)


def test_there_and_back(osp: Command, tiny_model: Path, tmp_path: Path) -> None:
    assert osp("convert", "--model", tiny_model, "--to", "megatron", "--tp", "2", "--out", "shards").code == 0
    assert osp("convert", "--model", tiny_model, "--to", "release", "--out", "release").code == 0
    said = osp("inspect", "shards").out
    assert "megatron" in said
    assert any(line.split() == ["tensor", "parallel:", "2"] for line in said.splitlines())
    both = osp("inspect", tiny_model).out
    assert "SparseUMMDiT" in both
    assert "WFVAE" in both
    assert "WFVAE" in osp("inspect", next((tmp_path / "release").glob("wfvae*"))).out


def test_merging_shards_alone(osp: Command, tiny_release: Path, tiny_model: Path, tmp_path: Path) -> None:
    """As the original's convert_mm_to_ckpt.py: no VAE and no text encoders; EMA weights if asked for."""
    back = ["convert", "--model", tiny_model, "--to", "megatron", "--tp", "2", "--out", "shards"]
    assert osp(*back).code == 0
    for file in (tmp_path / "shards" / "release").glob("*/*.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, weights_only=True)
        content["ema_model"] = {name: value + 1 for name, value in content["model"].items()}
        torch.save(content, file)
    plain = torch.load(tiny_release / "model_ema.pt", weights_only=True)
    outcomes = {
        "a/model.pt": osp("convert", "--transformer", "shards", "--to", "release", "--out", "a/model.pt"),
        "b/model.pt": osp("convert", "--transformer", "shards", "--to", "release", "--out", "b"),
        "c.pt": osp("convert", "--transformer", "shards", "--ema", "--to", "release", "--out", "c.pt"),
        "b/model_ema.pt": osp("convert", "--to", "release", "--out", "b", "--transformer", "shards", "--ema"),
    }
    assert [outcome.code for outcome in outcomes.values()] == [0] * 4, outcomes
    for name, outcome in outcomes.items():
        merged = torch.load(tmp_path / name, weights_only=True)
        ema = name in ("c.pt", "b/model_ema.pt")
        assert merged.keys() == plain.keys()
        assert all(torch.equal(merged[key], plain[key] + ema) for key in plain)
        assert f"{name}: the {'EMA weights' if ema else 'weights, not their EMA'} of " in outcome.log
    torch.save({"ema_state_dict": plain}, tmp_path / "ema.pt")
    only = mistake(osp("convert", "--transformer", "ema.pt", "--to", "release", "--out", "d.pt"))
    assert only.endswith("has EMA weights only (ema_state_dict), but ema is False: --ema takes them")
    (tmp_path / "ema.pt").unlink()
    again = osp("convert", "--transformer", "shards", "--to", "release", "--out", "a/model.pt")
    assert "a/model.pt exists: use another name" in mistake(again)
    assert osp(
        *("convert", "--transformer", "shards", "--ema", "false", "--to", "megatron"),
        *("--tp", "1", "--out", "whole"),
    ).code == 0  # fmt: skip
    resharded = load_checkpoint(tmp_path / "whole")
    assert all(torch.equal(resharded[key], plain[key]) for key in plain)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c.pt", "shards", "whole"]


def test_reconstruct(osp: Command, tiny_model: Path, tmp_path: Path) -> None:
    assert osp("generate", "a cat", "--model", tiny_model, *SMALL, "--out", "a.mp4").code == 0
    outcome = osp("reconstruct", "a.mp4", "--vae", tiny_model, "--device", "cpu")
    assert outcome.code == 0, outcome
    assert "9 frames of 32 x 32, PSNR " in outcome.log
    assert (tmp_path / "a_reconstruction.mp4").is_file()
    assert "decode: 100%" in outcome.err


def test_a_calibrated_model_leaves_steps_out(osp: Command, tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    size = [*SMALL[:6], "--steps", 6, "--device", "cpu"]
    assert osp("calibrate", "--model", model, *size).code == 0
    assert len(json.loads((model / "step_cache.json").read_text())["ratios"]) == 6
    assert "exists already" in mistake(osp("calibrate", "--model", model, *size))
    for name, options in (("exact", []), ("faster", ["--step-cache", 10])):
        outcome = osp("generate", "a cat", "--model", model, *size, *options, "--out", f"{name}.mp4")
        assert outcome.code == 0, outcome
        assert json.loads((tmp_path / f"{name}.json").read_text())["step_cache"] == (10 if options else 0)
    assert not torch.equal(read_frames(tmp_path / "exact.mp4"), read_frames(tmp_path / "faster.mp4"))


def test_how_a_video_is_made_decides_how_it_looks_and_is_told(
    osp: Command, tiny_model: Path, tmp_path: Path
) -> None:
    ways = {"exact": {}, "adams": {"solver": "adams"}, "int8": {"weights": "int8"}, "fp8": {"weights": "fp8"}}
    usual = {"solver": "euler", "weights": "whole"}
    for name, way in ways.items():
        options = [word for key, value in way.items() for word in (f"--{key}", value)]
        size = [*SMALL[:6], "--steps", 3, "--device", "cpu"]
        outcome = osp("generate", "a cat", "--model", tiny_model, *size, *options, "--out", f"{name}.mp4")
        assert outcome.code == 0, outcome
        told = json.loads((tmp_path / f"{name}.json").read_text())
        assert {key: told[key] for key in usual} == usual | way
    videos = [read_frames(tmp_path / f"{name}.mp4") for name in ways]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(videos, 2))


def test_help_tells_the_defaults_of_a_config(
    osp: Command, tiny_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    outcome = osp("generate", "--config", tiny_release / "inference.json", "--help")
    assert outcome.code == 0
    assert "(default: 17)" in outcome.out


# --- Mistakes that need no model ----------------------------------------------------------------------------

# {model}, {release} and {guide} stand for the tiny model, the tiny release and the guide's file.
QUICK = {
    "frames": ("generate cat --model {model} --frames 10", "frames .*got 10: use 9 or 17"),
    "height": (
        "generate cat --model {model} --height 100",
        "height 100: the nearest valid size is 96 x 1024",
    ),
    "both sides": (
        "generate cat --model {model} --height 8 --width 1000",
        "height 8 and width 1000: .*16 x 992",
    ),
    "steps": ("generate cat --model {model} --steps 0", "steps: .*got 0"),
    "too many steps": ("generate cat --model {model} --steps 10001", "steps: .*equal to 10000, got 10001"),
    "too high": ("generate cat --model {model} --height 16000000", "height: .*equal to 16384, got 16000000"),
    "too many copies": (
        "generate cat --model {model} --videos-per-prompt 1000000000",
        "videos_per_prompt must be from 1 to 10,000, got 1,000,000,000",
    ),
    "no prompt": ("generate --model {model}", 'give a prompt or a file of prompts: osp generate "'),
    "empty prompt": ("generate '' --model {model}", "give a prompt"),
    "blank prompt": ("generate ' ' --model {model}", "give a prompt"),
    "prompt file": ("generate cats.txt --model {model}", "prompt file cats.txt does not exist .* full stop"),
    "not prompts": ("generate {release}/model_ema.pt --model {model}", "model_ema.pt is a file, but not of"),
    "absent model": ("generate cat --model nowhere", "nowhere does not exist"),
    "file as model": (
        "generate cat --model {release}/model_ema.pt",
        "it is a file; `osp convert` makes a model folder",
    ),
    "part as model": (
        "generate cat --model {model}/vae",
        "model/vae is not .*: it is a part of the model folder .*model",
    ),
    "other folder": ("generate cat --model {release}", "it has no model_index.json"),
    "two models": ("generate cat --model {model} --config {guide} --device cpu", "leave out --config$"),
    "two models, parts": (
        "generate cat --model {model} --vae {model}/vae --ema True",
        "leave out --vae, --ema$",
    ),
    "set without config": ("generate cat --model {model} --set a=b", "--set changes values of --config"),
    "absent config": ("generate cat --config nowhere.json", "the config nowhere.json does not exist"),
    "prompt after set": (
        "generate --config {guide} --set fps=8 cat",
        "got 'cat' .put the prompt before --set",
    ),
    "parts missing": (
        "generate cat --vae {release}/wfvae.ckpt",
        "not given: --transformer, --text-encoder, ",
    ),
    "guide's paths": (
        "generate cat --config {guide}",
        "do not exist: transformer /path/to/pretrained/model, vae ",
    ),
    "guide's prompts": ("generate --config {guide}", "prompt file .*sora.txt does not exist"),
    "attention": (
        "generate cat --model {model} --attention flas",
        "there is no attention 'flas' .did you mean 'flash'",
    ),
    "not calibrated": (
        "generate cat --model {model} --step-cache 0.06",
        "model has no step_cache.json: `osp calibrate --model ",
    ),
    "step cache of parts": (
        "generate cat --config {guide} --step-cache 0.06 --transformer {model} --vae {model} "
        "--text-encoder {model} --text-encoder-2 {model}",
        "--step-cache needs a model folder",
    ),
    "calibrate absent": ("calibrate --model nowhere", "nowhere does not exist"),
    "calibrate frames": ("calibrate --model {model} --frames 10 --out x.json", "got 10: use 9 or 17"),
    "calibrate steps": (
        "calibrate --model {model} --steps 1 --out x.json",
        "--steps must be at least 2, got 1",
    ),
    "one file, more videos": (
        "generate cat --model {model} --videos-per-prompt 2 --out a.mp4",
        "a.mp4 is one file, but there are 2 videos to make: give a folder, a",
    ),
    "png": (
        "generate cat --model {model} --out a.png",
        "121 frames are written as .mp4, .* use a.mp4, or 1 frame",
    ),
    "mp4": (
        "generate cat --model {model} --out a.mp4 --frames 1",
        "1 frame is written as .png, .* use a.png",
    ),
    "gif": ("generate cat --model {model} --out a.gif", "written as .mp4, .*got a.gif: use a.mp4"),
    "below a file": (
        "generate cat --model {model} --out {guide}/out",
        "cannot write to .*json/out: Not a directory",
    ),
    "a file": ("generate cat --model {model} --out {guide}", "cannot write to .*json: it is a file"),
    "convert what": ("convert --out x", "not given: --transformer, --vae, "),
    "convert a model": (
        "convert --model {model} --out x",
        "already a diffusers folder: use --to megatron or",
    ),
    "convert back what": ("convert --to megatron --out x", "--to megatron needs --model"),
    "merge and convert": (
        "convert --to release --transformer {release} --vae {model} --out x.pt",
        "--to release writes what is in --transformer: leave out --vae$",
    ),
    "merge by the guide": (
        "convert --to release --config {guide} --transformer {release} --out x.pt",
        "leave out --config$",
    ),
    "merge a VAE": ("convert --to release --transformer {release}/wfvae.ckpt --out x.pt", "weights of a VAE"),
    "merge what is not there": (
        "convert --to release --transformer {release}/model_ema.pt --ema --out y/x.pt",
        "model_ema.pt has no EMA weights",
    ),
    "convert back absent": ("convert --to megatron --model nowhere --out x", "nowhere does not exist"),
    "convert back a file": ("convert --to release --model {guide} --out x", "it is a file"),
    "dtype back": (
        "convert --to release --model {model} --dtype fp16 --out x",
        "--dtype goes with --to diffusers",
    ),
    "parts back": ("convert --to release --model {model} --vae {model} --out x", "leave out --vae$"),
    "shards of a folder": ("convert --config {guide} --tp 2 --out x", "--tp 2 goes with --to megatron"),
    "shards of a release": (
        "convert --to release --model {model} --tp 2 --out x",
        "--tp 2 goes with --to megatron",
    ),
    "absent video": ("reconstruct a.mp4 --vae {model}", "a.mp4 does not exist"),
    "device as a video": ("reconstruct /dev/zero --vae {model}", "^/dev/zero is not a regular file"),
    "absent vae": ("reconstruct {guide} --vae nowhere", "nowhere does not exist"),
    "inspect": ("inspect nowhere", "nowhere does not exist"),
}


def words(line: str, model: Path, release: Path) -> list[str]:
    """The arguments in a line in which '' and ' ' are words, too."""
    quoted = line.replace("''", "{empty}").replace("' '", "{blank}").split()
    names = {"model": model, "release": release, "guide": GUIDE, "empty": "", "blank": " "}
    return [word.format(**names) for word in quoted]


@pytest.mark.parametrize("name", QUICK)
def test_quick_mistakes(
    osp: Command, tiny_model: Path, tiny_release: Path, tmp_path: Path, name: str
) -> None:
    line, message = QUICK[name]
    said = mistake(osp(*words(line, tiny_model, tiny_release)))
    assert re.search(message, said), said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", r"Generate:\n  generate "),
        ("generat cat", r"there is no verb 'generat' \(did you mean 'generate'\?\)"),
        ("data", "osp data needs one of check, sheet"),
        ("generate cat --heigth 32", r"osp generate has no option --heigth \(did you mean '--height'\?\)$"),
        ("generate cat --tp 2 --expert 3", r"osp generate has no option --expert$"),
        (
            "train run.toml --lr 1e-4",
            r"no option --lr: it is a setting of the run, --set optimizer\.lr=1e-4",
        ),
        ("train run.toml --optimizer.lr=1", r"it is a setting of the run, --set optimizer\.lr=1$"),
        ("plan --fram 3", r"osp plan has no option --fram \(did you mean '--frames'\?\)$"),
        ("generate cat --frames nine", "invalid literal for int.*'nine'"),
        ("generate cat --dtype fp8", "fp8"),
        ("generate a red ball", r'put quotes around a prompt: osp generate "a red ball"$'),
        ("generate a red ball --steps 9 --out x", r'put quotes around a prompt: osp generate "a red ball"$'),
        (
            "launch --processes 2 train RUN.toml --resume latest",
            r"after --: osp launch --processes 8 -- ",
        ),
        ("generate cat --config", "--config: expected one argument"),
    ],
)
def test_options_that_are_none(osp: Command, line: str, message: str) -> None:
    outcome = osp(*line.split())
    assert outcome.code == 2
    assert re.search(message, outcome.err), outcome.err
    assert "Traceback" not in outcome.err


def test_help_fits_the_terminal(osp: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    for verb in VERBS:
        outcome = osp(*verb.split(), "--help")
        assert outcome.code == 0
        assert max(map(len, outcome.out.splitlines())) <= 90
        for odd in ("[STR [STR ...]]", "(default: )", "None"):
            assert odd not in outcome.out, verb


def test_other_ways_to_ask_for_help(osp: Command) -> None:
    assert osp("help", "generate").out == osp("generate", "--help").out != ""
    assert osp("help").out == osp("-h").out == osp("--help").out
    assert "  data sheet   Make" in osp("data", "--help").out
    assert osp("--version").out == f"opensoraplan {version('opensoraplan')}\n"
    module = [sys.executable, "-m", "opensoraplan", "--version"]
    assert subprocess.run(module, capture_output=True, text=True, check=True).stdout.startswith(
        "opensoraplan "
    )


# --- Mistakes in the model's files --------------------------------------------------------------------------

SET = {
    "unknown key": ("predictor.numheads=4", "unknown key .*'numheads' .did you mean 'num_heads'"),
    "unknown section key": ("diffusion.shfit=3", "unknown key 'diffusion.shfit' .did you mean 'shift'"),
    "unknown top key": ("enable_text_preprocessing=true", "unknown key 'enable_text_preprocessing'"),
    "not v1.5": ("ae.norm_type=groupnorm", "norm_type = 'groupnorm' is not part of v1.5.0; only 'layernorm'"),
    "channels": (
        "predictor.in_channels=6",
        "needs 6 channels .in_channels., but the VAE's latents have 4",
    ),
    "width": (
        "predictor.num_heads=3",
        r"patch_embed.proj.weight is \[64, 4, 2, 2\], the config needs \[48, 4",
    ),
    "vae scale": ("ae.scale=[1,2,3]", "scale has 3 values for 4 latent channels"),
    "text width": (
        "predictor.caption_channels=32",
        r"caption_projection.weight is \[64, 24\], the config needs \[64, 32\]",
    ),
    "device": ("device=cuda:99", "cuda"),
    "device name": ("device=tpu", "device 'tpu' is not one of cpu, cuda, npu .*: use .*cpu"),
    "dtype": ("weight_dtype=float16", "weight_dtype 'float16' is not one of bf16, fp16, fp32"),
    "dtype of the VAE": ("ae.dtype=half", "ae.dtype 'half' is not one of bf16, fp16, fp32"),
}


@pytest.mark.parametrize("name", SET)
def test_configs_that_do_not_fit(osp: Command, tiny_release: Path, name: str) -> None:
    change, message = SET[name]
    # Twice --set: neither is lost.
    config = ["--config", tiny_release / "inference.json", "--set", change, "--set", "fps=8"]
    said = mistake(osp("generate", "cat", "--frames", "9", "--out", "out", *config))
    assert re.search(message, said), said


def test_devices(osp: Command, tiny_model: Path) -> None:
    for name in ("npu:99", "cuda:99", "nonsense"):
        said = mistake(osp("generate", "cat", "--model", tiny_model, "--device", name))
        assert name.partition(":")[0] in said
        assert ": use " in said or "the last is" in said


def test_swapped_parts(osp: Command, tiny_release: Path) -> None:
    parts = part_paths(tiny_release)
    swapped_texts = [*parts[:5], parts[7], parts[6], parts[5]]
    config = ["--config", tiny_release / "inference.json", "--out", "out"]
    said = mistake(osp("generate", "cat", *config, *swapped_texts))
    assert "text_encoder must be a T5 encoder" in said
    assert "were the two folders swapped?" in said
    swapped_models = ["--transformer", parts[3], "--vae", parts[1]]
    assert "were the two paths swapped?" in mistake(osp("generate", "cat", *config, *swapped_models))


def test_weights_that_are_cut_off(osp: Command, tiny_release: Path, tmp_path: Path) -> None:
    whole = (tiny_release / "model_ema.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    config = ["--config", tiny_release / "inference.json"]
    assert "cut.pt" in mistake(osp("generate", "cat", *config, "--transformer", "cut.pt", "--out", "out"))
    assert "cut.pt" in mistake(osp("convert", *config, "--transformer", "cut.pt", "--out", "model"))
    assert "cut.pt" in mistake(osp("inspect", "cut.pt"))
    assert not (tmp_path / "model").exists()


def drop_tensor(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path, metadata={"format": "pt"})


def cut_file(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no vae": (
        lambda model: shutil.rmtree(model / "vae"),
        "these parts of the model do not exist: vae model/vae",
    ),
    "no tokenizer": (
        lambda model: (model / "tokenizer/tokenizer.json").unlink(),
        "no tokenizer in model/tokenizer",
    ),
    "no scheduler": (lambda model: shutil.rmtree(model / "scheduler"), "scheduler_config.json"),
    "index": (
        lambda model: (model / "model_index.json").write_text("{"),
        "model_index.json is not valid JSON",
    ),
    "no class": (lambda model: (model / "model_index.json").write_text("{}"), "model_index.json is damaged"),
    "denoiser tensor": (lambda model: drop_tensor(model / "transformer"), "missing caption_projection.bias"),
    "vae tensor": (lambda model: drop_tensor(model / "vae"), "missing decoder.connect_l1.0.conv1.conv.bias"),
    "t5 tensor": (lambda model: drop_tensor(model / "text_encoder"), "encoder.* is missing"),
    "clip tensor": (lambda model: drop_tensor(model / "text_encoder_2"), "text_model.* is missing"),
    "denoiser cut": (lambda model: cut_file(model / "transformer"), "model/transformer/.*safetensors"),
    "vae cut": (lambda model: cut_file(model / "vae"), "model/vae/.*safetensors"),
    "t5 cut": (
        lambda model: cut_file(model / "text_encoder"),
        "cannot load the model in model/text_encoder,",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_models(osp: Command, tiny_model: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(Path(shutil.copytree(tiny_model, tmp_path / "model")))
    said = mistake(osp("generate", "cat", "--model", "model", *SMALL, "--out", "out"))
    assert re.search(message, said), said


def test_another_pipeline(osp: Command, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text('{"_class_name": "WanPipeline"}')
    said = mistake(osp("generate", "cat", "--model", "model"))
    assert said == "model is a WanPipeline, not an OpenSoraPlanPipeline"


def test_conversions_that_cannot_be(
    osp: Command, tiny_model: Path, tiny_release: Path, tmp_path: Path
) -> None:
    back = ["convert", "--model", tiny_model, "--to", "megatron", "--out"]
    assert re.search(r"4 heads \(1, 2, 4\), got 3", mistake(osp(*back, "shards", "--tp", "3")))
    assert not (tmp_path / "shards").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").touch()
    assert "mine exists and is not empty" in mistake(osp(*back, "mine"))
    there = ["convert", "--config", tiny_release / "inference.json", "--out", "mine"]
    assert "mine exists and is not empty" in mistake(osp(*there))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes"]


def test_templates(osp: Command, tiny_model: Path) -> None:
    said = mistake(osp("generate", "cat", "--model", tiny_model, *SMALL, "--prompt-template", "a film"))
    assert "must hold {} once" in said


def test_what_helps_a_host_without_room_for_the_weights() -> None:
    card, plan = torch.device("cuda"), Plan("resident", 1, denoising=25 * 10**9, decoding=30 * 10**9)
    advice = partial(advice_for_full_host, plan, card, whole=20 * 10**9)
    assert "--memory resident loads it there directly" in advice(free=33 * 10**9)
    assert advice(free=32 * 10**9).endswith(
        "more than 30 GB must be free there, and 32 GB are: ask for fewer or smaller frames"
    )
    assert advice(free=21 * 10**9).endswith("and 21 GB are")


def test_placements_are_for_cards(osp: Command, tiny_model: Path) -> None:
    said = mistake(osp("generate", "cat", "--model", tiny_model, "--device", "cpu", "--memory", "streamed"))
    assert "--memory streamed is for a card" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*SMALL, "--height", 16, "--width", 16], "the tokens of 9 x 16 x 16 are padded from 2 to 4"),
        (
            [*SMALL, "--guidance", 8, "--batched-guidance"],
            "--batched-guidance pads the shorter of the two prompts",
        ),
    ],
)
def test_attention_that_takes_no_masks(
    osp: Command, tiny_model: Path, options: list[object], message: str
) -> None:
    command = ["generate", "cat", "--model", tiny_model, "--attention", "_native_flash", "--out", "a.mp4"]
    outcome = osp(*command, *options)
    assert f"'_native_flash' cannot mask keys, and {message}: " in mistake(outcome)
    assert "loading" not in outcome.log


def test_a_host_short_of_memory_is_warned(
    osp: Command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", "cat", "--model", tiny_model, *SMALL, "--out"]
    said = r"(\w+) .* generating is predicted to take (\S+) GB of memory, \S+ GB are free(.*)"
    log = osp(*command, "a.mp4").log
    level, peak, rest = re.search(said, log).groups()  # type: ignore[union-attr]
    assert (level, rest) == ("INFO", "")
    # Without its weights it would fit.
    memory = SimpleNamespace(available=0.99e9 * float(peak), total=psutil.virtual_memory().total)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    outcome = osp(*command, "b.mp4")
    assert outcome.code == 0
    level, again, rest = re.search(said, outcome.log).groups()  # type: ignore[union-attr]
    assert (level, again, rest) == (
        "WARNING",
        peak,
        ": the system may kill the process; fewer or smaller frames need less",
    )


def test_full_memory_is_told(osp: Command, tiny_model: Path, tiny_clips: Path, tmp_path: Path) -> None:
    def full(_module: torch.nn.Module, _arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it")

    clip = next(tiny_clips.parent.rglob("*.mp4"))
    with register_module_forward_pre_hook(full):  # nothing was prepared for it
        said = mistake(osp("reconstruct", clip, "--vae", tiny_model, "--device", "cpu", "--out", "a.mp4"))
    assert said == "memory is full: CUDA out of memory."
    command = ["calibrate", "--model", tiny_model, *SMALL[:6], "--out"]
    with register_module_forward_pre_hook(full):
        said = mistake(osp(*command, tmp_path / "new" / "ratios.json"))
    assert said == "9 frames of 32 x 32 do not fit into memory: ask for fewer or smaller ones"
    (tmp_path / "file").touch()
    assert "cannot write to" in mistake(osp(*command, tmp_path / "file" / "ratios.json"))


def test_a_size_beyond_memory_leaves_no_folder(osp: Command, tiny_model: Path, tmp_path: Path) -> None:
    huge = ["--frames", "100001", "--height", "16384", "--width", "16384"]
    for out in ("samples", "samples/new/folder", "samples/cat.mp4"):
        said = mistake(osp("generate", "cat", "--model", tiny_model, *SMALL, *huge, "--out", out))
        assert re.fullmatch(r"generating is predicted to take .* ask for fewer or smaller frames", said), said
        assert list(tmp_path.iterdir()) == []


def test_more_memory_than_there_ever_is_is_refused() -> None:
    with pytest.raises(MemoryError, match=r"take 100,000\.0 GB of memory, cpu has .* GB, swap included: ask"):
        report_peak(10**14, torch.device("cpu"), free=10**15)


def test_help_of_generate_is_in_groups(osp: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = osp("generate", "--help").out
    titles = re.findall(r"^\W*([a-z ]+) options[^\w.]*$", text, re.MULTILINE)
    assert titles == [*generating.GROUPS, "model files", "several devices"]
    for names in generating.GROUPS.values():
        assert all(f"--{name.replace('_', '-')}" in text for name in names)
