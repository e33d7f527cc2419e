"""The guide's two training files: each key is used or named, contradictions are told with both places."""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from opensoraplan.documents import read_json
from opensoraplan.formats.mindspeed.meaning import Idle, To, find_rows
from opensoraplan.formats.mindspeed.table import DataFile, ModelFile
from opensoraplan.formats.mindspeed.training import read_guide
from opensoraplan.train.config import TrainSettings

GOLDEN = Path(__file__).parent / "golden"  # both exactly as printed in the guide
GUIDE = {"model": GOLDEN / "guide_model.json", "data": GOLDEN / "guide_data.json"}
CONTENT = {name: read_json(path, comments=True) for name, path in GUIDE.items()}
READING = "dataset_param.preprocess_parameters"
LOADER = "dataloader_param"
COLLATE = "dataloader_param.collate_param"
LEFT_OUT = object()


def leaves(content: object, before: str = "") -> Iterator[str]:
    items = content.items() if isinstance(content, dict) else enumerate(content)  # type: ignore[arg-type]
    for key, value in items:
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            yield from leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def read(folder: Path, **changes: Mapping[str, object]) -> tuple[dict[str, Any], list[str]]:
    """The guide's files with other values: model={"a.b": value}, data={...}."""
    return read_guide(*write(folder, **changes).values())


def write(folder: Path, **changes: Mapping[str, object]) -> dict[str, Path]:
    """The files that `read` reads."""
    paths = {}
    for name, content in CONTENT.items():
        content = copy.deepcopy(content)
        for key, value in changes.get(name, {}).items():
            section: Any = content
            *sections, last = key.split(".")
            for part in sections:
                section = section[int(part)] if isinstance(section, list) else section[part]
            if value is LEFT_OUT:
                del section[last]
            else:
                section[last] = value
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(json.dumps(content), encoding="utf-8")
    return paths


def test_as_printed() -> None:
    values, notes = read_guide(GUIDE["model"], GUIDE["data"])
    vae, model = values.pop("vae"), values.pop("model")
    assert (model["config"]["num_layers"], model["config"]["sparse_n"][3]) == ([2, 4, 6, 8, 6, 4, 2], 8)
    assert model["compute"] == "bf16"
    assert "pretrained" not in model
    assert (len(vae["config"]["shift"]), vae["compute"]) == (32, "fp32")
    assert vae["pretrained"].endswith("Middle888/merged.ckpt")
    text = values.pop("text")
    assert text.pop("t5").endswith("/t5-v1_1-xl")
    assert "CLIP-ViT-bigG" in text.pop("clip")
    assert text == {"max_tokens": 512, "clean": True, "compute": "bf16"}
    assert values == {
        "output": "runs/guide_model",
        "allow_tf32": False,
        "data": {
            "manifest": "./examples/opensoraplan1.5/data.txt",
            "selection": {
                "num_frames": 121,
                "frame_interval": 1,
                "max_height": 576,
                "max_width": 1024,
                "force_resolution": True,
                "force_5_ratio": False,
                "max_h_div_w_ratio": 1.0,
                "min_h_div_w_ratio": 0.42,
                "hw_stride": 16,
                "ae_stride_t": 8,
                "train_fps": 24,
                "speed_factor": 1.0,
                "drop_short_ratio": 1.0,
                "min_num_frames": 29,
            },
            "batch_size": 1,
            "caption_dropout": 0.1,
            "use_aesthetic": False,
            "reader": "decord",
            "workers": 4,
        },
        "flow": {"weighting": "logit_normal", "shift": "dynamic"},
        "optimizer": {"accumulate": 4},
        "parallel": {"encoder_dp": True},
    }
    assert all(re.fullmatch(r"guide_(model|data)\.json: without meaning here: .+ \(.+\)", n) for n in notes)
    assert len(notes) == len(set(notes)) == 9


def other(value: Any) -> Any:  # noqa: ANN401 (a JSON value and another of its type)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 8
    if value is None:
        return "somewhere"
    return f"{value}x" if isinstance(value, str) else [2 * inner for inner in value]


@pytest.fixture(scope="module")
def printed() -> tuple[dict[str, Any], list[str]]:
    return read_guide(GUIDE["model"], GUIDE["data"])


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, content in CONTENT.items() for key in leaves(content)]
)
def test_every_key_counts(
    name: str, key: str, printed: tuple[dict[str, Any], list[str]], tmp_path: Path
) -> None:
    """With another value: another result, or an error that names it, or a note that it has no meaning."""
    before, notes = printed
    old: Any = CONTENT[name]
    for part in key.split("."):
        old = old[int(part)] if isinstance(old, list) else old[part]
    try:
        after = read(tmp_path, **{name: {key: other(old)}})[0] | {"output": before["output"]}
        problem = ""
    except ValueError as error:
        after, problem = None, str(error)
    told = any(re.search(rf"[ .]{re.escape(key)}[, ]", note) for note in notes)
    assert told == (after == before)
    if problem:
        assert key.split(".")[-1] in problem
        assert str(tmp_path / f"{name}.json") in problem


# The two files, and what is told of them.
MODEL = r" in \S+/model\.json is "
DATA = r" in \S+/data\.json is "


@pytest.mark.parametrize(
    ("name", "key", "value", "problem"),
    [
        (
            "data",
            f"{LOADER}.batch_size",
            2,
            rf"{READING}\.batch_size{DATA}1, {LOADER}\.batch_size{DATA}2, {COLLATE}\.batch_size{DATA}1: make",
        ),
        (
            "data",
            f"{LOADER}.gradient_accumulation_size",
            1,
            rf"{READING}\.gradient_\w+{DATA}4, {LOADER}\.gradient_\w+{DATA}1: make them equal",
        ),
        (
            "model",
            "frames",
            57,
            rf"frames{MODEL}57, {READING}\.num_frames{DATA}121, {COLLATE}\.num_frames{DATA}121",
        ),
        ("data", f"{COLLATE}.ae_stride_t", 16, rf"ae_stride_t{DATA}8, {COLLATE}\.ae_stride_t{DATA}16"),
        ("data", f"{COLLATE}.patch_size", 1, rf"predictor\.patch_size{MODEL}2, .*patch_size{DATA}1"),
        ("data", f"{COLLATE}.patch_size_t", 2, rf"predictor\.patch_size_t{MODEL}1, .*patch_size_t{DATA}2"),
        (
            "model",
            "ae.latent_dim",
            16,
            rf"ae\.latent_dim{MODEL}16, predictor\.in_channels{MODEL}32, .*: the denoiser takes.*"
            rf"ae\.shift in \S+ has 32 values, but ae\.latent_dim{MODEL}16",
        ),
        ("model", "ae.scale", [1.0] * 31, rf"ae\.scale in \S+ has 31 values, but ae\.latent_dim{MODEL}32"),
        (
            "data",
            f"{READING}.max_height",
            288,
            r"train_pipeline\.video in \S+ resizes to \[576, 1024\], but \S+max_height x .* is 288 x 1024",
        ),
        (
            "model",
            "load_video_features",
            True,
            rf"load_video_features{MODEL}True, load_text_features{MODEL}False, \S+use_feature_data{DATA}False"
            ": osp cache writes both: set all three to true",
        ),
    ],
)
def test_contradictions(name: str, key: str, value: object, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        read(tmp_path, **{name: {key: value}})


def test_the_training_file_of_mindspeed_mm_itself(tmp_path: Path) -> None:
    encoders = [CONTENT["model"]["text_encoder"], CONTENT["model"]["text_encoder_2"]]
    with pytest.raises(ValueError, match=r"is a file of MindSpeed-MM itself .* model_opensoraplan1"):
        read(tmp_path, model={"text_encoder": encoders})


def test_what_is_left_out_in_one_place_counts_as_well(tmp_path: Path) -> None:
    left_out = {"load_text_features": LEFT_OUT}
    with pytest.raises(
        ValueError, match=r"load_video_features in .* is True, load_text_features in .* left out"
    ):
        read(
            tmp_path,
            model={"load_video_features": True, **left_out},
            data={"dataset_param.use_feature_data": True},
        )


def test_all_contradictions_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"frames in .* is 9, .*; predictor\.patch_size"):
        read(tmp_path, model={"frames": 9, "predictor.patch_size": 4})


@pytest.mark.parametrize(
    ("name", "key", "right"),
    [
        ("model", "wait_dtype", "weight_dtype"),
        ("model", "predictor.num_head", "num_heads"),
        ("model", "ae.norm_typ", "norm_type"),
        ("model", "diffusion.weighting_schema", "weighting_scheme"),
        ("model", "text_encoder.from_pretraned", "from_pretrained"),
        ("data", "dataset_params", "dataset_param"),
        ("data", "dataset_param.enable_text_preprocessing", "enable_text_preprocess"),
        ("data", "dataset_param.basic_parameters.data_paths", "data_path"),
        ("data", f"{READING}.batch_sise", "batch_size"),
        ("data", f"{READING}.min_hw", "min_hxw"),
        ("data", f"{READING}.train_pipeline.videos", "video"),
        ("data", f"{READING}.train_pipeline.video.0.trans_typ", "trans_type"),
        ("data", f"{READING}.train_pipeline.video.1.param.sise", "size"),
        ("data", f"{LOADER}.num_worker", "num_workers"),
        ("data", f"{COLLATE}.group_dat", "group_data"),
    ],
)
def test_typos_get_the_nearest_key(name: str, key: str, right: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown key") as caught:
        read(tmp_path, **{name: {key: 1}})
    assert f"did you mean {right!r}" in str(caught.value)
    assert str(tmp_path / f"{name}.json") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "value", "problem"),
    [
        ("model", "weight_dtype", "fp16", rf"weight_dtype{MODEL}'fp16': training is in fp32 or bf16 \(fp16"),
        ("model", "ae.dtype", "half", rf"ae\.dtype{MODEL}'half': training is in fp32 or bf16$"),
        ("model", "diffusion.weighting_scheme", "cosine", "weighting_scheme: .*'logit_normal'.*got 'cosine'"),
        ("model", "predictor.dropout", 0.1, r"dropout = 0\.1 is not part of v1\.5\.0"),
        ("data", "dataset_param.dataset_type", "i2v", "dataset_type: .*'t2v'.*'i2v'"),
        ("data", "dataset_param.use_img_from_vid", True, "use_img_from_vid: .*got True"),
        ("data", f"{READING}.video_reader_type", "torchvision", "video_reader_type: .*'decoder'"),
        ("data", f"{READING}.cfg", 2, "cfg: .*less than or equal to 1"),
        ("data", f"{READING}.train_fps", 0, "train_fps: .*got 0"),
        (
            "data",
            f"{READING}.train_pipeline.video",
            [{"trans_type": "ae_norm"}],
            r"trans_type ToTensorVideo, CenterCropResizeVideo, ae_norm \(with force_resolution\) or "
            "ToTensorVideo, MaxHWStrideResizeVideo, SpatialStrideCropVideo, ae_norm, got ae_norm",
        ),
        ("data", f"{READING}.train_pipeline.image.0.param", {"a": 1}, "ToTensorVideo takes no param, got"),
        ("data", f"{READING}.train_pipeline.image.1.param", LEFT_OUT, r"size \[height, width\], got None"),
        ("data", f"{READING}.train_pipeline.image.1.param.interpolation_mode", "area", "_mode: .*'bicubic'"),
    ],
)
def test_what_cannot_be(name: str, key: str, value: object, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        read(tmp_path, **{name: {key: value}})


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist"):
        read_guide(GUIDE["model"], tmp_path / "nowhere.json")


def test_precision_of_each_part(tmp_path: Path) -> None:
    values, _ = read(tmp_path, model={"weight_dtype": "fp32", "predictor.dtype": "bf16", "ae.dtype": "bf16"})
    assert [values[part]["compute"] for part in ("model", "vae", "text")] == ["bf16", "bf16", "fp32"]


def test_weights_to_go_on_from(tmp_path: Path) -> None:
    values, _ = read(tmp_path, model={"predictor.from_pretrained": "suv.pt", "predictor.sparse1d": False})
    assert values["model"]["pretrained"] == "suv.pt"
    assert values["model"]["config"]["sparse_n"] is None


def test_a_fixed_shift(tmp_path: Path) -> None:
    fixed = {"diffusion.use_dynamic_shifting": False, "diffusion.shift": 3.0}
    assert read(tmp_path, model=fixed)[0]["flow"]["shift"] == 3.0
    values, notes = read(tmp_path, model={"diffusion.shift": 3.0})
    assert values["flow"]["shift"] == "dynamic"
    assert any("diffusion.shift (use_dynamic_shifting" in note for note in notes)


def test_tokenizers_of_their_own_are_taken_and_told(tmp_path: Path) -> None:
    values, notes = read(tmp_path, data={"dataset_param.tokenizer_config_2.from_pretrained": "clip-tokens"})
    assert values["text"]["clip_tokenizer"] == "clip-tokens"
    assert "t5_tokenizer" not in values["text"]
    assert any("tokenizer_config_2 is not the folder of its encoder: clip-tokens" in note for note in notes)


def test_features_leave_the_clips_out(tmp_path: Path) -> None:
    flags = {"load_video_features": True, "load_text_features": True}
    values, notes = read(tmp_path, model=flags, data={"dataset_param.use_feature_data": True})
    assert "manifest" not in values["data"]
    assert any("basic_parameters.data_path, " in note and "data.features" in note for note in notes)


def test_features_are_made_of_the_clips(tmp_path: Path) -> None:
    """The same two files for `osp cache`, which say no more than that features are loaded in training."""
    flags = {"load_video_features": True, "load_text_features": True}
    features = {"dataset_param.use_feature_data": True, "dataset_param.basic_parameters.data_folder": "disk"}
    paths = write(tmp_path, model=flags, data=features)
    values, notes = read_guide(paths["model"], paths["data"], to_cache=True)
    assert (values["data"]["manifest"], values["data"]["root"]) == (
        "./examples/opensoraplan1.5/data.txt",
        "disk",
    )
    assert not any("data_path" in note for note in notes)
    trained = read_guide(paths["model"], paths["data"])[0]
    del values["data"]["manifest"], values["data"]["root"]
    assert values == trained


def test_sizes_of_their_own(tmp_path: Path) -> None:
    """Without force_resolution the bounds count, and what resizes to one size is named."""
    values, notes = read(tmp_path, data={f"{READING}.force_resolution": False})
    selection = values["data"]["selection"]
    assert (selection["max_hxw"], selection["min_hxw"]) == (589824, 589824)
    idle = " ".join(notes)
    assert f"{READING}.max_height, {READING}.max_width (" in idle
    assert f"{READING}.train_pipeline.video (" in idle
    stricter = read(tmp_path, data={f"{READING}.min_hxw": 600000})[0]["data"]["selection"]
    assert stricter["min_hxw"] == 600000


def free_size(**changes: object) -> list[dict[str, object]]:
    """The transforms of the data.json files in the branch's history, with other values by STEP.KEY."""
    bicubic: dict[str, object] = {"interpolation_mode": "bicubic"}
    scale = {"max_hxw": 589824, "force_5_ratio": False, "hw_stride": 16, **bicubic}
    cut: dict[str, object] = {"stride": 16, "force_5_ratio": False}
    for name, value in changes.items():
        step, key = name.split("_", 1)
        part = scale if step == "scale" else cut
        part[key] = value
        if value is LEFT_OUT:
            del part[key]
    return [
        {"trans_type": "ToTensorVideo"},
        {"trans_type": "MaxHWStrideResizeVideo", "param": scale},
        {"trans_type": "SpatialStrideCropVideo", "param": cut},
        {"trans_type": "ae_norm"},
    ]


FREE = {f"{READING}.force_resolution": False}
TRANSFORMS = f"{READING}.train_pipeline.video"


def test_fewest_pixels_that_are_left_out(tmp_path: Path) -> None:
    """The original then takes a quarter of the most."""
    values, _ = read(tmp_path, data={**FREE, f"{READING}.min_hxw": LEFT_OUT})
    assert values["data"]["selection"]["min_hxw"] == 589824 // 4
    neither = {f"{READING}.{key}": LEFT_OUT for key in ("min_hxw", "max_hxw")}
    assert "min_hxw" not in read(tmp_path, data=neither)[0]["data"]["selection"]


def test_transforms_of_free_sizes(tmp_path: Path) -> None:
    """MaxHWStrideResizeVideo with SpatialStrideCropVideo is what training does without force_resolution."""
    plain = read(tmp_path, data=FREE)
    values, notes = read(tmp_path, data={**FREE, TRANSFORMS: free_size()})
    assert values == plain[0]
    assert not any("train_pipeline.video" in note for note in notes)
    five = {f"{READING}.force_5_ratio": True}
    transforms = free_size(scale_force_5_ratio=LEFT_OUT, cut_force_5_ratio=True)
    values, notes = read(tmp_path, data={**FREE, **five, TRANSFORMS: transforms})
    assert values["data"]["selection"]["force_5_ratio"] is True
    silent = free_size(scale_interpolation_mode=LEFT_OUT)
    notes = read(tmp_path, data={**FREE, TRANSFORMS: silent})[1]
    assert any("train_pipeline.video names no interpolation_mode: bicubic" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {TRANSFORMS: free_size()},
            r"train_pipeline\.video in \S+ has MaxHW\S+, but \S+force_resolution is true: set it to false",
        ),
        (
            {**FREE, TRANSFORMS: free_size(scale_max_hxw=65536, cut_stride=32)},
            r"MaxHWStrideResizeVideo\.max_hxw is 65536, but \S+max_hxw is 589824; "
            r"SpatialStrideCropVideo\.stride is 32, but \S+hw_stride is 16: make them equal",
        ),
        (
            {**FREE, TRANSFORMS: free_size(cut_force_5_ratio=LEFT_OUT)},
            r"SpatialStrideCropVideo\.force_5_ratio is True, but \S+force_5_ratio is False",
        ),
        ({**FREE, TRANSFORMS: free_size(scale_hw_stride=32)}, "MaxHWStrideResizeVideo: hw_stride: .*16.*32"),
        ({**FREE, TRANSFORMS: free_size(scale_max_hxw=LEFT_OUT)}, "MaxHWStrideResizeVideo: max_hxw"),
        (
            {**FREE, TRANSFORMS: [*free_size()[:2], free_size()[3]]},
            "trans_type .*, got ToTensorVideo, MaxHWStrideResizeVideo, ae_norm",
        ),
    ],
)
def test_transforms_that_contradict(changes: dict[str, object], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        read(tmp_path, data=changes)


def test_what_may_be_left_out(tmp_path: Path) -> None:
    keys = ("num_frames", "batch_size", "gradient_accumulation_size")
    shorter = {f"{READING}.{key}": LEFT_OUT for key in keys} | {f"{COLLATE}.num_frames": LEFT_OUT}
    values, _ = read(tmp_path, model={"frames": 57}, data={**shorter, f"{READING}.train_pipeline": LEFT_OUT})
    assert values["data"]["selection"]["num_frames"] == 57
    assert (values["data"]["batch_size"], values["optimizer"]["accumulate"]) == (1, 4)


# Of the guide's three scripts: training, merging, inference.
FLAGS = """
--nproc_per_node --nnodes --node_rank --master_addr --master_port --tensor-model-parallel-size
--pipeline-model-parallel-size --context-parallel-size --micro-batch-size --global-batch-size
--num-layers --hidden-size --num-attention-heads --seq-length --max-position-embeddings
--attention-dropout --hidden-dropout --tokenizer-type --vocab-size --position-embedding-type
--rotary-base --swiglu --no-masked-softmax-fusion --bf16 --lr --min-lr --adam-beta1 --adam-beta2
--adam-eps --lr-decay-style --weight-decay --lr-warmup-init --lr-warmup-iters --clip-grad
--train-iters --no-gradient-accumulation-fusion --use-distributed-optimizer --recompute-granularity
--recompute-method --recompute-num-layers --normalization --use-fused-rmsnorm --qk-layernorm
--sequence-parallel --optimizer-selection --seed --data-parallel-random-init --use-ema --load
--fp32-residual-connection --attention-softmax-in-fp32 --accumulate-allreduce-grads-in-fp32
--no-load-optim --no-load-rng --no-save-optim --no-save-rng --mm-data --mm-model --mm-tool
--model_custom_precision --clip_grad_ema_decay --selective_recom --recom_ffn_layers --save
--log-interval --save-interval --eval-interval --eval-iters --wandb-project --wandb-exp-name
--wandb-save-dir --tensorboard-log-interval --distributed-backend --load_dir --save_dir --ema
--distributed-timeout-minutes
"""


def test_the_docs_tell_of_every_flag_of_the_guides_scripts() -> None:
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    table = page.partition("## The flags of the original's scripts")[2].partition("\n## ")[0]
    left = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    named = {flag for cell in left for flag in re.findall(r"--[\w-]+", cell)}
    assert [flag for flag in FLAGS.split() if flag not in named] == []


TABLES = {"model_opensoraplan1_5": ModelFile, "data": DataFile}


def rows_of_the_docs(file: str) -> list[tuple[set[str], str]]:
    """The names in the left column of a file's table of keys, and the right column."""
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    table = page.partition(f"| key of {file}.json | here |\n")[2].partition("\n\n")[0]
    cells = [line.split("|")[1:3] for line in table.splitlines()]
    return [(set(re.findall(r"`([\w.]+)`", left)), right) for left, right in cells]


@pytest.mark.parametrize("file", TABLES)
def test_the_docs_tell_what_every_key_is(file: str) -> None:
    rows = rows_of_the_docs(file)
    for key, meaning in find_rows(TABLES[file]):
        parts = key.split(".")
        names = {".".join(parts[start:]) for start in range(len(parts))} | set(parts)
        told = " ".join(right for left, right in rows if left & names)
        assert told, f"{key} is not in the docs"
        if isinstance(meaning, Idle):
            assert "no meaning" in told, key
        elif isinstance(meaning, To):
            section, _, name = meaning.subject.rpartition(".")
            chosen = f"the same names in `{section}`" in told and name == parts[-1]
            assert f"`{meaning.subject}`" in told or chosen, (key, meaning.subject)
        elif meaning is None:
            assert "one value each" in told, key


def test_the_docs_tell_of_no_other_keys() -> None:
    for file, table in TABLES.items():
        keys = {part for key, _ in find_rows(table) for part in key.split(".")}
        named = {part for left, _ in rows_of_the_docs(file) for name in left for part in name.split(".")}
        assert named - keys == set()


def test_keys_become_settings_that_there_are() -> None:
    known = {f"{section}{key}" for section, keys in TrainSettings.sections() for key in keys}
    for table in TABLES.values():
        assert {m.subject for _, m in find_rows(table) if isinstance(m, To)} <= known
