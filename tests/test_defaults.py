"""What a model's folder says in JSON, and configs of its models: read whole, or refused by file and key."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from opensoraplan import builtin
from opensoraplan.defaults import FILE, INDEX, SCHEDULER, GenerateDefaults, ModelIndex, check_model_files
from opensoraplan.defaults import STEP_CACHE_FILE as STEP_CACHE
from opensoraplan.formats.export import check_shard_size
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.wfvae import WFVAE
from opensoraplan.pipeline import OpenSoraPlanPipeline
from opensoraplan.runtime.step_cache import Calibration

FILES = (INDEX, SCHEDULER, FILE, STEP_CACHE)


def copy_with(folder: Path, file: str, **changes: object) -> Path:
    """The JSON files of the built-in model, one of them with other values."""
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        content = json.loads((builtin.folder() / name).read_text())
        (folder / name).write_text(json.dumps({**content, **(changes if name == file else {})}))
    return folder


def test_the_model_of_the_package_is_read(tmp_path: Path) -> None:
    check_model_files(copy_with(tmp_path, INDEX))
    parameters = inspect.signature(OpenSoraPlanPipeline.__init__).parameters
    assert ModelIndex.of(tmp_path).prompt_config().keys() <= parameters.keys()


@pytest.mark.parametrize(
    ("file", "changes", "fault"),
    [
        (INDEX, {"vae": None}, "vae: "),
        (INDEX, {"scheduler": ["diffusers"]}, "scheduler: "),
        (INDEX, {"clean_prompts": "yes"}, "clean_prompts: .*got 'yes'"),
        (INDEX, {"prompt_template": ["{}"]}, "prompt_template: "),
        (INDEX, {"max_text_tokens": 10**9}, "max_text_tokens: .*65536"),
        (SCHEDULER, {"shift": None, "num_train_timesteps": "1000"}, "num_train_timesteps: .*got '1000'"),
        (SCHEDULER, {"shift": -1}, "shift: .*greater than 0, got -1"),
        (SCHEDULER, {"use_dynamic_shifting": [1]}, "use_dynamic_shifting: "),
        (SCHEDULER, {"use_karras_sigmas": {}}, "use_karras_sigmas: "),
        (FILE, {"steps": 10**30}, "steps: .*10000"),
        (FILE, {"fps": "fast"}, "fps: .*got 'fast'"),
        (FILE, {"seeds": 3}, "unknown key 'seeds'"),
        (STEP_CACHE, {"ratios": [1]}, "ratios: .*at least 2"),
        (STEP_CACHE, {"ratios": {"a": 1}}, "ratios: "),
        (STEP_CACHE, {"ratios": [0] * 50}, "ratios.0: .*; and [0-9]+ more"),
    ],
)
def test_damaged_files_are_named(file: str, changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    copy_with(tmp_path, file, **changes)
    with pytest.raises(ValueError, match=fault) as error:
        Calibration.of(tmp_path) if file == STEP_CACHE else check_model_files(tmp_path)
    assert str(error.value).startswith(str(tmp_path / file))


@pytest.mark.parametrize("text", ["", "[]", '{"steps": NaN}', "[" * 10_000])
@pytest.mark.parametrize("file", [INDEX, SCHEDULER, FILE])
def test_files_that_are_not_ours(file: str, text: str, tmp_path: Path) -> None:
    (copy_with(tmp_path, file) / file).write_text(text)
    with pytest.raises(ValueError, match=r"not valid JSON|must hold one JSON object"):
        check_model_files(tmp_path)


def test_a_model_without_defaults(tmp_path: Path) -> None:
    assert GenerateDefaults.of(tmp_path) == GenerateDefaults()


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"num_layers": [10**9]}, "num_layers.0: .*equal to 128, got 1000000000"),
        ({"num_layers": 5}, "num_layers: .*got 5"),
        ({"num_layers": "24"}, "num_layers: .*got '24'"),
        ({"num_layers": []}, "num_layers: "),
        ({"sparse_n": [1.5]}, "sparse_n.0: .*got 1.5"),
        ({"num_attention_heads": None}, "num_attention_heads: .*got None"),
        ({"patch_size": True}, "patch_size: "),
        ({"double_ff": 1}, "double_ff: .*got 1"),
        ({"norm_eps": 0}, "norm_eps: .*greater than 0"),
        ({"num_head": 1}, "unknown key in c: 'num_head'"),
    ],
)
def test_configs_that_make_no_denoiser(config: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as error:
        SparseUMMDiT.check_config(config, where="c")
    assert "c" in str(error.value).split(":")[0]


def test_configs_that_make_no_vae() -> None:
    for config in (
        {"scale": [0.0]},
        {"shift": ["a"]},
        {"base_channels": 10**9},
        {"connect_res_layer_num": 0},
    ):
        with pytest.raises(ValueError, match=f"^c: {next(iter(config))}"):
            WFVAE.check_config(config, where="c")
    WFVAE.check_config({"shift": None, "scale": (1.5,)}, where="c")


@pytest.mark.parametrize("size", ["infGB", "nanGB", "1", "0MB", "-1GB", "2000TB", "1e3GB", "five"])
def test_sizes_of_shards_that_cannot_be(size: str) -> None:
    with pytest.raises(ValueError, match=f"from 1MB to 1TB, .*got '{size}'"):
        check_shard_size(size)
    for fine in ("2GB", "500mb", "1.5 GB", "1TB"):
        check_shard_size(fine)
