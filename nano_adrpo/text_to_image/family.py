"""What the families of models differ in, as a record, and where the parts of a release lie.

A release has a transformer, an autoencoder (VAE), text encoders and their tokenizers, and a scheduler. There are two public
layouts: diffusers' pipeline folder, which has a folder for each part and lists them in model_index.json; and a single file,
whose keys begin differently for each part and which never has the tokenizers.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from nano_adrpo import files
from nano_adrpo.errors import InputError, MissingFile
from nano_adrpo.files import safetensors

FOLDER = "expected a folder in diffusers' pipeline layout or a single file"


class Part(NamedTuple):
    what: str  # what it is for, as messages say it
    prefix: str | None = None  # how its keys begin in the single file
    library: str = "diffusers"  # its entry in model_index.json
    name: str | None = None


class Latents(NamedTuple):
    """The sizes of what flows."""

    channels: int
    patch: int  # the side of a token, in latent pixels
    side: int  # the height and width that the model was trained at, in latent pixels
    most: int | None = None  # the largest side, in patches; None: any


@dataclasses.dataclass(frozen=True)
class Family:
    name: str  # as messages say it
    pipelines: tuple[str, ...]  # diffusers' classes of the whole, in model_index.json; the first is written
    parts: dict[str, Part]
    telltale: (
        str | None
    )  # what its transformer's keys have, and no other family's, in a single file; None: there is no such file
    transformer: type  # called as transformer(latents, sigma, *the tensors of a Condition)
    autoencoder: type
    encoder: type  # see condition.Encoder
    scheduler: type  # scheduler.Scheduler or a subclass
    latents: Callable  # (the transformer's config) -> Latents
    targets: tuple[str, ...]  # the layers that adapters go on, see lora.add
    t5: str | None = None  # the part that is T5, None where there is none

    def open_encoder(self, path, dtype, device, base, lower=None, **options):
        """The text encoders of a release, see TextToImage.from_pretrained."""
        encoder = self.encoder.from_pretrained(path, dtype, device, base, **options)
        encoder.lower = encoder.lower if lower is None else lower
        return encoder


class Release:
    """Finds the parts of a release of `family`: in `path`, a folder or a single file, or else in the folder `base`."""

    def __init__(self, path, base, family):
        self.path, self.base, self.family = Path(path), base and Path(base), family
        self.keys = keys(path)
        self.folders = [folder for folder in (self.path, self.base) if folder and folder.is_dir()]
        self.index = {}  # model_index.json: part -> [library, class], [null, null] for a part that the model does without
        for folder in self.folders[::-1]:
            if (file := folder / "model_index.json").is_file():
                self.index |= files.read_json(file)
                if (name := self.index.get("_class_name", family.pipelines[0])) not in family.pipelines:
                    raise InputError(f"{file}: '_class_name' is {name!r}; expected {family.pipelines[0]!r}")

    def find(self, part):
        """-> the folder or the single file that has `part`; None where none has."""
        prefix = self.family.parts[part].prefix if part in self.family.parts else None
        if self.keys is not None and (part == "transformer" or prefix and any(key.startswith(prefix) for key in self.keys)):
            return self.path
        return next((folder / part for folder in self.folders if (folder / part).is_dir()), None)

    def expects(self, part):
        """Whether the model has `part`, even if its files are missing. A single file is a public release's, which has all."""
        if self.keys is not None and self.find(part) == self.path:
            return True
        if part in self.index:
            return self.index[part] not in (None, [None, None])
        return self.keys is not None or self.find(part) is not None

    def need(self, part):
        """As find, but raises MissingFile where none has it."""
        if found := self.find(part):
            return found
        what, nor = self.family.parts[part].what, f", nor in {self.base}" if self.base else ""
        if self.keys is not None:
            raise MissingFile(f"{self.path}: no {part} in this file{nor}; {what}; base=FOLDER can bring it")
        missing = f"{self.path}: no transformer/ in it" if part == "transformer" else f"{self.path / part}: no such folder"
        raise MissingFile(f"{missing}{nor}; {what}")

    def transformer_config(self):
        """Read from config.json or the headers alone. The dtype is given because a float8 file has none to compute in."""
        return self.family.transformer.from_pretrained(self.need("transformer"), torch.float32, "meta").config


def family_of(path, base, families):
    """The family of a release, told by its transformer: the keys of a single file; the pipeline's class in model_index.json or
    the transformer's in its config.json. Where nothing tells it is the first, whose loader then says what it misses.

    Raises MissingFile where path or base is not there, InputError for a pipeline of no family."""
    path = Path(path)
    if not path.exists():  # asked here, since base must not stand in for a mistyped path
        raise MissingFile(f"{path}: no such file or folder; {FOLDER}")
    if base and not Path(base).is_dir():
        raise MissingFile(f"{base}: no such folder; expected one in diffusers' pipeline layout")
    if path.is_file():
        return next((f for f in families if f.telltale and any(f.telltale in key for key in keys(path))), families[0])
    for folder in (path, *([Path(base)] if base else [])):
        index, config = folder / "model_index.json", folder / "transformer" / "config.json"
        if index.is_file() and (name := files.read_json(index).get("_class_name")) is not None:
            for family in families:
                if name in family.pipelines:
                    return family
            known = " or ".join(repr(family.pipelines[0]) for family in families)
            raise InputError(f"{index}: '_class_name' is {name!r}; expected {known}")
        if config.is_file():
            name = files.read_json(config).get("_class_name")
            return next((f for f in families if f.parts["transformer"].name == name), families[0])
    return families[0]


def keys(path):
    """The keys of a single file; None of a folder."""
    return safetensors.Checkpoint(path).home if Path(path).is_file() else None
