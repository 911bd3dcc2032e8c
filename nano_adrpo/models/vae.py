"""The autoencoder of Stable Diffusion 3 and of FLUX.1: one latent pixel of 16 channels for 8 × 8 image pixels (Esser et al.
2024, arXiv 2403.03206, section 5.2.1; the design is latent diffusion's, Rombach et al. 2022, arXiv 2112.10752).

  * encoder: per resolution a few residual blocks, then a convolution of stride 2; decoder: the way back, one block more each
  * at the coarsest resolution self-attention over all pixels, with one head, between two residual blocks
  * the encoder gives mean and log variance of a Gaussian, of which only the mean is used here
  * the transformer sees (mean − shift) · scale

Module names are diffusers' (AutoencoderKL); `STABILITY` at the end maps Stability's single file to them.
"""

import dataclasses
import math
import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nano_adrpo import files
from nano_adrpo.errors import InputError
from nano_adrpo.files import config as configs
from nano_adrpo.files import safetensors


@dataclasses.dataclass
class Config:
    """Sizes, under the names of diffusers' config.json; the defaults are its own too."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)  # width at each resolution, the finest first
    layers_per_block: int = 1  # residual blocks per resolution of the encoder; the decoder has one more
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    scaling_factor: float = 0.18215
    shift_factor: configs.Number | None = None  # None is 0
    sample_size: int | tuple[int, ...] = 32  # image size it was trained at, which only diffusers' own tiling reads

    def __post_init__(self):
        widths, groups = self.block_out_channels, self.norm_num_groups
        if not widths or any(width % groups for width in widths):
            raise InputError(f"block_out_channels is {widths}; expected multiples of norm_num_groups = {groups}")


class Autoencoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @property
    def factor(self):
        """Image pixels per latent pixel and axis: 8 for the public one."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, images):
        """The mean latents, scaled and shifted for the transformer.

        images   [B, 3, H, W] in [−1, 1], in the model's dtype; H and W multiples of `factor`, else InputError
        returns  [B, latent_channels, H / factor, W / factor]
        """
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise InputError(f"images are {height} × {width}; expected multiples of {self.factor}")
        mean, _ = self.encoder(images).chunk(2, dim=1)  # the rest is the log variance
        return (mean - (self.config.shift_factor or 0)) * self.config.scaling_factor

    def decode(self, latents, tile=None):
        """The inverse of `encode`.

        latents  [B, latent_channels, H, W], in the model's dtype
        tile     None, or the side in latent pixels of the squares that are decoded one after the other, see decode_tiles. It
                 is not quite the same image: group norm and attention see a tile alone, and the public decoder's convolutions
                 reach 17 to 18 latent pixels. From 64 on an overlap is about as wide as that
        returns  [B, 3, factor · H, factor · W], nominally in [−1, 1] and not clamped
        """
        latents = latents / self.config.scaling_factor + (self.config.shift_factor or 0)
        return decode_tiles(self.decoder, latents, self.config.out_channels, self.factor, tile)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None, scale=None):
        """Opens a diffusers `vae/` folder or a single file: with the prefix `first_stage_model.` or `vae.`, beside which other
        models may lie in the file, or with none. dtype None is the file's; device None the CPU.

        scale   (scaling_factor, shift_factor) of a single file, which says nothing of them: SD3 or FLUX of this module. None:
                FLUX's where FLUX's transformer lies in the file too or where its name is ae.safetensors, else SD3's"""
        return load(cls, Path(path), dtype, device, scale)

    def save_pretrained(self, path):
        """Writes a folder that diffusers' AutoencoderKL.from_pretrained opens."""
        fixed = {key: value for key, (value,) in implemented(len(self.config.block_out_channels)).items()}
        safetensors.save_model(path, self, {"_class_name": CLASS, **dataclasses.asdict(self.config), **fixed}, STEM)


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> mean and log variance [B, 2 · latent_channels, H / factor, W / factor]."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = stages(widths, config.layers_per_block, groups, "downsamplers", Downsample)
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.mid_block(self.down_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents [B, latent_channels, h, w] -> images [B, 3, factor · h, factor · w]."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = stages(widths, config.layers_per_block + 1, groups, "upsamplers", Upsample)
        self.conv_norm_out = norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x):
        x = self.up_blocks(self.mid_block(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def stages(widths, layers, groups, name, resample):
    """Per width some residual blocks and, except in the last stage, the step to the next resolution, under `name`."""
    blocks = []
    for before, width in zip((widths[0], *widths), widths):
        resnets = [ResnetBlock(before if i == 0 else width, width, groups) for i in range(layers)]
        step = [resample(width)] if len(blocks) < len(widths) - 1 else []
        blocks.append(nn.Sequential(OrderedDict([("resnets", nn.Sequential(*resnets)), (name, nn.Sequential(*step))])))
    return nn.Sequential(*blocks)


class ResnetBlock(nn.Module):
    def __init__(self, dim_in, dim, groups):
        super().__init__()
        self.norm1, self.conv1 = norm(dim_in, groups), nn.Conv2d(dim_in, dim, 3, padding=1)
        self.norm2, self.conv2 = norm(dim, groups), nn.Conv2d(dim, dim, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(dim_in, dim, 1) if dim_in != dim else None

    def forward(self, x):
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return (self.conv_shortcut(x) if self.conv_shortcut else x) + residual


class MidBlock(nn.Module):
    def __init__(self, dim, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(dim, dim, groups) for _ in range(2))
        self.attentions = nn.Sequential(*([Attention(dim, groups)] if attention else []))

    def forward(self, x):
        return self.resnets[1](self.attentions(self.resnets[0](x)))


class Attention(nn.Module):
    """Every pixel attends to all pixels with one head as wide as the features."""

    def __init__(self, dim, groups):
        super().__init__()
        self.group_norm = norm(dim, groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x):
        normed = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, D, h, w] -> [B, h · w, D]
        q, k, v = (project(normed)[:, None] for project in (self.to_q, self.to_k, self.to_v))  # [B, 1 head, h · w, D]
        attended = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        # In this order the sum lies in memory as diffusers' does (channels last), and the next layers round as its do.
        return attended.transpose(1, 2).unflatten(2, x.shape[-2:]) + x


class Downsample(nn.Module):
    """Half the size. The row and column of zeros go below and to the right only, as the model was trained."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: every pixel four times, then a convolution."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def norm(dim, groups):
    """Group norm; the kernel takes mean and variance in float32 whatever its input is."""
    return nn.GroupNorm(groups, dim, eps=1e-6)


def decode_tiles(decoder, latents, channels, factor, tile):
    """decoder(latents): images of `channels` channels and `factor` times the size. With `tile`, a number of latent pixels (at
    least 1, else InputError), it decodes squares of that side, one after the other, and blends their overlaps, so that only
    the image itself grows in memory."""
    if tile is None:
        return decoder(latents)
    if tile < 1:
        raise InputError(f"tile is {tile}; expected at least 1 latent pixel")
    height, width = latents.shape[-2:]
    # Blended in float32 or better: in bfloat16 the weights would sum to 1 within 1/256 only.
    images = latents.new_zeros(
        (len(latents), channels, factor * height, factor * width), dtype=torch.promote_types(latents.dtype, torch.float32)
    )
    for latent_rows, rows, row_weights in tiles(height, tile, factor):
        for latent_columns, columns, column_weights in tiles(width, tile, factor):
            image = decoder(latents[..., latent_rows, latent_columns])
            images[..., rows, columns] += (row_weights[:, None] * column_weights).to(images) * image
    return images.to(latents.dtype)


def tiles(length, tile, factor):
    """Cuts one axis of `length` latent pixels into evenly spread tiles that overlap by a quarter or more.

    Returns [(slice of the latents, slice of the image, weights of those image pixels [factor · tile])]. A weight falls
    linearly from the tile's middle to its ends and is divided by the sum of all tiles' weights there: it is 1 where there is
    but one tile, and where two overlap one fades out as the other fades in. At every image pixel the weights sum to 1.
    """
    tile = min(tile, length)
    overlap = (tile + 2) // 4  # a quarter, rounded
    count = math.ceil((length - overlap) / (tile - overlap))
    starts = [round(i * (length - tile) / max(count - 1, 1)) for i in range(count)]
    spans = [(slice(start, start + tile), slice(factor * start, factor * (start + tile))) for start in starts]
    ramp = torch.arange(factor * tile, dtype=torch.float64) + 0.5  # from the tile's end to each pixel's middle
    tent, sums = torch.minimum(ramp, ramp.flip(0)), torch.zeros(factor * length, dtype=torch.float64)
    for _, pixels in spans:
        sums[pixels] += tent
    return [(latent, pixels, tent / sums[pixels]) for latent, pixels in spans]


# ------------------------------------------------------------------------------------------------------------------- files

CLASS, STEM = "AutoencoderKL", "diffusion_pytorch_model"  # what diffusers calls the model and its weight file

# SD1 and SDXL have two 1 × 1 convolutions around the latents, and a config.json that does not mention them means yes.
NEEDED = ("use_quant_conv", "use_post_quant_conv")


def implemented(stages):
    """Keys of config.json that would make AutoencoderKL another model, and the values that make it this one."""
    return {
        "down_block_types": (["DownEncoderBlock2D"] * stages,),
        "up_block_types": (["UpDecoderBlock2D"] * stages,),
        "act_fn": ("silu",),
        "use_quant_conv": (False,),
        "use_post_quant_conv": (False,),
        "latents_mean": (None,),
        "latents_std": (None,),
    }


# Ours -> Stability's, replaced in this order within a name.
STABILITY = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "attn_1.to_": "attn_1.",  # q, k, v
    "down_blocks": "down",
    "up_blocks": "up",
    "resnets": "block",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}


def to_stability(name, config):
    """Our name of a tensor -> Stability's, which counts the decoder's stages from the image's side."""
    last = len(config.block_out_channels) - 1
    name = re.sub(r"(?<=up_blocks\.)\d+", lambda stage: str(last - int(stage[0])), name)
    return safetensors.rename(name, STABILITY)


def load(cls, path, dtype, device, scale):
    if not path.is_file():
        where = path / "config.json"
        values = files.read_json(where)
        configs.only(values, {"_class_name": (CLASS,)}, where)
        config = configs.parse(Config, values, where)
        configs.only(values, implemented(len(config.block_out_channels)), where, NEEDED)
        return safetensors.load(lambda: cls(config), safetensors.Checkpoint(path, STEM), dtype, device)
    keys = safetensors.Checkpoint(path).home
    is_flux = path.name == "ae.safetensors" or any("double_blocks." in key for key in keys)
    prefix = "vae." if any(key.startswith("vae.") for key in keys) else "first_stage_model."
    file = safetensors.Checkpoint(path, prefix=prefix)
    config = stability_config(file, scale or (FLUX if is_flux else SD3))
    return safetensors.load(lambda: cls(config), file, dtype, device, lambda name: to_stability(name, config))


# scaling_factor and shift_factor, which only the releases' code tells (sd3_impls.py, SD3LatentFormat; flux/util.py).
SD3, FLUX = (1.5305, 0.0609), (0.3611, 0.1159)


def stability_config(file, scale):
    """The sizes of a single file, read off the shapes of its tensors. The rest is the same in every release of SD3 and FLUX: 16
    channels, 32 groups."""
    stages = range(file.count("encoder.down."))
    axes = {f"encoder.down.{i}.block.0.conv1.weight": (f"width {i}", None, None, None) for i in stages}
    sizes = file.measure("Stability's layout of the autoencoder of SD3 and FLUX", axes)
    values = {
        "latent_channels": 16,
        "block_out_channels": [sizes[f"width {i}"] for i in stages],
        "layers_per_block": file.count("encoder.down.0.block."),
        "scaling_factor": scale[0],
        "shift_factor": scale[1],
        "sample_size": 1024,
    }
    return configs.parse(Config, values, file.path)
