"""--set KEY=VALUE: the same values, and the same mistakes, wherever it is taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opensoraplan.changes import apply_changes, parse_change
from opensoraplan.formats.mindspeed.inference import read_inference, read_selection
from opensoraplan.settings import Settings
from opensoraplan.train.run.files import read_settings

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "tests" / "golden" / "inference_t2v_model1_5.json"
RUN = ROOT / "configs" / "finetune.toml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("2e-5", 2e-5),
        ("1_000", 1000),
        ("true", True),
        ("false", False),
        ("null", None),
        ("none", None),
        ("None", None),
        ('""', ""),
        ('"12"', "12"),
        ("'a'", "a"),
        ("[4, 8, 8]", [4, 8, 8]),
        ("[1, 2,]", [1, 2]),
        ("[1, null]", [1, None]),
        ('["a red ball", "b"]', ["a red ball", "b"]),
        ("{a = 1}", {"a": 1}),
        ('{"a": null, "b": [true]}', {"a": None, "b": [True]}),
        ('{a = "none"}', {"a": None}),
        (r'"\ud83d\ude00"', "\N{GRINNING FACE}"),
        ("runs/a", "runs/a"),
        ("/a b/x=y.txt", "/a b/x=y.txt"),
        ("2024-01-01", "2024-01-01"),
        ("True", "True"),
        ("1\nkey = 2", "1\nkey = 2"),
    ],
)
def test_values(text: str, value: object) -> None:
    for change in (f"a.b={text}", f" a.b = {text} "):
        assert parse_change(change) == {"a": {"b": value}}


def test_tables_are_changed_key_by_key() -> None:
    values = {"a": {"b": 1, "c": 2}, "d": [1]}
    assert apply_changes(values, ["a={c = 3}", "d=[2]"]) == {"a": {"b": 1, "c": 3}, "d": [2]}
    assert values == {"a": {"b": 1, "c": 2}, "d": [1]}


def read_three(*changes: str) -> list[Callable[[], Any]]:
    """What osp generate, osp train and osp data check read."""
    return [
        lambda: read_inference(GUIDE, changes=changes),
        lambda: read_settings(RUN, changes=changes),
        lambda: read_selection(None, changes=changes),
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("train_fps", r"a change is written section\.key=value, got 'train_fps'"),
        ("a..b=3", r"a change is written section\.key=value, got 'a\.\.b=3'"),
        ("=3", r"a change is written section\.key=value"),
        ("train_fps= ", r"'train_fps= ' has no value: write none for nothing"),
    ],
)
def test_the_same_mistakes_everywhere(change: str, problem: str) -> None:
    for read in read_three(change):
        with pytest.raises(ValueError, match=problem):
            read()


def test_the_same_values_everywhere() -> None:
    assert read_inference(GUIDE, changes=["fps = 1_0", "ae.shift=none"]).generate["fps"] == 10
    selection = read_selection(None, changes=["max_hxw = 1_00", "force_resolution = false", "min_hxw=none"])
    assert (selection.max_hxw, selection.min_hxw) == (100, None)
    changes = ["optimizer.ema_decay=null", 'model.config={"num_layers": [2]}']
    run = read_settings(RUN, changes=changes)
    assert run.optimizer.ema_decay is None
    assert run.model.config == {"num_layers": [2]}


def test_an_unknown_key_is_told_with_its_change() -> None:
    with pytest.raises(
        ValueError, match=r"'num_frame=9': unknown key 'num_frame' \(did you mean 'num_frames'"
    ):
        read_selection(None, changes=["num_frame=9"])


class Inner(Settings):
    depth: int = 1
    width: int = 1


class Outer(Settings):
    inner: Inner = Inner()
    name: str


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("nam", "'nam' (did you mean 'name'?)"),
        ("width", "'width' (did you mean 'inner.width'?)"),
        ("inner.widt", "'inner.widt' (did you mean 'width'?)"),
        ("inner.name", "'inner.name' (did you mean 'name'?)"),
        ("zzz", "'zzz'"),
    ],
)
def test_unknown_keys_are_found_in_parts_and_in_the_whole(key: str, hint: str) -> None:
    nested = parse_change(f"{key}=1")
    assert Outer.unknown_keys(nested) == {key: f"unknown key {hint}"}
    with pytest.raises(ValueError, match="unknown key") as caught:
        Outer.read({"name": "a", **nested}, where="file")
    assert f"unknown key {hint}" in str(caught.value)
