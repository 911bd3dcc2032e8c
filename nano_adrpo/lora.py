"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on linear layers: y = W·x + b + (alpha / rank) · B·(A·x).

  * A [rank, in] is random at the start and B [out, rank] zero, so that an untrained adapter changes nothing
  * only A and B are trained, in float32; W and b are frozen and may be in half precision, and products have the input's dtype
  * with its adapters off the model computes what it did before, bit for bit: the reference needs no second copy of the weights

Files are PEFT's; diffusers' own are read too (files/adapters.py). Layer names here are those of diffusers and transformers, so
adapters go to and fro.

    python -m nano_adrpo.lora merge MODEL ADAPTER OUT        # a model folder with the adapter merged into its weights

    lora.add(policy, lora.MMDIT_TARGETS, rank=32, alpha=32, generator=generator)
    optimizer = torch.optim.AdamW(p for p in policy.parameters() if p.requires_grad)
    with torch.no_grad(), lora.disabled(policy) as reference:
        v_ref = reference(latents, sigma, context, pooled)
    lora.save(policy, "adapter")
"""

import contextlib
import dataclasses
import json
import re
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nano_adrpo import files
from nano_adrpo.errors import InputError, MissingFile, Parser, about, run_command, shown
from nano_adrpo.files import config as configs
from nano_adrpo.files import safetensors
from nano_adrpo.files.adapters import MATRICES, PREFIX, UNSET, Adapter, Config, named_by

# The attention's projections: of both streams of a flow transformer (and of SD3.5-medium's second attention); of a decoder.
MMDIT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
DECODER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Adapted(nn.Module):
    """A linear layer and its adapter. It takes the layer's place in the model, and the layer's weight and bias keep their names
    beside `lora_A.weight` and `lora_B.weight`."""

    def __init__(self, layer, config, scale, down, up, device=None):
        """layer: the nn.Linear; down [rank, in], up [out, rank], of any device and dtype. device: where the adapter goes; None:
        where the layer is."""
        super().__init__()
        self.config, self.scale, self.enabled = config, scale, True
        self.weight, self.bias = layer.weight, layer.bias
        device = device or layer.weight.device
        self.lora_A, self.lora_B = (linear(nn.Parameter(x.to(device, torch.float32))) for x in (down, up))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        down, up = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)  # their gradients are float32 again
        low = F.linear(x, down)  # [..., rank]
        # One pass over the large y, rounded once; PEFT's two more, for the product and its scale, round three times.
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), up.T, alpha=self.scale).view_as(y)


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


def targeted(model, config):
    """{name: layer} of the plain linear layers that have an adapter by `config`. Raises InputError where there is none, for the
    head of a decoder, and for a model that has adapters."""
    if named(model, Adapted):
        raise InputError(f"this {type(model).__name__} has adapters already; merge them before others are added")
    frozen = re.compile(getattr(model, "not_adapted", ""))  # names of layers that stay as they are
    layers = {name: layer for name, layer in named(model, nn.Linear).items() if config.covers(public(name))}
    layers = {name: layer for name, layer in layers.items() if not frozen.fullmatch(public(name))}
    if not layers:
        raise InputError(f"{type(model).__name__} has no linear layer {meant_by(config.target_modules)}")
    if "lm_head" in map(public, layers):
        raise InputError("'lm_head' can have no adapter: Decoder.token_logprobs reads its weight, not its output")
    return layers


def meant_by(targets):
    """Targets in words, for messages."""
    if isinstance(targets, str):
        return f"whose name matches {targets!r}"
    more = f" and {len(targets) - 5} more" if len(targets) > 5 else ""
    return f"whose name ends in one of {list(targets)[:5]}{more}"


def adapted(model):
    """{name: layer} of the layers with adapters. Raises InputError where there is none."""
    layers = named(model, Adapted)
    if not layers:
        raise InputError(f"this {type(model).__name__} has no adapters")
    return layers


def add(model, targets, rank, alpha, generator=None, device=None):
    """Puts adapters on the linear layers whose name is a target or ends in one ("to_q" is in "attn.to_q", not in "xto_q"), or
    on all but a head ("all-linear"), and leaves only them trainable; -> the model. A is drawn from U(±1/√in), as PEFT and
    nn.Linear do, on the generator's device. device: where adapters go whose layers have no weights yet; None: to the layers.

    Raises InputError for a model that has adapters, a target that names no linear layer, a rank below 1, an alpha not above 0.
    """
    targets = "all-linear" if list(targets) == ["all-linear"] else targets
    values = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
    values["exclude_modules"] = getattr(model, "not_adapted", None)
    config = configs.parse(Config, values, "lora.add")
    layers = targeted(model, config)
    for target in () if isinstance(config.target_modules, str) else config.target_modules:
        if not any(named_by(public(name), [target]) for name in layers):
            raise InputError(f"{type(model).__name__} has no linear layer whose name ends in '{target}'")
    model.requires_grad_(False)
    for name, layer in layers.items():
        drawn_on, bound = generator.device if generator else layer.weight.device, layer.in_features**-0.5
        down = torch.empty(rank, layer.in_features, device=drawn_on, dtype=torch.float32)
        up = torch.zeros(layer.out_features, rank, device=drawn_on)
        down.uniform_(-bound, bound, generator=generator)
        model.set_submodule(name, Adapted(layer, config, config.scale(public(name)), down, up, device))
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
        layer.weight.copy_(merged(layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.scale))
        model.set_submodule(name, linear(layer.weight, layer.bias))
    return model


def merged(weight, down, up, scale):
    """W + scale·B·A, computed in float32 or wider and rounded to the dtype of W."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (up.to(wide) @ down.to(wide))).to(weight.dtype)


# ------------------------------------------------------------------------------------------------------------------- files


def save(model, folder):
    """Writes adapter_config.json and adapter_model.safetensors (float32), which peft, transformers and diffusers open."""
    folder, layers = Path(folder), adapted(model)
    folder.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(next(iter(layers.values())).config)
    values = {key: value for key, value in values.items() if not configs.among(value, UNSET)}
    if values["lora_alpha"] == int(values["lora_alpha"]):
        values["lora_alpha"] = int(values["lora_alpha"])  # what PEFT declares it to be
    # diffusers reads no adapter_config.json but looks into the file's header, and without it would take alpha to be the rank.
    header = {PREFIX + key: value for key, value in values.items()}
    matrices = {
        f"{PREFIX}{public(name)}.{matrix}.weight": getattr(layer, matrix).weight
        for name, layer in layers.items()
        for matrix in MATRICES
    }
    safetensors.save(folder / "adapter_model.safetensors", matrices, ("lora_adapter_metadata", json.dumps(header)))
    files.write_json(folder / "adapter_config.json", {"peft_type": "LORA", **values, "lora_dropout": 0.0, "bias": "none"})


def load(model, path, device=None):
    """Adds the adapters of `path` (see Adapter), which alone are trainable then; -> the model. Dropout, a matter of training,
    is not applied, and text encoders' adapters are left out. device: as in `add`.

    Raises InputError naming the file and the key, with the model as it was, for an adapter of another model or of another kind.
    """
    adapter = Adapter(path)
    with about(adapter.where):
        layers = targeted(model, adapter.config)
    adapter.check({public(name): layer.weight.shape for name, layer in layers.items()}, type(model).__name__)
    if adapter.beside and not next(iter(layers.values())).weight.is_meta:
        print(f"{adapter.where}: the transformer's adapters are used, those of {shown(', '.join(adapter.beside))} are not")
    model.requires_grad_(False)
    for name, layer in layers.items():
        down, up = adapter.matrices(public(name), device or layer.weight.device)
        model.set_submodule(name, Adapted(layer, adapter.config, adapter.config.scale(public(name)), down, up, device))
    return model


# ----------------------------------------------------------------------------------------------------------------- command


@torch.no_grad()
def merge_files(folder, path, out):
    """Writes a transformers folder, a diffusers transformer or pipeline to `out`, a new or empty folder, with an adapter merged
    into its weights. No model is built: each W in the files becomes W + scale·B·A, rounded to its dtype, under the same name.
    The other files come along: config, tokenizer and, of a pipeline, its other parts. Raises InputError as `load` does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFile(f"{folder}: no such folder; expected a model folder in transformers' or diffusers' layout")
    part = folder / "transformer" if (folder / "transformer").is_dir() else folder
    stem = "diffusion_pytorch_model" if any(part.glob("diffusion_pytorch_model*")) else "model"
    base, adapter = safetensors.Checkpoint(part, stem), Adapter(path)
    weights = {key: shape for key, shape in base.shapes.items() if key.endswith(".weight") and len(shape) == 2}
    layers = {key: name for key in weights if adapter.covers(name := layer_of(key))}
    adapter.check({name: weights[key] for key, name in layers.items()}, str(part))
    for key in layers:
        if base.dtypes[key].itemsize == 1:
            raise InputError(f"{base.where(key)} is stored as {base.dtypes[key]}; expected a wider dtype to merge into")
    with files.new_folder(out) as new:
        inside = new / part.relative_to(folder)
        if part != folder:
            files.copy_small(folder, new)
            for other in sorted(folder.iterdir()):
                if other.is_dir() and other != part and not other.name.startswith("."):
                    shutil.copytree(other, new / other.name)
        inside.mkdir(exist_ok=True)
        files.copy_small(part, inside)
        homes = {}
        for file in base.files:  # shard by shard, which bounds memory
            name = re.sub(r"\.(fp16|bf16)", "", file.name)
            tensors = {key: base.stored(key) for key, home in base.home.items() if home == file}
            for key in layers.keys() & tensors.keys():
                change = (*adapter.matrices(layers[key]), adapter.config.scale(layers[key]))
                tensors[key] = merged(tensors[key], *change)
            safetensors.save(inside / name, tensors)
            homes |= dict.fromkeys(tensors, name)
        if f"{stem}.safetensors" not in homes.values():  # shards, of which there may be one
            files.write_json(inside / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": homes})
    print(f"{out}: {len(layers)} layers of {part} merged with {adapter.where}")


def layer_of(key):
    """The name of a layer in a model, from the key of its weight in a file: Qwen2.5-Omni's files are of a larger model."""
    return key.removesuffix(".weight").removeprefix("thinker.")


def main():
    parser = Parser("Writes a model folder with an adapter merged into its weights.")
    parser.add_argument("command", choices=("merge",), metavar="merge", help="what is done")
    parser.add_argument("model", metavar="MODEL", help="folder in transformers' or diffusers' layout")
    parser.add_argument("adapter", metavar="ADAPTER", help="PEFT's folder, or diffusers' file or folder")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    args = parser.parse_args()
    merge_files(args.model, args.adapter, args.out)


if __name__ == "__main__":
    run_command(main)
