"""JSON and TOML from outside: what is wrong with a file is one ValueError that names it."""

from pathlib import Path

import pytest

from opensoraplan.documents import read_json, read_json_object, read_toml

BAD_JSON = {
    "empty": ("", "it is empty"),
    "nested": ("[" * 100_000, "nested too deeply"),
    "digits": ("[" + "1" * 10_000 + "]", "too many digits"),
    "nan": ('{"a": NaN}', "NaN is not a number"),
    "infinity": ('{"a": -Infinity}', "-Infinity is not a number"),
    "huge": ('{"a": 1e999}', "the number 1e999 is too large"),
    "twice": ('{"a": 1, "a": 2}', "'a' is there twice"),
    "syntax": ('{"a": 1,\n "b" 2}', "line 2"),
}
BAD_TOML = {
    "nested": ("a = " + "[" * 100_000, "nested too deeply"),
    "digits": ("a = " + "1" * 10_000, "too many digits"),
    "syntax": ("a = 1\nb = \n", "line 2"),
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
    with pytest.raises(ValueError, match="is not a file"):
        read_json(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_json(tmp_path / "none.json")
