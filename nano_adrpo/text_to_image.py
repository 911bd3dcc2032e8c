"""SD3 as one object: prompts in, velocities in the paper's time, images out.

A folder in diffusers' pipeline layout: transformer/ (MMDiT), text_encoder/ and optionally text_encoder_2/ (CLIP) with
tokenizer/ and tokenizer_2/. Such a model works in pixel space: its latents are the images.

This is the one place where time is turned round. The paper: t = 0 noise, t = 1 data, velocity dx/dt = x1 − x0 = data − noise.
SD3's network: sigma = 1 − t, output noise − data. Hence velocity(x, t) = −network(x, 1 − t).
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from nano_adrpo import weights
from nano_adrpo.models.clip import CLIPText
from nano_adrpo.models.mmdit import MMDiT


@dataclass
class Condition:
    """What the network sees of B prompts. condition[rows] picks and repeats prompts, e.g. condition[[0, 0, 1, 1]]."""

    context: torch.Tensor  # [B, L, D], token embeddings
    pooled: torch.Tensor  # [B, P]

    def __getitem__(self, rows):
        return Condition(self.context[rows], self.pooled[rows])


class TextToImage:
    def __init__(self, transformer, encoders, tokenizers):
        """encoders and tokenizers: one CLIPText and one PromptTokenizer per text_encoder folder, in order."""
        self.transformer, self.encoders, self.tokenizers = transformer, encoders, tokenizers

    @property
    def device(self):
        return self.transformer.proj_out.weight.device

    @property
    def latent_shape(self):
        """[C, H, W] of one sample at the size the model was trained at."""
        config = self.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    @torch.no_grad()
    def encode(self, prompts):
        """A list of B strings -> Condition: the encoders' token embeddings side by side, padded with zeros to the
        transformer's width, and their pooled embeddings side by side."""
        outputs = [
            encoder(tokenizer(prompts, encoder.config.max_position_embeddings).to(self.device))
            for encoder, tokenizer in zip(self.encoders, self.tokenizers)
        ]
        context = torch.cat([hidden for hidden, _ in outputs], dim=-1)  # [B, L, D1 + D2]
        context = F.pad(context, (0, self.transformer.config.joint_attention_dim - context.shape[-1]))
        return Condition(context, torch.cat([pooled for _, pooled in outputs], dim=-1))

    def velocity(self, x, t, condition):
        """dx/dt at time t of the paper. x [B, C, H, W]; t a number or [B], in [0, 1]; -> like x, in x's dtype."""
        dtype = self.transformer.proj_out.weight.dtype
        sigma = 1 - torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        context, pooled = condition.context.to(dtype), condition.pooled.to(dtype)
        return -self.transformer(x.to(dtype), sigma, context, pooled).to(x.dtype)

    def decode(self, latents):
        """Latents [B, C, H, W] -> images [B, C, H, W], nominally in [−1, 1] and not clamped."""
        return latents

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        path = Path(path)
        if not (path / "transformer").is_dir():
            raise FileNotFoundError(f"{path}: no transformer/ in it; expected a folder in diffusers' SD3 pipeline layout")
        for part in ("vae", "text_encoder_3"):
            if (path / part).is_dir():
                raise ValueError(f"{path / part}: not supported; expected a pixel-space model with CLIP text encoders")
        suffixes = [suffix for suffix in ("", "_2") if (path / f"text_encoder{suffix}").is_dir()]
        if not suffixes:
            raise FileNotFoundError(f"{path / 'text_encoder'}: no such folder; it encodes the prompts")
        transformer = MMDiT.from_pretrained(path / "transformer", dtype, device)
        encoders = [CLIPText.from_pretrained(path / f"text_encoder{suffix}", dtype, device) for suffix in suffixes]
        model = cls(transformer, encoders, [PromptTokenizer(path / f"tokenizer{suffix}") for suffix in suffixes])
        width, pooled = sum(e.config.hidden_size for e in encoders), sum(e.config.projection_dim for e in encoders)
        if width > transformer.config.joint_attention_dim or pooled != transformer.config.pooled_projection_dim:
            raise ValueError(
                f"{path}: the text encoders give width {width} and pooled width {pooled}; transformer/config.json expects at "
                f"most {transformer.config.joint_attention_dim} and exactly {transformer.config.pooled_projection_dim}"
            )
        return model

    def save_pretrained(self, path):
        path = Path(path)
        index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
        self.transformer.save_pretrained(path / "transformer")
        for suffix, encoder, tokenizer in zip(("", "_2"), self.encoders, self.tokenizers):
            encoder.save_pretrained(path / f"text_encoder{suffix}")
            tokenizer.save_pretrained(path / f"tokenizer{suffix}")
            index[f"text_encoder{suffix}"] = ["transformers", "CLIPTextModelWithProjection"]
            index[f"tokenizer{suffix}"] = ["transformers", "PreTrainedTokenizerFast"]
        weights.write_json(path / "model_index.json", index)


class PromptTokenizer:
    """A tokenizer folder (tokenizer.json, tokenizer_config.json) used as CLIP's: every prompt padded to one length."""

    def __init__(self, path):
        self.config = weights.read_json(Path(path) / "tokenizer_config.json")
        file = Path(path) / "tokenizer.json"
        weights.read_json(file)  # a missing or damaged file is named
        self.tokenizer = Tokenizer.from_file(str(file))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        pad = self.config.get("pad_token")
        self.pad = self.tokenizer.token_to_id(pad["content"] if isinstance(pad, dict) else pad) if pad else None
        if self.pad is None:
            raise ValueError(f"{Path(path) / 'tokenizer_config.json'}: 'pad_token' is {pad!r}; expected a token of {file.name}")

    def __call__(self, prompts, length):
        """B strings -> ids [B, length]: begin, words, end, padding. A longer prompt loses words before its end token."""
        rows = []
        for prompt, encoding in zip(prompts, self.tokenizer.encode_batch(list(prompts))):
            ids = encoding.ids
            if len(ids) > length:
                warnings.warn(f"the prompt {prompt!r} has {len(ids)} tokens and is cut to {length}", stacklevel=3)
                ids = ids[: length - 1] + ids[-1:]
            rows.append(ids + [self.pad] * (length - len(ids)))
        return torch.tensor(rows)

    def save_pretrained(self, path):
        Path(path).mkdir(parents=True, exist_ok=True)
        weights.write_json(Path(path) / "tokenizer.json", json.loads(self.tokenizer.to_str()))
        weights.write_json(Path(path) / "tokenizer_config.json", self.config)
