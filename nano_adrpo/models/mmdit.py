"""MMDiT: the flow transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206, section 4).

  * the latent image becomes a sequence of patches, plus a 2-D sin-cos position table of which the centre is cropped
  * the time and the pooled prompt embedding become one vector, `cond`, that shifts, scales and gates every block (adaLN-Zero)
  * two streams, image and text, with weights of their own; each block joins them in one attention and parts them again
  * the last block does not update the text stream, whose output nobody reads
  * SD3.5: RMS norm on queries and keys; SD3.5-medium: a second, image-only attention in its first blocks

SD3's own language: sigma = 1 is noise and sigma = 0 data, and the output estimates noise − data. The paper's runs the other
way; `text_to_image.py` translates, and nothing else does.

Module names are diffusers' (SD3Transformer2DModel), so a diffusers folder loads key by key, and adapters made for it find
their layers. `STABILITY` below maps the other public layout, Stability's single file.
"""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nano_adrpo import weights

STEM = "diffusion_pytorch_model"  # what diffusers calls the weight file


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
    dual_attention_layers: tuple = ()
    qk_norm: str | None = None

    def __post_init__(self):
        if not isinstance(self.dual_attention_layers, (list, tuple)):
            raise ValueError(f"dual_attention_layers is {self.dual_attention_layers!r}; expected a list of layers")
        self.dual_attention_layers = tuple(self.dual_attention_layers)
        self.out_channels = self.in_channels if self.out_channels is None else self.out_channels
        if type(self.out_channels) is not int or self.out_channels <= 0:
            raise ValueError(f"out_channels is {self.out_channels!r}; expected a positive int or null")
        if self.caption_projection_dim != self.dim:
            raise ValueError(f"caption_projection_dim is {self.caption_projection_dim}; expected heads × head dim = {self.dim}")
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}; expected null or 'rms_norm'")

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
        path = Path(path)
        if path.is_file():
            file = weights.Checkpoint(path)
            refuse_other_families(file.home, path)
            prefix = "model.diffusion_model." if any(key.startswith("model.diffusion_model.") for key in file.home) else ""
            keys = [key for key in file.home if key.startswith(prefix)]
            config = stability_config({key.removeprefix(prefix): file.shapes[key] for key in keys}, prefix, path)
            with torch.device("meta"):
                model = cls(config)

            def convert(key, read):
                return from_stability(key.removeprefix(prefix), read, config)

            return weights.load(model, file, dtype, device, convert, keys, lambda name: prefix + to_stability(name))
        where = path / "config.json"
        values = weights.read_json(where)
        if (name := values.get("_class_name", "SD3Transformer2DModel")) != "SD3Transformer2DModel":
            raise ValueError(f"{where}: '_class_name' is {name!r}; expected 'SD3Transformer2DModel'")
        with torch.device("meta"):
            model = cls(weights.parse_config(Config, values, where))
        return weights.load(model, weights.Checkpoint(path, STEM), dtype, device)

    def save_pretrained(self, path):
        """Writes a folder that diffusers' SD3Transformer2DModel.from_pretrained opens."""
        config = {"_class_name": "SD3Transformer2DModel", **dataclasses.asdict(self.config)}
        weights.save_model(path, self, config, STEM)


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
        q, k, v = self.norm_q(self.split(self.to_q(x))), self.norm_k(self.split(self.to_k(x))), self.split(self.to_v(x))
        if self.joint:
            q = torch.cat([q, self.norm_added_q(self.split(self.add_q_proj(context)))], dim=2)  # [B, heads, T + L, d]
            k = torch.cat([k, self.norm_added_k(self.split(self.add_k_proj(context)))], dim=2)
            v = torch.cat([v, self.split(self.add_v_proj(context))], dim=2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, T + L, D]
        attended = self.to_out[0](out[:, : x.shape[1]])
        if not self.joint:
            return attended
        return attended, self.to_add_out(out[:, x.shape[1] :]) if self.to_add_out else None

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, T, D] -> [B, heads, T, d]


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
            raise ValueError(f"latents are {size}; expected multiples of {patch}, at most {self.side * patch}")
        top, left = (self.side - height) // 2, (self.side - width) // 2
        table = self.pos_embed.unflatten(1, (self.side, self.side))[:, top : top + height, left : left + width]
        return self.proj(latents).flatten(2).transpose(1, 2) + table.flatten(1, 2)


def position_table(dim, side, base):
    """The 2-D sin-cos table of a model trained from scratch, [1, side², dim]; a checkpoint brings its own. Half the
    channels tell the column, half the row; `base` patches are the unit, so that a wider table has finer steps."""
    positions = torch.arange(side, dtype=torch.float32) / (side / base)
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
        # At 1000·sigma the angles are large, so float32's rounding shows in the output: the order of operations is SD3's.
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=sigma.device) / 128)
        angles = (1000 * sigma.float())[:, None] * frequencies  # [B, 128]
        time = torch.cat([angles.cos(), angles.sin()], dim=-1).to(pooled.dtype)
        return self.timestep_embedder(time) + self.text_embedder(pooled)


class MLP(nn.Module):
    def __init__(self, dim_in, dim):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim_in, dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


def layer_norm(x):
    """Layer norm without weights; the kernel computes in float32 whatever x is."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


# Stability's single file. A tuple: the three blocks of a fused query-key-value layer.
STABILITY = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
STABILITY_BLOCK = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}


# What a key of another family's file begins with, behind `model.diffusion_model.` where that is there. The first that occurs
# decides, so the more telling ones stand above: SDXL has SD 1's blocks too.
TELLTALES = {
    "double_blocks.0.img_attn.": "FLUX",
    "single_transformer_blocks.": "FLUX (diffusers)",
    "double_layers.0.": "AuraFlow",
    "label_emb.": "SDXL",
    "conditioner.embedders.": "SDXL",
    "add_embedding.": "SDXL (diffusers)",
    "cond_stage_model.transformer.": "Stable Diffusion 1",
    "cond_stage_model.model.": "Stable Diffusion 2",
    "input_blocks.": "Stable Diffusion 1, 2 or SDXL",
    "down_blocks.": "Stable Diffusion 1, 2 or SDXL (diffusers)",
    "transformer_blocks.": "diffusers-layout",
}


def refuse_other_families(keys, path):
    """ValueError, naming the family, if a single file is another one's."""
    if any("joint_blocks." in key for key in keys):
        return
    for start, family in TELLTALES.items():
        if key := next((key for key in keys if key.removeprefix("model.diffusion_model.").startswith(start)), None):
            raise ValueError(
                f"{path}: this is a {family} checkpoint (key '{key}'); expected SD3 or SD3.5 in Stability's layout"
            )


def from_stability(key, read, config):
    """One tensor of Stability's file -> {diffusers' name: tensor}; an unknown key keeps its name, which no model has."""
    stem, dot, kind = key.rpartition(".") if key.endswith((".weight", ".bias")) else (key, "", "")
    block = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", stem)
    names = STABILITY_BLOCK.get(block[2]) if block else STABILITY.get(stem)
    if names is None:
        return {key: read()}
    prefix = f"transformer_blocks.{block[1]}." if block else ""
    tensor = torch.atleast_1d(read())  # so that a misshapen one can be cut, and is told by its shape
    if isinstance(names, tuple):
        return {f"{prefix}{name}{dot}{kind}": part.clone() for name, part in zip(names, tensor.chunk(3))}
    name = f"{prefix}{names}{dot}{kind}"
    # The two layers that only shift and scale: Stability orders them shift, scale; diffusers scale, shift.
    if name.startswith(("norm_out.", f"transformer_blocks.{config.num_layers - 1}.norm1_context.")):
        tensor = torch.cat(tensor.chunk(2)[::-1])
    return {name: tensor}


def to_stability(name):
    """diffusers' name of a tensor -> the key in Stability's file that has it."""
    stem, dot, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
    block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", stem)
    table, stem = (STABILITY_BLOCK, block[2]) if block else (STABILITY, stem)
    key = next(key for key, ours in table.items() if stem == ours or isinstance(ours, tuple) and stem in ours)
    return f"joint_blocks.{block[1]}.{key}{dot}{kind}" if block else key + dot + kind


def stability_config(shapes, prefix, path):
    """The sizes that Stability's file does not spell out, read off its tensors' shapes; its heads are always 64 wide."""
    layers = {int(match[1]) for key in shapes if (match := re.match(r"joint_blocks\.(\d+)\.", key))}
    dual = {int(match[1]) for key in shapes if (match := re.match(r"joint_blocks\.(\d+)\.x_block\.attn2\.", key))}
    size = functools.partial(weights.size, shapes, path, "Stability's SD3 or SD3.5 layout", prefix)
    dim, channels, patch = (size("x_embedder.proj.weight", axis, 4) for axis in range(3))
    if dim % 64:
        raise ValueError(f"{path}: the width {dim} does not divide into heads of 64, as in SD3 and SD3.5")
    side = math.isqrt(size("pos_embed", 1, 3))
    return Config(
        sample_size=min(128, side * patch),  # 128 (1024 px) in every release, of which nothing in the file tells
        patch_size=patch,
        in_channels=channels,
        out_channels=max(1, size("final_layer.linear.weight", 0) // patch**2),
        num_layers=max(layers, default=0) + 1,
        num_attention_heads=dim // 64,
        joint_attention_dim=size("context_embedder.weight", 1),
        pooled_projection_dim=size("y_embedder.mlp.0.weight", 1),
        caption_projection_dim=dim,
        pos_embed_max_size=side,
        dual_attention_layers=sorted(dual),
        qk_norm="rms_norm" if any(".ln_q." in key for key in shapes) else None,
    )
