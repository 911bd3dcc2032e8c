"""Text and JSON: what is damaged is named with its line; what is written is whole."""

import pytest

from nano_adrpo import files


def test_json_is_read_or_named(tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')  # with a byte order mark, as some editors write it
    assert files.read_json(file) == {"a": "é"}
    with pytest.raises(FileNotFoundError, match="no-such.json: no such file"):
        files.read_json(tmp_path / "no-such.json")
    for content, message in (
        (b'{"a": ', "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"a": "\\ud83d"}', "not valid JSON"),  # half a character
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": "\xff"}', "not a text file in UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{file}: {message}") as error:
            files.read_json(file)
        assert "\n" not in str(error.value)


def test_json_lines_are_numbered(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": "\u2028"}\n\n{"b": 2}\n', encoding="utf-8")
    assert list(files.read_json_lines(file)) == [(1, {"a": "\u2028"}), (3, {"b": 2})]
    file.write_text('{"a": 1}\n\n{"b": \n')
    with pytest.raises(ValueError, match=f"^{file}, line 3: not valid JSON"):
        list(files.read_json_lines(file))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "x"
    files.write_bytes(file, b"before")

    def fail(temporary):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.replace(file, fail)
    assert file.read_bytes() == b"before" and [path.name for path in tmp_path.iterdir()] == ["x"]
