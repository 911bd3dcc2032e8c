"""Files of prompts, and files of encoded prompts.

Prompts are encoded once, before the transformer is loaded: SD3's text encoders, for one, are larger than it. `cached` writes
the result to disk, so that a second run loads no encoder at all.
"""

import csv
import dataclasses
import hashlib
import io
import json
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch

from nano_adrpo import files
from nano_adrpo.errors import InputError
from nano_adrpo.files import safetensors
from nano_adrpo.text_to_image import FAMILIES
from nano_adrpo.text_to_image.condition import Condition
from nano_adrpo.text_to_image.family import Release, family_of

NAMES = ("prompt", "prompts")  # of the key or column that a prompt stands under; "Prompts" is DrawBench's


class Prompt(NamedTuple):
    text: str
    category: str = ""  # "": none


def read_prompts(file):
    """The prompts in a file, [Prompt], see `read_rows`."""
    return [Prompt(row["prompt"], str(row.get("category") or "").strip()) for row in read_rows(file)]


def read_rows(file, names=NAMES):
    """The rows of a file of prompts: dicts with a text under "prompt" and whatever else the row holds, such as "category".

    file    its ending, in capitals or not, tells its format:
              .txt or none      a prompt a line, its first character may be "#"; empty lines are passed over
              .jsonl, .ndjson   a JSON object a line
              .json             a list of texts and objects
              .csv, .tsv        a table whose first line names the columns (in capitals or not), with commas or with tabs
    names   the keys or columns that a prompt may stand under; the first that a row has counts

    Raises MissingFile, or InputError in one line with the file and the place in it.
    """
    ending = Path(file).suffix.lower()
    if ending in (".jsonl", ".ndjson"):
        rows = [(f"line {number}", values) for number, values in files.read_json_lines(file)]
    elif ending == ".json":
        listed = enumerate(files.parse_json(files.read_text(file), file, list), 1)
        rows = [(f"item {number}", {"prompt": item} if isinstance(item, str) else item) for number, item in listed]
    elif ending in (".csv", ".tsv"):
        rows = list(read_table(file, "," if ending == ".csv" else "\t", names))
    elif ending in (".txt", ""):
        rows = read_lines(file, names)
    else:
        known = "a prompt a line in .txt, or .json, .jsonl, .ndjson, .csv, .tsv"
        raise InputError(f"{file}: the ending {ending!r} is no known format of prompts; expected {known}")
    if not rows:
        raise InputError(f"{file}: no prompts in it; expected at least one")
    quoted = " or ".join(f'"{name}"' for name in names)
    for where, row in rows:
        prompt = next((row[name] for name in names if name in row), None) if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"{file}, {where}: expected an object with a text {quoted}")
        row["prompt"] = prompt
    return [row for _, row in rows]


def read_lines(file, names):
    """[(place, row)] of a file with a prompt a line. Refuses JSON and tables, which are no prompts a line."""
    lines = [line.strip() for line in files.read_text(file).split("\n")]  # splitlines() would end a line at U+2028, too
    lines = [(f"line {number}", {"prompt": line}) for number, line in enumerate(lines, 1) if line]
    first = lines[0][1]["prompt"] if lines else ""
    # Brackets alone do not make JSON: some prompts have them, for example [cat:dog:0.5] or {red|blue} roses.
    if re.fullmatch(r'[\[{]\s*[\]}]?|(\{\s*"|\[\s*["{\[]).*', first):
        raise InputError(f"{file}, {lines[0][0]}: this is JSON; expected the ending .json, or .jsonl for an object a line")
    if any(cell.strip(' "').lower() in names for mark in ",;\t" for cell in first.split(mark)):
        raise InputError(f"{file}, {lines[0][0]}: this is the first line of a table; expected the ending .csv or .tsv")
    return lines


def read_table(file, delimiter, names):
    """Yields (place, row) of a table with one of the columns `names`; the names of its columns are turned to small letters."""
    text, header = files.read_text(file), None
    lines = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    if delimiter == "\t" and not quoted(text):
        lines = csv.reader(io.StringIO(text), delimiter=delimiter, quoting=csv.QUOTE_NONE)
    try:
        for cells in filter(None, lines):
            where = f"line {lines.line_num}"
            if header is None:
                header = [cell.strip().lower() for cell in cells]
                if not any(header.count(name) == 1 for name in names):
                    found = textwrap.shorten(repr(cells), 80)
                    raise InputError(f"{file}, {where}: the columns are {found}; expected one that is called {names[0]!r}")
            elif len(cells) != len(header):
                raise InputError(f"{file}, {where}: {len(cells)} cells; expected {len(header)}, one for each column")
            else:
                yield where, dict(zip(header, cells))
    except csv.Error as error:
        raise InputError(f"{file}, line {lines.line_num}: not a table ({error})") from None


def quoted(text):
    """Whether a table between tabs has quotes around cells as CSV does. By its standard it has none, as PartiPrompts.tsv."""
    try:
        return bool(list(csv.reader(io.StringIO(text), delimiter="\t", strict=True)))
    except csv.Error:
        return False


def cached(file, prompts, negative_prompt, path, dtype=None, device=None, base=None, t5="load", lower=None, **options):
    """-> (Condition of the B prompts, Condition of the one negative prompt), both on the CPU.

    file      keeps them on disk: it is read if it was made of the same prompts and encoders in the same dtype, else it is
              written. None keeps nothing
    path, …   the encoders' release and its options, see TextToImage.from_pretrained; device is where the encoders run
    """
    family = family_of(path, base, FAMILIES)
    check_t5(path, base, t5)

    def encode():
        encoder = family.open_encoder(path, dtype, device, base, lower, t5=t5, **options)
        return encoder.encode_both(prompts, negative_prompt, device="cpu")

    if file is None:
        return encode()
    lower = family.encoder.lower if lower is None else lower
    options_read = {**options, "t5": t5 == "zeros", "lower": lower}  # a streamed T5 is the same one
    settings = [family.name, prompts, negative_prompt, str(dtype), torch.device(device or "cpu").type, options_read]
    wanted = fingerprint(Release(path, base, family), settings)
    found = read_conditions(file, wanted)
    if found is None:
        files.check_writable(Path(file).parent)  # before the encoders are loaded, not after
        found = encode()
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        tensors = {prefix + name: x for prefix, some in zip(PREFIXES, found) for name, x in some.tensors().items()}
        safetensors.save(file, {**tensors, "fingerprint": sealed(wanted, tensors)})
    return found


def check_t5(path, base, t5):
    """Raises InputError for a choice of how T5 is read where the release has none."""
    family = family_of(path, base, FAMILIES)
    release = Release(path, base, family)
    listed = t5 == "zeros" and family.t5 in release.index  # as without T5, which is what such a release is saved as
    if t5 != "load" and not (family.t5 and (release.expects(family.t5) or listed)):
        raise InputError(f"--t5 {t5}: {path} has no T5; expected load, the default")


PREFIXES = ("", "negative.")  # of the tensors' names in the file: the prompts', the negative prompt's


def read_conditions(file, wanted):
    """-> the two Conditions in `file`; None where the file is absent, damaged, or of another fingerprint than the wanted."""
    if not Path(file).exists():
        return None
    stored = safetensors.Checkpoint(file)
    fields = [field.name for field in dataclasses.fields(Condition)]
    known = {"fingerprint", *(prefix + name for prefix in PREFIXES for name in fields)}
    if not {"fingerprint", "context"} <= stored.home.keys() <= known:
        raise InputError(f"{file}: not a file of prompt embeddings; it is not written over")
    tensors = {key: stored.stored(key) for key in stored.home}
    if data(tensors.pop("fingerprint")) != data(sealed(wanted, tensors)):
        return None
    return tuple(Condition(**{name: tensors.get(prefix + name) for name in fields}) for prefix in PREFIXES)


def sealed(wanted, tensors):
    """SHA-256, as 32 bytes, of the wanted fingerprint and of {name: tensor}: a file with a bit flipped is another one's."""
    digest = hashlib.sha256(data(wanted))
    for name, tensor in sorted(tensors.items()):
        digest.update(repr([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(data(tensor))
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def data(tensor):
    """The bytes of a tensor."""
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def fingerprint(release, settings):
    """SHA-256, as 32 bytes, of the settings and of all that the encoders are made from: of small files the content, of weight
    files the header, the size and the time of change, since to hash 11 GB takes as long as to load them."""
    parts = [part for part in release.family.parts if part.startswith(("text_encoder", "tokenizer"))]
    listed = [(release.expects(part), part in release.index) for part in parts]  # T5 may be there, zeros, or no tokens at all
    config = dataclasses.asdict(release.transformer_config())
    digest = hashlib.sha256(json.dumps([settings, listed, config]).encode())
    for part in filter(release.expects, parts):
        where = release.find(part)
        for file in sorted(where.iterdir()) if where and where.is_dir() else [where] if where else []:
            if file.suffix == ".safetensors" or file == where:
                size = file.stat().st_size
                with file.open("rb") as opened:  # the length of a damaged file's header may be nonsense
                    header = opened.read(min(int.from_bytes(opened.read(8), "little"), size))
                digest.update(repr([part, file.name, size, file.stat().st_mtime_ns, header]).encode())
            elif file.suffix in (".json", ".txt"):
                digest.update(repr([part, file.name, file.read_bytes()]).encode())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
