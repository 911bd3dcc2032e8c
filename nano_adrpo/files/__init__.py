"""Files: read with errors that name them, written whole or not at all."""

import json
import os
import re
from pathlib import Path

from nano_adrpo.errors import InputError, MissingFile


def read_text(file):
    """The text of a UTF-8 file, without a byte order mark."""
    if not Path(file).is_file():
        raise MissingFile(f"{file}: no such file")
    return decode(Path(file).read_bytes(), file)


def decode(content, where):
    """The text in the bytes of a UTF-8 file named `where`, its lines ended by \\n."""
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not a text file in UTF-8 ({error})") from None


def read_json(file):
    """The object in a JSON file, a dict."""
    return parse_json(read_text(file), file)


def read_json_lines(file):
    """Yields (line number from 1, dict) for every line of a JSON lines file that is not empty."""
    for number, line in enumerate(read_text(file).split("\n"), 1):  # splitlines() would end a line at U+2028 too
        if line.strip():
            yield number, parse_json(line, f"{file}, line {number}")


def parse_json(text, where, kind=dict):
    """The object in a JSON text, a dict, or with kind=list the list. `where` names the text in the message of an InputError."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a character, as in "\ud83d", is no text
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, kind):
        raise InputError(f"{where}: expected a JSON {'object' if kind is dict else 'list'}")
    return value


def write_json(file, value):
    """Writes `value` as JSON, whole or not at all."""
    replace(file, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def write_bytes(file, content):
    """Writes `content`, whole or not at all."""
    replace(file, lambda temporary: temporary.write_bytes(content))


def new_folder(path):
    """Creates the folder where it is missing; -> its Path. Refuses one with files in it: nothing is written over."""
    path = Path(path)
    if path.is_file() or path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path}: exists; expected a new or empty folder, since nothing is overwritten")
    path.mkdir(parents=True, exist_ok=True)
    return path


WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|ot|npz)|.*\.index(\.\w+)?\.json|\..*|.*\.py")


def copy_small(folder, out):
    """Copies the files of a model folder that are no weights, such as config.json and the tokenizer's. Folders, hidden files
    and code are left."""
    for file in sorted(Path(folder).iterdir()):
        if file.is_file() and not WEIGHTS.fullmatch(file.name):
            write_bytes(Path(out) / file.name, file.read_bytes())


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
