"""Files of a training run: TOML that extends TOML, changes, a run's config.json, and what a resume allows."""

import logging
import runpy
from collections.abc import Sequence
from pathlib import Path

import pytest

from opensoraplan.data.record import Record
from opensoraplan.data.selection import select
from opensoraplan.settings import Settings
from opensoraplan.train.config import TrainSettings, VAETrainSettings
from opensoraplan.train.run.files import (
    RESUMABLE_CHANGES,
    read_run,
    read_settings,
    refuse_changes,
)

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = Path(__file__).parent.parent / "configs"
MODEL_JSON, DATA_JSON = GOLDEN / "guide_model.json", GOLDEN / "guide_data.json"
RUN = """
output = "runs/a"
[model]
config = { num_layers = [2, 2, 2] }
[data]
manifest = "clips"
selection = { num_frames = 33 }
[optimizer]
lr = 2e-5
"""


def write(path: Path, text: str = RUN) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write(tmp_path / "run.toml")


def test_toml(run: Path) -> None:
    settings = read_run(run)
    assert settings == TrainSettings.read(
        {
            "output": "runs/a",
            "model": {"config": {"num_layers": [2, 2, 2]}},
            "data": {"manifest": "clips", "selection": {"num_frames": 33}},
            "optimizer": {"lr": 2e-5},
        },
        where="here",
    )
    assert settings.output == Path("runs/a")  # from the current folder, not from the file's


def test_the_config_that_a_run_writes(run: Path, tmp_path: Path) -> None:
    settings = read_run(run, changes=["optimizer.ema_decay=none", "flow.shift=3"])
    written = write(tmp_path / "config.json", settings.model_dump_json(indent=1))
    assert read_run(written) == settings
    assert read_run(written, changes=["seed=1"]).seed == 1


def test_extends(run: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    middle = 'extends = "../run.toml"\noutput = "runs/b"\n[data.selection]\nmin_num_frames = 9\n'
    write(tmp_path / "more" / "middle.toml", middle)
    top = 'extends = "more/middle.toml"\n[data]\nbatch_size = 2\n[model]\nconfig.num_layers = [4, 4, 4]\n'
    settings = read_run(write(tmp_path / "top.toml", top))
    assert settings.output == Path("runs/b")
    assert (settings.data.selection.num_frames, settings.data.selection.min_num_frames) == (33, 9)
    assert (settings.data.batch_size, settings.data.manifest) == (2, Path("clips"))
    assert settings.model.config == {"num_layers": [4, 4, 4]}
    assert settings.optimizer.lr == 2e-5
    assert run.read_text() == RUN


def test_none_is_no_value(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", RUN + 'ema_decay = 0.99\n[log]\nwandb_project = "a"\n')
    over = 'extends = "base.toml"\n[optimizer]\nema_decay = "none"\n[log]\nwandb_project = "None"\n'
    settings = read_run(write(tmp_path / "over.toml", over))
    assert settings.optimizer.ema_decay is settings.log.wandb_project is None


@pytest.mark.parametrize(
    ("extends", "problem"),
    [
        ('extends = "nowhere.toml"', r"run\.toml extends nowhere\.toml, but \S+nowhere\.toml does not exist"),
        ('extends = "run.toml"', r"run\.toml extends run\.toml, which is a circle: run\.toml, run\.toml"),
        (
            'extends = "b.toml"',
            r"c\.toml extends run\.toml, which is a circle: run\.toml, b\.toml, c\.toml, r",
        ),
        ('extends = ["b.toml", "c.toml"]', r"extends must be the name of one other file, got \['b"),
        ('extend = "b.toml"', r"unknown key 'extend' \(did you mean 'extends'\?\)"),
        ('extends = "wrong.toml"', r"/wrong\.toml: unknown key 'optimizer\.stepps' \(did you mean 'steps'"),
        ('extends = "late.toml"', r"run\.toml over \S+/late\.toml: optimizer\.steps: .*'late'"),
    ],
)
def test_wrong_extends(extends: str, problem: str, tmp_path: Path) -> None:
    write(tmp_path / "b.toml", 'extends = "c.toml"')
    write(tmp_path / "c.toml", 'extends = "run.toml"')
    write(tmp_path / "wrong.toml", "[optimizer]\nstepps = 3")
    write(tmp_path / "late.toml", '[optimizer]\nsteps = "late"')
    with pytest.raises(ValueError, match=problem):
        read_run(write(tmp_path / "run.toml", extends + RUN))


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("run.toml", "output = 'a'\nseed 3", r"run\.toml is not valid TOML: .*line 2"),
        ("run.toml", b"# \xff", r"run\.toml is not UTF-8: .* line 1"),
        ("run.json", '{"seed": 3,}', r"run\.json is not valid JSON: .*line 1"),
        ("run.yaml", "seed: 3", r"run\.yaml: a run is described by a \.toml file"),
        ("run.toml", "", r"run\.toml: output: Field required; model: Field required; data: Field required"),
        ("run.toml", "lr = 1e-4" + RUN, r"unknown key 'lr' \(did you mean 'optimizer\.lr'\?\)"),
        ("run.toml", RUN + "[dta]\nseed = 1", r"run\.toml: unknown key 'dta' \(did you mean 'data'\?\)"),
        (
            "run.toml",
            RUN + "steps = 0\neps = 'a'",
            r"run\.toml: optimizer\.steps: .*0; optimizer\.eps: .*'a'",
        ),
        ("run.toml", RUN + "[log]\nevery = 1.5", r"log\.every: .*got 1\.5"),
        ("run.toml", RUN.replace('manifest = "clips"', ""), "data needs `manifest`"),
        (
            "run.json",
            '{"predictor": {}}',
            "is one of the guide's two files: give them",
        ),
    ],
)
def test_wrong_files(name: str, text: str | bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=problem) as caught:
        read_run(path)
    assert str(path) in str(caught.value)


def test_the_guides_file_in_the_wrong_place() -> None:
    for path in (MODEL_JSON, DATA_JSON):
        with pytest.raises(
            ValueError, match=r"is one of the guide's two files: give them as --model and --data"
        ):
            read_run(path)


def test_which_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run is given"):
        read_run(None)
    with pytest.raises(ValueError, match=r"nowhere\.toml does not exist"):
        read_run(tmp_path / "nowhere.toml")
    with pytest.raises(ValueError, match=r"--data \S+guide_data\.json needs --model"):
        read_run(run, data_json=DATA_JSON)
    with pytest.raises(
        ValueError, match=r"a run is described by a \.toml file such as configs/finetune\.toml"
    ):
        read_run(tmp_path)


def test_changes(run: Path) -> None:
    settings = read_run(
        run,
        changes=[
            "optimizer.lr=1e-4",
            "output=runs/2024-01-01",
            "data.manifest=/a b/x=y.txt",
            "data.features=2024-01-01",
            'validation.prompts=["a red ball", "b"]',
            "validation.every=100",
            "model.config.num_layers=[2, 4, 2]",
            "model.config.double_ff=false",
            "model.sparse_n = [1, 2, 1]",
            "optimizer.ema_decay=none",
            "device=cpu",
            "seed=1",
            "seed=2",
        ],
    )
    assert settings.optimizer.lr == 1e-4
    assert settings.optimizer.ema_decay is None
    assert settings.output == Path("runs/2024-01-01")
    assert (settings.data.manifest, settings.data.features) == (Path("/a b/x=y.txt"), Path("2024-01-01"))
    assert settings.validation.prompts == ("a red ball", "b")
    assert settings.model.config == {"num_layers": [2, 4, 2], "double_ff": False}
    assert settings.model.sparse_n == (1, 2, 1)
    assert (settings.device, settings.seed) == ("cpu", 2)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("optimizer.lr", r"is written section\.key=value, got 'optimizer\.lr'"),
        ("=3", r"is written section\.key=value"),
        ("optimizer..lr=3", r"is written section\.key=value"),
        ("output=", r"'output=' has no value: write none"),
        ("optimzer.lr=3", r"'optimzer\.lr=3': unknown key 'optimzer' \(did you mean 'optimizer'"),
        (
            "data.selection.max_hight=3",
            r"unknown key 'data\.selection\.max_hight' \(did you mean 'max_height'",
        ),
        ("steps=3", r"unknown key 'steps' \(did you mean 'optimizer\.steps'"),
        ("optimizer.lr=fast", r"run\.toml with optimizer\.lr=fast: optimizer\.lr: .*'fast'"),
        ("optimizer.lr.x=3", r"optimizer\.lr: .*valid number"),
        ("optimizer=3", r"optimizer: .*got 3"),
        ("output=none", r"output: .*got None"),
        ("optimizer.betas=[0.9, 1.0]", r"optimizer\.betas\.1: .*less than 1, got 1\.0"),
        ("flow.shift=-1", r"flow\.shift: Input should be 'dynamic' or greater than 0, got -1$"),
        ("vae.chunk=0", r"vae\.chunk: .*greater than or equal to 1, got 0"),
        ("validation.guidance_scale=-3", r"validation\.guidance_scale: .*equal to 0, got -3"),
        ("optimizer.lr=inf", r"optimizer\.lr: .*finite number, got inf"),
        ("optimizer.lr=5", r"optimizer\.lr: .*less than or equal to 0\.1, got 5"),
        ("optimizer.final_lr=nan", r"optimizer\.final_lr: .*finite number, got nan"),
        (
            'optimizer={lr = 1e-5, final_lr = 1e-2, schedule = "cosine"}',
            r"final_lr 0\.01 is above lr",
        ),
        ("flow.shift=inf", r"flow\.shift: .*finite number, got inf"),
        ("optimizer.weight_decay=inf", r"weight_decay: .*finite number"),
        ("optimizer.steps=true", r"optimizer\.steps: true and false are neither numbers nor text"),
        ("optimizer.betas=[true, 0.9]", r"optimizer\.betas: true and false are neither numbers nor text"),
        ("data.caption_dropout=false", r"data\.caption_dropout: true and false are neither numbers nor text"),
        ("data.workers=100000", r"data\.workers: .*equal to 1024, got 100000"),
        ("data.selection.num_frames=100000000", r"num_frames: .*equal to 65536"),
        ("data.selection.speed_factor=inf", r"speed_factor: .*finite number"),
        ("parallel.timeout_s=inf", r"timeout_s: .*finite number"),
        ("validation.fps=5000", r"validation\.fps: .*equal to 1000, got 5000"),
        ("validation.shift=inf", r"validation\.shift: .*finite number, got inf"),
        ("data.reader=opencv", r"data\.reader: .*'pyav', 'decord' or 'torchcodec', got 'opencv'"),
        ("data.selection.max_height=100", r"data\.selection: .*nearest valid size is 96 x 1024"),
        ("memory={recompute_blocks = 1, recompute_feed_forwards = 1}", "exclude each other"),
        ("seed=1\nseed = 2", r"seed: .*got '1\\nseed = 2'"),
    ],
)
def test_wrong_changes(change: str, problem: str, run: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        read_run(run, changes=[change])


def test_the_guides_files(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        settings = read_run(None, model_json=MODEL_JSON, data_json=DATA_JSON)
    assert sum("without meaning here: " in record.getMessage() for record in caplog.records) == 9
    assert settings.allow_tf32 is False
    assert settings.data.reader == "decord"
    assert settings.optimizer.accumulate == 4
    assert settings.model.pretrained is None
    sized = ["data.selection.max_height=96", "data.selection.max_width=160", "data.manifest=clips"]
    changed = read_run(None, model_json=MODEL_JSON, data_json=DATA_JSON, changes=sized)
    assert differences(settings, changed) == [
        "data.selection.max_height: 576 -> 96",
        "data.selection.max_width: 1024 -> 160",
    ]
    assert changed.data.selection.smallest_area == 96 * 160


def test_what_the_guides_launch_script_sets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It goes below the files and what is set, and the log names it."""

    def read(*changes: str, over: Path | None = None) -> tuple[TrainSettings, str]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            settings = read_run(over, model_json=MODEL_JSON, data_json=DATA_JSON, changes=changes)
        (note,) = (text for text in caplog.messages if "launch script" in text)
        return settings, note

    settings, note = read()
    assert (settings.seed, settings.checkpoint.every, settings.log.every) == (1024, 1000, 1)
    assert settings.memory.recompute_feed_forwards == 32
    assert settings.model.init == "original"
    named = "seed = 1024, checkpoint.every = 1000, log.every = 1, memory.recompute_feed_forwards = 32, model."
    assert named in note
    assert "optimizer.steps is 1000 (there one epoch), optimizer.accumulate is 4 (there 1" in note
    over = write(tmp_path / "over.toml", "seed = 7\n[checkpoint]\nkeep = 9\n[memory]\nrecompute_blocks = 8\n")
    settings, note = read("log.every=5", over=over)
    assert (settings.seed, settings.log.every) == (7, 5)
    assert (settings.checkpoint.every, settings.checkpoint.keep) == (1000, 9)
    assert (settings.memory.recompute_blocks, settings.memory.recompute_feed_forwards) == (8, 0)
    assert "have it: checkpoint.every = 1000, model.init = original; not" in note
    assert read("model.pretrained=model.pt")[0].model.init == "adaln_zero"
    # No more feed-forwards than a smaller model has.
    settings, _ = read("model.config.num_layers=[2,2,2]", "model.config.sparse_n=[1,2,1]")
    assert settings.memory.recompute_feed_forwards == 6
    for wrong in ("memory=3", "model.config=3"):
        with pytest.raises(ValueError, match=wrong.partition("=")[0]):
            read(wrong)
    assert read("model.config.num_layers=[[2]]")[0].memory.recompute_feed_forwards == 32


def test_a_file_over_the_guides(tmp_path: Path) -> None:
    over = write(tmp_path / "over.toml", 'output = "runs/c"\n[optimizer]\nsteps = 7\n[text]\nt5 = "t5"\n')
    settings = read_run(over, model_json=MODEL_JSON, data_json=DATA_JSON, changes=["text.clip=clip"])
    assert (settings.output, settings.optimizer.steps, settings.optimizer.accumulate) == (
        Path("runs/c"),
        7,
        4,
    )
    assert (settings.text.t5, settings.text.clip, settings.text.max_tokens) == (Path("t5"), Path("clip"), 512)


def test_features_of_the_guide_need_a_folder(tmp_path: Path) -> None:
    model, data = (
        write(
            tmp_path / path.name,
            path.read_text(encoding="utf-8").replace(f'{flag}": false', f'{flag}": true'),
        )
        for path, flag in ((MODEL_JSON, "_features"), (DATA_JSON, "use_feature_data"))
    )
    with pytest.raises(ValueError, match=r"data\.features is missing: give data\.features=FOLDER"):
        read_run(None, model_json=model, data_json=data)
    settings = read_run(None, model_json=model, data_json=data, changes=["data.features=cache"])
    assert (settings.data.features, settings.data.manifest) == (Path("cache"), None)
    clips = Path("examples/opensoraplan1.5/data.txt")
    for changes, features in (([], None), (["data.features=cache"], Path("cache"))):
        settings = read_run(None, model_json=model, data_json=data, changes=changes, to_cache=True)
        assert (settings.data.features, settings.data.manifest) == (features, clips)


def test_a_config_gives_no_defaults_of_how_features_were_made(run: Path, tmp_path: Path) -> None:
    """It has all values, and features without clips are held against those that somebody gave."""
    config = tmp_path / "config.json"
    for changes, given in (([], 19), (["data.manifest=none", "data.features=cache"], 1)):
        settings = read_run(run, changes=changes)
        again = read_run(write(config, settings.model_dump_json()))
        assert again == settings
        assert len(again.data.selection.model_fields_set) == given
        assert ("reader" in again.data.model_fields_set) == (given > 1)
        assert "num_frames" in again.data.selection.model_fields_set


def read_vae_run(path: Path, *, changes: Sequence[str] = ()) -> VAETrainSettings:
    settings = read_settings(path, changes=changes, method="vae")
    assert isinstance(settings, VAETrainSettings)
    return settings


def test_vae_runs(tmp_path: Path) -> None:
    path = write(tmp_path / "vae.toml", 'output = "v"\n[model]\nconfig = {}\n[data]\nmanifest = "clips"\n')
    settings = read_vae_run(path, changes=["loss.kl=0", "data.height=64"])
    assert (settings.loss.kl, settings.data.height) == (0, 64)
    # A VAE's own defaults stay where another key of the section is given.
    optimizer = read_vae_run(path, changes=["optimizer.lr=1e-4"]).optimizer
    assert (optimizer.lr, optimizer.ema_decay, optimizer.eps) == (1e-4, 0.999, 1e-8)
    with pytest.raises(ValueError, match=r"unknown key 'data\.caption_dropout'"):
        read_vae_run(path, changes=["data.caption_dropout=0"])
    with pytest.raises(ValueError, match=r"validation: `manifest` is missing"):
        read_vae_run(path, changes=["validation.every=1"])


def test_a_file_names_its_method(tmp_path: Path) -> None:
    content = 'output = "v"\n[model]\nconfig = {}\n[data]\nmanifest = "clips"\nframes = 9\n[loss]\nkl = 0.0\n'
    vae = write(tmp_path / "vae.toml", content)
    with pytest.raises(ValueError, match=r'has data\.frames, loss: to train that, it needs method = "vae"$'):
        read_run(vae)
    denoiser = write(tmp_path / "denoiser.toml", RUN + '[flow]\nshift = 3\n[text]\nt5 = "t5"\n')
    with pytest.raises(ValueError, match=r'has flow, text: to train that, it needs method = "flow"$'):
        read_settings(denoiser, method="vae")
    named = write(tmp_path / "named.toml", f'method = "vae"\n{content}')
    assert isinstance(read_settings(named), VAETrainSettings)
    with pytest.raises(ValueError, match=r'named.toml trains no denoiser: it has method = "vae"'):
        read_run(named)
    extending = write(tmp_path / "extending.toml", 'extends = "named.toml"\nloss.kl = 1e-3\n')
    assert read_settings(extending).method == "vae"
    other = write(tmp_path / "other.toml", 'extends = "named.toml"\nmethod = "flow"\n')
    with pytest.raises(ValueError, match=r"named\.toml: .*unknown key 'loss'"):
        read_settings(other)
    wrong = write(tmp_path / "wrong.toml", f'method = "lora"\n{content}')
    with pytest.raises(ValueError, match=r"wrong\.toml: method must be one of flow, vae, got 'lora'"):
        read_settings(wrong)


@pytest.mark.parametrize("named", [True, False])
def test_the_first_runs_named_no_method(run: Path, tmp_path: Path, named: bool) -> None:
    path = write(tmp_path / "vae.toml", 'output = "v"\n[model]\nconfig = {}\n[data]\nmanifest = "clips"\n')
    for settings in (read_vae_run(path), read_run(run)):
        without = set() if named else {"method"}
        config = write(tmp_path / "config.json", settings.model_dump_json(exclude=without))
        assert read_settings(config) == settings


PROMPTS = ["validation.every=5", 'validation.prompts=["a ball"]']


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["validation.every=5"], r"validation every 5 steps of what\? Give `manifest` or `features`"),
        (['validation.prompts=["a ball"]'], r"`prompts` are given, but `every` is 0"),
        ([*PROMPTS, "validation.frames=10"], r"validation: the video of 'a ball': frames must be 8k \+ 1"),
        ([*PROMPTS, "validation.height=100"], r"got height 100: the nearest valid size is 96 x 512"),
        ([*PROMPTS, 'validation.prompts=["a", " "]'], r"the video of ' ': prompt: the prompt is empty"),
    ],
)
def test_validation_of_nothing_or_never_or_what_cannot_be(
    changes: list[str], problem: str, run: Path
) -> None:
    with pytest.raises(ValueError, match=problem):
        read_run(run, changes=changes)


def test_differences(run: Path) -> None:
    old = read_run(run)
    refuse_changes(old, read_run(run))
    changes = ["optimizer.lr=1e-4", "model.config.num_layers=[2]", "model.sparse_n=[1]", "seed=3"]
    assert differences(old, read_run(run, changes=changes)) == [
        "seed: 0 -> 3",
        "model.config.num_layers: [2, 2, 2] -> [2]",
        "model.sparse_n: none -> [1]",
        "optimizer.lr: 2e-05 -> 0.0001",
    ]
    other = read_run(run, changes=["model.config=none", "model.pretrained=a"])
    assert differences(old, other)[:2] == [
        "model.pretrained: none -> a",
        "model.config.num_layers: [2, 2, 2] -> none",
    ]


def test_what_a_resume_allows(run: Path) -> None:
    old = read_run(run)
    allowed = [
        "optimizer.steps=7",
        "clip.outlier=clip",
        "log.every=1",
        "validation.sigmas=[0.5]",
        "checkpoint.keep=9",
        "memory.compile=true",
        "model.attention=flash",
        "vae.chunk=2",
        "data.workers=0",
        "data.reader=decord",
        "data.batch_size=2",
        "parallel.sp=2",
        "device=cpu",
    ]
    refuse_changes(old, read_run(run, changes=allowed))
    with pytest.raises(ValueError, match="started with other settings") as caught:
        refuse_changes(
            old, read_run(run, changes=[*allowed, "optimizer.lr=1e-4", "data.caption_dropout=0.2"])
        )
    text = str(caught.value)
    assert "\n  data.caption_dropout: 0.1 -> 0.2\n  optimizer.lr: 2e-05 -> 0.0001\n" in text
    assert not any(change.split("=")[0] in text for change in allowed)
    assert "without --resume" in text
    assert "another output folder" in text


def test_a_cosine_schedule_ends_where_it_was_to_end(run: Path) -> None:
    old = read_run(run, changes=["optimizer.schedule=cosine"])
    refuse_changes(old, read_run(run, changes=["optimizer.schedule=cosine", "log.every=1"]))
    longer = read_run(run, changes=["optimizer.schedule=cosine", "optimizer.steps=7"])
    with pytest.raises(ValueError, match=r"optimizer\.steps: 1000 -> 7, .*changes the learning rate"):
        refuse_changes(old, longer)


def names(kind: type[Settings], before: str = "") -> list[str]:
    found = []
    for key, field in kind.model_fields.items():
        found.append(f"{before}{key}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            found += names(field.annotation, f"{before}{key}.")
    return found


def test_the_page_of_settings_is_up_to_date() -> None:
    docs = CONFIGS.parent / "docs"
    page = runpy.run_path(str(docs / "make_settings.py"))["page"]()
    assert (docs / "settings.md").read_text(encoding="utf-8") == page, "run python docs/make_settings.py"
    assert "| `accumulate` | `1` | whole number >= 1, <= 1e+06 |" in page
    keys = [row for row in page.splitlines() if row.startswith("| `")]
    assert [row for row in keys if row.endswith("|  |")] == []  # each has a description


def differences(old: Settings, new: Settings) -> list[str]:
    """What differs, as a message of refused changes has it."""
    with pytest.raises(ValueError, match="started with other settings") as refused:
        refuse_changes(old, new)
    return [line.strip() for line in str(refused.value).splitlines() if line.startswith("  ")]


def test_resumable_changes_are_settings() -> None:
    known = names(TrainSettings)
    assert [name for name in RESUMABLE_CHANGES if name.removesuffix(".*") not in known] == []


# --- configs/ -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_configs(path: Path) -> None:
    settings = read_settings(path)
    assert settings.output == Path("runs") / path.stem
    assert len(path.read_text(encoding="utf-8").splitlines()) < 30


def test_the_recipe_goes_from_stage_to_stage() -> None:
    """Each starts from what the one before made; rates of the first ten are the report's."""
    stages = [path.stem for path in sorted(CONFIGS.glob("*-[1-9]*.toml"))]
    assert len(stages) == 11
    runs = [read_run(CONFIGS / f"{stage}.toml") for stage in stages]
    assert [run.model.pretrained for run in runs] == [
        None,
        *(Path("models") / stage for stage in stages[:-1]),
    ]
    assert [run.optimizer.lr for run in runs] == [1e-4] * 4 + [6e-5, 6e-5, 4e-5, 2e-5, 1e-5, 1e-5, 1e-5]
    assert [set(run.model.sparse_n or ()) == {1} for run in runs] == [True] * 3 + [False] * 8
    assert [run.data.selection.num_frames for run in runs] == [1] * 4 + [57, 57] + [121] * 5
    assert [run.data.selection.train_fps for run in runs] == [24] * 5 + [12] + [24] * 5
    assert all(run.model.config == {} for run in runs)
    assert [run.conditions.used for run in runs] == [False] * 10 + [True]


def test_the_recipe_has_the_batches_and_steps_of_its_table() -> None:
    text = (CONFIGS.parent / "docs" / "training.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in text.splitlines() if "| `" in row]
    names = {path.stem for path in CONFIGS.glob("*.toml")}
    table = {row[0]: row for row in rows if row[0] in names}
    assert len(table) == 10
    for stage, (_, size, attention, rate, steps, batch) in table.items():
        run = read_run(CONFIGS / f"{stage}.toml")
        assert run.data.batch_size * run.optimizer.accumulate == int(batch)
        assert run.optimizer.steps == int(steps.replace(",", ""))
        assert run.optimizer.lr == float(rate)
        assert (set(run.model.sparse_n or ()) == {1}) == (attention == "dense")
        if "576" in size:
            assert (run.data.selection.max_height, run.data.selection.max_width) == (576, 1024)


@pytest.mark.parametrize(("stage", "side"), [("image-1-256", 256), ("image-2-384", 384)])
def test_image_stages_keep_all_five_ratios(stage: str, side: int) -> None:
    sizes = [(1080, 1920), (1920, 1080), (600, 800), (800, 600), (700, 700)]
    records = [
        Record(Path(f"{height}x{width}.jpg"), ("a ball",), num_frames=1, height=height, width=width)
        for height, width in sizes
    ]
    kept = select(records, read_run(CONFIGS / f"{stage}.toml").data.selection).kept
    assert len(kept) == 5
    assert all(0.5 * side**2 < sample.height * sample.width <= side**2 for sample in kept)
