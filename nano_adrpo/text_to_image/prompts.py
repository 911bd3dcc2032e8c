"""Files of prompts, and files of encoded prompts.

Prompts are encoded once, before the transformer is loaded: SD3's text encoders are larger than its transformer. `cached` writes
the result to disk, so that a second run loads no encoder at all.
"""

import hashlib
import json
from pathlib import Path

import torch

from nano_adrpo import files
from nano_adrpo.errors import InputError
from nano_adrpo.files import safetensors
from nano_adrpo.text_to_image.condition import Condition
from nano_adrpo.text_to_image.sd3 import PARTS, PromptEncoder, Release


def read_prompts(file):
    """The prompts in a file: one a line, or in a .jsonl file a JSON object with a text "prompt" a line. Empty lines are passed
    over. Raises MissingFile, or InputError naming the file and the line."""
    if Path(file).suffix == ".jsonl":
        prompts = []
        for number, values in files.read_json_lines(file):
            if not isinstance(values.get("prompt"), str):
                raise InputError(f'{file}, line {number}: expected a JSON object with a text "prompt"')
            prompts.append(values["prompt"])
    else:
        # Not splitlines(), which ends a line at U+2028, too.
        prompts = [line.strip() for line in files.read_text(file).split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"{file}: no prompts in it; expected one a line")
    return prompts


def cached(file, prompts, negative_prompt, path, dtype=None, device=None, base=None, t5="load", t5_tokens=256):
    """-> (Condition of the B prompts, Condition of the one negative prompt), both on the CPU.

    file                 keeps them on disk: it is read if it was made of the same prompts and encoders in the same dtype, else
                         it is written. None keeps nothing
    path, …, t5_tokens   the encoders' release, see PromptEncoder.from_pretrained; device is where they run
    """
    texts = [*prompts, negative_prompt]

    def encode():
        return PromptEncoder.from_pretrained(path, dtype, device, base, t5, t5_tokens).encode(texts, device="cpu")

    if file is None:
        condition = encode()
    else:
        settings = [texts, str(dtype), torch.device(device or "cpu").type, t5 == "zeros", t5_tokens]
        wanted = fingerprint(Release(path, base), settings)
        condition = read_condition(file, wanted)
        if condition is None:
            Path(file).parent.mkdir(parents=True, exist_ok=True)  # fails before the encoders are loaded, not after
            condition = encode()
            safetensors.save(file, {**vars(condition), "fingerprint": wanted})
    return condition[:-1], condition[-1:]


def read_condition(file, wanted):
    """-> the Condition in `file`; None where the file is absent or has another fingerprint than the wanted one."""
    if not Path(file).exists():
        return None
    stored = safetensors.Checkpoint(file)
    if stored.home.keys() != {"context", "pooled", "fingerprint"}:
        raise InputError(f"{file}: not a file of prompt embeddings; it is not written over")
    if not torch.equal(stored.read("fingerprint"), wanted):
        return None
    return Condition(stored.read("context"), stored.read("pooled"))


def fingerprint(release, settings):
    """SHA-256, as 32 bytes, of the settings and of all that the encoders are made from: of small files the content, of weight
    files the header, the size and the time of change, since to hash 11 GB takes as long as to load them."""
    config, parts = release.transformer_config(), [part for part in PARTS if part.startswith(("text_encoder", "tokenizer"))]
    listed = [(release.expects(part), part in release.index) for part in parts]  # T5 may be there, zeros, or no tokens at all
    digest = hashlib.sha256(json.dumps([settings, listed, config.joint_attention_dim, config.pooled_projection_dim]).encode())
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
