"""The flow transformer of FLUX.1-dev and FLUX.1-schnell (Black Forest Labs 2024; their repository flux, src/flux/model.py).

  * the latent image becomes a sequence of 2 × 2 patches; a position is turned into attention's queries and keys (rotary
    embedding, Su et al. 2021, arXiv 2104.09864) over three axes: 0, row, column. Text tokens stand at (0, 0, 0)
  * the time, the guidance and the pooled prompt embedding become one vector, `cond`, that shifts, scales and gates every block
  * 19 double blocks as in SD3: two streams, image and text, with weights of their own and one attention
  * 38 single blocks: both streams as one sequence; attention and MLP read the same input side by side
  * dev is distilled: it is told the scale of classifier-free guidance and needs one pass. schnell is told none

It speaks SD3's language: sigma = 1 is noise, sigma = 0 is data, and the output estimates noise − data. text_to_image turns it
round. Module names are diffusers' (FluxTransformer2DModel); the tables at the end map Black Forest Labs' single file to them.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nano_adrpo.errors import InputError
from nano_adrpo.files import config as configs
from nano_adrpo.files import safetensors
from nano_adrpo.models import mmdit
from nano_adrpo.models.mmdit import MLP, AdaLN, FeedForward, Modulation, layer_norm, sinusoids

PATCH = 2
OTHERS = {384: "FLUX.1 Fill", 128: "FLUX.1 Canny and Depth (Control)"}  # in_channels of models that see more than the latents


@dataclasses.dataclass
class Config:
    """Sizes, under the names of diffusers' config.json; the defaults are its own too."""

    patch_size: Literal[1] = 1  # diffusers packs the patches outside of its model
    in_channels: int = 64  # of a patch: 4 · those of the latents
    out_channels: int | None = None  # None: as in_channels
    num_layers: int = 19  # double blocks
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096  # width of the prompt's token embeddings
    pooled_projection_dim: int = 768  # width of the prompt's pooled embedding
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)  # how much of a head tells the position on each axis

    def __post_init__(self):
        self.out_channels = self.out_channels or self.in_channels
        if self.in_channels != self.out_channels or self.in_channels % PATCH**2:
            like = f", as of {OTHERS[self.in_channels]}" if self.in_channels in OTHERS else ""
            raise InputError(
                f"in_channels is {self.in_channels}{like}, and out_channels {self.out_channels}; expected one multiple "
                "of 4 for both: only text-to-image models are implemented"
            )
        axes = self.axes_dims_rope
        if len(axes) != 3 or any(width % 2 for width in axes) or sum(axes) != self.attention_head_dim:
            raise InputError(
                f"axes_dims_rope is {axes}; expected 3 even numbers of sum attention_head_dim, {self.attention_head_dim}"
            )

    @property
    def dim(self):
        return self.attention_head_dim * self.num_attention_heads


class Flux(nn.Module):
    """`guidance` is the scale that a distilled model is told, for every sample: 3.5 as in the public pipeline. It belongs to
    the model, so that rollouts, loss and reference are told the same. `gradient_checkpointing` = True recomputes each block
    in backward and keeps only its inputs."""

    def __init__(self, config):
        super().__init__()
        self.config, dim, heads = config, config.dim, config.num_attention_heads
        self.guidance, self.gradient_checkpointing = 3.5, False
        self.x_embedder = nn.Linear(config.in_channels, dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, dim)
        self.time_text_embed = Embed(config.pooled_projection_dim, dim, config.guidance_embeds)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(dim, heads) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(dim, heads) for _ in range(config.num_single_layers))
        self.norm_out = AdaLN(dim, 2)
        self.proj_out = nn.Linear(dim, config.out_channels)

    def forward(self, latents, sigma, context, pooled):
        """The estimate of noise − data.

        latents  [B, C, H, W]; H and W even, else InputError
        sigma    [B], 0 (data) … 1 (noise); the network sees 1000·sigma, computed in float32
        context  [B, L, joint_attention_dim], the prompt's token embeddings; all are attended to
        pooled   [B, pooled_projection_dim]
        returns  like latents
        """
        height, width = latents.shape[-2:]
        if height % PATCH or width % PATCH:
            raise InputError(f"latents are {height} × {width}; expected multiples of {PATCH}")
        x = self.x_embedder(pack(latents))  # [B, T, D], T = H·W / 4
        cond = self.time_text_embed(sigma, self.guidance, pooled)[:, None]  # [B, 1, D]
        context, length = self.context_embedder(context), context.shape[1]  # [B, L, D]
        rotation = rotations(self.config.axes_dims_rope, length, height // PATCH, width // PATCH, x.device)
        for block in self.transformer_blocks:
            x, context = self.run(block, x, context, cond, rotation)
        x = torch.cat([context, x], dim=1)  # [B, L + T, D]
        for block in self.single_transformer_blocks:
            x = self.run(block, x, cond, rotation)
        scale, shift = self.norm_out(cond)  # diffusers keeps these two in this order
        x = self.proj_out(Modulation(shift, scale)(layer_norm(x[:, length:])))  # [B, T, 4·C]
        return unpack(x, height, width)

    def run(self, block, *inputs):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        """Opens a diffusers `transformer/` folder or Black Forest Labs' single file (with the prefix `model.diffusion_model.`,
        beside which other models may lie in the file, or with none). dtype None is the file's; device None the CPU."""
        return load(cls, Path(path), dtype, device)

    def save_pretrained(self, path):
        """Writes a folder that diffusers' FluxTransformer2DModel.from_pretrained opens."""
        safetensors.save_model(path, self, {"_class_name": CLASS, **dataclasses.asdict(self.config)}, STEM)


def pack(latents):
    """[B, C, H, W] -> [B, T, 4·C], patches in reading order; a patch's numbers by channel, row, column."""
    x = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [B, C, h, p, w, q]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(x, height, width):
    """The inverse of `pack`."""
    x = x.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (height // PATCH, width // PATCH))  # [B, h, w, C, p, q]
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, height, width)


class Embed(nn.Module):
    """cond = MLP(sinusoids of the time) + MLP(sinusoids of the guidance) + MLP(pooled prompt embedding)."""

    def __init__(self, pooled_dim, dim, guided):
        super().__init__()
        self.timestep_embedder, self.text_embedder = MLP(256, dim), MLP(pooled_dim, dim)
        self.guidance_embedder = MLP(256, dim) if guided else None

    def forward(self, sigma, guidance, pooled):
        cond = self.timestep_embedder(sinusoids(sigma).to(pooled.dtype))
        if self.guidance_embedder:
            cond = cond + self.guidance_embedder(sinusoids(torch.full_like(sigma, guidance)).to(pooled.dtype))
        return cond + self.text_embedder(pooled)


def rotations(axes, length, height, width, device):
    """cos and sin [L + T, head dim / 2] of the angles by which attention turns pairs of numbers: L text tokens at position
    (0, 0, 0), then T = height·width patches at (0, row, column). Computed in float64, kept in float32.

    axes   how many numbers of a head tell each of the three"""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    image = torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns)  # [T, 3]
    positions = F.pad(image, (0, 0, length, 0)).double()
    angles = [
        positions[:, axis, None] * 10000 ** (-torch.arange(0, size, 2, dtype=torch.float64, device=device) / size)
        for axis, size in enumerate(axes)
    ]
    angles = torch.cat(angles, dim=1)
    return angles.cos().float(), angles.sin().float()


def rotate(x, rotation):
    """Turns each pair of adjacent numbers of x [B, heads, L + T, d] by its angle, in float32."""
    (cos, sin), (a, b) = rotation, x.unflatten(-1, (-1, 2)).unbind(-1)  # the products are float32, as cos and sin are
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


class DoubleBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm1_context = AdaLN(dim, 6), AdaLN(dim, 6)
        self.attn = JointAttention(dim, heads)
        self.ff, self.ff_context = FeedForward(dim), FeedForward(dim)

    def forward(self, x, context, cond, rotation):
        """x [B, T, D], context [B, L, D], cond [B, 1, D] -> the updated x and context."""
        attn, mlp = self.norm1.modulations(cond)
        context_attn, context_mlp = self.norm1_context.modulations(cond)
        attended, context_attended = self.attn(attn(layer_norm(x)), context_attn(layer_norm(context)), rotation)
        x = x + attn.gate * attended
        x = x + mlp.gate * self.ff(mlp(layer_norm(x)))
        context = context + context_attn.gate * context_attended
        context = context + context_mlp.gate * self.ff_context(context_mlp(layer_norm(context)))
        return x, context


class SingleBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm = AdaLN(dim, 3)
        self.attn = Attention(dim, heads)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)

    def forward(self, x, cond, rotation):
        """x [B, L + T, D], text before image, cond [B, 1, D] -> the updated x."""
        (both,) = self.norm.modulations(cond)
        normed = both(layer_norm(x))
        attended = attention(*self.attn(normed), rotation)
        mlp = F.gelu(self.proj_mlp(normed), approximate="tanh")
        return x + both.gate * self.proj_out(torch.cat([attended, mlp], dim=-1))


def attention(q, k, v, rotation):
    """q, k, v [B, heads, L + T, d] -> [B, L + T, D]."""
    return F.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Queries, keys and values of one sequence. Queries and keys have an RMS norm, whose mean square is float32."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // heads, eps=1e-6) for _ in range(2))

    def forward(self, x):
        """[B, T, D] -> three [B, heads, T, d]."""
        return self.split(self.to_q(x), self.norm_q), self.split(self.to_k(x), self.norm_k), self.split(self.to_v(x))

    split = mmdit.Attention.split


class JointAttention(Attention):
    """Attention of text and image in one sequence, text first, with projections of their own."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_added_q, self.norm_added_k = (nn.RMSNorm(dim // heads, eps=1e-6) for _ in range(2))
        self.to_out, self.to_add_out = nn.ModuleList([nn.Linear(dim, dim)]), nn.Linear(dim, dim)

    def forward(self, x, context, rotation):
        """x [B, T, D], context [B, L, D] -> the same shapes."""
        q, k = self.split(self.add_q_proj(context), self.norm_added_q), self.split(self.add_k_proj(context), self.norm_added_k)
        v, length = self.split(self.add_v_proj(context)), context.shape[1]
        joined = (torch.cat(both, dim=2) for both in zip((q, k, v), super().forward(x)))
        attended = attention(*joined, rotation)
        return self.to_out[0](attended[:, length:]), self.to_add_out(attended[:, :length])


# ------------------------------------------------------------------------------------------------------------------- files

CLASS, STEM = "FluxTransformer2DModel", "diffusion_pytorch_model"  # what diffusers calls the model and its weight file

# Ours -> Black Forest Labs', replaced in this order within a name: of a double block, of a single block, of the rest. Names
# with one key are a fused layer, in this order.
DOUBLE = {
    "transformer_blocks": "double_blocks",
    ".norm1.linear": ".img_mod.lin",
    ".norm1_context.linear": ".txt_mod.lin",
    ".attn.to_q": ".img_attn.qkv",
    ".attn.to_k": ".img_attn.qkv",
    ".attn.to_v": ".img_attn.qkv",
    ".attn.add_q_proj": ".txt_attn.qkv",
    ".attn.add_k_proj": ".txt_attn.qkv",
    ".attn.add_v_proj": ".txt_attn.qkv",
    ".attn.norm_q.weight": ".img_attn.norm.query_norm.scale",
    ".attn.norm_k.weight": ".img_attn.norm.key_norm.scale",
    ".attn.norm_added_q.weight": ".txt_attn.norm.query_norm.scale",
    ".attn.norm_added_k.weight": ".txt_attn.norm.key_norm.scale",
    ".attn.to_out.0": ".img_attn.proj",
    ".attn.to_add_out": ".txt_attn.proj",
    ".ff.net.0.proj": ".img_mlp.0",
    ".ff.net.2": ".img_mlp.2",
    ".ff_context.net.0.proj": ".txt_mlp.0",
    ".ff_context.net.2": ".txt_mlp.2",
}
SINGLE = {
    "single_transformer_blocks": "single_blocks",
    ".norm.linear": ".modulation.lin",
    ".attn.to_q": ".linear1",
    ".attn.to_k": ".linear1",
    ".attn.to_v": ".linear1",
    ".proj_mlp": ".linear1",
    ".proj_out": ".linear2",
    ".attn.norm_q.weight": ".norm.query_norm.scale",
    ".attn.norm_k.weight": ".norm.key_norm.scale",
}
REST = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder": "time_in",
    "time_text_embed.guidance_embedder": "guidance_in",
    "time_text_embed.text_embedder": "vector_in",
    "linear_1": "in_layer",
    "linear_2": "out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
# What the axes of some of its tensors are: no config.json lies beside a single file.
AXES = {
    "img_in.weight": ("dim", "in_channels"),
    "txt_in.weight": (None, "joint_attention_dim"),
    "vector_in.in_layer.weight": (None, "pooled_projection_dim"),
    "final_layer.linear.weight": ("out_channels", None),
}


def to_bfl(name):
    """Our name of a tensor -> Black Forest Labs'."""
    tables = {"single_transformer_blocks": SINGLE, "transformer_blocks": DOUBLE}
    return safetensors.rename(name, tables.get(name.partition(".")[0], REST))


def load(cls, path, dtype, device):
    if not path.is_file():
        config = configs.read(Config, path / "config.json", {"_class_name": (CLASS,)})
        return safetensors.load(lambda: cls(config), safetensors.Checkpoint(path, STEM), dtype, device)
    file = safetensors.Checkpoint(path, prefix="model.diffusion_model.")
    config = bfl_config(file)
    model = safetensors.load(lambda: cls(config), file, dtype, device, to_bfl)
    for parameter in model.norm_out.parameters():  # Black Forest Labs order them shift, scale; diffusers scale, shift
        parameter.data = torch.cat(parameter.data.chunk(2)[::-1])
    return model


def bfl_config(file):
    """The sizes of a single file, read off the shapes of its tensors. Heads are 128 wide."""
    sizes = file.measure("Black Forest Labs' layout of FLUX.1", AXES)
    sizes |= {
        "num_layers": file.count("double_blocks."),
        "num_single_layers": file.count("single_blocks."),
        "num_attention_heads": file.heads(sizes.pop("dim"), 128),
        "guidance_embeds": any(key.startswith("guidance_in.") for key in file.shapes),
    }
    return configs.parse(Config, sizes, file.path)
