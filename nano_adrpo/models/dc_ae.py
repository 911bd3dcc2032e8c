"""DC-AE, the autoencoder of Sana: one latent pixel of 32 channels for 32 × 32 image pixels (Chen et al. 2024, arXiv
2410.10733).

  * per resolution a few blocks: residual ones in the fine stages; in the coarse ones linear attention over all pixels and a
    gated convolution (EfficientViT, Cai et al. 2022, arXiv 2205.14756)
  * every change of resolution or width has a shortcut without weights, which only moves pixels to channels and back and takes
    means or repeats: the convolution beside it learns the difference
  * it is deterministic: no mean and variance. The transformer sees the latents times a scale

Module names are diffusers' (AutoencoderDC), whose folder is the only layout that is read.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from nano_adrpo import files
from nano_adrpo.errors import InputError
from nano_adrpo.files import config as configs
from nano_adrpo.files import safetensors
from nano_adrpo.models.sana import GLUMBConv, linear_attention
from nano_adrpo.models.vae import decode_tiles

BlockType = Literal["ResBlock", "EfficientViTBlock"]
WIDTHS = (128, 256, 512, 512, 1024, 1024)


@dataclasses.dataclass
class Config:
    """Sizes, under the names of diffusers' config.json; the defaults are its own too. Lists have an entry for each resolution,
    the finest first."""

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: BlockType | tuple[BlockType, ...] = "ResBlock"
    decoder_block_types: BlockType | tuple[BlockType, ...] = "ResBlock"
    encoder_block_out_channels: tuple[int, ...] = WIDTHS
    decoder_block_out_channels: tuple[int, ...] = WIDTHS
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))  # sizes of kernels, see Attention
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    scaling_factor: float = 1.0

    def __post_init__(self):
        if len(self.encoder_block_out_channels) != len(self.decoder_block_out_channels):
            counts = len(self.encoder_block_out_channels), len(self.decoder_block_out_channels)
            raise InputError(f"encoder_block_out_channels has {counts[0]} widths, decoder_block_out_channels {counts[1]}")
        for side in ("encoder", "decoder"):
            widths = getattr(self, f"{side}_block_out_channels")
            for name in ("block_types", "layers_per_block", "qkv_multiscales"):
                value = getattr(self, f"{side}_{name}")
                if not isinstance(value, str) and len(value) != len(widths):
                    raise InputError(f"{side}_{name} has {len(value)} entries; expected {len(widths)}, as there are widths")
            for width, _, kind, kernels in self.stages(side):
                if any(kernel % 2 == 0 for kernel in kernels):
                    raise InputError(f"{side}_qkv_multiscales has {kernels}; expected odd sizes of kernels")
                if kind == "EfficientViTBlock" and width % self.attention_head_dim:
                    raise InputError(f"attention_head_dim is {self.attention_head_dim}; expected a divisor of {width}")
            pairs = [(4 * fine, coarse) for fine, coarse in zip(widths, widths[1:])] + [(widths[-1], self.latent_channels)]
            if not widths or any(many % few for many, few in pairs):
                raise InputError(f"{side}_block_out_channels is {widths}; expected widths whose shortcuts divide evenly")

    def stages(self, side):
        """[(width, layers, block type, kernel sizes)] of the "encoder" or "decoder", the finest resolution first."""
        widths = getattr(self, f"{side}_block_out_channels")
        kinds = getattr(self, f"{side}_block_types")
        kinds = (kinds,) * len(widths) if isinstance(kinds, str) else kinds
        return [*zip(widths, getattr(self, f"{side}_layers_per_block"), kinds, getattr(self, f"{side}_qkv_multiscales"))]


class DeepAutoencoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @property
    def factor(self):
        """Image pixels per latent pixel and axis: 32 for the public one."""
        return 2 ** (len(self.config.encoder_block_out_channels) - 1)

    def encode(self, images):
        """The latents, scaled for the transformer.

        images   [B, 3, H, W] in [−1, 1], in the model's dtype; H and W multiples of `factor`, else InputError
        returns  [B, latent_channels, H / factor, W / factor]
        """
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise InputError(f"images are {height} × {width}; expected multiples of {self.factor}")
        return self.encoder(images) * self.config.scaling_factor

    def decode(self, latents, tile=None):
        """The inverse of `encode`.

        latents  [B, latent_channels, H, W], in the model's dtype
        tile     None, or the side in latent pixels of the squares that are decoded one after the other, see vae.decode_tiles;
                 attention then sees a square alone
        returns  [B, 3, factor · H, factor · W], nominally in [−1, 1] and not clamped
        """
        latents = latents / self.config.scaling_factor
        return decode_tiles(self.decoder, latents, self.config.in_channels, self.factor, tile)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        """Opens a diffusers `vae/` folder. dtype None is the file's; device None the CPU."""
        where = Path(path) / "config.json"
        values = files.read_json(where)
        configs.only(values, IMPLEMENTED, where, NEEDED)
        config = configs.parse(Config, values, where)
        for key, one in EVERYWHERE.items():
            count = len(config.decoder_block_out_channels)
            configs.only(values, {key: (one, [one] * count)}, where)
        return safetensors.load(lambda: cls(config), safetensors.Checkpoint(path, STEM), dtype, device)

    def save_pretrained(self, path):
        """Writes a folder that diffusers' AutoencoderDC.from_pretrained opens."""
        fixed = {key: values[0] for key, values in IMPLEMENTED.items()}
        safetensors.save_model(path, self, {**fixed, **EVERYWHERE, **dataclasses.asdict(self.config)}, STEM)


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> latents [B, latent_channels, H / factor, W / factor]."""

    def __init__(self, config):
        super().__init__()
        stages = config.stages("encoder")
        widths = [width for width, *_ in stages]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.Sequential(
            *(
                nn.Sequential(*blocks(config, *stage), *[Down(stage[0], coarser) for coarser in widths[i + 1 : i + 2]])
                for i, stage in enumerate(stages)
            )
        )
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.down_blocks(self.conv_in(x))
        return self.conv_out(x) + means(x, self.conv_out.out_channels)


class Decoder(nn.Module):
    """Latents [B, latent_channels, h, w] -> images [B, 3, factor · h, factor · w]."""

    def __init__(self, config):
        super().__init__()
        stages = config.stages("decoder")
        widths = [width for width, *_ in stages]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList(  # numbered from the image's side, so that the last one comes first
            nn.Sequential(*[Up(coarser, stage[0]) for coarser in widths[i + 1 : i + 2]], *blocks(config, *stage))
            for i, stage in enumerate(stages)
        )
        self.norm_out = RMSNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x) + repeats(x, self.conv_in.out_channels)
        for block in reversed(self.up_blocks):
            x = block(x)
        return self.conv_out(F.relu(self.norm_out(x)))


def blocks(config, width, layers, kind, kernels):
    """The blocks of one resolution."""
    if kind == "ResBlock":
        return [ResBlock(width) for _ in range(layers)]
    return [EfficientViTBlock(width, config.attention_head_dim, kernels) for _ in range(layers)]


class ResBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = RMSNorm(dim)

    def forward(self, x):
        return self.norm(self.conv2(F.silu(self.conv1(x)))) + x


class EfficientViTBlock(nn.Module):
    def __init__(self, dim, size, kernels):
        super().__init__()
        self.attn, self.conv_out = Attention(dim, size, kernels), FeedForward(dim)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.conv_out(x)


class Attention(nn.Module):
    """Linear attention over all pixels. Some heads read queries, keys and values of single pixels, and for each kernel size as
    many read those of neighbourhoods. [B, D, H, W] -> the same shape."""

    def __init__(self, dim, size, kernels):
        super().__init__()
        self.size = size
        # One projection of D to 3·D channels in thirds. The names are nominal: head g has its queries, keys and values in
        # channels 3·size·g … of the whole, so that those of the first heads all come from to_q.
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_qkv_multiscale = nn.ModuleList(Neighbourhood(3 * dim, size, kernel) for kernel in kernels)
        self.to_out = nn.Linear((1 + len(kernels)) * dim, dim, bias=False)
        self.norm_out = RMSNorm(dim)

    def forward(self, x):
        pixels = x.movedim(1, -1)  # [B, H, W, D]
        qkv = torch.cat([self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)], dim=-1).movedim(-1, 1)
        qkv = torch.cat([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], dim=1)  # [B, heads · 3 · size, H, W]
        q, k, v = qkv.flatten(2).unflatten(1, (-1, 3, self.size)).mT.unbind(2)  # [B, heads, H·W, size] each
        out = linear_attention(q, k, v).to(x.dtype)
        out = self.to_out(out.transpose(1, 2).flatten(2))  # [B, H·W, D]
        return self.norm_out(out.transpose(1, 2).unflatten(2, x.shape[-2:]))


class FeedForward(GLUMBConv):
    def __init__(self, dim):
        super().__init__(dim, 4)
        self.norm = RMSNorm(dim)

    def forward(self, x):
        return self.norm(super().forward(x))


class Neighbourhood(nn.Module):
    """What a head reads of a pixel's neighbourhood: a depthwise convolution, then a mixture of `size` channels at a time."""

    def __init__(self, channels, size, kernel):
        super().__init__()
        self.proj_in = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=channels // size, bias=False)

    def forward(self, x):
        return self.proj_out(self.proj_in(x))


class Down(nn.Module):
    """Half the size."""

    def __init__(self, dim_in, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x) + means(F.pixel_unshuffle(x, 2), self.conv.out_channels)


class Up(nn.Module):
    """Twice the size."""

    def __init__(self, dim_in, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, 3, padding=1)

    def forward(self, x):
        wide = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(wide) + F.pixel_shuffle(repeats(x, 4 * self.conv.out_channels), 2)


def means(x, channels):
    """[B, C, H, W] -> [B, channels, H, W], the means of neighbouring channels."""
    return x.unflatten(1, (channels, -1)).mean(dim=2)


def repeats(x, channels):
    """[B, C, H, W] -> [B, channels, H, W], each channel several times in turn."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)


class RMSNorm(nn.Module):
    """x / rms(x) · weight + bias over the channels of each pixel, the mean square in float32. [B, C, H, W] -> the same."""

    def __init__(self, dim):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        normed = F.rms_norm(x.movedim(1, -1), self.weight.shape, self.weight, eps=1e-5) + self.bias
        return normed.movedim(-1, 1)


# ------------------------------------------------------------------------------------------------------------------- files

CLASS, STEM = "AutoencoderDC", "diffusion_pytorch_model"  # what diffusers calls the model and its weight file

# Keys of config.json that would make AutoencoderDC another model, and the values that make it this one.
IMPLEMENTED = {
    "_class_name": (CLASS,),
    "upsample_block_type": ("interpolate",),
    "downsample_block_type": ("Conv", "conv"),  # releases spell it both ways
    "encoder_out_shortcut": (True,),
    "decoder_in_shortcut": (True,),
    "decoder_conv_act_fn": ("relu",),
}
NEEDED = ("upsample_block_type", "downsample_block_type")  # where they are absent, diffusers takes other blocks
EVERYWHERE = {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"}  # one word, or one for each resolution
