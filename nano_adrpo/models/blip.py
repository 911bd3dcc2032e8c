"""BLIP (Li et al. 2022, arXiv 2201.12086): does this text describe this image? And ImageReward (Xu et al. 2023, arXiv
2304.05977), a score of human preference on the same two towers.

  * image: a ViT; pre-norm blocks, learned absolute positions, a class token before the patches
  * text: BERT; post-norm blocks, learned absolute positions, no token types. Each block attends to the text and, where an
    image is given, to its patches: without the image the tower embeds a text, with it it judges the pair
  * `BLIP`: embeddings of either tower to compare (ITC), or the probability that the pair matches (ITM)
  * `ImageReward`: the pair's first token through a linear head, normalised by a published mean and deviation

`BLIP` has transformers' module names (BlipForImageTextRetrieval). ImageReward's release has names of its own, see the end.
"""

import dataclasses
import math
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


class TowerConfig:
    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise InputError(f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads")


@dataclasses.dataclass
class TextConfig(TowerConfig):
    """transformers' names and defaults; its config.json leaves out values equal to these."""

    vocab_size: int = 30524  # bert-base-uncased's 30522, [DEC] and [ENC]
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 8  # transformers' default; the public checkpoints have 12
    max_position_embeddings: int = 512
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: float = 1e-12


@dataclasses.dataclass
class VisionConfig(TowerConfig):
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 384
    patch_size: int = 16
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        if self.patch_size > self.image_size:
            raise InputError(f"patch_size is {self.patch_size}; expected at most image_size, {self.image_size}")


@dataclasses.dataclass
class Config:
    text_config: TextConfig = field(default_factory=TextConfig)
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    image_text_hidden_size: int = 256  # P of the embeddings; ImageReward has none


class BLIP(nn.Module):
    """Images and texts, embedded apart or judged together. Embeddings are projected but not normalised: cosine similarity is
    up to the caller. Pixels are resized and normalised as the model's preprocessor asks (CLIP's mean and deviation).

    Texts begin with [CLS], as in transformers and in ImageReward. Salesforce's own code puts [ENC] (id 30523) first in ITM,
    which transformers' port leaves out: for that, put it into ids[:, 0] yourself."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        text, vision = config.text_config, config.vision_config
        self.vision_model = VisionModel(vision)
        self.text_encoder = TextModel(text, vision.hidden_size)
        self.vision_proj = nn.Linear(vision.hidden_size, config.image_text_hidden_size)
        self.text_proj = nn.Linear(text.hidden_size, config.image_text_hidden_size)
        self.itm_head = nn.Linear(text.hidden_size, 2)

    def encode_image(self, pixels):
        """pixels [B, 3, H, W] -> [B, P]."""
        return self.vision_proj(self.vision_model(pixels)[:, 0])

    def encode_text(self, ids, mask=None):
        """ids [B, L], first token first; mask [B, L] (1 at tokens, 0 at padding; None: all tokens) -> [B, P]."""
        return self.text_proj(self.text_encoder(ids, mask)[:, 0])

    def match_logits(self, pixels, ids, mask=None):
        """B images and B texts, pair by pair -> [B, 2]: logits of "they do not match" and "they match"."""
        return self.itm_head(self.text_encoder(ids, mask, self.vision_model(pixels))[:, 0])

    def match(self, pixels, ids, mask=None):
        """B images and B texts, pair by pair -> the probability that they match [B], float32."""
        return self.match_logits(pixels, ids, mask).softmax(dim=1, dtype=torch.float32)[:, 1]

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        """Opens a transformers BlipForImageTextRetrieval folder. dtype None is the file's; device None the CPU."""
        config = configs.read(Config, Path(path) / "config.json", {"model_type": ("blip",)}, ("model_type",))
        return safetensors.load(lambda: cls(config), safetensors.Checkpoint(path), dtype, device, ignore=r"(.*\.)?position_ids")

    def save_pretrained(self, path):
        """Writes a folder that transformers' BlipForImageTextRetrieval.from_pretrained opens."""
        config = {"architectures": ["BlipForImageTextRetrieval"], "model_type": "blip", **dataclasses.asdict(self.config)}
        config["text_config"]["encoder_hidden_size"] = self.config.vision_config.hidden_size
        config["text_config"]["model_type"], config["vision_config"]["model_type"] = "blip_text_model", "blip_vision_model"
        safetensors.save_model(path, self, config)


class ImageReward(nn.Module):
    """ImageReward v1.0: how much people would like this image for this prompt. Its authors cut prompts to 35 tokens;
    pixels are 224 × 224, normalised by CLIP's mean and deviation."""

    MEAN, STD = 0.16717362830052426, 1.0333394966054072  # as published in ImageReward.py

    def __init__(self, config):
        super().__init__()
        self.config = config
        text, vision = config.text_config, config.vision_config
        self.blip = nn.ModuleDict({"visual_encoder": VisionModel(vision), "text_encoder": TextModel(text, vision.hidden_size)})
        # No activations in between: the published head is one linear map, regularised in training.
        layers = [nn.Linear(text.hidden_size, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)]
        layers += [nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)]
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(*layers)})

    def forward(self, pixels, ids, mask=None):
        """pixels [B, 3, H, W], ids [B, L], mask [B, L] (1 at tokens, 0 at padding), pair by pair -> rewards [B], float32."""
        first = self.blip["text_encoder"](ids, mask, self.blip["visual_encoder"](pixels))[:, 0]  # [B, D]
        return (self.mlp["layers"](first)[:, 0].float() - self.MEAN) / self.STD

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        """Opens a folder with ImageReward.safetensors (ImageReward.pt of the release, converted key by key) and the release's
        med_config.json, BERT's sizes; or such a safetensors file alone, when all sizes come from its tensors' shapes.
        dtype None is the file's; device None the CPU."""
        return load_image_reward(cls, Path(path), dtype, device)

    def save_pretrained(self, path):
        """Writes ImageReward.safetensors and med_config.json under the release's names."""
        Path(path).mkdir(parents=True, exist_ok=True)
        tensors = {image_reward_key(name): tensor for name, tensor in self.state_dict().items()}
        safetensors.save(Path(path) / "ImageReward.safetensors", tensors)
        bert = {"architectures": ["BertModel"], "model_type": "bert", **dataclasses.asdict(self.config.text_config)}
        bert |= {"encoder_width": self.config.vision_config.hidden_size, "add_cross_attention": True}
        files.write_json(Path(path) / "med_config.json", bert)


class VisionModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels):
        """pixels [B, 3, H, W] -> the class token and the patches [B, 1 + T, D]."""
        x = self.embeddings(pixels)
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.post_layernorm(x)


class VisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.size, dim, patch = config.image_size, config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embedding = nn.Conv2d(3, dim, patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.zeros(1, (self.size // patch) ** 2 + 1, dim))

    def forward(self, pixels):
        if pixels.shape[-2:] != (self.size, self.size):
            raise InputError(f"pixels are {pixels.shape[-2]} × {pixels.shape[-1]}; expected {self.size} × {self.size}")
        patches = self.patch_embedding(pixels.to(self.class_embedding.dtype)).flatten(2).transpose(1, 2)  # [B, T, D]
        return torch.cat([self.class_embedding.expand(len(pixels), -1, -1), patches], dim=1) + self.position_embedding


class VisionLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim, hidden, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.self_attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "projection": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x):
        q, k, v = (split(x, self.heads) for x in self.self_attn["qkv"](self.layer_norm1(x)).chunk(3, dim=-1))
        x = x + self.self_attn["projection"](merge(F.scaled_dot_product_attention(q, k, v)))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x))))


class TextModel(nn.Module):
    def __init__(self, config, image_width):
        super().__init__()
        dim = config.hidden_size
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config.vocab_size, dim),
                "position_embeddings": nn.Embedding(config.max_position_embeddings, dim),
                "LayerNorm": nn.LayerNorm(dim, eps=config.layer_norm_eps),
            }
        )
        layers = nn.ModuleList(TextLayer(config, image_width) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, ids, mask=None, image=None):
        """ids [B, L], mask [B, L] or None, image tokens [B, 1 + T, image_width] or None -> [B, L, D]."""
        length, positions = ids.shape[1], self.embeddings["position_embeddings"].weight
        if length > len(positions):
            raise InputError(f"the prompt has {length} tokens; expected at most {len(positions)}")
        attends = None if mask is None else mask.bool()[:, None, None]  # [B, 1, 1, L]
        x = self.embeddings["LayerNorm"](self.embeddings["word_embeddings"](ids) + positions[:length])
        for layer in self.encoder["layer"]:
            x = layer(x, attends, image)
        return x


class TextLayer(nn.Module):
    def __init__(self, config, image_width):
        super().__init__()
        dim, hidden, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.attention, self.crossattention = TextAttention(config, dim), TextAttention(config, image_width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(dim, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, dim), "LayerNorm": nn.LayerNorm(dim, eps=eps)})

    def forward(self, x, attends, image):
        x = self.attention(x, x, attends)
        if image is not None:
            x = self.crossattention(x, image)
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


class TextAttention(nn.Module):
    """Attention of the text to `source`, the residual and its norm."""

    def __init__(self, config, width):
        super().__init__()
        dim = config.hidden_size
        self.heads = config.num_attention_heads
        self.self = nn.ModuleDict({"query": nn.Linear(dim, dim), "key": nn.Linear(width, dim), "value": nn.Linear(width, dim)})
        self.output = nn.ModuleDict({"dense": nn.Linear(dim, dim), "LayerNorm": nn.LayerNorm(dim, eps=config.layer_norm_eps)})

    def forward(self, x, source, attends=None):
        """x [B, L, D], source [B, S, width], attends: boolean, broadcastable to [B, heads, L, S] -> [B, L, D]."""
        q = split(self.self["query"](x), self.heads)
        k, v = split(self.self["key"](source), self.heads), split(self.self["value"](source), self.heads)
        attended = merge(F.scaled_dot_product_attention(q, k, v, attn_mask=attends))
        return self.output["LayerNorm"](x + self.output["dense"](attended))


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, L, D] -> [B, heads, L, d]


def merge(x):
    return x.transpose(1, 2).flatten(2)  # [B, heads, L, d] -> [B, L, D]


# ------------------------------------------------------------------------------------------------------------------- files

# Ours -> the names in ImageReward's file, replaced in this order within a name: its ViT is timm's.
IMAGE_REWARD = {
    "visual_encoder.embeddings.class_embedding": "visual_encoder.cls_token",
    "visual_encoder.embeddings.position_embedding": "visual_encoder.pos_embed",
    "visual_encoder.embeddings.patch_embedding": "visual_encoder.patch_embed.proj",
    "visual_encoder.encoder.layers.": "visual_encoder.blocks.",
    "visual_encoder.post_layernorm": "visual_encoder.norm",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".self_attn.qkv.": ".attn.qkv.",
    ".self_attn.projection.": ".attn.proj.",
}
# Positions 0, 1, 2, …, and BLIP's projections, which the score does not go through.
IMAGE_REWARD_UNUSED = r"blip\.(text_encoder\.embeddings\.position_ids|(vision|text)_proj\.(weight|bias))"

# What the axes of some tensors are.
VISION_AXES = {
    "blip.visual_encoder.patch_embed.proj.weight": ("hidden_size", None, "patch_size", None),
    "blip.visual_encoder.blocks.0.mlp.fc1.weight": ("intermediate_size", None),
    "blip.visual_encoder.pos_embed": (None, "positions", None),
}
TEXT_AXES = {
    "blip.text_encoder.embeddings.word_embeddings.weight": ("vocab_size", "hidden_size"),
    "blip.text_encoder.encoder.layer.0.intermediate.dense.weight": ("intermediate_size", None),
    "blip.text_encoder.embeddings.position_embeddings.weight": ("max_position_embeddings", None),
}


def image_reward_key(name):
    """The name of a tensor in the model -> its key in ImageReward's file."""
    return safetensors.rename(name, IMAGE_REWARD)


def load_image_reward(cls, path, dtype, device):
    file = safetensors.Checkpoint(path, "ImageReward")
    where = path if path.is_file() else path / "med_config.json"
    bert = {} if path.is_file() else files.read_json(where)
    config = image_reward_config(file, bert, where)
    return safetensors.load(lambda: cls(config), file, dtype, device, image_reward_key, IMAGE_REWARD_UNUSED)


def image_reward_config(file, bert, where):
    """The sizes: med_config.json's (`bert`, read from `where`) as far as it gives them, the rest from the shapes of the file's
    tensors. Heads are 64 wide where only shapes tell: so they are in the ViT and the BERT of every public BLIP."""
    vision = file.measure("ImageReward's layout", VISION_AXES)
    vision |= {
        "num_hidden_layers": file.count("blip.visual_encoder.blocks."),
        "num_attention_heads": file.heads(vision["hidden_size"]),
        "image_size": vision["patch_size"] * math.isqrt(vision["positions"] - 1),  # without the class token
        "layer_norm_eps": 1e-6,
    }
    text = file.measure("ImageReward's layout", TEXT_AXES)
    text["num_hidden_layers"] = file.count("blip.text_encoder.encoder.layer.")
    if "num_attention_heads" not in bert:
        text["num_attention_heads"] = file.heads(text["hidden_size"])
    return Config(configs.parse(TextConfig, text | bert, where), configs.parse(VisionConfig, vision, file.path))
