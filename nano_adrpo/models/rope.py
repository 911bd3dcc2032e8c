"""Rotary positions (Su et al. 2021, arXiv 2104.09864), and how a config stretches them to texts longer than those of training.

Pair i of a head's d numbers turns by the angle position · θ^(−2i/d). Each kind of stretching is a dataclass of its numbers in
config.json, and gives (frequencies [d/2] in radians per position, a factor of the rotated queries and keys):

  * linear    all frequencies are divided by `factor`
  * dynamic   θ grows with the length of the batch's longest text, as soon as it exceeds max_position_embeddings
              (NTK-aware). A key in a cache keeps the angle it had when it was written, as in transformers: beyond that length
              a text that is sampled token by token and one that is read at once get other angles
  * yarn      frequencies that turn often in the trained length stay, slow ones are divided, with a ramp over the pairs between
              them, and the attention is scaled (Peng et al. 2023, arXiv 2309.00071)
  * llama3    the same with a ramp over the frequencies, and no scale (Llama 3.1)
"""

import dataclasses
import math

import torch

from nano_adrpo.errors import InputError
from nano_adrpo.files import config as configs
from nano_adrpo.files.config import Number


@dataclasses.dataclass
class Linear:
    factor: float

    def stretch(self, frequencies, config, longest):
        return frequencies / self.factor, 1.0


@dataclasses.dataclass
class Dynamic:
    factor: float

    def stretch(self, frequencies, config, longest):
        longer = (longest / config.max_position_embeddings).clamp(min=1)
        theta = config.rope_theta * (self.factor * longer - (self.factor - 1)) ** (config.head_dim / (config.head_dim - 2))
        return unstretched(theta, config.head_dim, longest.device), 1.0


@dataclasses.dataclass
class Yarn:
    factor: float | None  # None: max_position_embeddings / original_max_position_embeddings
    original_max_position_embeddings: float
    attention_factor: float | None = None  # None: from `factor`, or from both mscales
    beta_fast: float | None = None  # rounds in the trained length from which on a frequency stays; 32
    beta_slow: float | None = None  # and up to which it is divided; 1
    mscale: Number | None = None
    mscale_all_dim: Number | None = None
    truncate: bool = True  # whether the ramp ends at whole pairs

    def stretch(self, frequencies, config, longest):
        trained, dim = self.original_max_position_embeddings, config.head_dim
        factor = self.factor or config.max_position_embeddings / trained

        def pair(rounds):
            """The pair, a fraction, that turns so many rounds in the trained length."""
            return dim * math.log(trained / (rounds * 2 * math.pi)) / (2 * math.log(config.rope_theta))

        def scale(mscale):
            return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

        low, high = pair(self.beta_fast or 32), pair(self.beta_slow or 1)
        low, high = (math.floor(low), math.ceil(high)) if self.truncate else (low, high)
        low, high = max(low, 0), min(high, dim - 1)
        pairs = torch.arange(dim // 2, dtype=torch.float32, device=frequencies.device)
        divided = ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        attention = self.attention_factor
        if attention is None:
            both = self.mscale and self.mscale_all_dim
            attention = scale(self.mscale) / scale(self.mscale_all_dim) if both else scale(1)
        return frequencies / factor * divided + frequencies * (1 - divided), attention


@dataclasses.dataclass
class Llama3:
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float

    def stretch(self, frequencies, config, longest):
        # What turned often in the trained length stays; what did not even turn low_freq_factor times is divided.
        rounds = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((rounds - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor, 1.0


KINDS = {"linear": Linear, "dynamic": Dynamic, "yarn": Yarn, "llama3": Llama3}


def unstretched(theta, dim, device):
    """[d/2], radians per position."""
    return 1 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def reach(config):
    """How many positions a model has: its max_position_embeddings, and what they are stretched to where those are the trained
    ones, as in vLLM."""
    scaling, trained = config.rope_scaling or {}, config.max_position_embeddings
    if scaling.get("rope_type") in ("linear", "dynamic"):
        return int(trained * scaling["factor"])
    if scaling.get("rope_type") == "yarn":
        return max(trained, int(scaling["original_max_position_embeddings"] * (scaling["factor"] or 1)))
    return trained


def rotations(config, positions):
    """What `rotate` multiplies by, positions [B, T] -> cos and ±sin, [B, 1, T, d], in float32: large angles need its bits."""
    frequencies, factor = unstretched(config.rope_theta, config.head_dim, positions.device), 1.0
    if config.rope_scaling:
        numbers = dict(config.rope_scaling)
        scaling = KINDS[numbers.pop("rope_type")](**numbers)
        frequencies, factor = scaling.stretch(frequencies, config, positions.max() + 1)
    angles = positions[:, None, :, None] * frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def check(config, where):
    """Raises InputError where the numbers of a config give no rotations, such as a factor that divides by zero."""
    try:
        cos, sin = rotations(config, torch.tensor([[0, min(reach(config), config.max_position_embeddings) - 1]]))
        finite = bool(cos.isfinite().all() and sin.isfinite().all())
    except (ZeroDivisionError, OverflowError, ValueError):
        finite = False
    if not finite:
        numbers = f"{config.rope_scaling}, rope_theta {config.rope_theta} and head_dim {config.head_dim}"
        raise InputError(f"{where}: key 'rope_scaling': {numbers} give no angles; expected numbers of a public model's kind")


def rotate(x, rope):
    """Turns the pairs (i, i + d/2) of x [B, heads, T, d] by their angles."""
    cos, sin = rope  # float32, and so are the products
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def read_rope(values, where):
    """A config.json's rope_theta and rope_scaling (None, or rope_type and the numbers of its kind), from transformers 4's keys
    of these names or from transformers 5's rope_parameters. Raises InputError naming file and key."""
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope, where = dict(configs.section(values, name, where)), f"{where}: '{name}'"
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    theta = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
    configs.only({"rope_type": kind}, {"rope_type": ("default", *KINDS)}, where)
    fields = {kind: [field.name for field in dataclasses.fields(cls)] for kind, cls in KINDS.items()}
    # transformers passes over another kind's number; one that no kind has may change what is computed.
    unknown = {key for key in rope if kind == "default" or not any(key in names for names in fields.values())}
    configs.only(rope, {key: (None, 1) if key == "partial_rotary_factor" else (None,) for key in unknown}, where)
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if "original_max_position_embeddings" in fields[kind]:
        trained = values.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = trained or values["max_position_embeddings"]
    numbers = {key: rope[key] for key in fields[kind] if key in rope}
    configs.parse(KINDS[kind], numbers, where)
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **numbers}}
