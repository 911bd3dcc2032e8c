"""CLIP (Radford et al. 2021, arXiv 2103.00020): a text and an image transformer that meet in one embedding space.

  * both towers: pre-norm blocks of self-attention and MLP; learned absolute positions
  * text: causal attention, pooled at the end-of-text token; image: patches after a class token, pooled at that token
  * `CLIP` is both towers with their projections (ClipScore and the like); `CLIPText` is the text tower alone, as SD3
    uses it to encode prompts: hidden states before the last block for the token stream, projected pooled output for cond

Module names are transformers' (CLIPModel, CLIPTextModelWithProjection); its folders load key by key.
"""

import dataclasses
import re
from dataclasses import field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from nano_adrpo import files
from nano_adrpo.errors import InputError
from nano_adrpo.files import config as configs
from nano_adrpo.files import safetensors

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


@dataclasses.dataclass
class TowerConfig:
    """What both towers have, under transformers' names; its config.json leaves out values equal to these defaults."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    projection_dim: int = 512
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise InputError(f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads")


@dataclasses.dataclass
class TextConfig(TowerConfig):
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


@dataclasses.dataclass
class VisionConfig(TowerConfig):
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32

    def __post_init__(self):
        super().__post_init__()
        if self.patch_size > self.image_size:
            raise InputError(f"patch_size is {self.patch_size}; expected at most image_size, {self.image_size}")


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
        return load(cls, Path(path), dtype, device)

    def save_pretrained(self, path):
        """Writes a folder that transformers' CLIPModel.from_pretrained opens."""
        config = {"architectures": ["CLIPModel"], "model_type": "clip", **dataclasses.asdict(self.config)}
        config["text_config"]["model_type"], config["vision_config"]["model_type"] = "clip_text_model", "clip_vision_model"
        safetensors.save_model(path, self, config)


class CLIPText(nn.Module):
    """The text tower and its projection, or (projected=False, as in FLUX) the tower alone: a prompt encoder."""

    def __init__(self, config, projected=True):
        super().__init__()
        self.config, self.projected = config, projected
        self.text_model = TextTower(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False) if projected else nn.Identity()

    def forward(self, ids):
        """ids [B, L] -> (hidden states of the last-but-one layer [B, L, D], pooled projection [B, P])."""
        hidden, pooled = self.text_model(ids)
        return hidden, self.text_projection(pooled)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None, prefix="", projected=True):
        """Opens a transformers CLIPTextModelWithProjection folder (projected=False: a CLIPTextModel folder), or a single file
        of SD3's release: clip_l.safetensors, clip_g.safetensors, or a bigger file whose keys for this encoder begin with
        `prefix`, such as `text_encoders.clip_l.transformer.`. dtype None is the file's; device None the CPU."""
        return load_text(cls, Path(path), dtype, device, prefix, projected)

    def save_pretrained(self, path):
        """Writes a folder that transformers' CLIPTextModelWithProjection or CLIPTextModel opens."""
        name = "CLIPTextModelWithProjection" if self.projected else "CLIPTextModel"
        config = {"architectures": [name], "model_type": "clip_text_model"}
        safetensors.save_model(path, self, {**config, **dataclasses.asdict(self.config)})


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
            raise InputError(f"the prompt has {length} tokens; expected at most {len(positions)}")
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
            raise InputError(f"pixels are {pixels.shape[-2]} × {pixels.shape[-1]}; expected {self.size} × {self.size}")
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


# ------------------------------------------------------------------------------------------------------------------- files

POSITIONS = r".*embeddings\.position_ids"  # older files carry 0, 1, 2, … as a tensor

# What the axes of some tensors are: no config.json lies beside a single file of SD3's release.
AXES = {
    "text_model.embeddings.token_embedding.weight": ("vocab_size", "hidden_size"),
    "text_model.embeddings.position_embedding.weight": ("max_position_embeddings", None),
    "text_model.encoder.layers.0.mlp.fc1.weight": ("intermediate_size", None),
}
PROJECTION = "text_projection.weight"


def load(cls, path, dtype, device):
    where = path / "config.json"
    values = files.read_json(where)
    configs.only(values, {"model_type": ("clip",)}, where, ("model_type",))
    for tower in ("text_config", "vision_config"):  # older files have a section of another name too, which has the last word
        if values.get(f"{tower}_dict") is not None:
            values[tower] = values[f"{tower}_dict"]
    config = configs.parse(Config, values, where)
    return safetensors.load(lambda: cls(config), safetensors.Checkpoint(path), dtype, device, ignore=POSITIONS)


def load_text(cls, path, dtype, device, prefix, projected):
    file = safetensors.Checkpoint(path, prefix=prefix)
    if not path.is_file():
        config = configs.read(TextConfig, path / "config.json", {"model_type": ("clip_text_model",)}, ("model_type",))
        # transformers 5 writes a tower without a projection under names without the tower's own.
        bare = "embeddings.token_embedding.weight" in file.home
        ignore = POSITIONS if projected else rf"{POSITIONS}|{re.escape(PROJECTION)}"
        return safetensors.load(
            lambda: cls(config, projected), file, dtype, device, lambda name: name.removeprefix("text_model." * bare), ignore
        )
    # SD3 takes CLIP-L's pooled output as it is, without a projection, even where its file has the matrix.
    matrix = projected and ("clip_g" in prefix or PROJECTION in file.home and "clip_l" not in prefix)
    config = single_file_config(file, matrix)
    ignore = rf"{POSITIONS}|logit_scale" + ("" if matrix else rf"|{re.escape(PROJECTION)}")
    model = safetensors.load(lambda: cls(config, matrix), file, dtype, device, ignore=ignore)
    if projected and not matrix:  # from here on the identity is a matrix, as in the folders of the release
        norm = model.text_model.final_layer_norm.weight
        model.text_projection = nn.Linear(len(norm), len(norm), bias=False, device=norm.device, dtype=norm.dtype)
        nn.init.eye_(model.text_projection.weight)
        model.projected = True
    return model


def single_file_config(file, projected):
    """The sizes of a single file, read off the shapes of its tensors. SD3 has two such encoders, both with heads of 64: L/14,
    unprojected and with the quick GELU of OpenAI's CLIP, and bigG, projected and with the exact one."""
    axes = AXES | ({PROJECTION: ("projection_dim", None)} if projected else {})
    sizes = file.measure("a CLIP text encoder of SD3's release", axes)
    width = sizes["hidden_size"]
    values = {
        "num_hidden_layers": file.count("text_model.encoder.layers."),
        "num_attention_heads": file.heads(width),
        "projection_dim": width,
        "hidden_act": "gelu" if projected and width != 768 else "quick_gelu",
        "eos_token_id": 2,  # as in SD3's text_encoder/config.json: the highest id
    }
    return configs.parse(TextConfig, values | sizes, file.path)
