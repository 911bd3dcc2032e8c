"""Stable Diffusion 3 and 3.5: what differs from the other families.

The transformer sees of a prompt

  * context: the hidden states of CLIP-L and CLIP-bigG side by side, padded with zeros to the transformer's width (77 tokens),
    then T5's tokens (256). Without T5 these are zeros, as in diffusers' pipeline
  * pooled: the pooled outputs of both CLIPs side by side

Nothing is masked: padding is encoded and attended to, as in diffusers' encode_prompt.
"""

import torch
import torch.nn.functional as F

from nano_adrpo import lora
from nano_adrpo.errors import InputError
from nano_adrpo.models.clip import CLIPText
from nano_adrpo.models.mmdit import MMDiT
from nano_adrpo.models.t5 import T5Encoder
from nano_adrpo.models.tokenizers import PromptTokenizer
from nano_adrpo.models.vae import Autoencoder
from nano_adrpo.text_to_image.condition import Condition, Encoder, save_encoder
from nano_adrpo.text_to_image.family import FOLDER, Family, Latents, Part, Release
from nano_adrpo.text_to_image.scheduler import Scheduler

CLIP = "transformers", "CLIPTextModelWithProjection"
PARTS = {
    "transformer": Part(FOLDER, "model.diffusion_model.", "diffusers", "SD3Transformer2DModel"),
    "vae": Part("it turns latents into images", "first_stage_model.", "diffusers", "AutoencoderKL"),
    "text_encoder": Part("it encodes the prompts (CLIP-L)", "text_encoders.clip_l.transformer.", *CLIP),
    "text_encoder_2": Part("it encodes the prompts (CLIP-bigG)", "text_encoders.clip_g.transformer.", *CLIP),
    "text_encoder_3": Part(
        "it encodes the prompts (T5; t5='zeros' does without)",
        "text_encoders.t5xxl.transformer.",
        "transformers",
        "T5EncoderModel",
    ),
    "tokenizer": Part("it splits the prompts for text_encoder"),
    "tokenizer_2": Part("it splits the prompts for text_encoder_2"),
    "tokenizer_3": Part("it splits the prompts for text_encoder_3"),
}


class PromptEncoder(Encoder):
    def __init__(self, clips, tokenizers, width, t5=None, t5_tokenizer=None, t5_tokens=0):
        """clips and tokenizers: a CLIPText and a PromptTokenizer for each CLIP, in order; width: the transformer's
        joint_attention_dim; t5_tokens: how many tokens stand behind CLIP's, zeros without a `t5`."""
        self.clips, self.tokenizers, self.width = clips, tokenizers, width
        self.t5, self.t5_tokenizer, self.t5_tokens = t5, t5_tokenizer, t5_tokens
        self.clip_tokens = int(min(tokenizers[0].longest, *(clip.config.max_position_embeddings for clip in clips)))
        for tokenizer in (*tokenizers, *([t5_tokenizer] if t5 else [])):
            tokenizer.reported = tokenizers[0].reported  # only the first tokenizer that cuts a long prompt reports it

    @property
    def device(self):
        return self.clips[0].text_projection.weight.device

    def _encode(self, prompts, negative):  # both are encoded alike
        ids = [self.tokens(*pair, prompts, self.clip_tokens) for pair in zip(self.tokenizers, self.clips)]
        outputs = [clip(tokens) for clip, tokens in zip(self.clips, ids)]
        context = torch.cat([hidden for hidden, _ in outputs], dim=-1)  # [B, 77, D1 + D2]
        context = F.pad(context, (0, self.width - context.shape[-1]))
        if self.t5:
            tokens = self.t5(self.tokens(self.t5_tokenizer, self.t5, prompts, self.t5_tokens))
            context = torch.cat([context, tokens], dim=1)  # [B, 77 + T, D]
        else:
            context = F.pad(context, (0, 0, 0, self.t5_tokens))
        return Condition(context, torch.cat([pooled for _, pooled in outputs], dim=-1))

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None, base=None, t5="load", t5_tokens=256):
        """The encoders and tokenizers of a release: see TextToImage.from_pretrained.

        t5          "load", "stream" (layer by layer from disk: its 9 GB are never in memory at once), or "zeros" (do without)
        t5_tokens   how many tokens T5 sees, 1 … 512
        """
        if t5 not in ("load", "stream", "zeros") or not 1 <= t5_tokens <= 512:
            raise InputError(f"t5 is {t5!r}, of {t5_tokens} tokens; expected 'load', 'stream' or 'zeros', of 1 … 512 tokens")
        release = Release(path, base, SD3)
        sizes, suffixes = release.transformer_config(), ["", "_2"] if release.expects("text_encoder_2") else [""]
        with_t5 = release.expects("text_encoder_3") and t5 != "zeros"
        needed = [*suffixes, "_3"] if with_t5 else suffixes
        where = {part: release.need(part) for s in needed for part in (f"text_encoder{s}", f"tokenizer{s}")}
        tokenizers = [PromptTokenizer(where[f"tokenizer{suffix}"]) for suffix in suffixes]
        clips = []
        for part in (f"text_encoder{suffix}" for suffix in suffixes):
            prefix = {"prefix": PARTS[part].prefix} if where[part].is_file() else {}
            clips.append(CLIPText.from_pretrained(where[part], dtype, device, **prefix))
        width, pooled = sum(c.config.hidden_size for c in clips), sum(c.config.projection_dim for c in clips)
        if width > sizes.joint_attention_dim or pooled != sizes.pooled_projection_dim:
            raise InputError(
                f"{path}: the text encoders give width {width} and pooled width {pooled}; transformer/config.json expects at "
                f"most {sizes.joint_attention_dim} and exactly {sizes.pooled_projection_dim}"
            )
        if not with_t5:
            t5_tokens = t5_tokens if "text_encoder_3" in release.index or release.expects("text_encoder_3") else 0
            return cls(clips, tokenizers, sizes.joint_attention_dim, t5_tokens=t5_tokens)
        encoder = T5Encoder.from_pretrained(where["text_encoder_3"], dtype, device, stream=t5 == "stream")
        if (width := encoder.config.d_model) != sizes.joint_attention_dim:
            raise InputError(f"{where['text_encoder_3']}: T5 has width {width}; expected {sizes.joint_attention_dim}")
        return cls(clips, tokenizers, sizes.joint_attention_dim, encoder, PromptTokenizer(where["tokenizer_3"]), t5_tokens)

    def save_pretrained(self, path):
        index, name = {}, PARTS["text_encoder"].name
        for suffix, clip, tokenizer in zip(("", "_2"), self.clips, self.tokenizers):
            index |= save_encoder(path, suffix, clip, tokenizer, name)
        if self.t5:
            index |= save_encoder(path, "_3", self.t5, self.t5_tokenizer, PARTS["text_encoder_3"].name)
        elif self.t5_tokens:
            index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
        return index


def latents(config):
    return Latents(config.in_channels, config.patch_size, config.sample_size, config.pos_embed_max_size)


SD3 = Family(
    name="SD3",
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    parts=PARTS,
    telltale="joint_blocks.",
    transformer=MMDiT,
    autoencoder=Autoencoder,
    encoder=PromptEncoder,
    scheduler=Scheduler,
    latents=latents,
    targets=lora.MMDIT_TARGETS,
    t5="text_encoder_3",
)
