"""Adapters in files: PEFT's folder (adapter_config.json, adapter_model.safetensors) and diffusers' file.

`Config` says which layers have an adapter, and of what rank and strength, as peft does; `Adapter` is what was read. Layer names
are those of diffusers and transformers. lora.py puts adapters on a model.
"""

import dataclasses
import math
import re
from pathlib import Path

import torch

from nano_adrpo import files
from nano_adrpo.errors import InputError, MissingFile
from nano_adrpo.files import config as configs
from nano_adrpo.files import patterns, safetensors
from nano_adrpo.files.config import Index

PREFIX = "base_model.model."  # PEFT wraps a model in two more, and its files' keys say so
PIPELINE = "transformer."  # in a file of diffusers' pipelines, beside which text encoders' adapters may lie
# Of Qwen2.5-Omni: "model." in transformers' classes, and the parts beside the text model, which have no adapters here.
OMNI = r"(thinker\.model\.language_model|model\.language_model|thinker\.model)\."
NOT_TEXT = r"(.*\.)?(audio_tower|visual|talker|token2wav)\..*"
MATRICES = ("lora_A", "lora_B")
OLDER = {".lora.down.weight": ".lora_A.weight", ".lora.up.weight": ".lora_B.weight"}  # as diffusers called them before PEFT

# Keys of adapter_config.json that, if set, change what the model computes in ways not implemented here.
UNSET = (None, False, [], {}, "none")
UNSUPPORTED = (
    "use_dora", "bias", "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
IMPLEMENTED = {
    "peft_type": ("LORA",),
    **dict.fromkeys(UNSUPPORTED, UNSET),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # other ways to start change the model's own weights
}
# Other layouts and kinds of adapters, by what is in their keys.
FOREIGN = {
    r"lora_(unet|te\d?|transformer)_.*|.*\.lora_(down|up)\..*": "kohya's layout",
    r".*\.(lokr|hada|oft)_.*": "a LyCORIS adapter",
    r".*(dora_scale|lora_magnitude_vector).*": "a DoRA adapter",
    r".*\.processor\..*|(double|single)_blocks\..*": "x-flux's layout",
    r"diffusion_model\..*": "ComfyUI's layout",
}


@dataclasses.dataclass
class Config:
    """What all adapters of a model have in common, under the names and with the meaning of PEFT's adapter_config.json."""

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] | str  # ends of names; or a regular expression of whole names, or "all-linear"
    use_rslora: bool = False  # the strength is alpha / √rank
    rank_pattern: dict | None = None  # {regular expression of the end of a name: that layer's rank}
    alpha_pattern: dict | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[Index, ...] | Index | None = None  # only in blocks of these numbers
    layers_pattern: tuple[str, ...] | str | None = None  # what the list of blocks is called; None: any name

    def __post_init__(self):
        for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
            for key, value in (getattr(self, name) or {}).items():
                if not configs.fits(value, kind):
                    raise InputError(f"key '{name}' is {value!r} for {key!r}; expected {configs.describe(kind)}")
        whole = [names for names in (self.target_modules, self.exclude_modules) if isinstance(names, str)]
        for pattern in [*whole, *(self.rank_pattern or {}), *(self.alpha_pattern or {}), *listed(self.layers_pattern)]:
            patterns.match(pattern, "")  # says where it is none
        if isinstance(self.target_modules, str) and (listed(self.layers_to_transform) or self.layers_pattern):
            raise InputError("keys 'layers_to_transform' and 'layers_pattern': expected only with a list of target_modules")

    def covers(self, name):
        """Whether the linear layer of this name has an adapter."""
        targets, blocks = self.target_modules, listed(self.layers_to_transform)
        if self.exclude_modules and named_by(name, self.exclude_modules):
            return False
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            return name not in HEADS
        if isinstance(targets, str) or name in targets or not blocks:
            return named_by(name, targets)
        lists = [(pattern, r"(?:^|.*?\.){}") for pattern in listed(self.layers_pattern)] or [(r"[^.]*", r".*?\.{}")]
        found = (patterns.match(pattern, name, rf"{form}\.(?P<number>\d{{{{1,9}}}})\.") for pattern, form in lists)
        number = next((int(groups["number"]) for groups in found if groups), None)
        return named_by(name, targets) and number in blocks

    def rank(self, name):
        return self.r if (value := of_pattern(name, self.rank_pattern)) is None else value

    def scale(self, name):
        """What B·A is multiplied by."""
        alpha = self.lora_alpha if (value := of_pattern(name, self.alpha_pattern)) is None else value
        return alpha / (math.sqrt(self.rank(name)) if self.use_rslora else self.rank(name))


ALL_LINEAR, HEADS = "all-linear", ("lm_head", "score")  # a decoder's and a reward model's are not meant by it


def listed(value):
    """One value, several, or None, as a list."""
    return [] if value is None else [value] if isinstance(value, str | int) else list(value)


def named_by(name, names):
    """Whether a regular expression matches the whole name, or the name is one of several or ends in one."""
    if isinstance(names, str):
        return patterns.match(names, name, whole=True) is not None
    return any(f".{name}".endswith(f".{end}") for end in names)


def of_pattern(name, pattern):
    """The value of the first regular expression that matches the end of the name, from a dot or the start on; or None."""
    return next(
        (value for key, value in (pattern or {}).items() if patterns.match(key, name, r"(.*\.)?({})$") is not None), None
    )


def find(path):
    """-> the file of an adapter's matrices, and PEFT's config of it or None."""
    path = Path(path)
    if path.is_file():
        config = path.with_name("adapter_config.json")
        return path, config if path.name == "adapter_model.safetensors" and config.is_file() else None
    if not path.exists():
        raise MissingFile(f"{path}: no such file or folder; expected an adapter's")
    config, here = path / "adapter_config.json", sorted(path.glob("*.safetensors"))
    names = [file.name for file in here]
    if config.is_file() or not here or "adapter_model.safetensors" in names:
        if not config.is_file():
            raise MissingFile(f"{config}: no such file, nor another adapter; expected PEFT's folder, diffusers' folder or file")
        return path / "adapter_model.safetensors", config
    if "pytorch_lora_weights.safetensors" in names:
        return path / "pytorch_lora_weights.safetensors", None
    if len(here) > 1:
        raise InputError(f"{path}: holds {len(here)} safetensors files; expected one adapter, or the path of one")
    return here[0], None


class Adapter:
    """An adapter's files, opened: its config, and of each layer where the matrices are. Raises InputError naming file and key,
    MissingFile.

    path     PEFT's folder (adapter_config.json, adapter_model.safetensors); or diffusers' file, whatever its name, or the
             folder that it alone is in
    config   the Config
    names    the layers in the file, under the names of diffusers and transformers
    beside   which text encoders' adapters the file holds too; they are not read
    """

    def __init__(self, path):
        file, config = find(path)
        if not file.is_file():
            stem = file.name.removesuffix(".safetensors")
            safetensors.Checkpoint(path, stem)  # raises, and tells of the command that converts a pickle
        keys = list(safetensors.open_file(file).keys())
        for pattern, kind in FOREIGN.items():
            if found := next((key for key in keys if re.fullmatch(pattern, key)), None):
                raise InputError(f"{file}: key {found!r} is of {kind}; expected PEFT's or diffusers' keys (…lora_A.weight)")
        prefix = next((some for some in (PREFIX, PIPELINE) if any(key.startswith(some) for key in keys)), "")
        if not prefix and (alone := {key.partition(".")[0] for key in keys if re.match(r"text_encoder|unet\.", key)}):
            raise InputError(f"{file}: holds adapters of {', '.join(sorted(alone))} alone; expected a transformer's")
        others = [key for key in keys if not key.startswith(prefix)]
        self.beside = sorted({key.partition(".")[0] for key in others})
        if unknown := [key for key in others if prefix != PIPELINE or not key.startswith("text_encoder")]:
            raise InputError(f"{file}: key {unknown[0]!r} is not part of an adapter of one model")
        self.file, self.where = safetensors.Checkpoint(file, prefix=prefix), config or file
        self.keys = {}  # {(layer, matrix): key, without the prefix}
        for key in self.file.shapes:
            spelt = safetensors.rename(key, OLDER)
            layer, _, matrix = spelt.removesuffix(".weight").rpartition(".")
            if matrix not in MATRICES or not spelt.endswith(".weight"):
                unread = "embeddings' adapters and layers that were trained whole are not read"
                raise InputError(f"{self.file.where(key)} is no matrix of a linear layer's adapter; {unread}")
            self.keys[layer, matrix] = key
        self.names = list(dict.fromkeys(layer for layer, _ in self.keys))
        values = files.read_json(config) if config else self.header()
        configs.only(values, IMPLEMENTED, self.where, ("peft_type",))
        self.config = configs.parse(Config, values, self.where)
        if any(re.match(OMNI, name) for name in self.names):
            self.rename()

    def rename(self):
        """Gives the layers of Qwen2.5-Omni's text model the names that they have here. The config lists them by the ends that
        they have in every class."""
        names, old = {name: re.sub(f"^{OMNI}", "model.", name) for name in self.names}, self.config
        self.keys = {(names[name], matrix): key for (name, matrix), key in self.keys.items()}
        ends, self.names = {name: new.removeprefix("model.") for name, new in names.items()}, list(names.values())
        ranks = {re.escape(end): old.rank(name) for name, end in ends.items() if old.rank(name) != old.r}
        alphas = {re.escape(end): value for name, end in ends.items() if (value := of_pattern(name, old.alpha_pattern))}
        self.config = Config(old.r, old.lora_alpha, tuple(ends.values()), old.use_rslora, ranks, alphas, NOT_TEXT)

    def header(self):
        """The config that diffusers writes into the file's header. Older versions write none: alpha is then the rank."""
        (opened,) = self.file.files.values()
        values = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
        values = files.parse_json(values, f"{self.where}: 'lora_adapter_metadata' in its header")
        prefix = self.file.prefix
        values = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        if values:
            return {"peft_type": "LORA"} | values if prefix == PREFIX else values  # `save` writes no type
        ranks = {name: self.file.shapes[key][0] for (name, matrix), key in self.keys.items() if matrix == "lora_A"}
        rank = max(ranks.values(), key=list(ranks.values()).count, default=0)
        own = {re.escape(name): other for name, other in ranks.items() if other != rank}
        return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": self.names, "rank_pattern": own,
                "alpha_pattern": own}  # fmt: skip

    def covers(self, name):
        """As its config's, for a weight of which only the file tells whether it is a linear layer's."""
        targets = self.config.target_modules
        everything = isinstance(targets, str) and targets.lower() == ALL_LINEAR
        return self.config.covers(name) and (not everything or name in self.names)

    def check(self, layers, owner):
        """Compares the file with {name: shape [out, in]} of the layers that shall have adapters. Raises InputError naming a key
        that is missing, misshapen or of no such layer."""
        expected = {}
        for name, (rows, columns) in layers.items():
            for matrix, shape in zip(MATRICES, ((self.config.rank(name), columns), (rows, self.config.rank(name)))):
                expected[self.keys.get((name, matrix), f"{name}.{matrix}.weight")] = torch.empty(shape, device="meta")
        safetensors.check(self.file, self.file.shapes, expected, owner)

    def matrices(self, name, device=None):
        """-> A [rank, in], B [out, rank] of a layer"""
        return [self.file.read(self.keys[name, matrix], device) for matrix in MATRICES]
