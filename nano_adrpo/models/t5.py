"""The encoder of T5 version 1.1 (Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, 2002.05202): SD3's third text encoder.

  * pre-norm blocks of self-attention, which sees the whole text, and a gated MLP (tanh GELU); RMS norm; no biases
  * no positions in the embeddings: a table in the first block gives every head a number per distance between two tokens, near
    distances one by one and far ones in logarithmic buckets; every block adds the same numbers to its attention's scores
  * the scores are not divided by √d: the weights were trained without

Module names are transformers' (T5EncoderModel), in its folders and in the single files of SD3's release.

In half precision the sum over the blocks is kept in float32, and in float16 the MLP's last product too: the largest of its
numbers exceed 65,504. transformers does the same by keeping `wo` in float32; its clamping of what is still float16 is left out.
"""

import dataclasses
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nano_adrpo.errors import InputError
from nano_adrpo.files import config as configs
from nano_adrpo.files import safetensors

TABLE = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"  # the first block's, which all blocks use


@dataclasses.dataclass
class Config:
    """Sizes, under the names and with the defaults of transformers' config.json."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64  # width of a head
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or farthest <= buckets // 4:
            raise InputError(
                f"relative_attention_num_buckets is {buckets} and relative_attention_max_distance {farthest}; expected 4 or "
                "more, and a distance of more than a quarter of it"
            )


class T5Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.read = None  # streaming: reads the tensor of a parameter, by its name
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = nn.ModuleDict(
            {
                "block": nn.ModuleList(Block(config, first=index == 0) for index in range(config.num_layers)),
                "final_layer_norm": RMSNorm(config),
            }
        )
        # SD3 trains no encoder, and fused attention takes a bias only where that needs no gradient. To train it all the same,
        # requires_grad_(True); the kernel is then another, and the last bits of the outputs with it.
        self.requires_grad_(False)

    def forward(self, ids, mask=None):
        """ids [B, L], mask [B, L] (1 at tokens, 0 at padding on either side; None: all tokens) -> [B, L, d_model]."""
        rows = buckets(ids.shape[1], self.config).to(ids.device)
        bias = self.run(TABLE, rows).permute(2, 0, 1)[None]  # [1, heads, L, L]
        if mask is not None:  # the smallest number and not −∞, with which a row of padding alone would be NaN
            bias = bias.masked_fill(~mask.bool()[:, None, None], torch.finfo(bias.dtype).min)  # [B, heads, L, L]
        bias = bias.contiguous()  # as fused attention wants it
        x = self.run("shared", ids).float()
        for index in range(self.config.num_layers):
            x = self.run(f"encoder.block.{index}", x, bias)
        return self.run("encoder.final_layer_norm", x)

    def run(self, name, *inputs):
        """What the module `name` makes of the inputs. Streaming: its tensors are read now and forgotten on return."""
        module = self.get_submodule(name)
        if not self.read:
            return module(*inputs)
        tensors = {inside: self.read(f"{name}.{inside}") for inside, _ in module.named_parameters()}
        return torch.func.functional_call(module, tensors, inputs)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None, stream=False):
        """Opens a folder of transformers' T5EncoderModel, or of a whole T5 version 1.1, whose decoder is passed over; or a
        single file with the same keys, as they are or behind `text_encoders.t5xxl.transformer.` beside other models.

        dtype     None is the file's; a float8 file needs one, and one with scales of its own is refused
        device    None is the CPU
        stream    True keeps no weights: each call reads them from disk, never more at a time than one block's (XXL in float16:
                  0.39 of 9.5 GB). The outputs are the same bit for bit; so are the checks, made here. The parameters stay
                  meta: such a model is neither trained, moved nor saved. Encode once and keep the embeddings.
        """
        return load(cls, Path(path), dtype, device, stream)

    def save_pretrained(self, path):
        """Writes a folder that transformers' T5EncoderModel.from_pretrained opens."""
        if self.read:
            raise InputError(f"{path}: a T5Encoder with stream=True has no weights to save; expected one without")
        config = {"architectures": ["T5EncoderModel"], "model_type": "t5", **dataclasses.asdict(self.config)}
        safetensors.save_model(path, self, {**config, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})


class Block(nn.Module):
    def __init__(self, config, first):
        super().__init__()
        attention = nn.ModuleDict({"SelfAttention": Attention(config, first), "layer_norm": RMSNorm(config)})
        mlp = nn.ModuleDict({"DenseReluDense": GatedMLP(config), "layer_norm": RMSNorm(config)})
        self.layer = nn.ModuleList([attention, mlp])

    def forward(self, x, bias):
        """x [B, L, D], float32; bias, broadcastable to [B, heads, L, L] -> like x."""
        attention, mlp = self.layer
        x = x + attention["SelfAttention"](attention["layer_norm"](x), bias)
        return x + mlp["DenseReluDense"](mlp["layer_norm"](x))


class Attention(nn.Module):
    def __init__(self, config, first):
        super().__init__()
        self.heads, inner = config.num_heads, config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if first:  # every block's table
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x, bias):
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, d]
            for project in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o(attended.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        gated = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        if gated.dtype == torch.float16:
            return F.linear(gated.float(), self.wo.weight.float())
        return self.wo(gated)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the division in float32."""

    def __init__(self, config):
        super().__init__()
        self.eps, self.weight = config.layer_norm_epsilon, nn.Parameter(torch.ones(config.d_model))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(self.weight.dtype) * self.weight


def buckets(length, config):
    """The rows of the table for query i and key j: [length, length].

    Half the rows are for keys behind the query, half for those before it or at it. Of each half the first half (rounded down)
    are the distances 0, 1, 2, …, and the rest divide the way to max_distance evenly in the distance's logarithm; what is
    farther shares the last. (Raffel et al. 2020, section 2.1, as in their code.)
    """
    half = config.relative_attention_num_buckets // 2
    exact, farthest = half // 2, config.relative_attention_max_distance
    position = torch.arange(length, device="cpu")  # one logarithm for all devices: an ulp at an edge is another row
    offset = position - position[:, None]  # key − query
    distance = offset.abs()
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(farthest / exact) * (half - exact)
    far = (exact + far.long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


# ------------------------------------------------------------------------------------------------------------------- files

PREFIX = "text_encoders.t5xxl.transformer."  # in Stability's single file
ALIAS = "encoder.embed_tokens.weight"  # transformers' second name of shared.weight; t5xxl_fp16.safetensors holds both

# What may lie beside an encoder: the rest of a whole T5, and a number that files saved by ComfyUI carry and nothing reads.
BESIDE = r"decoder\..*|lm_head\.weight|logit_scale"

IMPLEMENTED = {
    "model_type": ("t5",),
    "feed_forward_proj": ("gated-gelu",),
    "dense_act_fn": ("gelu_new",),  # the tanh GELU; where it is given, transformers obeys it and not the above
    "is_decoder": (False,),
}
# What the axes of some tensors are: no config.json lies beside a single file. The table has a column per head.
AXES = {
    "encoder.block.0.layer.0.SelfAttention.q.weight": ("inner", None),
    f"{TABLE}.weight": ("relative_attention_num_buckets", "num_heads"),
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": ("d_ff", None),
}


def load(cls, path, dtype, device, stream):
    if not path.is_file():
        config = configs.read(Config, path / "config.json", IMPLEMENTED, ("model_type", "feed_forward_proj"))
    file = safetensors.Checkpoint(path, prefix=PREFIX)
    embeddings = ALIAS if ALIAS in file.home and "shared.weight" not in file.home else "shared.weight"
    ignore = BESIDE if embeddings == ALIAS else f"{BESIDE}|{re.escape(ALIAS)}"
    if path.is_file():
        config = single_file_config(file, embeddings)

    def key_of(name):
        return embeddings if name == "shared.weight" else name

    model = safetensors.load(lambda: cls(config), file, dtype, "meta" if stream else device, key_of, ignore)
    if stream:
        dtype = model.shared.weight.dtype
        model.read = lambda name: file.read(key_of(name), device).to(dtype)
    return model


def single_file_config(file, embeddings):
    """The sizes of a single file, read off the shapes of its tensors."""
    sizes = file.measure("the encoder of T5 version 1.1", AXES | {embeddings: ("vocab_size", "d_model")})
    inner, heads = sizes.pop("inner"), sizes["num_heads"]
    if inner % heads:
        where = f"{file.where(f'{TABLE}.weight')} has shape {list(file.shapes[f'{TABLE}.weight'])}"
        raise InputError(f"{where}; expected a column per head, where q has {inner} rows")
    return configs.parse(Config, sizes | {"d_kv": inner // heads, "num_layers": file.count("encoder.block.")}, file.path)
