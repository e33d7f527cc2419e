"""The guide's inference JSON: each key is used or named, and each mistake is told with what is right."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from opensoraplan.documents import read_json, read_json_object
from opensoraplan.formats.mindspeed.inference import Inference, read_inference
from opensoraplan.formats.mindspeed.meaning import find_rows
from opensoraplan.formats.mindspeed.table import DataFile, InferenceFile, ModelFile
from opensoraplan.settings import Settings

GUIDE = Path(__file__).parent / "golden" / "inference_t2v_model1_5.json"  # exactly as printed there


@pytest.fixture
def content() -> dict[str, Any]:
    return read_json(GUIDE, comments=True)


def write(content: object, folder: Path) -> Path:
    path = folder / "inference.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def leaves(content: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{before}{key}.")
        else:
            yield before + key, value


def test_the_guides_file() -> None:
    inference = read_inference(GUIDE)
    assert inference.sources["transformer"] == Path("/path/to/pretrained/model")
    assert inference.sources["vae"].name == "merged.ckpt"
    assert inference.sources["text_encoder"] == inference.sources["tokenizer"]
    assert inference.sources["text_encoder_2"] == inference.sources["tokenizer_2"]
    assert inference.transformer_config == {
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "in_channels": 32,
        "out_channels": 32,
        "num_layers": [2, 4, 6, 8, 6, 4, 2],
        "sparse_n": [1, 2, 4, 8, 4, 2, 1],
        "double_ff": True,
        "caption_channels": 2048,
        "pooled_projection_dim": 1280,
        "timestep_embed_dim": 1024,
        "patch_size": 2,
        "norm_eps": 1e-6,
        "skip_connection": True,
        "skip_connection_zero_init": True,
    }
    vae = dict(inference.vae_config)
    shift, scale = vae.pop("shift"), vae.pop("scale")
    assert (len(shift), shift[0], shift[-1]) == (32, -0.2129, -0.9570)
    assert (len(scale), scale[0], scale[-1]) == (32, 0.7031, 0.9492)
    assert vae == {
        "latent_channels": 32,
        "base_channels": 160,
        "connect_res_layer_num": 1,
        "encoder_num_resblocks": 2,
        "decoder_num_resblocks": 2,
        "encoder_energy_flow_hidden_size": 128,
        "decoder_energy_flow_hidden_size": 128,
    }
    assert inference.streaming
    assert inference.max_text_tokens == 512
    assert inference.scheduler == {"shift": 7.0, "use_dynamic_shifting": False}
    assert inference.generate == {
        "prompt": "examples/opensoraplan1.5/sora.txt",
        "out": Path("opensoraplan_samples/test_samples"),
        "fps": 24,
        "videos_per_prompt": 1,
        "device": "npu",
        "dtype": "fp16",
        "vae_dtype": "fp16",
        "frames": 121,
        "height": 576,
        "width": 1024,
        "steps": 50,
        "guidance": 8.0,
        "guidance_rescale": 0.7,
        "linear_quadratic": False,
        "clean_prompts": True,
    }


def test_the_guides_configs_are_the_defaults_of_our_models() -> None:
    import inspect

    from opensoraplan.models.sparse_ummdit import SparseUMMDiT
    from opensoraplan.models.wfvae import WFVAE

    inference = read_inference(GUIDE)
    for model, config in ((SparseUMMDiT, inference.transformer_config), (WFVAE, inference.vae_config)):
        defaults = {name: p.default for name, p in inspect.signature(model).parameters.items()}
        for key, value in config.items():
            default = defaults[key]
            assert (list(default) if isinstance(default, tuple) else default) == value


def other_value(value: Any) -> Any:  # noqa: ANN401 (a JSON value and another of its type)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 2
    return f"{value}x" if isinstance(value, str) else [2 * inner for inner in value]


@pytest.mark.parametrize("key", [key for key, _ in leaves(read_json(GUIDE, comments=True))])
def test_every_key_counts(
    key: str, content: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With another value: another result, or an error, or a line in the log that the key has no meaning."""

    def read() -> Inference | str:
        try:
            return read_inference(write(content, tmp_path))
        except ValueError as error:
            return str(error)

    before = read()
    *sections, name = key.split(".")
    section = content
    for part in sections:
        section = section[part]
    section[name] = other_value(section[name])
    caplog.clear()
    with caplog.at_level(logging.INFO):
        after = read()
    told = [
        r.getMessage()
        for r in caplog.records
        if f" {key}," in r.getMessage() or f" {key} (" in r.getMessage()
    ]
    assert isinstance(before, Inference)
    assert (after == before) == bool(told)
    if isinstance(after, str):
        assert str(tmp_path) in after
        assert name in after


def test_keys_without_meaning_are_named_once_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        read_inference(GUIDE)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert all(line.startswith(f"{GUIDE.name}: without meaning here: ") for line in lines)
    assert any("norm_elementwise_affine (norms have weights" in line for line in lines)


def test_comments_and_strings(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(
        '# "before": 1\n{"a": "x # y", # "b": 2\n "c": "\\"# no comment", "d": ["#", "\\\\"], # end\n'
        '"e#": {"f": 1}}# {\n',
        encoding="utf-8-sig",
    )
    assert read_json(path, comments=True) == {
        "a": "x # y",
        "c": '"# no comment',
        "d": ["#", "\\"],
        "e#": {"f": 1},
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1,\n "b" 2}', r"is not valid JSON: .*line 2, column 6"),
        ("", "is not valid JSON"),
        ('{"a": 1 # }', "is not valid JSON"),
        ("[1]", "must hold one JSON object, got a list"),
        ('{"a": {"b": 1, "b": 2}}', "is not valid JSON: key 'b' is given twice"),
        (b'{"a": "\xff"}', "is not UTF-8: invalid start byte in line 1"),
    ],
)
def test_broken_json(text: str | bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"some\.json {problem}"):
        read_json_object(path, comments=True)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist"):
        read_inference(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("typo", "right"),
    [
        ("weight_dtyp", "weight_dtype"),
        ("pipeline_confg", "pipeline_config"),
        ("text_encoder.from_pretraned", "from_pretrained"),
        ("tokenizer_2.hub_backed", "hub_backend"),
        ("diffusion.guidance_scal", "guidance_scale"),
        ("pipeline_config.input_sizes", "input_size"),
        ("predictor.num_head", "num_heads"),
        ("predictor.sparse_1d", "sparse1d"),
        ("ae.base_chanels", "base_channels"),
        ("ae.l1_downsample_block", "l1_dowmsample_block"),
        ("ae.norm_typ", "norm_type"),
    ],
)
def test_typos_get_the_nearest_key(typo: str, right: str, content: dict[str, Any], tmp_path: Path) -> None:
    *sections, name = typo.split(".")
    section = content[sections[0]] if sections else content
    section[name] = section.pop(right)
    path = write(content, tmp_path)
    with pytest.raises(ValueError, match="unknown key") as caught:
        read_inference(path)
    text = str(caught.value)
    assert str(path) in text
    assert f"did you mean {right!r}" in text
    assert all(part in text for part in sections)


@pytest.mark.parametrize("key", ["weighting_scheme", "cfg", "sigma_scheme"])
def test_keys_of_training_are_no_keys_here(key: str, content: dict[str, Any], tmp_path: Path) -> None:
    content["diffusion"][key] = "logit_normal"
    with pytest.raises(ValueError, match=f"unknown key 'diffusion.{key}'"):
        read_inference(write(content, tmp_path))


def test_all_mistakes_are_told_at_once(content: dict[str, Any], tmp_path: Path) -> None:
    content["predictor"] |= {"num_heads": 0, "dropout": 0.1, "double_ff": "yes"}
    with pytest.raises(ValueError, match="predictor") as caught:
        read_inference(write(content, tmp_path))
    assert all(key in str(caught.value) for key in ("num_heads", "dropout", "double_ff"))
    content["fps"] = content["frame_interval"] = 0
    del content["prompt"]
    with pytest.raises(ValueError, match=r"frame_interval: .*fps: ") as caught:
        read_inference(write(content, tmp_path))
    assert "prompt: Field required" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("predictor.dropout=0.1", r"dropout = 0\.1 is not part of v1\.5\.0; only 0\.0"),
        ("predictor.patch_size_t=2", "patch_size_t = 2 is not part of"),
        ("predictor.model_id=Other", "model_id = 'Other' is not part of"),
        ("predictor.activation_fn=gelu", "activation_fn = 'gelu' is not part of .*'gelu-approximate'"),
        ("predictor.num_heads=24.5", r"num_heads must be a whole number above 0, got 24\.5"),
        ("predictor.num_heads=true", "num_heads must be a whole number above 0, got True"),
        ("predictor.num_heads=many", "num_heads must be a whole number above 0, got 'many'"),
        ("predictor.num_layers=8", "num_layers must be a list of whole numbers above 0, got 8"),
        ("predictor.sparse1d=no", "sparse1d must be true or false, got 'no'"),
        ("predictor.from_pretrained=3", "from_pretrained must be text, or null, got 3"),
        ("predictor.from_pretrained=null", "predictor needs from_pretrained"),
        ("ae.norm_type=groupnorm", "norm_type = 'groupnorm' is not part of v1.5.0; only 'layernorm'"),
        ("ae.vae_scale_factor=[4, 8, 8]", r"vae_scale_factor = \[4, 8, 8\] is not part of"),
        ("ae.scale=1", "scale must be a list of numbers, or null, got 1"),
        ('ae.from_pretrained=""', "ae needs from_pretrained"),
        ("ae.use_tiling=1", "use_tiling must be true or false, got 1"),
        ("pipeline_config.model_type=i2v", "pipeline_config.model_type: Input should be 't2v', got 'i2v'"),
        ("pipeline_config.version=v1.3", "pipeline_config.version: Input should be 'v1.5', got 'v1.3'"),
        ("pipeline_config.input_size=[121, 576]", r"pipeline_config.input_size"),
        ("pipeline_config.input_size=[-8, 576, 1024]", r"pipeline_config.input_size.*-8"),
        ("frame_interval=0", "frame_interval: .* greater than 0, got 0"),
        ("frame_interval=25", "24 // 25, which is 0: frame_interval must be at most 24"),
        ("num_samples_per_prompt=0", "num_samples_per_prompt: .* greater than 0, got 0"),
        ("allow_tf32=1.5", r"allow_tf32: .* got 1\.5"),
        ("fps=slow", "fps: .*, got 'slow'"),
        ("fps=0", "fps: .* greater than or equal to 0.001, got 0"),
        ("model_max_length=0", "model_max_length: .* greater than 0, got 0"),
        ("diffusion.num_inference_steps=0", "num_inference_steps: .* greater than 0, got 0"),
        ("diffusion.model_id=ddpm", "diffusion.model_id: Input should be 'OpenSoraPlan', got 'ddpm'"),
        ("text_encoder.hub_backend=om", "text_encoder.hub_backend: Input should be 'hf', got 'om'"),
        ("predictor=3", "predictor: Input should be a valid dictionary, got 3"),
        ("predictor.num_head=3", "unknown key .*'num_head' .*did you mean 'num_heads'"),
        ("predicter.num_heads=3", "there is no section 'predicter' .*did you mean 'predictor'"),
        ("zzz.num_heads=3", "there is no section 'zzz'; there are ae, text_encoder"),
        ("predictor.num_heads.x=3", "there is no section 'num_heads'; there are none"),
        ("predictor.num_heads", "is written section.key=value, got 'predictor.num_heads'"),
        ("predictor.=3", "is written section.key=value, got 'predictor.=3'"),
    ],
)
def test_bad_changes(change: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_inference(GUIDE, changes=[change])


def test_changes() -> None:
    changed = read_inference(
        GUIDE,
        changes=[
            "predictor.num_heads=4",
            "predictor.sparse1d=false",
            "predictor.norm_cls=rms_norm",
            "ae.from_pretrained=/data/a=b.ckpt",
            "ae.use_tiling=false",
            "ae.shift=null",
            "pipeline_config.input_size=[9, 64, 96]",
            "diffusion.shift=3",
            'prompt="12"',
            "fps=8",
            "fps=16",
        ],
    )
    plain = read_inference(GUIDE)
    assert changed.transformer_config == plain.transformer_config | {
        "num_attention_heads": 4,
        "sparse_n": None,
        "norm_cls": "rms_norm",
    }
    assert changed.vae_config == plain.vae_config | {"shift": None}
    assert changed.sources == plain.sources | {"vae": Path("/data/a=b.ckpt")}
    assert not changed.streaming
    assert changed.scheduler["shift"] == 3
    assert changed.generate == plain.generate | {
        "frames": 9,
        "height": 64,
        "width": 96,
        "prompt": "12",
        "fps": 16,
    }


@pytest.mark.parametrize(
    ("changes", "fps"), [(["fps=24", "frame_interval=5"], 4), (["fps=23.976"], 23.976), (["fps=30"], 30)]
)
def test_frame_interval_divides_the_rate(changes: list[str], fps: float) -> None:
    assert read_inference(GUIDE, changes=changes).generate["fps"] == fps


def test_keys_that_the_guide_does_not_print() -> None:
    plain = read_inference(GUIDE)
    assert (plain.allow_tf32, plain.generate["videos_per_prompt"]) == (None, 1)
    changed = read_inference(GUIDE, changes=["allow_tf32=true", "num_samples_per_prompt=3"])
    assert (changed.allow_tf32, changed.generate["videos_per_prompt"]) == (True, 3)


def test_what_may_be_left_out(content: dict[str, Any], tmp_path: Path) -> None:
    for key in ("micro_batch_size", "frame_interval", "model_max_length", "fps", "device", "weight_dtype"):
        del content[key]
    content["diffusion"] = {}
    for name in ("shift", "scale", "use_tiling", "dtype"):
        del content["ae"][name]
    inference = read_inference(write(content, tmp_path))
    assert inference.vae_config["shift"] is inference.vae_config["scale"] is None
    assert inference.streaming
    assert inference.scheduler["shift"] == 7
    assert inference.generate["vae_dtype"] is None
    assert (inference.generate["steps"], inference.generate["guidance"]) == (50, 8.0)


def test_the_tiny_release(tiny_release: Path) -> None:
    inference = read_inference(tiny_release / "inference.json")
    assert all(path.exists() for path in inference.sources.values())
    assert inference.vae_config["shift"] == [-0.2, 0.1, 0.6, -0.9]


@pytest.fixture
def own_file(content: dict[str, Any]) -> dict[str, Any]:
    """The guide's file as MindSpeed-MM 2.x writes its own."""
    del content["predictor"]["from_pretrained"], content["predictor"]["patch_size"]
    del content["predictor"]["patch_size_t"]
    content["predictor"] |= {"patch_size_thw": [1, 2, 2], "norm_cls": "fp32_layer_norm", "dtype": "fp16"}
    content["ae"] |= {"norm_type": "aelayernorm", "t_chunk_enc": 8, "t_chunk_dec": 4}
    content["dtype"] = content.pop("weight_dtype")
    t5, clip = ({**content.pop(name), "dtype": "fp16"} for name in ("text_encoder", "text_encoder_2"))
    content["text_encoder"] = [t5, {**clip, "output_key": "text_embeds"}]
    tokenizers = content.pop("tokenizer"), content.pop("tokenizer_2")
    content["tokenizer"] = [
        {**tokenizer, "model_max_length": length}
        for tokenizer, length in zip(tokenizers, (content.pop("model_max_length"), 77), strict=True)
    ]
    return content | {"use_prompt_preprocess": False, "pipeline_class": "OpenSoraPlanPipeline"}


def test_the_file_of_mindspeed_mm_itself(
    own_file: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same as the guide's, but that no file names the denoiser's weights."""
    guide = read_inference(GUIDE)
    with caplog.at_level(logging.INFO):
        own = read_inference(write(own_file, tmp_path), changes=["ae.t_chunk_dec=2"])
    assert own.sources == {name: path for name, path in guide.sources.items() if name != "transformer"}
    assert own.transformer_config == guide.transformer_config | {"norm_cls": "layer_norm"}
    assert own.vae_config == guide.vae_config
    assert own.generate == guide.generate | {"clean_prompts": False}
    assert (own.scheduler, own.max_text_tokens) == (guide.scheduler, 512)
    assert "inference.json is MindSpeed-MM's own inference file" in caplog.text
    idle = "text_encoder.T5.dtype, text_encoder.CLIPWithProjection.dtype, ae.t_chunk_enc, ae.t_chunk_dec ("
    assert f"without meaning here: {idle}" in caplog.text
    own_file["predictor"]["from_pretrained"] = "model_ema.pt"
    for key in ("text_encoder", "tokenizer"):
        own_file[key].reverse()
    named = read_inference(write(own_file, tmp_path))
    assert named.sources == guide.sources | {"transformer": Path("model_ema.pt")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pipeline_class": "FlashI2VPipeline"}, "pipeline_class is 'FlashI2VPipeline', not 'OpenSora"),
        ({"tokenizer": []}, "tokenizer must be a list of two objects, of T5 and of CLIP"),
        ({"text_encoder": [{"model_id": "T5", "from_pretrained": "a"}] * 2}, "a list of T5 and CLIPWithPro"),
        ({"text_encoder": [{"model_id": "T5"}, {}]}, "text_encoder: from_pretrained: Field required"),
        ({"weight_typ": "fp16"}, "unknown key 'weight_typ'"),
        ({"predictor.patch_size_thw": [1, 2, 4]}, r"patch_size_thw must be \[1, 2, 2\], got \[1, 2, 4\]"),
        ({"predictor.patch_size_thw": [2, 2, 2]}, "patch_size_t = 2 is not part of v1.5.0"),
        ({"ae.t_chunk_en": 8}, "unknown key in section ae .*t_chunk_en"),
    ],
)
def test_mistakes_in_the_file_of_mindspeed_mm_itself(
    change: dict[str, Any], message: str, own_file: dict[str, Any], tmp_path: Path
) -> None:
    for name, value in change.items():
        section, _, key = name.rpartition(".")
        (own_file[section] if section else own_file)[key] = value
    with pytest.raises(ValueError, match=message) as caught:
        read_inference(write(own_file, tmp_path))
    assert "inference.json" in str(caught.value)


@pytest.mark.parametrize("table", [InferenceFile, ModelFile, DataFile])
def test_a_key_without_a_meaning_has_one_value(table: type[Settings]) -> None:
    for key, meaning in find_rows(table):
        if meaning is None:
            *sections, name = key.split(".")
            kind: Any = table
            for section in sections:
                kind = kind.model_fields[section].annotation
            annotation = kind.model_fields[name].annotation
            assert Literal in {get_origin(part) for part in (annotation, *get_args(annotation))}, key
