"""Files: read with errors that name them, written whole or not at all."""

import json
import os
from pathlib import Path

from nano_adrpo.errors import InputError, MissingFile


def read_text(file):
    """The text of a UTF-8 file, without a byte order mark."""
    if not Path(file).is_file():
        raise MissingFile(f"{file}: no such file")
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a text file in UTF-8 ({error})") from None


def read_json(file):
    """The object in a JSON file, a dict."""
    return parse_json(read_text(file), file)


def read_json_lines(file):
    """Yields (line number from 1, dict) for every line of a JSON lines file that is not empty."""
    for number, line in enumerate(read_text(file).split("\n"), 1):  # splitlines() would end a line at U+2028 too
        if line.strip():
            yield number, parse_json(line, f"{file}, line {number}")


def parse_json(text, where):
    """The object in a JSON text, a dict. `where` names the text in the message of an InputError."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a character, as in "\ud83d", is no text
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object")
    return value


def write_json(file, value):
    """Writes `value` as JSON, whole or not at all."""
    replace(file, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def write_bytes(file, content):
    """Writes `content`, whole or not at all."""
    replace(file, lambda temporary: temporary.write_bytes(content))


def replace(file, write):
    """Calls `write` with the path of a new file beside `file`, flushes that to the disk and renames it over `file`: at every
    instant one whole version exists."""
    file = Path(file)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")  # another run may write the same file, such as embeddings
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives a new file; safetensors would make it private
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
