"""Text and JSON: what is damaged is named with its line; what is written is whole."""

import json
from pathlib import Path

import pytest
import torch

from nano_adrpo import files
from nano_adrpo.errors import InputError, MissingFile, NotWritten, about
from nano_adrpo.files import safetensors


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


def test_what_is_nested_deeper_than_pythons_own_tools_go_is_refused(tmp_path):
    for depth, whole in ((60, True), (70, False), (900, False), (100_000, False)):
        for content in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            try:
                files.parse_json('{"x": ' + content + "}", "f")
                assert whole
            except InputError as error:
                assert not whole and str(error).startswith("f: not valid JSON (")


def test_an_index_names_files_beside_it(tmp_path):
    index = tmp_path / "i.json"
    for name in ("../x", "/etc/passwd", "sub/../../x", "sub/x", "..", ".", "", "a\0b", "a" * 256, "..\\x"):
        index.write_text(json.dumps({"weight_map": {"a": "x.bin", "b": name}}))
        with pytest.raises(InputError, match="expected the plain name of a file beside it"):
            files.read_index(index)
    for name in ("x.bin", "..x", "a b", "é.safetensors"):
        assert files.plain_name(name, "i") == name


def test_a_new_file_follows_no_link_and_a_new_folder_is_whole(tmp_path):
    (tmp_path / "theirs").write_text("mine")
    seen = []

    def write(temporary):
        seen.append(temporary.parent.name)
        assert temporary.parent.stat().st_mode & 0o77 == 0  # nobody else can put a link there
        temporary.write_text("new")

    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    for _ in range(2):
        files.replace(tmp_path / "link", write)
    assert (tmp_path / "theirs").read_text() == "mine" and not (tmp_path / "link").is_symlink() and len(set(seen)) == 2
    with pytest.raises(ZeroDivisionError), files.new_folder(tmp_path / "out") as new:
        (new / "half").touch()
        raise ZeroDivisionError
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "link"}
    with files.new_folder(tmp_path / "out") as new:
        (new / "whole").touch()
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    with pytest.raises(InputError, match="out: exists; expected a new or empty folder"), files.new_folder(tmp_path / "out"):
        pass


def test_what_cannot_be_written_is_named_in_one_line(tmp_path):
    for file, reason in ((tmp_path / "no" / "x.json", "No such file or directory"), (Path("/dev/null/x"), "Not a directory")):
        with pytest.raises(NotWritten, match=f"^{file}: cannot be written .{reason}"):
            files.write_json(file, {})
        with pytest.raises(OSError, match=f"^{file}: cannot be written .{reason}"):
            safetensors.save(file, {"a": torch.ones(1)})


def test_a_message_is_one_line_fit_to_print():
    line = "a\x1b[31m\nb\u202e\ud83d\u2028 β ← é"
    for kind in (InputError, MissingFile, NotWritten):
        assert str(kind(line)) == r"a\x1b[31m\nb\u202e\ud83d\u2028 β ← é"
    with pytest.raises(MissingFile) as error, about("x\n"):
        raise MissingFile("y" * 5000 + "end")
    assert str(error.value).startswith(r"x\n: yyy") and str(error.value).endswith("yend") and len(str(error.value)) < 1010
