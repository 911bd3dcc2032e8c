"""The encoder of T5 version 1.1 (Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, 2002.05202): SD3's third text encoder.

  * pre-norm blocks of self-attention, which sees the whole text, and a gated MLP (tanh GELU); RMS norm; no biases
  * no positions in the embeddings: a table in the first block gives every head a number per distance between two tokens, near
    distances one by one and far ones in logarithmic buckets; every block adds the same numbers to its attention's scores
  * the scores are not divided by √d: the weights were trained without

Module names are transformers' (T5EncoderModel), so its folders load key by key, and so do the single files of that layout
(t5xxl_fp16.safetensors, or the T5 inside Stability's SD3 file). In half precision the sum over the blocks is kept in float32,
and in float16 the MLP's last product too: the largest of its numbers exceed 65,504.
"""

import dataclasses
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nano_adrpo import weights

PREFIX = "text_encoders.t5xxl.transformer."  # in Stability's single file

# What makes a T5 another computation, key by key of config.json: its default, and the only value implemented.
ONLY = {"feed_forward_proj": ("relu", "gated-gelu"), "is_decoder": (False, False)}


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
        if buckets % 4 or farthest <= buckets // 4:
            raise ValueError(
                f"relative_attention_num_buckets is {buckets} and relative_attention_max_distance {farthest}; expected a "
                "multiple of 4, and a distance of more than a quarter of it"
            )


class T5Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.read_block = config, None
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = nn.ModuleDict(
            {
                "block": nn.ModuleList(Block(config, first=index == 0) for index in range(config.num_layers)),
                "final_layer_norm": RMSNorm(config),
            }
        )

    def forward(self, ids, mask=None):
        """ids [B, L], mask [B, L] (1 at tokens, 0 at padding on either side; None: all tokens) -> [B, L, d_model]."""
        blocks, table = self.encoder["block"], "layer.0.SelfAttention.relative_attention_bias.weight"
        tensors = self.read_block(0) if self.read_block else dict(blocks[0].named_parameters())
        bias = tensors[table][buckets(ids.shape[1], self.config).to(ids.device)].permute(2, 0, 1)  # [heads, L, L]
        if mask is not None:  # the smallest number and not −∞, with which a row of padding alone would be NaN
            bias = bias.masked_fill(~mask.bool()[:, None, None], torch.finfo(bias.dtype).min)  # [B, heads, L, L]
        x = self.shared(ids).float()
        for index, block in enumerate(blocks):
            if self.read_block:
                tensors = tensors if index == 0 else self.read_block(index)
                x = torch.func.functional_call(block, tensors, (x, bias))
                tensors = None  # before the next is read
            else:
                x = block(x, bias)
        return self.encoder["final_layer_norm"](x)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None, stream=False):
        """Opens a folder of transformers' T5EncoderModel, or of a whole T5 version 1.1, whose decoder is passed over; or a
        single file with the same keys, as they are or behind `text_encoders.t5xxl.transformer.` beside other models.

        dtype None is the file's (float8 files need one); device None the CPU
        stream    True leaves the blocks on disk. Each is read when it runs and forgotten when it has, so that of XXL's 9.5 GB
                  (float16) the embeddings and one block, 0.65 GB, are in memory at a time
        """
        path = Path(path)
        if path.is_file():
            checkpoint, where = weights.Checkpoint(path), path
            prefix = PREFIX if any(key.startswith(PREFIX) for key in checkpoint.home) else ""
            config = sizes({key.removeprefix(prefix): shape for key, shape in checkpoint.shapes.items()}, path)
        else:
            where, prefix = path / "config.json", ""
            values = weights.read_json(where)
            if (kind := values.get("model_type")) != "t5":
                raise ValueError(f"{where}: 'model_type' is {kind!r}; expected 't5'")
            for key, (default, known) in ONLY.items():
                if (value := values.get(key, default)) != known:
                    raise ValueError(f"{where}: '{key}' is {value!r}; only {known!r}, T5 version 1.1's encoder, is implemented")
            config, checkpoint = weights.parse_config(Config, values, where), weights.Checkpoint(path)
        keys = {key: key.removeprefix(prefix) for key in checkpoint.home if key.startswith(prefix)}
        alias = "encoder.embed_tokens.weight"  # transformers' second name of the embeddings
        keys = {key: name for key, name in keys.items() if not name.startswith(("decoder.", "lm_head.")) and name != alias}
        if "shared.weight" not in keys.values() and prefix + alias in checkpoint.home:
            keys[prefix + alias] = "shared.weight"
        stored = {checkpoint.dtypes[key] for key in keys}
        if dtype is None and any(kind.itemsize == 1 for kind in stored):
            raise ValueError(f"{where}: the weights are stored as {min(map(str, stored))}; expected a dtype to compute in")
        with torch.device("meta"):
            model = cls(config)

        def convert(key, read):
            return {keys[key]: read()}

        if not stream:
            return weights.load(model, checkpoint, dtype, device, convert, keys)
        weights.load(model, checkpoint, dtype, "meta", convert, keys)  # checks every name and shape
        dtypes, home = {name: p.dtype for name, p in model.named_parameters()}, {name: key for key, name in keys.items()}

        def read(start):
            """{name after start: tensor} of the parameters whose name begins so."""
            names = [name for name in home if name.startswith(start)]
            return {name[len(start) :]: checkpoint.read(home[name], device).to(dtypes[name]) for name in names}

        for name in ("shared.", "encoder.final_layer_norm."):
            model.load_state_dict({name + rest: tensor for rest, tensor in read(name).items()}, strict=False, assign=True)
        model.read_block = lambda index: read(f"encoder.block.{index}.")
        return model

    def save_pretrained(self, path):
        """Writes a folder that transformers' T5EncoderModel.from_pretrained opens."""
        if self.read_block:
            raise ValueError(f"{path}: a T5Encoder with stream=True has its blocks on disk; expected one without, to save it")
        config = {"architectures": ["T5EncoderModel"], "model_type": "t5", **dataclasses.asdict(self.config)}
        weights.save_model(path, self, {**config, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})


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

    Half the rows are for keys behind the query, half for those before it or at it. Of each half the first half are the
    distances 0, 1, 2, …, and the rest divide the way to max_distance evenly in the distance's logarithm; what is farther shares
    the last. (Raffel et al. 2020, section 2.1, as in their code.)
    """
    half = config.relative_attention_num_buckets // 2
    exact, farthest = half // 2, config.relative_attention_max_distance
    offset = torch.arange(length) - torch.arange(length)[:, None]  # key − query
    distance = offset.abs()
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(farthest / exact) * (half - exact)
    far = (exact + far.long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


def sizes(shapes, path):
    """The sizes that a single file does not spell out, read off its tensors' shapes."""
    layers = {int(match[1]) for key in shapes if (match := re.match(r"encoder\.block\.(\d+)\.", key))}
    first = "encoder.block.0.layer."
    try:
        rows, heads = shapes[f"{first}0.SelfAttention.relative_attention_bias.weight"]
        inner, _ = shapes[f"{first}0.SelfAttention.q.weight"]
        d_ff, d_model = shapes[f"{first}1.DenseReluDense.wi_0.weight"]
        vocabulary, _ = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
    except KeyError as error:
        raise ValueError(f"{path}: key {error} is missing; expected the encoder of T5 version 1.1") from None
    try:
        return Config(vocabulary, d_model, inner // heads, d_ff, max(layers) + 1, heads, rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
