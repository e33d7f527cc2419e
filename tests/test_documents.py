"""JSON and TOML from outside: what is wrong with a file is one ValueError that names it."""

import os
from pathlib import Path

import pytest

from opensoraplan.documents import parse_json, read_json, read_json_object, read_shard_index, read_toml

BAD_JSON = {
    "empty": ("", "it is empty"),
    "nested": ("\n" + "[" * 100_000, "nested too deeply in line 2"),
    "too deep for code that recurses": ("\n" + "[" * 70 + "]" * 70, "nested too deeply in line 2"),
    "digits": ('{"a": "\\"",\n"b": [' + "1" * 10_000 + "]}", "too many digits in line 2"),
    "nan": ('{"a":\n\nNaN}', "NaN is not a number of JSON in line 3"),
    "infinity": ('{"NaN":\n -Infinity}', "-Infinity is not a number of JSON in line 2"),
    "huge": ('{"a":\n 1e999}', "the number 1e999 is too large in line 2"),
    "twice": ('{"a": 1, "a": 2}', "'a' is given twice"),
    "syntax": ('{"a": 1,\n "b" 2}', "in line 2, column 6"),
}
BAD_TOML = {
    "nested": ("\na = " + "[" * 100_000, "nested too deeply in line 2"),
    "dotted": (".".join(["a"] * 70) + " = 1", "nested too deeply"),
    "digits": ("b = 'a'\na = " + "1" * 10_000, "too many digits in line 2"),
    "syntax": ("a = 1\nb = \n", "Invalid value in line 2, column 5"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_an_error_with_the_file_and_the_reason(name: str, tmp_path: Path) -> None:
    content, reason = BAD_JSON[name]
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_json(path)
    assert str(error.value).startswith(str(path))
    assert len(str(error.value)) < len(str(path)) + 150


@pytest.mark.parametrize("name", BAD_TOML)
def test_bad_toml_is_an_error_with_the_file_and_the_reason(name: str, tmp_path: Path) -> None:
    content, reason = BAD_TOML[name]
    path = tmp_path / "a.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_toml(path)
    assert str(error.value).startswith(str(path))


def test_a_byte_order_mark_and_comments_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "#1"} # a comment')
    assert read_json(path, comments=True) == {"a": "#1"}
    with pytest.raises(ValueError, match="not valid JSON"):
        read_json(path)


def test_other_encodings_folders_and_other_values_are_refused(tmp_path: Path) -> None:
    latin, values = tmp_path / "latin.json", tmp_path / "list.json"
    latin.write_bytes(b'\n"\xe9"')
    values.write_text("[1]")
    with pytest.raises(ValueError, match=r"not UTF-8: .* in line 2"):
        read_json(latin)
    with pytest.raises(ValueError, match="one JSON object, got a list"):
        read_json_object(values)
    with pytest.raises(ValueError, match="is a folder"):
        read_json(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_json(tmp_path / "none.json")


def test_a_row_of_a_file_is_named_by_its_line() -> None:
    with pytest.raises(ValueError, match=r"^a\.jsonl is not valid JSON: .* in line 7, column 2"):
        parse_json("{", where="a.jsonl", line=7)


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ("[]", "has no weight_map"),
        ('{"a": 3}', "the file of a must be text, got a number"),
        ('{"a": "../../b.safetensors"}', "outside of its folder, '../../b.safetensors': refused"),
        ('{"a": "/b.safetensors"}', "outside of its folder"),
        ('{"a": ".."}', "outside of its folder"),
        ('{"a": "x\\\\b.safetensors"}', "outside of its folder"),
    ],
)
def test_shards_are_in_the_folder_of_their_index(weight_map: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.index.json"
    path.write_text(f'{{"weight_map": {weight_map}}}')
    with pytest.raises(ValueError, match=reason) as error:
        read_shard_index(path)
    assert str(error.value).startswith(str(path))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="is not a regular file"):
        read_json(tmp_path / "pipe.json")
