"""MMDiT: the flow transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206, section 4).

  * the latent image becomes a sequence of patches, plus a 2-D sin-cos position table of which the centre is cropped
  * the time and the pooled prompt embedding become one vector, `cond`, that shifts, scales and gates every block (adaLN-Zero)
  * two streams, image and text, with weights of their own; each block joins them in one attention and splits them again
  * the last block does not update the text stream, whose output nobody reads
  * SD3.5: RMS norm on queries and keys; SD3.5-medium: a second, image-only attention in its first blocks

It speaks SD3's own language: sigma = 1 is noise, sigma = 0 is data, and the output estimates noise − data. text_to_image turns
it round. Module names are diffusers' (SD3Transformer2DModel); `STABILITY` at the end maps Stability's single file to them.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nano_adrpo.errors import InputError
from nano_adrpo.files import config as configs
from nano_adrpo.files import safetensors


@dataclasses.dataclass
class Config:
    """Sizes, under the names of diffusers' config.json; the defaults are its own too."""

    sample_size: int = 128  # latent height and width the model was trained at
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int | None = 16  # None: as in_channels
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096  # width of the prompt's token embeddings
    pooled_projection_dim: int = 2048  # width of the prompt's pooled embedding
    caption_projection_dim: int = 1152  # width of the text stream, which must be the image stream's
    pos_embed_max_size: int = 96  # side of the position table, in patches
    dual_attention_layers: tuple[configs.Index, ...] = ()
    qk_norm: Literal["rms_norm"] | None = None

    def __post_init__(self):
        self.out_channels = self.out_channels or self.in_channels
        if self.caption_projection_dim != self.dim:
            raise InputError(f"caption_projection_dim is {self.caption_projection_dim}; expected heads × head dim = {self.dim}")
        if self.dim % 4 or self.sample_size % self.patch_size:
            sizes = f"heads × head dim is {self.dim}, sample_size {self.sample_size} and patch_size {self.patch_size}"
            raise InputError(f"{sizes}; expected a multiple of 4, and whole patches")

    @property
    def dim(self):
        return self.attention_head_dim * self.num_attention_heads


class MMDiT(nn.Module):
    """`gradient_checkpointing` = True recomputes each block in backward and keeps only its inputs."""

    def __init__(self, config):
        super().__init__()
        self.config, dim = config, config.dim
        self.gradient_checkpointing = False
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = TimeTextEmbed(config.pooled_projection_dim, dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            Block(
                dim,
                config.num_attention_heads,
                qk_norm=config.qk_norm is not None,
                dual=layer in config.dual_attention_layers,
                last=layer == config.num_layers - 1,
            )
            for layer in range(config.num_layers)
        )
        self.norm_out = AdaLN(dim, 2)
        self.proj_out = nn.Linear(dim, config.patch_size**2 * config.out_channels)

    def forward(self, latents, sigma, context, pooled):
        """The estimate of noise − data.

        latents  [B, C, H, W]; H and W multiples of the patch size, at most pos_embed_max_size patches each
        sigma    [B], 0 (data) … 1 (noise); the network sees 1000·sigma, computed in float32
        context  [B, L, joint_attention_dim], the prompt's token embeddings
        pooled   [B, pooled_projection_dim]
        returns  [B, out_channels, H, W]
        """
        height, width, patch = *latents.shape[-2:], self.config.patch_size
        x = self.pos_embed(latents)  # [B, T, D], T = H·W / patch²
        cond = self.time_text_embed(sigma, pooled)[:, None]  # [B, 1, D]
        context = self.context_embedder(context)  # [B, L, D]
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, context = checkpoint(block, x, context, cond, use_reentrant=False)
            else:
                x, context = block(x, context, cond)
        scale, shift = self.norm_out(cond)  # diffusers keeps these two in this order
        x = self.proj_out(Modulation(shift, scale)(layer_norm(x)))  # [B, T, patch²·C]
        x = x.unflatten(1, (height // patch, width // patch)).unflatten(3, (patch, patch, -1))  # [B, h, w, p, q, C]
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, height, width)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        """Opens a diffusers `transformer/` folder or Stability's single file (with the prefix `model.diffusion_model.`,
        beside which other models may lie in the file, or with none). dtype None is the file's; device None the CPU."""
        return load(cls, Path(path), dtype, device)

    def save_pretrained(self, path):
        """Writes a folder that diffusers' SD3Transformer2DModel.from_pretrained opens."""
        safetensors.save_model(path, self, {"_class_name": CLASS, **dataclasses.asdict(self.config)}, STEM)


class Modulation(NamedTuple):
    """What adaLN-Zero does to one branch: shift and scale its input, gate its output. Each [B, 1, D]."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor | None = None

    def __call__(self, x):
        return x * (1 + self.scale) + self.shift


class AdaLN(nn.Module):
    """cond [B, 1, D] -> `count` vectors [B, 1, D]."""

    def __init__(self, dim, count):
        super().__init__()
        self.count, self.linear = count, nn.Linear(dim, count * dim)

    def forward(self, cond):
        return self.linear(F.silu(cond)).chunk(self.count, dim=-1)

    def modulations(self, cond):
        vectors = self(cond)
        return [Modulation(*vectors[i : i + 3]) for i in range(0, self.count, 3)]


class Block(nn.Module):
    def __init__(self, dim, heads, qk_norm, dual, last):
        super().__init__()
        self.last = last
        self.norm1 = AdaLN(dim, 9 if dual else 6)
        self.norm1_context = AdaLN(dim, 2 if last else 6)
        self.attn = Attention(dim, heads, qk_norm, joint=True, last=last)
        self.attn2 = Attention(dim, heads, qk_norm) if dual else None
        self.ff = FeedForward(dim)
        self.ff_context = None if last else FeedForward(dim)

    def forward(self, x, context, cond):
        """x [B, T, D], context [B, L, D], cond [B, 1, D] -> the updated x and context (None from the last block)."""
        attn, mlp, *dual = self.norm1.modulations(cond)
        if self.last:
            scale, shift = self.norm1_context(cond)
            context_attn = Modulation(shift, scale)
        else:
            context_attn, context_mlp = self.norm1_context.modulations(cond)

        normed = layer_norm(x)
        attended, context_attended = self.attn(attn(normed), context_attn(layer_norm(context)))
        x = x + attn.gate * attended
        if dual:
            x = x + dual[0].gate * self.attn2(dual[0](normed))
        x = x + mlp.gate * self.ff(mlp(layer_norm(x)))
        if self.last:
            return x, None
        context = context + context_attn.gate * context_attended
        context = context + context_mlp.gate * self.ff_context(context_mlp(layer_norm(context)))
        return x, context


class Attention(nn.Module):
    """Self-attention of the image, or (joint) of image and text in one sequence with projections of their own."""

    def __init__(self, dim, heads, qk_norm, joint=False, last=False):
        super().__init__()
        self.heads, self.joint = heads, joint
        norm = (lambda: nn.RMSNorm(dim // heads, eps=1e-6)) if qk_norm else nn.Identity  # its mean square is float32
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = norm(), norm()
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
            self.norm_added_q, self.norm_added_k = norm(), norm()
            self.to_add_out = None if last else nn.Linear(dim, dim)

    def forward(self, x, context=None):
        """x [B, T, D], context [B, L, D] -> the same shapes; without context, x alone."""
        q, k, v = self.split(self.to_q(x), self.norm_q), self.split(self.to_k(x), self.norm_k), self.split(self.to_v(x))
        if self.joint:
            q = torch.cat([q, self.split(self.add_q_proj(context), self.norm_added_q)], dim=2)  # [B, heads, T + L, d]
            k = torch.cat([k, self.split(self.add_k_proj(context), self.norm_added_k)], dim=2)
            v = torch.cat([v, self.split(self.add_v_proj(context))], dim=2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, T + L, D]
        attended = self.to_out[0](out[:, : x.shape[1]])
        if not self.joint:
            return attended
        return attended, self.to_add_out(out[:, x.shape[1] :]) if self.to_add_out else None

    def split(self, x, norm=nn.Identity()):  # noqa: B008, it has no state
        """[B, T, D] -> [B, heads, T, d]. Norms come before the transposed view, of which they would make a copy."""
        return norm(x.unflatten(-1, (self.heads, -1))).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.net = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(dim, 4 * dim)}), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x):
        return self.net[2](F.gelu(self.net[0]["proj"](x), approximate="tanh"))


class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.side = config.pos_embed_max_size
        self.proj = nn.Conv2d(config.in_channels, config.dim, config.patch_size, stride=config.patch_size)
        self.register_buffer("pos_embed", position_table(config.dim, self.side, config.sample_size // config.patch_size))

    def forward(self, latents):
        """[B, C, H, W] -> [B, T, D], rows of patches in reading order."""
        patch = self.proj.stride[0]
        height, width = latents.shape[-2] // patch, latents.shape[-1] // patch
        if latents.shape[-2] % patch or latents.shape[-1] % patch or max(height, width) > self.side:
            size = f"{latents.shape[-2]} × {latents.shape[-1]}"
            raise InputError(f"latents are {size}; expected multiples of {patch}, at most {self.side * patch}")
        top, left = (self.side - height) // 2, (self.side - width) // 2
        table = self.pos_embed.unflatten(1, (self.side, self.side))[:, top : top + height, left : left + width]
        patches = self.proj(latents).flatten(2).transpose(1, 2).contiguous()  # else all of the image stream lies transposed
        return patches + table.flatten(1, 2)


def position_table(dim, side, length):
    """The 2-D sin-cos table of a model trained from scratch, [1, side², dim]; a checkpoint brings its own. Half the channels
    tell the column, half the row. Positions run from 0 to `length`, so that a table of more patches has finer steps."""
    positions = torch.arange(side, dtype=torch.float32) / (side / length)
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = positions[:, None] * omega  # [side, dim/4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, dim/2]
    columns, rows = axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).float().reshape(1, side * side, dim)


class TimeTextEmbed(nn.Module):
    """cond = MLP(sinusoids of the time) + MLP(pooled prompt embedding)."""

    def __init__(self, pooled_dim, dim):
        super().__init__()
        self.timestep_embedder, self.text_embedder = MLP(256, dim), MLP(pooled_dim, dim)

    def forward(self, sigma, pooled):
        return self.timestep_embedder(sinusoids(sigma).to(pooled.dtype)) + self.text_embedder(pooled)


def sinusoids(sigma):
    """[B] -> [B, 256], cosines and sines of 1000·sigma at 128 frequencies, in float32."""
    # The angles are large, so float32's rounding shows in the output: the order of operations is SD3's.
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=sigma.device) / 128)
    angles = (1000 * sigma.float())[:, None] * frequencies  # [B, 128]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class MLP(nn.Module):
    def __init__(self, dim_in, dim):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim_in, dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


def layer_norm(x):
    """Layer norm without weights; the kernel computes in float32 whatever x is."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


# ------------------------------------------------------------------------------------------------------------------- files

CLASS, STEM = "SD3Transformer2DModel", "diffusion_pytorch_model"  # what diffusers calls the model and its weight file

# Ours -> Stability's, replaced in this order within a name. Three names with one key are a fused query-key-value layer.
STABILITY = {
    "pos_embed.proj": "x_embedder.proj",
    "pos_embed.pos_embed": "pos_embed",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "transformer_blocks": "joint_blocks",
    ".norm1.linear": ".x_block.adaLN_modulation.1",
    ".attn.to_q": ".x_block.attn.qkv",
    ".attn.to_k": ".x_block.attn.qkv",
    ".attn.to_v": ".x_block.attn.qkv",
    ".attn.norm_q": ".x_block.attn.ln_q",
    ".attn.norm_k": ".x_block.attn.ln_k",
    ".attn.to_out.0": ".x_block.attn.proj",
    ".attn2.to_q": ".x_block.attn2.qkv",
    ".attn2.to_k": ".x_block.attn2.qkv",
    ".attn2.to_v": ".x_block.attn2.qkv",
    ".attn2.norm_q": ".x_block.attn2.ln_q",
    ".attn2.norm_k": ".x_block.attn2.ln_k",
    ".attn2.to_out.0": ".x_block.attn2.proj",
    ".ff.net.0.proj": ".x_block.mlp.fc1",
    ".ff.net.2": ".x_block.mlp.fc2",
    ".norm1_context.linear": ".context_block.adaLN_modulation.1",
    ".attn.add_q_proj": ".context_block.attn.qkv",
    ".attn.add_k_proj": ".context_block.attn.qkv",
    ".attn.add_v_proj": ".context_block.attn.qkv",
    ".attn.norm_added_q": ".context_block.attn.ln_q",
    ".attn.norm_added_k": ".context_block.attn.ln_k",
    ".attn.to_add_out": ".context_block.attn.proj",
    ".ff_context.net.0.proj": ".context_block.mlp.fc1",
    ".ff_context.net.2": ".context_block.mlp.fc2",
}
# What the axes of some of its tensors are: no config.json lies beside a single file.
STABILITY_AXES = {
    "x_embedder.proj.weight": ("caption_projection_dim", "in_channels", "patch_size", None),
    "pos_embed": (None, "positions", None),
    "context_embedder.weight": (None, "joint_attention_dim"),
    "y_embedder.mlp.0.weight": (None, "pooled_projection_dim"),
    "final_layer.linear.weight": ("outputs", None),
}


def load(cls, path, dtype, device):
    if not path.is_file():
        config = configs.read(Config, path / "config.json", {"_class_name": (CLASS,)})
        return safetensors.load(lambda: cls(config), safetensors.Checkpoint(path, STEM), dtype, device)
    file = safetensors.Checkpoint(path, prefix="model.diffusion_model.")
    config = stability_config(file)
    model = safetensors.load(lambda: cls(config), file, dtype, device, lambda name: safetensors.rename(name, STABILITY))
    # The two layers that shift and scale but do not gate: Stability orders their outputs shift, scale; diffusers scale, shift.
    for layer in (model.norm_out, model.transformer_blocks[-1].norm1_context):
        for parameter in layer.parameters():
            parameter.data = torch.cat(parameter.data.chunk(2)[::-1])
    return model


def stability_config(file):
    """The sizes of a single file, read off the shapes of its tensors. Heads are 64 wide in SD3 and SD3.5."""
    sizes = file.measure("Stability's layout of SD3 or SD3.5", STABILITY_AXES)
    side = math.isqrt(sizes.pop("positions"))
    dual = [re.match(r"joint_blocks\.(\d+)\.x_block\.attn2\.", key) for key in file.shapes]
    sizes |= {
        "sample_size": min(128, side * sizes["patch_size"]),  # 128, for 1024 px, in every release; nothing in the file tells it
        "out_channels": sizes.pop("outputs") // sizes["patch_size"] ** 2,
        "num_layers": file.count("joint_blocks."),
        "num_attention_heads": file.heads(sizes["caption_projection_dim"]),
        "pos_embed_max_size": side,
        "dual_attention_layers": sorted({int(match[1]) for match in dual if match}),
        "qk_norm": "rms_norm" if any(".ln_q." in key for key in file.shapes) else None,
    }
    return configs.parse(Config, sizes, file.path)
