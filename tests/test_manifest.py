"""Manifests in every format, probing and its cache, and selection against the original's measured cases."""

import json
import logging
import os
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import av
import pyarrow
import pytest
import torch
from pyarrow import parquet

from opensoraplan.data.manifest import read_manifest
from opensoraplan.data.record import Record, probe_cache
from opensoraplan.data.selection import Reason, Sample, Selection, SelectionSettings, select
from opensoraplan.data.video import VideoWriter, read_frames

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sample_filter.json").read_text())
# 24 x 32 pixels: enough for the files, and a rule's numbers stay readable.
TINY = {
    "num_frames": 17,
    "min_num_frames": 9,
    "drop_short_ratio": 0.0,
    "force_resolution": False,
    "max_hxw": 64 * 64,
    "max_h_div_w_ratio": 2.0,
    "min_h_div_w_ratio": 0.5,
}


def settings(**changes: object) -> SelectionSettings:
    return SelectionSettings.read({**TINY, **changes}, where="test")


def write_clip(path: Path, *, frames: int = 12, fps: float = 24, height: int = 24, width: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps=fps) as writer:
        writer.write(torch.full((frames, height, width, 3), 128, dtype=torch.uint8))
    return path


def write_image(path: Path, *, height: int = 24, width: int = 32) -> Path:
    with av.open(str(path), "w", format="image2") as file:
        stream = file.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = height, width, "rgb24"
        pixels = torch.zeros(height, width, 3, dtype=torch.uint8).numpy()
        file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
    return path


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def clip(name: str = "a.mp4", **changes: object) -> Record:
    whole = Record(Path(name), ("x",), num_frames=40, fps=24.0, height=64, width=64)
    return replace(whole, **changes)


def only(record: Record, **changes: object) -> Sample | Reason:
    """What becomes of one record."""
    selection = select([record], settings(**changes), allow_empty=True)
    return selection.kept[0] if selection.kept else selection.dropped[0].reason


def kept(record: Record, **changes: object) -> Sample:
    sample = only(record, **changes)
    assert isinstance(sample, Sample)
    return sample


@pytest.mark.parametrize("name", sorted(GOLDEN["cases"]))
def test_selection_equals_the_original(tmp_path: Path, name: str) -> None:
    write_lines(tmp_path / "records.json", json.dumps(GOLDEN["records"]))
    write_lines(tmp_path / "data.txt", ",records.json")
    records = read_manifest(tmp_path / "data.txt", probing="none")
    case = GOLDEN["cases"][name]
    selection = select(records, SelectionSettings.read(case["config"], where=name))
    found = [
        {"path": sample.record.path.name, "shape": "x".join(map(str, sample.shape))}
        for sample in selection.kept
    ]
    assert found == case["kept"]
    assert len(selection.kept) + len(selection.dropped) == len(GOLDEN["records"])
    assert all(drop.detail for drop in selection.dropped)
    for sample in selection.kept:
        numbers = sample.frame_numbers
        assert len(numbers) == sample.num_frames
        assert numbers[0] >= 0
        assert numbers[-1] < (sample.record.num_frames or 1)
        assert all(low < high for low, high in pairwise(numbers))


def test_defaults_are_the_guides_data_json() -> None:
    case = GOLDEN["cases"]["seed_fixed_resolution"]["config"]
    defaults = SelectionSettings()
    given = SelectionSettings.read(case, where="golden")
    assert defaults.smallest_area == given.smallest_area
    assert defaults.largest_area == given.largest_area
    both = {"max_hxw": None, "min_hxw": None}
    assert defaults.model_copy(update=both) == given.model_copy(update=both)


@pytest.mark.parametrize(
    ("record", "changes", "reason"),
    [
        (clip(error="gone"), {}, Reason.UNREADABLE),
        (clip(captions=()), {}, Reason.NO_CAPTION),
        (clip(height=None), {}, Reason.NO_SIZE),
        (clip(num_frames=None), {}, Reason.NO_LENGTH),
        (clip(fps=None), {}, Reason.NO_LENGTH),
        (clip(height=129, width=64), {}, Reason.ASPECT),
        (clip(), {"min_hxw": 64 * 64, "force_5_ratio": True, "hw_stride": 48}, Reason.TOO_SMALL),
        (clip(height=63), {"min_hxw": 64 * 64}, Reason.TOO_SMALL),
        (clip(height=79, width=79), {"min_hxw": 4097, "max_hxw": 79 * 79}, Reason.TOO_SMALL),
        (clip(height=20, width=15), {"force_5_ratio": True}, Reason.TOO_SMALL),
        (clip(num_frames=86), {}, Reason.TOO_LONG),
        (clip(fps=23.8), {}, Reason.LOW_FPS),
        (clip(num_frames=8), {}, Reason.TOO_SHORT),
        (clip(num_frames=16), {"drop_short_ratio": 1.0}, Reason.SHORT),
        (clip(num_frames=30), {"num_frames": 1, "too_long_factor": 99.0}, Reason.TOO_SHORT),
    ],
)  # fmt: skip
def test_every_reason(record: Record, changes: dict[str, object], reason: Reason) -> None:
    assert only(record, **changes) is reason
    assert reason.sentence


@pytest.mark.parametrize(
    ("record", "changes", "shape"),
    [
        (clip(height=128, width=64), {}, (17, 80, 32)),
        (clip(height=64, width=128), {}, (17, 32, 80)),
        (clip(height=64), {"min_hxw": 64 * 64}, (17, 64, 64)),
        (clip(num_frames=85), {}, (17, 64, 64)),
        (clip(fps=23.976), {}, (17, 64, 64)),
        (clip(num_frames=9), {}, (9, 64, 64)),
        (clip(num_frames=16), {}, (9, 64, 64)),
        (clip("a.JPG", num_frames=1, fps=None), {}, (1, 64, 64)),
        (clip(), {"force_resolution": True, "max_height": 32, "max_width": 48}, (17, 32, 48)),
    ],
)
def test_bounds_are_included(record: Record, changes: dict[str, object], shape: tuple[int, int, int]) -> None:
    assert kept(record, **changes).shape == shape


def test_forced_size_asks_for_enough_pixels_after_the_crop() -> None:
    forced = {"force_resolution": True, "max_height": 32, "max_width": 64, "min_hxw": 2048}
    # Of a square, the crop to 1:2 leaves half: 4096 pixels are just enough.
    assert kept(clip(), **forced).shape == (17, 32, 64)
    assert only(clip(height=64, width=63), **forced) is Reason.TOO_SMALL


def test_frame_numbers_follow_rate_and_cut() -> None:
    sample = kept(clip(fps=30.0, cut=(5, 26), num_frames=21))
    assert sample.step == 1.25
    assert sample.resampled == 17
    assert sample.frame_numbers == tuple(5 + i * 5 // 4 for i in range(17))


def test_window_moves_with_the_seed_but_not_with_the_neighbours() -> None:
    records = [clip(f"{i}.mp4", num_frames=40) for i in range(30)]
    first = select(records, settings()).kept
    assert first == select(records, settings()).kept
    assert {sample.windows for sample in first} == {24}
    assert len({sample.window for sample in first}) > 5
    assert [sample.window for sample in first] != [s.window for s in select(records, settings(), seed=1).kept]
    later = select(records[7:], settings()).kept
    assert [sample.window for sample in later] == [sample.window for sample in first[7:]]
    last = first[0].at(23)
    assert last.frame_numbers == tuple(range(23, 40))


def test_drop_short_ratio_is_a_probability() -> None:
    records = [clip(f"{i}.mp4", num_frames=12) for i in range(400)]
    dropped = len(select(records, settings(drop_short_ratio=0.25)).dropped)
    assert 70 < dropped < 130


def test_speed_factor_thins_evenly_down_to_what_is_wanted() -> None:
    sample = kept(clip(num_frames=33), speed_factor=4.0)
    assert sample.frame_numbers == tuple(range(0, 33, 2))
    sample = kept(clip(num_frames=60), speed_factor=2.0)
    assert (sample.resampled, sample.thinned, sample.windows) == (60, 30, 14)
    last = sample.at(13).frame_numbers
    assert last[-1] == 59
    assert {high - low for low, high in pairwise(last)} == {2, 3}
    assert kept(clip(num_frames=12), speed_factor=2.0).thinned == 12
    # Too long is five times 17 frames at the speed that they may be played.
    assert kept(clip(num_frames=170), speed_factor=2.0).thinned == 85
    assert only(clip(num_frames=171), speed_factor=2.0) is Reason.TOO_LONG


def test_sequence_parallel_keeps_latent_frames_divisible() -> None:
    assert kept(clip(num_frames=40), num_frames=41, sequence_parallel=2).shape == (25, 64, 64)
    assert kept(clip(num_frames=41), num_frames=41, sequence_parallel=3).shape == (41, 64, 64)


def test_rare_shapes_are_dropped_where_the_batch_is_known() -> None:
    records = [clip(f"{i}.mp4") for i in range(8)] + [clip(f"{i}.mp4", num_frames=9) for i in range(7)]
    assert len(select(records, settings()).kept) == 15
    selection = select(records, settings(), global_batch=2)
    assert set(selection.shapes) == {(17, 64, 64)}
    assert [drop.index for drop in selection.dropped] == list(range(8, 15))
    assert {drop.reason for drop in selection.dropped} == {Reason.RARE_SHAPE}
    assert selection.dropped[0].detail == "7 samples of 9x64x64, 8 needed"
    assert len(select(records, settings(min_batches=3), global_batch=2).kept) == 15


def test_rare_shapes_stay_where_there_are_no_others() -> None:
    records = [clip(f"{i}.mp4") for i in range(7)] + [clip(f"{i}.mp4", num_frames=9) for i in range(3)]
    records.append(clip(num_frames=1, captions=("one",)))
    selection = select(records, settings(min_num_frames=1), global_batch=2)
    assert selection.shapes == {(17, 64, 64): 7, (9, 64, 64): 3}
    assert [drop.detail for drop in selection.dropped] == ["1 samples of 1x64x64, 2 needed"]
    with pytest.raises(ValueError, match=r"all 11 .* 11 rare shape .* 7 samples of 17x64x64, 8 needed"):
        select(records, settings(min_num_frames=1), global_batch=8)


def test_captions_are_not_needed_for_a_vae() -> None:
    assert select([clip(captions=())], settings(), need_captions=False).kept


def test_nothing_kept_names_every_reason() -> None:
    records = [clip("a.mp4", captions=()), clip("b.mp4", fps=10.0), clip("c.mp4", fps=12.0)]
    with pytest.raises(
        ValueError, match=r"all 3 records are dropped: 2 low fps \(.*\), as b.mp4: 10 fps.*; 1 no"
    ):
        select(records, settings())
    with pytest.raises(ValueError, match="no records"):
        select([], settings())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 29, "min_num_frames": 29}, "29 .* 25 and 33: use min_num_frames 25 or num_frames 33"),
        ({"num_frames": 17, "min_num_frames": 40}, "17 .* 40 .* use min_num_frames 17 or num_frames 41"),
        ({"num_frames": 9, "sequence_parallel": 4}, "the fewest are 25: use num_frames 25"),
        ({"min_hxw": 5000}, "min_hxw 5000 is above max_hxw 4096 .* up to 4096"),
        ({"min_h_div_w_ratio": 3.0}, "min_h_div_w_ratio 3 is above max_h_div_w_ratio 2"),
        ({"force_resolution": True, "force_5_ratio": True}, "exclude each other"),
        ({"force_resolution": True, "max_height": 30, "max_width": 64}, "got 30 x 64: .* is 32 x 64"),
        ({"hw_stride": 8}, "hw_stride must be a multiple of 16, got 8: use 16"),
        ({"ae_stride_t": 4}, "ae_stride_t must be a multiple of 8, got 4: use 8"),
        ({"frame_interval": 2}, "frame_interval: .*got 2"),
        ({"drop_short_ratio": 1.5}, "drop_short_ratio: .*got 1.5"),
        ({"min_frames": 9}, "unknown key 'min_frames'"),
    ],
)
def test_contradictions_are_errors(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("wanted", "fewest", "parallel"), [(33, 29, 1), (25, 25, 1), (41, 41, 2), (1, 29, 1)]
)
def test_the_frames_that_errors_name_are_accepted(wanted: int, fewest: int, parallel: int) -> None:
    if parallel == 2:
        # 41 frames are 6 latent frames.
        assert settings(num_frames=wanted, sequence_parallel=parallel).sample_frames(41) == 41
    assert settings(num_frames=wanted, min_num_frames=fewest, sequence_parallel=parallel).num_frames == wanted


FULL = {
    "path": "a.mp4", "cap": ["one", " two "], "num_frames": 100, "fps": 29.97, "cut": [10, 60],
    "resolution": {"height": 480, "width": 640}, "crop": [10, 330, 20, 260], "aes": 5.5, "other": {"x": 1},
}  # fmt: skip
EXPECTED = Record(
    Path("a.mp4"),
    ("one", "two"),
    num_frames=50,
    fps=29.97,
    height=240,
    width=320,
    cut=(10, 60),
    crop=(10, 330, 20, 260),
    aesthetic=5.5,
)


def test_data_txt_with_all_kinds_of_annotation(tmp_path: Path) -> None:
    (tmp_path / "clips, old").mkdir()
    write_lines(tmp_path / "list.json", [FULL])
    write_lines(
        tmp_path / "object.json", {"b.jpg": {"cap": "picture", "resolution": {"height": 5, "width": 6}}}
    )
    write_lines(tmp_path / "lines.jsonl", FULL, "", {**FULL, "path": "c.mp4"})
    lines = ("clips, old,list.json", "", f"{tmp_path / 'clips, old'} , object.json", ",lines.jsonl")
    found = read_manifest(write_lines(tmp_path / "data.txt", *lines))
    assert found[0] == replace(EXPECTED, path=tmp_path / "clips, old" / "a.mp4")
    assert found[1] == Record(
        tmp_path / "clips, old" / "b.jpg", ("picture",), num_frames=1, height=5, width=6
    )
    assert found[2] == replace(EXPECTED, path=tmp_path / "a.mp4")
    assert found[3].path == tmp_path / "c.mp4"


def test_root_goes_before_the_folder_of_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "disk" / "clips").mkdir(parents=True)
    write_lines(tmp_path / "list.json", [FULL])
    data = write_lines(tmp_path / "data.txt", "clips,list.json")
    assert read_manifest(data, root=tmp_path / "disk")[0].path == tmp_path / "disk" / "clips" / "a.mp4"
    assert read_manifest(tmp_path / "list.json", root="/disk")[0].path == Path("/disk/a.mp4")


def test_paths_of_data_txt_may_start_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lists").mkdir()
    write_lines(tmp_path / "lists" / "a.json", [FULL])
    data = write_lines(tmp_path / "lists" / "data.txt", "lists,lists/a.json")
    with pytest.raises(ValueError, match=r"data\.txt, line 1: folder lists exists neither in"):
        read_manifest(data)
    monkeypatch.chdir(tmp_path)
    assert read_manifest(data)[0].path == Path("lists/a.mp4")


def test_csv_cells_are_text_and_may_be_empty(tmp_path: Path) -> None:
    head = "\ufeffvideo,caption,num_frames,fps,height,width,cut,crop,aesthetic"
    data = write_lines(
        tmp_path / "data.csv",
        head,
        'a.mp4,"one, two",100,29.97,480,640,"[10, 60]",10 330 20 260,5.5',
        "",
        'b.jpg,"two\nlines",,,5,6,,,',
    )
    found = read_manifest(data)
    assert found[0] == replace(EXPECTED, path=tmp_path / "a.mp4", captions=("one, two",))
    assert found[1] == Record(tmp_path / "b.jpg", ("two\nlines",), num_frames=1, height=5, width=6)


def test_parquet_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    rows = [{**FULL, "embedding": [1.0, 2.0]}, {**FULL, "path": "b.mp4", "aes": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read_manifest(path)
    assert found[0] == replace(EXPECTED, path=tmp_path / "a.mp4")
    assert found[1] == replace(EXPECTED, path=tmp_path / "b.mp4", aesthetic=None)
    path.write_text("no table")
    with pytest.raises(ValueError, match=r"data\.parquet: not Parquet"):
        read_manifest(path)


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install pyarrow"):
        read_manifest(tmp_path / "data.parquet")


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "m.txt",
            ["just-a-folder"],
            r"m\.txt, line 1: expected folder,annotation\.json, got 'just-a-folder'",
        ),
        ("m.txt", [",gone.json"], r"line 1: annotation gone\.json exists neither"),
        ("m.txt", [",a.pkl"], r"line 1: annotation must be \.json"),
        ("m.txt", [], "has no records"),
        ("m.json", ["[]"], "has no records"),
        ("m.json", ["[{},", "x]"], r"m\.json is not valid JSON: .* in line 2"),
        ("m.json", ["3"], "expected a list of records, got int"),
        ("m.json", ['[{"path": "a.mp4"}, 7]'], "entry 2: expected an object, got '7'"),
        ("m.json", [{"a": 3}], "entry 'a': expected an object"),
        ("m.jsonl", [FULL, "{'path'"], r"m\.jsonl, line 2: not valid JSON: .* at column"),
        ("m.jsonl", ["[1]"], "line 1: expected an object"),
        (
            "m.jsonl",
            [{"file": "a.mp4", "cap": "x"}],
            r"needs a path \(any of path, video\), has only file, cap",
        ),
        ("m.jsonl", [{**FULL, "video": "b.mp4"}], "path and video contradict each other: 'a.mp4', 'b.mp4'"),
        ("m.jsonl", [{**FULL, "cap": [3]}], "a caption must be text or a list of texts, got '3'"),
        ("m.jsonl", ['{"path": "a.mp4", "cap": "\\ud83d"}'], "half a character"),
        ("m.jsonl", [{**FULL, "num_frames": 0}], "num_frames must be above 0, got 0"),
        ("m.jsonl", [{**FULL, "num_frames": 1.5}], "num_frames must be a whole number, got 1.5"),
        ("m.jsonl", [{**FULL, "fps": "fast"}], "fps must be a number, got 'fast'"),
        (
            "m.jsonl",
            [{**FULL, "resolution": "640x480"}],
            r"resolution must be \{height, width\}, got '640x480'",
        ),
        (
            "m.jsonl",
            [{**FULL, "cut": [60, 10]}],
            r"cut must be whole numbers \[start, end\], each pair rising",
        ),
        ("m.jsonl", [{**FULL, "crop": [0, 5]}], r"crop must be .*\[left, right, top, bottom\].*\[0, 5\]"),
        ("m.jsonl", [{**FULL, "fps": -1}] * 7, "line 1: .*line 5: .*; and 2 more"),
        ("m.csv", ["path,cap", "a.mp4"], r"m\.csv, line 2: 1 cells, but 2 columns"),
        ("m.csv", ["path,cap", 'a.mp4,"open'], "not CSV"),
        ("m.yaml", ["a: b"], r"must be a folder or one of \.txt \.json"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, name: str, lines: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_manifest(write_lines(tmp_path / name, *lines))


@pytest.mark.parametrize(
    ("name", "before"), [("m.json", '[{"path": "'), ("m.jsonl", '{"path": "'), ("m.csv", "path,cap\n")]
)
def test_other_encodings_are_errors(tmp_path: Path, name: str, before: str) -> None:
    (tmp_path / name).write_bytes(before.encode() + "größe".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}.* UTF-8"):
        read_manifest(tmp_path / name)


def test_missing_manifest_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.json does not exist"):
        read_manifest(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="has no clips"):
        read_manifest(tmp_path)


def test_a_table_without_captions_says_what_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**{key: FULL[key] for key in FULL if key != "cap"}, "captions": "x"}] * 2
    records = read_manifest(write_lines(tmp_path / "m.jsonl", *rows))
    assert [record.captions for record in records] == [(), ()]
    assert "none of 2 records has a caption (cap|caption|text), they have: path, num_frames" in caplog.text
    assert "captions" in caplog.text


def test_an_empty_caption_is_a_caption(tmp_path: Path) -> None:
    """As in the original, where a record without one is dropped. An empty cell of a table is none."""
    known = {key: FULL[key] for key in FULL if key != "cap"}
    rows = [{**known, **cap} for cap in ({"cap": ""}, {"cap": ["", "x"]}, {"cap": None}, {"cap": []}, {})]
    rows.append({**known, "cap": "", "text": "y"})
    write_lines(tmp_path / "m.json", json.dumps(rows))
    found = read_manifest(tmp_path / "m.json", probing="none")
    assert [record.captions for record in found] == [("",), ("", "x"), (), (), (), ("y",)]
    assert [drop.index for drop in select(found, settings(), allow_empty=True).dropped] == [2, 3, 4]
    table = write_lines(tmp_path / "m.csv", "path,caption", "a.mp4,", "b.mp4,x")
    assert [record.captions for record in read_manifest(table, probing="none")] == [(), ("x",)]


def test_a_rate_that_is_left_out_is_24(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in the original, if the frames are given; what has to be looked up in the file anyway is, whole."""
    write_clip(tmp_path / "a.mp4", frames=20, fps=12)
    size = {"path": "a.mp4", "cap": "x", "height": 24, "width": 32}
    write_lines(tmp_path / "1.json", [{**size, "num_frames": 20}, {**size, "num_frames": 20, "fps": 12}])
    write_lines(tmp_path / "2.json", [size, {**size, "path": "b.png"}, {**size, "num_frames": 18}])
    found = read_manifest(write_lines(tmp_path / "data.txt", ",1.json", ",2.json"))
    assert [(record.num_frames, record.fps) for record in found] == [
        *((20, 24.0), (20, 12.0), (20, 12.0), (1, None), (18, 24.0))
    ]
    (message,) = (text for text in caplog.messages if "no fps" in text)
    assert "data.txt: 2 of 5 records have num_frames but no fps: assuming 24 fps; add fps" in message


def test_folder_of_clips_with_captions_beside_them(tmp_path: Path) -> None:
    one = write_clip(tmp_path / "one.mp4", frames=12, fps=30000 / 1001)
    deep = write_clip(tmp_path / "sub" / "two.mp4", frames=20)
    image = write_image(tmp_path / "three.png", height=40)
    write_clip(tmp_path / ".hidden" / "four.mp4")
    one.with_suffix(".txt").write_text("  a clip\n")
    image.with_suffix(".txt").write_text("a picture")
    found = {record.path: record for record in read_manifest(tmp_path)}
    assert found[one] == Record(one, ("a clip",), num_frames=12, fps=30000 / 1001, height=24, width=32)
    assert found[deep] == Record(deep, (), num_frames=20, fps=24, height=24, width=32)
    assert found[image] == Record(image, ("a picture",), num_frames=1, height=40, width=32)
    assert len(found) == 3


def test_frame_numbers_can_be_read_from_the_file(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", frames=50, fps=48, height=32, width=32)
    data = write_lines(tmp_path / "m.jsonl", {"path": "a.mp4", "cap": "x", "cut": [3, 45]})
    sample = select(read_manifest(data), settings()).kept[0]
    assert sample.frame_numbers[0] >= 3
    assert read_frames(sample.record.path, start=sample.frame_numbers[-1], count=1).shape == (1, 32, 32, 3)


def test_what_the_manifest_says_is_not_looked_up(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", frames=20)
    rows = [
        {"path": "a.mp4", "cap": "x", "fps": 12},
        {"path": "a.mp4", "cap": "x", "height": 5, "cut": [15, 99]},
    ]
    given, cut = read_manifest(write_lines(tmp_path / "m.jsonl", *rows))
    assert (given.num_frames, given.fps, given.height, given.width) == (20, 12, 24, 32)
    assert (cut.num_frames, cut.fps, cut.height, cut.width) == (5, 24, 5, 32)


def test_unreadable_files_are_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_clip(tmp_path / "good.mp4", frames=20, height=32)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    (tmp_path / "folder.mp4").mkdir()
    rows = [
        {"path": "good.mp4", "cap": "x"},
        {"path": "broken.mp4", "cap": "x"},
        {"path": "gone.mp4", "cap": "x"},
        {"path": "folder.mp4", "cap": "x"},
        {"path": "good.mp4", "cap": "x", "cut": [20, 30]},
        {"path": "good.mp4", "cap": "x", "crop": [0, 33, 0, 24]},
        {"path": "nul\0.mp4", "cap": "x"},
    ]
    records = read_manifest(write_lines(tmp_path / "m.jsonl", *rows))
    assert [bool(record.error) for record in records] == [False] + [True] * 6
    assert "broken.mp4 (15 bytes) is not a video" in records[1].error
    assert "gone.mp4" in records[2].error
    assert "has 20 frames, cut is [20, 30]" in records[4].error
    assert "is 32 x 32 (height x width), crop is [0, 33, 0, 24]" in records[5].error
    assert "6 of 7 files cannot be read" in caplog.text
    assert "broken.mp4" in caplog.text
    selection: Selection = select(records, settings())
    assert [drop.reason for drop in selection.dropped] == [Reason.UNREADABLE] * 6
    with pytest.raises(ValueError, match=r"all 1 records are dropped: 1 unreadable .*broken\.mp4"):
        select(records[1:2], settings())


@pytest.fixture
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, which is empty."""
    folder = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def cache_of(manifest: Path) -> Path:
    """Where what probing found is remembered."""
    cache = probe_cache(manifest)
    assert cache is not None
    return cache


@pytest.mark.usefixtures("caches")
def test_probing_is_remembered_until_the_file_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_clip(tmp_path / "a.mp4", frames=12)
    data = write_lines(tmp_path / "m.jsonl", {"path": "a.mp4", "cap": "x"})
    cache = cache_of(data)
    assert read_manifest(data)[0].num_frames == 12
    # The remembered number is what comes back, so the file is not opened again.
    cache.write_text(cache.read_text().replace('"frames":12', '"frames":13'))
    assert read_manifest(data)[0].num_frames == 13
    os.utime(path, ns=(0, 0))
    assert read_manifest(data)[0].num_frames == 12
    whole = json.loads(cache.read_text())
    ((name, entry),) = whole["files"].items()
    wrong = [{name: {"size": 1}}, {name: 3}, [], None, {name: {**entry, "more": 1}}]
    for field in entry:
        for value in (None, [], "x", -1e400):
            wrong.append({name: {**entry, field: value}})
    for field in ("frames", "resampled", "height", "width"):
        wrong.append({name: {**entry, field: 0}})
    wrong += [{name: {**entry, "fps": fps}} for fps in ("0", "-24", "1/0")]
    for nonsense in ("[]", "{", "[" * 100_000, *(json.dumps({**whole, "files": files}) for files in wrong)):
        cache.write_text(nonsense)
        caplog.clear()
        assert read_manifest(data)[0].num_frames == 12
        assert "the cache of clip properties is ignored" in caplog.text, nonsense
        assert str(cache) in caplog.text
        assert json.loads(cache.read_text()) == whole
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "m.jsonl"]
    assert os.listdir(cache.parent) == [cache.name]


@pytest.mark.usefixtures("caches")
def test_what_an_earlier_version_remembered_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As it was written before frames of Matroska were counted, with no version."""
    write_clip(tmp_path / "a.mp4", frames=12)
    data = write_lines(tmp_path / "m.jsonl", {"path": "a.mp4", "cap": "x"})
    cache = cache_of(data)
    read_manifest(data)
    whole = json.loads(cache.read_text())
    entry = whole["files"][str(tmp_path / "a.mp4")]
    entry["frames"] = 99
    for old in (whole["files"], {**whole, "version": whole["version"] - 1}):
        cache.write_text(json.dumps(old))
        assert read_manifest(data)[0].num_frames == 12
        assert json.loads(cache.read_text())["files"][str(tmp_path / "a.mp4")]["frames"] == 12
    assert not caplog.messages


def test_every_file_is_held_against_the_manifest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_clip(tmp_path / "a.mp4", frames=12)
    write_image(tmp_path / "b.png")
    whole = {"cap": "x", "num_frames": 12, "fps": 24, "height": 24, "width": 32}
    clip, image = {"path": "a.mp4", **whole}, {"path": "b.png", **whole}
    rows = [
        clip,
        {**clip, "fps": 23.976},
        {**clip, "crop": [0, 16, 0, 8]},
        {**clip, "num_frames": 99},
        {**clip, "num_frames": 99, "cut": [2, 90]},
        {**clip, "num_frames": 7},
        image,
        {**clip, "height": 32, "width": 24},
        {**clip, "fps": 24.3},
        {**image, "width": 33},
        {**clip, "height": 25, "fps": 12},
    ]
    data = write_lines(tmp_path / "m.jsonl", *rows)
    given = read_manifest(data)
    assert [record.error for record in given] == [""] * len(rows)
    assert [record.num_frames for record in given][:6] == [12, 12, 12, 99, 88, 7]
    assert not caplog.messages
    found = read_manifest(data, probing="all")
    assert [record.num_frames for record in found][:7] == [12, 12, 12, 12, 10, 7, 1]
    assert [record.fps for record in found][:2] == [24, 23.976]
    clip_path, image_path = tmp_path / "a.mp4", tmp_path / "b.png"
    assert [record.error for record in found] == [
        *[""] * 7,
        f"{clip_path}: the manifest says 32 x 24 (height x width), the file is 24 x 32",
        f"{clip_path}: the manifest says 24.3 fps, the file has 24",
        f"{image_path}: the manifest says 24 x 33 (height x width), the file is 24 x 32",
        f"{clip_path}: the manifest says 25 x 32 (height x width), the file is 24 x 32; the manifest says "
        "12 fps, the file has 24",
    ]
    assert "4 of 11 files cannot be read, or are not what the manifest says: " in caplog.text


def test_probing_every_file_finds_what_is_gone(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "m.jsonl", FULL)
    assert not read_manifest(data)[0].error
    assert not read_manifest(data, probing="none")[0].error
    found = read_manifest(data, probing="all")[0]
    assert "a.mp4" in found.error
    assert (found.num_frames, found.height) == (50, 240)


@pytest.mark.usefixtures("caches")
def test_a_folder_that_cannot_be_written_to_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write_clip(tmp_path / "a.mp4")
    data = write_lines(tmp_path / "m.jsonl", {"path": "a.mp4", "cap": "x"})
    # A folder in the cache's place stops root, too, whom no permission stops.
    (cache_of(data) / "full").mkdir(parents=True)
    assert read_manifest(data)[0].num_frames == 12
    assert "the cache of clip properties cannot be written" in caplog.text
    assert os.listdir(cache_of(data).parent) == [cache_of(data).name]
