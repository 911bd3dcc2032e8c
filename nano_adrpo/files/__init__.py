"""Files: read with errors that name them, written whole or not at all."""

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path

from nano_adrpo.errors import InputError, MissingFile, NotWritten, writing


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


DEEPEST = 64  # lists and objects within each other: Python's own copies and encoders end at a few hundred


def parse_json(text, where, kind=dict):
    """The object in a JSON text, a dict, or with kind=list the list. `where` names the text in the message of an InputError."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a character, as in "\ud83d", is no text
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, kind):
        raise InputError(f"{where}: expected a JSON {'object' if kind is dict else 'list'}")
    inside = [value]
    for _ in range(DEEPEST):
        found = (each.values() if isinstance(each, dict) else each for each in inside)
        inside = [each for some in found for each in some if isinstance(each, dict | list)]
    if inside:
        raise InputError(f"{where}: not valid JSON (more than {DEEPEST} lists and objects within each other)")
    return value


def read_index(file):
    """The files that an index lists, {key: name}: {"weight_map": {…}} with plain names, which lie beside the index."""
    listed = read_json(file).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise InputError(f"{file}: expected a 'weight_map' from keys to shard files")
    for name in set(listed.values()):
        plain_name(name, file)
    return listed


def plain_name(name, where):
    """-> name, which a file `where` gives. Refuses all but the plain name of a file: no folders, nothing outside."""
    if name in ("", ".", "..") or set(name) & {"/", "\\", "\0"} or len(name.encode()) > 255:
        raise InputError(f"{where}: {name!r}: expected the plain name of a file beside it")
    return name


def write_json(file, value):
    """Writes `value` as JSON, whole or not at all."""
    replace(file, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def write_bytes(file, content):
    """Writes `content`, whole or not at all."""
    replace(file, lambda temporary: temporary.write_bytes(content))


def check_writable(folder):
    """Raises NotWritten where nothing can be written in `folder` or, if it is missing, in the nearest one above it."""
    folder = Path(folder).absolute()
    nearest = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    with writing(folder), tempfile.TemporaryFile(dir=nearest):
        pass


def refuse_used(path):
    """Refuses a file, and a folder with files in it: nothing is written over."""
    path = Path(path)
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path}: exists; expected a new or empty folder, since nothing is overwritten")


@contextlib.contextmanager
def new_folder(path):
    """The path of a new folder, which becomes `path` at the end (see `beside`). Refuses a `path` with files in it."""
    refuse_used(path)
    path = Path(path).resolve()  # of a link to an empty folder, that folder
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as folder:
        folder.mkdir()
        yield folder


WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|ot|npz)|.*\.index(\.\w+)?\.json|\..*|.*\.py")


# What transformers opens beside them: further chat templates, and Qwen2.5-Omni's voices, which are copied and never read.
BESIDE = "additional_chat_templates/*.jinja", "spk_dict.pt"


def copy_small(folder, out):
    """Copies the files of a model folder that are no weights, such as config.json and the tokenizer's, and those in BESIDE.
    Other folders, hidden files and code are left."""
    folder = Path(folder)
    small = [file for file in folder.iterdir() if not WEIGHTS.fullmatch(file.name)]
    for file in sorted([*small, *(file for name in BESIDE for file in folder.glob(name))]):
        if file.is_file():
            (copy := Path(out) / file.relative_to(folder)).parent.mkdir(exist_ok=True)
            write_bytes(copy, file.read_bytes())


def replace(file, write):
    """Calls `write` with the path of a new file, flushes that to the disk and renames it over `file`. Raises NotWritten, with
    the file as it was."""
    try:
        with beside(file) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # what the user's umask gives a new file; safetensors would make it private
            write(temporary)
            temporary.chmod(mode)
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
    except OSError as error:
        raise NotWritten(f"{file}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def beside(path):
    """A path for a new file or folder that is renamed to `path` at the end, if nothing failed: at every instant one whole
    version of it exists, or none.

    The new one grows in a folder beside `path`, which has a name that nobody can guess and is open to its owner alone, so that
    no link can be put in its way."""
    path = Path(path)
    hidden = {"prefix": f".{path.name[:40]}.", "suffix": ".tmp", "dir": path.parent}
    with tempfile.TemporaryDirectory(**hidden, ignore_cleanup_errors=True) as folder:
        yield Path(folder) / path.name
        os.replace(Path(folder) / path.name, path)
