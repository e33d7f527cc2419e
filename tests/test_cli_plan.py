"""`osp plan` and `osp launch` by the command itself."""

import json
import re
from pathlib import Path

import pytest
from command import Command

from opensoraplan import builtin

RUN = """
output = "run"
[model]
compute = "fp32"
[model.config]
num_attention_heads = 4
attention_head_dim = 16
num_layers = [2, 2, 2]
sparse_n = [1, 2, 1]
[data]
features = "features"
batch_size = 3
[data.selection]
num_frames = 9
min_num_frames = 9
max_height = 64
max_width = 64
[memory]
recompute_blocks = 6
"""


def test_plan_of_the_release(osp: Command) -> None:
    code, said, *_ = osp(
        "plan", "--dp-shard", 8, "--recompute-blocks", 32, "--tflops", 300, "--samples", 1000
    )
    assert code == 0
    assert "8,504,661,120 parameters; 121 x 576 x 1024, 512 text tokens" in said
    assert "8 devices: dp_replicate 1 x dp_shard 8 x sp 1 x tp 1" in said
    assert "1,472.3 TFLOP of a device a step" in said  # performance.md: 1472 a sample
    assert "4.91 s a step at 300 TFLOP/s" in said
    assert "10.2 minutes an epoch of 1,000 samples" in said
    assert "feature cache: 39.8 GB on disk" in said


ADAPTER = """output = "out"
model = { pretrained = "absent" }
adapter = { kind = "lora" }
data = { features = "features", selection = { num_frames = 121, max_height = 576, max_width = 1024 } }
"""


def peak_and_host(said: str) -> list[float]:
    """GB of the device at the busiest moment, and of the host."""
    found = (re.search(f"{name} +([0-9.]+)", said) for name in ("most at one moment", "of the host"))
    return [0.0 if match is None else float(match[1]) for match in found]


def test_plan_of_an_adapter(osp: Command, tmp_path: Path) -> None:
    """By less and less memory on the device: the release, whole and streamed, in 8 bits."""
    (tmp_path / "run.toml").write_text(ADAPTER)
    changes = (
        ("memory.recompute_blocks=32",),
        ("memory.recompute_blocks=32", "adapter.base=int8"),
        ("memory.placement=streamed",),
        ("memory.placement=streamed", "adapter.base=int8"),
    )
    found = []
    for change in changes:
        code, said, *_ = osp("plan", "run.toml", "--devices", 1, "--memory", 24, "--set", *change)
        assert code == 0
        assert "112,066,560 are trained, a LoRA of rank 32; the rest " in said
        assert "1,468.1 TFLOP with what is recomputed" in said
        found.append(peak_and_host(said))
        assert ("fits into 24" in said) == ("memory.placement=streamed" in change)
    assert found == sorted(found, reverse=True, key=lambda one: one[0])
    assert [round(host, 1) for _, host in found] == [0, 0, 17.0, 8.5]
    code, said, error, _ = osp("plan", "run.toml", "--set", "adapter.base=int8", "--sp", 2)
    assert (code, said) == (2, "")
    assert "quantised or streamed frozen weights need one device, got 2" in error
    for memory, chosen in ((80, "bf16, resident"), (24, "bf16, streamed")):
        code, said, *_ = osp("plan", "run.toml", "--memory", memory, "--set", "memory.placement=auto")
        assert (code, f"a LoRA of rank 32; the rest {chosen}" in said) == (0, True)
        rows = [line for line in said.splitlines() if line.startswith("  frozen weights ")]
        fitting = [row for row in rows if row.endswith(f"   fits into {memory}")]
        assert "streamed" in rows[-1]
        assert len(rows) > len(fitting) > 0
    for given, message in (
        (("--sp", 2), '--sp has no effect: memory.placement "auto" is for one device'),
        (("--recompute-blocks", 4), "--recompute-blocks has no effect: "),
    ):
        code, said, error, _ = osp("plan", "run.toml", "--set", "memory.placement=auto", *given)
        assert (code, said, message in error) == (2, "", True)
    _, said, *_ = osp(
        "plan", "run.toml", "--memory", 80, "--set", "memory.placement=auto", "--compute", "fp32"
    )
    assert "a LoRA of rank 32; the rest fp32, resident" in said
    code, said, *_ = osp("plan", "run.toml", "--memory", 24, "--recompute-blocks", 32)
    assert (code, "the cheapest mesh that fits" in said) == (0, True)


def test_plan_of_a_run_takes_its_settings(osp: Command, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    code, said, *_ = osp("plan", "run.toml", "--set", "optimizer.accumulate=2")
    assert code == 0
    assert "9 x 64 x 64, 512 text tokens" in said
    assert "batch 3 x accumulate 2: 6 samples a step" in said
    assert "stage 2, 2 blocks of rate 2" in said


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ("num_frames = 93\nmax_height = 64\nmax_width = 64", "89 x 64 x 64"),
        ("num_frames = 1\nmin_num_frames = 1\nforce_resolution = false\nmax_hxw = 70000", "1 x 256 x 256"),
    ],
)
def test_plan_of_a_run_is_of_its_largest_sample(
    osp: Command, tmp_path: Path, selection: str, said: str
) -> None:
    head = RUN.partition("[data.selection]")[0]
    (tmp_path / "run.toml").write_text(f"{head}[data.selection]\n{selection}\n")
    assert f"parameters; {said}, " in osp("plan", "run.toml")[1]


def test_plan_counts_a_last_frame_that_is_given(osp: Command, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN + "[conditions]\nfirst_last = 0.2\n")
    said = osp("plan", tmp_path / "run.toml").out
    assert "9 x 64 x 64, 512 text tokens, the last frame once more" in said
    assert "48 video tokens a sample" in said  # 2 latent frames and 1, of 4 x 4


def test_plan_before_there_are_weights(osp: Command, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    code, said, *_ = osp("plan", "run.toml", "--set", "model.pretrained=absent", "model.config=none")
    assert (code, said[:24]) == (0, "8,504,661,120 parameters")


def test_plan_suggests_a_mesh_that_fits(osp: Command) -> None:
    code, said, *_ = osp("plan", "--recompute-blocks", 32, "--memory", 80)
    assert code == 0
    assert "the cheapest mesh that fits" in said
    assert "fits into 80" in said


def test_plan_of_a_model_folder_and_of_generating(osp: Command, tmp_path: Path) -> None:
    config = {"_class_name": "SparseUMMDiT", "num_attention_heads": 4, "attention_head_dim": 16}
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    (tmp_path / "model" / "transformer" / "config.json").write_text(json.dumps(config))
    code, said, *_ = osp("plan", "model", "--generate", "--frames", 9, "--height", 64, "--width", 64)
    assert code == 0
    assert "activations of decoding" in said


def test_plan_counts_the_encoders_that_the_run_or_the_model_has(osp: Command) -> None:
    run = Path(__file__).parents[1] / "configs" / "finetune_builtin.toml"
    encoders = re.search(r"VAE and text encoders +(\S+)", osp("plan", run)[1])
    assert encoders is not None
    assert float(encoders[1]) < 0.1
    text = re.search(r"T5 and CLIP +(\S+)", osp("plan", builtin.folder(), "--generate")[1])
    assert text is not None
    assert float(text[1]) < 0.1
    assert "T5 and CLIP                              3.836" in osp("plan", "--generate")[1]


def test_the_release_fits_small_cards_by_streaming(osp: Command) -> None:
    code, said, *_ = osp("plan", "--generate", "--memory", 8)
    assert code == 0
    rows = [line.strip() for line in said.splitlines() if "at a time" in line and line.startswith("  ")]
    assert list(dict.fromkeys(row.split(",")[0] for row in rows)) == ["resident", "in-turn", "streamed"]
    assert all(row.endswith("does NOT fit into 8") for row in rows if not row.startswith("streamed"))
    assert rows[-1].endswith("   fits into 8")


def test_int8_weights_spare_a_card_of_16_gb_the_streaming(osp: Command) -> None:
    for weights, verdict in (("whole", "does NOT fit into 16"), ("int8", "   fits into 16")):
        code, said, *_ = osp("plan", "--generate", "--memory", 16, "--weights", weights)
        assert code == 0
        rows = [row for row in said.splitlines() if row.strip().startswith("in-turn")]
        assert rows[-1].endswith(verdict)


def test_generating_counts_the_vae_in_its_own_precision(osp: Command) -> None:
    rows: dict[str, list[str]] = {}
    for dtype in ("bf16", "fp32"):
        code, said, *_ = osp("plan", "--generate", "--vae-dtype", dtype)
        assert code == 0
        rows[dtype] = [line for line in said.splitlines() if line.startswith(("VAE ", "activations of"))]
    (whole, forward, decoding), (double, same, more) = (
        [float(row.split()[-1]) for row in rows[dtype]] for dtype in ("bf16", "fp32")
    )
    assert (double, more) == (pytest.approx(2 * whole, abs=2e-3), pytest.approx(2 * decoding, abs=2e-3))
    assert same == forward
    assert "in bf16, the VAE in fp32; GB" in said
    assert "in fp32; GB" in osp("plan", "--generate", "--compute", "fp32")[1]


def test_generating_is_of_one_video_whatever_the_run_has_in_a_batch(osp: Command) -> None:
    run = Path(__file__).parents[1] / "configs" / "finetune_builtin.toml"
    alone, one, two = (osp("plan", run, "--generate", *more) for more in ([], ["--batch", 1], ["--batch", 2]))
    assert alone == one != two


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "int8"], "--weights int8 is for --generate"),
        (["--vae-dtype", "fp32"], "--vae-dtype fp32 is for --generate"),
        (["--generate", "--weights", "fp8", "--compute", "fp32"], "fp8 goes with --compute bf16, got fp32"),
        (["--tp", 5], "sp 1 x tp 5 = 5 must divide the model's 24 attention heads"),
        (["--devices", 8, "--sp", 3], "8 processes cannot be arranged"),
        (["--memory", 0], "--memory must be above 0"),
        (["--frames", 0], "--frames must be above 0 and at most"),
        (["--devices", 0, "--dp-shard", 4], "--devices must be above 0 and at most"),
        (["--memory", 1], "the least is"),
        (["--frames", 120], "frames must be 8k + 1"),
        (["--recompute-blocks", 40], "between 0 and 32"),
        (["nothing.toml"], "nothing.toml"),
        (["nothing"], "nothing does not exist"),
        (["--set", "a=1"], "goes with a run's .toml"),
    ],
)
def test_plan_refuses(osp: Command, arguments: list[object], message: str) -> None:
    code, said, error, _ = osp("plan", *arguments)
    assert (code, said) == (2, "")
    assert message in error


def test_unknown_keys_of_a_model_are_named(osp: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_attention_head": 4}')
    code, _, error, _ = osp("plan", "config.json")
    assert code == 2
    assert "'num_attention_head' (did you mean 'num_attention_heads'?)" in error


def test_launch_prints_the_line(osp: Command) -> None:
    train = ["--", "train", "RUN.toml", "--resume", "latest"]
    code, said, *_ = osp("launch", "--processes", 8, "--max-restarts", 3, "--print", *train)
    assert code == 0
    words = said.split()
    # The first is time to save, the second or restarts hang.
    environment = ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    assert words[:3] == ["env", *environment]
    assert words[4:] == [
        *("-m", "torch.distributed.run", "--nproc-per-node=8", "--standalone", "--max-restarts=3"),
        *("-m", "opensoraplan", "train", "RUN.toml", "--resume", "latest"),
    ]
    several = ["--nodes", 2, "--node-rank", 1, "--master", "a:29500"]
    _, said, *_ = osp("launch", "--processes", 8, *several, "--print", *train)
    assert "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=a:29500 --rdzv-conf=is_host=false" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", 0], "--processes must be at least 1, got 0"),
        (["--processes", 2, "--max-restarts", -1], "--max-restarts must be at least 0"),
        (["--processes", 2, "--nodes", 2], "--node-rank must be 0 to 1, got none"),
        (["--processes", 2, "--nodes", 2, "--node-rank", 2], "got 2"),
        (
            ["--processes", 2, "--nodes", 2, "--node-rank", 0, "--master", "a"],
            "--master must be HOST:PORT of the first",
        ),
        (["--processes", 2, "--master", "a:1"], "go with --nodes 2 or more"),
    ],
)
def test_launch_refuses(osp: Command, arguments: list[object], message: str) -> None:
    code, _, error, _ = osp("launch", *arguments, "--print", "--", "train", "RUN.toml")
    assert code == 2
    assert message in error
