"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on linear layers: y = W·x + b + (alpha / rank) · B·(A·x).

  * A [rank, in] is random at the start and B [out, rank] zero, so that an untrained adapter changes nothing
  * only A and B are trained, in float32; W and b are frozen and may be in half precision, and products have the input's dtype
  * with its adapters off the model computes what it did before, bit for bit: the reference needs no second copy of the weights

Files are PEFT's: adapter_config.json and adapter_model.safetensors; diffusers' own are read too. Layer names here are those of
diffusers and transformers, so adapters go to and fro.

    lora.add(policy, lora.MMDIT_TARGETS, rank=32, alpha=32, generator=generator)
    optimizer = torch.optim.AdamW(p for p in policy.parameters() if p.requires_grad)
    with torch.no_grad(), lora.disabled(policy) as reference:
        v_ref = reference(latents, sigma, context, pooled)
    lora.save(policy, "adapter")
"""

import contextlib
import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nano_adrpo import files
from nano_adrpo.errors import InputError, about
from nano_adrpo.files import config as configs
from nano_adrpo.files import safetensors

# The attention's projections: of both streams of a flow transformer (and of SD3.5-medium's second attention); of a decoder.
MMDIT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
DECODER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass
class Config:
    """What all adapters of a model have in common, under the names of PEFT's adapter_config.json."""

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]


class Adapted(nn.Module):
    """A linear layer and its adapter. It takes the layer's place in the model, and the layer's weight and bias keep their names
    beside `lora_A.weight` and `lora_B.weight`."""

    def __init__(self, layer, config, down, up):
        """layer: the nn.Linear; down [rank, in], up [out, rank], of any device and dtype."""
        super().__init__()
        self.config, self.scale, self.enabled = config, config.lora_alpha / config.r, True
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A, self.lora_B = (linear(nn.Parameter(x.to(layer.weight.device, torch.float32))) for x in (down, up))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        down, up = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)  # their gradients are float32 again
        return y + F.linear(F.linear(x, down), up) * self.scale  # in PEFT's order, so that no rounding differs


def linear(weight, bias=None):
    """The nn.Linear that has these parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def named(model, kind):
    """{name: layer} of a model's layers of exactly this class."""
    return {name: layer for name, layer in model.named_modules() if type(layer) is kind}


def public(name):
    """The name of a layer without what torch.compile adds to it."""
    return name.replace("_orig_mod.", "")


def targeted(model, targets):
    """{name: layer} of the plain linear layers that `targets` names. Raises InputError where there is none, for the head of a
    decoder, and for a model that has adapters."""
    if named(model, Adapted):
        raise InputError(f"this {type(model).__name__} has adapters already; merge them before others are added")
    layers = {
        name: layer for name, layer in named(model, nn.Linear).items() if any(matches(name, target) for target in targets)
    }
    if not layers:
        raise InputError(f"{type(model).__name__} has no linear layer whose name ends in one of {list(targets)}")
    if "lm_head" in map(public, layers):
        raise InputError("'lm_head' can have no adapter: Decoder.token_logprobs reads its weight, not its output")
    return layers


def matches(name, target):
    return f".{public(name)}".endswith(f".{target}")


def adapted(model):
    """{name: layer} of the layers with adapters. Raises InputError where there is none."""
    layers = named(model, Adapted)
    if not layers:
        raise InputError(f"this {type(model).__name__} has no adapters")
    return layers


def add(model, targets, rank, alpha, generator=None):
    """Puts adapters on the linear layers whose name is a target or ends in one ("to_q" is in "attn.to_q", not in "xto_q"), and
    leaves only them trainable; -> the model. A is drawn from U(±1/√in), as PEFT and nn.Linear do, on the generator's device.

    Raises InputError for a model that has adapters, a target that names no linear layer, a rank below 1, an alpha not above 0.
    """
    config = configs.parse(Config, {"r": rank, "lora_alpha": alpha, "target_modules": targets}, "lora.add")
    layers = targeted(model, config.target_modules)
    for target in config.target_modules:
        if not any(matches(name, target) for name in layers):
            raise InputError(f"{type(model).__name__} has no linear layer whose name ends in '{target}'")
    model.requires_grad_(False)
    for name, layer in layers.items():
        device, bound = generator.device if generator else layer.weight.device, layer.in_features**-0.5
        down = torch.empty(rank, layer.in_features, device=device, dtype=torch.float32)
        up = torch.zeros(layer.out_features, rank, device=device)
        model.set_submodule(name, Adapted(layer, config, down.uniform_(-bound, bound, generator=generator), up))
    return model


@contextlib.contextmanager
def disabled(model):
    """Inside, the model computes what it did before it had adapters, bit for bit; the context's value is the model. For use
    under no_grad: a backward pass with gradient checkpointing computes blocks again, and the adapters must then be as they
    were in the forward pass."""
    layers = list(adapted(model).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


@torch.no_grad()
def merge(model):
    """Adds each (alpha / rank)·B·A to its weight and leaves a plain model, all of it frozen; -> it. The sum is rounded to the
    weight's dtype: in bfloat16 a change below 1/256 of a weight may be lost; adapters that are not merged keep it."""
    for name, layer in adapted(model).items():
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        change = layer.scale * (layer.lora_B.weight.to(wide) @ layer.lora_A.weight.to(wide))
        layer.weight.copy_(layer.weight.to(wide) + change)
        model.set_submodule(name, linear(layer.weight, layer.bias))
    return model


# ------------------------------------------------------------------------------------------------------------------- files

PREFIX = "base_model.model."  # PEFT wraps a model in two more, and its files' keys say so
MATRICES = ("lora_A", "lora_B")
DIFFUSERS = "pytorch_lora_weights"  # the file's stem where diffusers saved an adapter, its config in the header

# Keys of adapter_config.json that, if set, change what the model computes in ways not implemented here.
UNSET = (None, False, [], {}, "none")
UNSUPPORTED = (
    "use_dora", "use_rslora", "bias", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layer_replication", "exclude_modules", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
IMPLEMENTED = {
    "peft_type": ("LORA",),
    **dict.fromkeys(UNSUPPORTED, UNSET),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # other ways to start change the model's own weights
}


def save(model, folder):
    """Writes adapter_config.json and adapter_model.safetensors (float32), which peft, transformers and diffusers open."""
    folder, layers = Path(folder), adapted(model)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        **dataclasses.asdict(next(iter(layers.values())).config),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    if config["lora_alpha"] == int(config["lora_alpha"]):
        config["lora_alpha"] = int(config["lora_alpha"])  # what PEFT declares it to be
    # diffusers reads no adapter_config.json but looks into the file's header, and without it would take alpha to be the rank.
    header = {PREFIX + key: config[key] for key in ("r", "lora_alpha", "target_modules")}
    matrices = {
        f"{PREFIX}{public(name)}.{matrix}.weight": getattr(layer, matrix).weight
        for name, layer in layers.items()
        for matrix in MATRICES
    }
    safetensors.save(folder / "adapter_model.safetensors", matrices, ("lora_adapter_metadata", json.dumps(header)))
    files.write_json(folder / "adapter_config.json", config)


def read(folder):
    """-> (an adapter's config as a dict, the file that holds it, the Checkpoint of its matrices, the prefix of their keys)."""
    folder = Path(folder)
    if (folder / "adapter_config.json").exists() or not (folder / f"{DIFFUSERS}.safetensors").exists():
        where = folder / "adapter_config.json"
        return files.read_json(where), where, safetensors.Checkpoint(folder, "adapter_model"), PREFIX
    file, where = safetensors.Checkpoint(folder, DIFFUSERS), folder / f"{DIFFUSERS}.safetensors"
    prefix = "transformer." if any(key.startswith("transformer.") for key in file.shapes) else ""  # a pipeline's, a model's
    header = (file.files[where].metadata() or {}).get("lora_adapter_metadata", "{}")
    values = files.parse_json(header, f"{where}: 'lora_adapter_metadata' in its header")
    values = {key.removeprefix(prefix): value for key, value in values.items()}
    if not values:  # as older versions wrote it: alpha is the rank
        ranks = [shape[0] for key, shape in file.shapes.items() if key.endswith("lora_A.weight")] or [0]
        targets = sorted({key.removeprefix(prefix).rpartition(".lora_")[0] for key in file.shapes})
        values = {"peft_type": "LORA", "r": ranks[0], "lora_alpha": ranks[0], "target_modules": targets}
    return values, where, file, prefix


def load(model, folder):
    """Adds the adapters of a folder, which alone are trainable then; -> the model. The folder is PEFT's (adapter_config.json,
    adapter_model.safetensors) or diffusers' (pytorch_lora_weights.safetensors). Dropout, a matter of training, is not applied.

    Raises InputError naming the file and the key, with the model as it was, for an adapter of another model or of another kind.
    """
    values, where, file, prefix = read(folder)
    configs.only(values, IMPLEMENTED, where, ("peft_type",))
    config = configs.parse(Config, values, where)
    with about(where):
        layers = targeted(model, config.target_modules)
    expected = {}
    for name, layer in layers.items():
        down, up = (f"{prefix}{public(name)}.{matrix}.weight" for matrix in MATRICES)
        expected[down] = torch.empty(config.r, layer.in_features, device="meta")
        expected[up] = torch.empty(layer.out_features, config.r, device="meta")
    safetensors.check(file, file.shapes, expected, type(model).__name__)
    model.requires_grad_(False)
    for name, layer in layers.items():
        down, up = (file.read(f"{prefix}{public(name)}.{matrix}.weight", layer.weight.device) for matrix in MATRICES)
        model.set_submodule(name, Adapted(layer, config, down, up))
    return model
