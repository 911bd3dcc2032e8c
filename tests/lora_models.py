"""Tiny models with adapters, which the tests of their computation and of their files share."""

import tiny
import torch
from torch import nn

from nano_adrpo import lora
from nano_adrpo.models import decoder, mmdit

FILE = "adapter_model.safetensors"
KINDS = ["mmdit", "decoder"]
TARGETS = {"mmdit": lora.MMDIT_TARGETS, "decoder": lora.DECODER_TARGETS}
IDS = torch.tensor([[1, 5, 9, 2, 7, 3], [4, 4, 8, 6, 0, 11]])


def base(kind="mmdit", device="cpu"):
    if kind == "mmdit":
        return tiny.fill(mmdit.MMDiT(mmdit.Config(**tiny.MMDIT_STYLES["sd3.5-medium"]))).to(device)
    config = decoder.Config("qwen3", 24, 32, 48, 3, 4, 64, num_key_value_heads=2, head_dim=8)
    return tiny.fill(decoder.Decoder(config)).to(device)


def output(model):
    parameter = next(model.parameters())
    if isinstance(model, decoder.Decoder):
        return model(IDS.to(parameter.device))
    latents, sigma, context, pooled = (x.to(parameter.device) for x in tiny.mmdit_inputs())
    return model(*(x if x is sigma else x.to(parameter.dtype) for x in (latents, sigma, context, pooled)))


def adapt(model, kind="mmdit", rank=4, alpha=6.0, moved=True):
    """Adapters whose B is not zero."""
    lora.add(model, TARGETS[kind], rank, alpha, torch.Generator().manual_seed(0))
    if moved:
        move(model)
    return model


def move(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class Names(nn.Module):
    """Layers whose names are almost a target's."""

    def __init__(self):
        super().__init__()
        self.to_q, self.xto_q, self.to_q_norm = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(3, 5)
        self.inner = nn.ModuleDict({"to_q": nn.Linear(5, 2, bias=False), "out": nn.ModuleList([nn.Linear(2, 2)])})
        self.conv = nn.ModuleDict({"to_q": nn.Conv2d(3, 3, 1)})
