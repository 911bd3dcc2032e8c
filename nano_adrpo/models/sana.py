"""Sana: the flow transformer of SANA-1.5, of 1.6 or 4.8 billion parameters (Xie et al. 2025, arXiv 2501.18427; the design is
Sana's, Xie et al. 2024, arXiv 2410.10629, section 2.2).

  * every latent pixel is a token. There are no positions: only the 3 × 3 convolutions know where a token lies
  * linear attention: ReLU in the place of the softmax, so that the cost grows with the number of tokens and not its square
  * cross attention from the image to the prompt's tokens, whose padding is masked
  * the feed-forward is a gated convolution (GLUMBConv): 1 × 1, depthwise 3 × 3, gate, 1 × 1
  * the time becomes six vectors that all blocks share; a block only adds a table of its own to them (adaLN-single, Chen et al.
    2023, arXiv 2310.00426). There is no pooled prompt embedding
  * RMS norm on queries and keys, over all heads together

It speaks SD3's language: sigma = 1 is noise, sigma = 0 is data, and the output estimates noise − data. text_to_image turns it
round. Module names are diffusers' (SanaTransformer2DModel), whose folder is the only layout without pickles.
"""

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nano_adrpo.errors import InputError
from nano_adrpo.files import config as configs
from nano_adrpo.files import safetensors
from nano_adrpo.models.mmdit import MLP, layer_norm, sinusoids


@dataclasses.dataclass
class Config:
    """Sizes, under the names of diffusers' config.json; the defaults are its own too."""

    sample_size: int = 32  # latent height and width the model was trained at
    in_channels: int = 32
    out_channels: int | None = 32  # None: as in_channels
    num_layers: int = 20
    attention_head_dim: int = 32
    num_attention_heads: int = 70
    cross_attention_head_dim: int = 112
    num_cross_attention_heads: int = 20
    cross_attention_dim: int = 2240  # width of what the cross attention reads, which must be the tokens'
    caption_channels: int = 2304  # width of the prompt's token embeddings
    mlp_ratio: float = 2.5

    def __post_init__(self):
        self.out_channels = self.out_channels or self.in_channels
        if self.cross_attention_dim != self.dim:
            raise InputError(f"cross_attention_dim is {self.cross_attention_dim}; expected heads × head dim = {self.dim}")
        if self.mlp_ratio * self.dim < 1:
            raise InputError(f"mlp_ratio is {self.mlp_ratio}; expected a width of 1 or more within the MLP")

    @property
    def dim(self):
        return self.attention_head_dim * self.num_attention_heads


class Sana(nn.Module):
    """`gradient_checkpointing` = True recomputes each block in backward and keeps only its inputs."""

    def __init__(self, config):
        super().__init__()
        self.config, dim = config, config.dim
        self.gradient_checkpointing = False
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(config.in_channels, dim, 1)})
        self.time_embed = TimeEmbed(dim)
        self.caption_projection = CaptionProjection(config.caption_channels, dim)
        self.caption_norm = RMSNorm(dim)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, config.out_channels)

    def forward(self, latents, sigma, context, mask=None):
        """The estimate of noise − data.

        latents  [B, C, H, W], of any height and width
        sigma    [B], 0 (data) … 1 (noise); the network sees 1000·sigma, computed in float32
        context  [B, L, caption_channels], the prompt's token embeddings
        mask     [B, L], 1 at tokens, 0 at padding; None: all are tokens
        returns  [B, out_channels, H, W]
        """
        size = latents.shape[-2:]
        x = self.patch_embed["proj"](latents).flatten(2).transpose(1, 2).contiguous()  # [B, T, D], T = H·W
        time, vectors = self.time_embed(sigma, x.dtype)  # [B, 1, D], [B, 6, D]
        context = self.caption_norm(self.caption_projection(context))  # [B, L, D]
        if mask is not None:  # added to the scores; as a boolean mask but for rows of padding alone, which are not NaN
            mask = ((1 - mask.to(x.dtype)) * -10000.0)[:, None, None]  # [B, 1, 1, L]
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, context, mask, vectors, size, use_reentrant=False)
            else:
                x = block(x, context, mask, vectors, size)
        shift, scale = (self.scale_shift_table + time).chunk(2, dim=1)  # [B, 1, D] each
        x = self.proj_out(layer_norm(x) * (1 + scale) + shift)  # [B, T, C]
        return x.transpose(1, 2).unflatten(2, size)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        """Opens a diffusers `transformer/` folder. dtype None is the file's; device None the CPU."""
        config = configs.read(Config, Path(path) / "config.json", IMPLEMENTED, NEEDED)
        return safetensors.load(lambda: cls(config), safetensors.Checkpoint(path, STEM), dtype, device)

    def save_pretrained(self, path):
        """Writes a folder that diffusers' SanaTransformer2DModel.from_pretrained opens."""
        fixed = {key: values[0] for key, values in IMPLEMENTED.items()}
        safetensors.save_model(path, self, {**fixed, **dataclasses.asdict(self.config)}, STEM)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config.dim
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attn1 = LinearAttention(dim, config.num_attention_heads, config.attention_head_dim, bias=False)
        self.attn2 = CrossAttention(dim, config.num_cross_attention_heads, config.cross_attention_head_dim, bias=True)
        self.ff = GLUMBConv(dim, config.mlp_ratio)

    def forward(self, x, context, mask, vectors, size):
        """x [B, T, D], context [B, L, D], mask None or what is added to the scores, vectors [B, 6, D], size (height, width)
        -> the updated x."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (self.scale_shift_table + vectors).chunk(6, dim=1)  # [B, 1, D] each
        x = x + gate * self.attn1(layer_norm(x) * (1 + scale) + shift)
        x = x + self.attn2(x, context, mask)  # neither normed nor modulated nor gated
        image = (layer_norm(x) * (1 + ff_scale) + ff_shift).transpose(1, 2).unflatten(2, size)  # [B, D, H, W]
        return x + ff_gate * self.ff(image).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """What both attentions have: projections, and RMS norms over all heads together."""

    def __init__(self, dim, heads, size, bias):
        super().__init__()
        self.heads, inner = heads, heads * size
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(inner) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def project(self, x, context):
        """x [B, T, D], context [B, L, D] -> queries [B, heads, T, d], keys and values [B, heads, L, d]."""
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context)), self.to_v(context)
        return [y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v)]


class LinearAttention(Attention):
    def forward(self, x):
        out = linear_attention(*self.project(x, x)).to(x.dtype)  # [B, heads, T, d]
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class CrossAttention(Attention):
    def forward(self, x, context, mask=None):
        out = F.scaled_dot_product_attention(*self.project(x, context), attn_mask=mask)  # [B, heads, T, d]
        return self.to_out[0](out.transpose(1, 2).flatten(2))


def linear_attention(q, k, v):
    """softmax(q·kᵀ)·v with relu(q)·relu(k)ᵀ, divided by its sum, in the place of the softmax: q·(kᵀ·v) / (q·Σk), of which no
    term is as large as T². q, k, v [..., T, d] -> [..., T, d] in float32, since kᵀ·v is a sum over all tokens."""
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):  # there is no autocast on meta
        q, k, v = F.relu(q).float(), F.relu(k).float(), v.float()
        weight = q @ k.sum(dim=-2, keepdim=True).mT  # [..., T, 1]
        return q @ (k.mT @ v) / (weight + 1e-15)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the division in float32."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, eps=1e-5).to(self.weight.dtype) * self.weight


class GLUMBConv(nn.Module):
    """Gated feed-forward of convolutions: each token meets its eight neighbours. [B, D, H, W] -> the same shape."""

    def __init__(self, dim, ratio):
        super().__init__()
        inner = int(ratio * dim)
        self.conv_inverted = nn.Conv2d(dim, 2 * inner, 1)
        self.conv_depth = nn.Conv2d(2 * inner, 2 * inner, 3, padding=1, groups=2 * inner)
        self.conv_point = nn.Conv2d(inner, dim, 1, bias=False)

    def forward(self, x):
        value, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, dim=1)
        return self.conv_point(value * F.silu(gate))


class TimeEmbed(nn.Module):
    """sigma [B] -> the time's embedding [B, 1, D], which the output layer uses, and six vectors [B, 6, D] for the blocks."""

    def __init__(self, dim):
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": MLP(256, dim)})
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, sigma, dtype):
        time = self.emb["timestep_embedder"](sinusoids(sigma).to(dtype))
        return time[:, None], self.linear(F.silu(time)).unflatten(1, (6, -1))


class CaptionProjection(MLP):
    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


# ------------------------------------------------------------------------------------------------------------------- files

CLASS, STEM = "SanaTransformer2DModel", "diffusion_pytorch_model"  # what diffusers calls the model and its weight file

# Keys of config.json that would make it another model, and the values that make it this one. (Sana 1.0 has no qk_norm, the
# models for 2K and 4K have positions, Sana-Sprint has embedded guidance.)
IMPLEMENTED = {
    "_class_name": (CLASS,),
    "qk_norm": ("rms_norm_across_heads",),
    "patch_size": (1,),
    "attention_bias": (False,),
    "dropout": (0.0,),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6,),
    "interpolation_scale": (None,),
    "guidance_embeds": (False,),
    "timestep_scale": (1.0,),
}
NEEDED = ("qk_norm",)  # diffusers takes an absent one to be null
