"""CLIP (Radford et al. 2021, arXiv 2103.00020): a text and an image transformer that meet in one embedding space.

  * both towers: pre-norm blocks of self-attention and MLP; learned absolute positions
  * text: causal attention, pooled at the end-of-text token; image: patches after a class token, pooled at that token
  * `CLIP` is both towers with their projections (ClipScore and the like); `CLIPText` is the text tower alone, as SD3
    uses it to encode prompts: hidden states before the last block for the token stream, projected pooled output for cond

Module names are transformers' (CLIPModel, CLIPTextModelWithProjection); its folders load key by key.
"""

import dataclasses
import functools
import re
from dataclasses import field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nano_adrpo import weights

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


@dataclasses.dataclass
class TowerConfig:
    """What both towers have, under transformers' names; its config.json leaves out values equal to these defaults."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    projection_dim: int = 512
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; expected one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads")


@dataclasses.dataclass
class TextConfig(TowerConfig):
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


@dataclasses.dataclass
class VisionConfig(TowerConfig):
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32


@dataclasses.dataclass
class Config:
    text_config: TextConfig = field(default_factory=TextConfig)
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    projection_dim: int = 512


class CLIP(nn.Module):
    """Both towers. The embeddings are projected but not normalised: cosine similarity is up to the caller."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.text_model = TextTower(config.text_config)
        self.vision_model = VisionTower(config.vision_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # log of the inverse temperature; ln(1/0.07) at the start

    def encode_text(self, ids, mask=None):
        """ids [B, L], mask [B, L] (1 at tokens, 0 at padding; None: all tokens) -> [B, P]."""
        return self.text_projection(self.text_model(ids, mask)[1])

    def encode_image(self, pixels):
        """pixels [B, C, H, W], resized and normalised as the model's preprocessor asks -> [B, P]."""
        return self.visual_projection(self.vision_model(pixels))

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        """Opens a transformers CLIPModel folder. dtype None is the file's; device None the CPU."""
        where = Path(path) / "config.json"
        values = weights.read_json(where)
        if (kind := values.get("model_type")) != "clip":
            raise ValueError(f"{where}: 'model_type' is {kind!r}; expected 'clip'")
        config = weights.parse_config(Config, values, where)
        for tower, cls_ in (("text_config", TextConfig), ("vision_config", VisionConfig)):
            name = tower if values.get(f"{tower}_dict") is None else f"{tower}_dict"  # of older files, which has the last word
            setattr(config, tower, weights.parse_config(cls_, weights.section(values, name, where), where))
        with torch.device("meta"):
            model = cls(config)
        return weights.load(model, weights.Checkpoint(path), dtype, device, drop_position_ids)

    def save_pretrained(self, path):
        """Writes a folder that transformers' CLIPModel.from_pretrained opens."""
        config = {"architectures": ["CLIPModel"], "model_type": "clip", **dataclasses.asdict(self.config)}
        config["text_config"]["model_type"], config["vision_config"]["model_type"] = "clip_text_model", "clip_vision_model"
        weights.save_model(path, self, config)


class CLIPText(nn.Module):
    """The text tower and its projection: one of SD3's prompt encoders."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.text_model = TextTower(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, ids):
        """ids [B, L] -> (hidden states of the last-but-one layer [B, L, D], pooled projection [B, P])."""
        hidden, pooled = self.text_model(ids)
        return hidden, self.text_projection(pooled)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None, prefix=""):
        """Opens a transformers CLIPTextModelWithProjection folder, or a single file of SD3's release: clip_l.safetensors,
        clip_g.safetensors, or a bigger file whose keys for this encoder begin with `prefix`, such as
        `text_encoders.clip_l.transformer.`. dtype None is the file's; device None the CPU."""
        if Path(path).is_file():
            return cls._from_file(weights.Checkpoint(path), dtype, device, prefix)
        where = Path(path) / "config.json"
        values = weights.read_json(where)
        if (kind := values.get("model_type")) != "clip_text_model":
            raise ValueError(f"{where}: 'model_type' is {kind!r}; expected 'clip_text_model'")
        with torch.device("meta"):
            model = cls(weights.parse_config(TextConfig, values, where))
        return weights.load(model, weights.Checkpoint(path), dtype, device, drop_position_ids)

    @classmethod
    def _from_file(cls, checkpoint, dtype, device, prefix):
        keys = [key for key in checkpoint.home if key.startswith(prefix) and key != f"{prefix}logit_scale"]
        # SD3 takes CLIP-L's pooled output as it is, and its files leave the projection out: here that is the identity.
        projected = "clip_g" in prefix or f"{prefix}text_projection.weight" in keys and "clip_l" not in prefix
        keys = [key for key in keys if projected or key != f"{prefix}text_projection.weight"]
        config = file_config(
            {key.removeprefix(prefix): checkpoint.shapes[key] for key in keys}, prefix, checkpoint.path, projected
        )
        with torch.device("meta"):
            model = cls(config)

        def convert(key, read):
            name = key.removeprefix(prefix)
            tensors = drop_position_ids(name, read)
            if name == "text_model.final_layer_norm.bias" and not projected:
                tensors["text_projection.weight"] = torch.eye(config.hidden_size, device=tensors[name].device)
            return tensors

        return weights.load(model, checkpoint, dtype, device, convert, keys, lambda name: prefix + name)

    def save_pretrained(self, path):
        """Writes a folder that transformers' CLIPTextModelWithProjection.from_pretrained opens."""
        config = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"}
        weights.save_model(path, self, {**config, **dataclasses.asdict(self.config)})


def drop_position_ids(key, read):
    """Older files carry 0, 1, 2, … as a tensor; every other key is the model's own."""
    return {} if key.endswith("embeddings.position_ids") else {key: read()}


def file_config(shapes, prefix, path, projected):
    """The sizes that a single file does not spell out, read off its tensors' shapes. SD3 has two such encoders, both with
    heads of 64: L/14, unprojected and with the quick GELU of OpenAI's CLIP, and bigG, projected and with the exact one."""
    layers = [int(match[1]) for name in shapes if (match := re.match(r"text_model\.encoder\.layers\.(\d+)\.", name))]
    size = functools.partial(weights.size, shapes, path, "a CLIP text encoder of SD3's release", prefix)
    dim = size("text_model.embeddings.token_embedding.weight", 1)
    if dim % 64:
        raise ValueError(f"{path}: the width {dim} does not divide into heads of 64, as in SD3's CLIP text encoders")
    return TextConfig(
        hidden_size=dim,
        intermediate_size=size("text_model.encoder.layers.0.mlp.fc1.weight", 0),
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=dim // 64,
        projection_dim=size("text_projection.weight", 0) if projected else dim,
        hidden_act="gelu" if projected and dim != 768 else "quick_gelu",
        vocab_size=size("text_model.embeddings.token_embedding.weight", 0),
        max_position_embeddings=size("text_model.embeddings.position_embedding.weight", 0),
        eos_token_id=2,  # as in SD3's text_encoder/config.json: the highest id
    )


class TextTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.eos = config.eos_token_id
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.vocab_size, config.hidden_size),
                "position_embedding": nn.Embedding(config.max_position_embeddings, config.hidden_size),
            }
        )
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids, mask=None):
        """ids [B, L], mask [B, L] or None -> (hidden states before the last block [B, L, D], pooled [B, D])."""
        length, positions = ids.shape[1], self.embeddings["position_embedding"].weight
        if length > len(positions):
            raise ValueError(f"the prompt has {length} tokens; expected at most {len(positions)}")
        attends = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()  # [L, L], causal
        if mask is not None:
            attends = attends & mask.bool()[:, None, None]  # [B, 1, L, L]
            # Padding before the first token sees nothing, which would be NaN: let it see itself.
            attends = attends | (torch.eye(length, dtype=torch.bool, device=ids.device) & ~attends.any(dim=-1, keepdim=True))
        hidden, last = self.encoder(self.embeddings["token_embedding"](ids) + positions[:length], attends)
        # The first end-of-text token. Configs from before 2023 call it 2, and it is then the highest id of the row.
        end = ids.argmax(dim=1) if self.eos == 2 else (ids == self.eos).int().argmax(dim=1)
        return hidden, self.final_layer_norm(last)[torch.arange(len(ids), device=ids.device), end]


class VisionTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # the checkpoints' own spelling
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels):
        """pixels [B, C, H, W] -> the class token's output [B, D]."""
        _, last = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(last[:, 0])


class VisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.size = config.image_size
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2 + 1, config.hidden_size)

    def forward(self, pixels):
        if pixels.shape[-2:] != (self.size, self.size):
            raise ValueError(f"pixels are {pixels.shape[-2]} × {pixels.shape[-1]}; expected {self.size} × {self.size}")
        patches = self.patch_embedding(pixels.to(self.class_embedding.dtype)).flatten(2).transpose(1, 2)  # [B, T, D]
        return torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1) + self.position_embedding.weight


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x, attends=None):
        """x [B, L, D], attends: boolean, broadcastable to [B, heads, L, L] -> outputs of the last two layers."""
        for layer in self.layers:
            before, x = x, layer(x, attends)
        return before, x


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.act = ACTIVATIONS[config.hidden_act]
        self.layer_norm1, self.self_attn = nn.LayerNorm(dim, eps=eps), Attention(dim, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(dim, config.intermediate_size), "fc2": nn.Linear(config.intermediate_size, dim)}
        )

    def forward(self, x, attends):
        x = x + self.self_attn(self.layer_norm1(x), attends)
        return x + self.mlp["fc2"](self.act(self.mlp["fc1"](self.layer_norm2(x))))


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, attends):
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, d]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=attends).transpose(1, 2).flatten(2))
