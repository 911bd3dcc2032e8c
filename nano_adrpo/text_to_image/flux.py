"""FLUX.1-dev and FLUX.1-schnell: what differs from the other families.

The transformer sees of a prompt

  * context: T5's tokens (512), of which none is masked: padding is encoded and attended to, as in the public pipelines
  * pooled: CLIP-L's pooled output, without a projection

A negative prompt is encoded the same way. dev is told a guidance scale (see models/flux.py) and needs no second pass; guidance
by two passes works all the same and multiplies its cost by two.
"""

import dataclasses
import math
import warnings

from nano_adrpo import lora, ode
from nano_adrpo.errors import InputError
from nano_adrpo.models.clip import CLIPText
from nano_adrpo.models.flux import Flux
from nano_adrpo.models.t5 import T5Encoder
from nano_adrpo.models.tokenizers import PromptTokenizer
from nano_adrpo.models.vae import Autoencoder
from nano_adrpo.text_to_image import scheduler
from nano_adrpo.text_to_image.condition import Condition, Encoder, save_encoder
from nano_adrpo.text_to_image.family import FOLDER, Family, Latents, Part, Release

PARTS = {
    "transformer": Part(FOLDER, "model.diffusion_model.", "diffusers", "FluxTransformer2DModel"),
    "vae": Part("it turns latents into images", "vae.", "diffusers", "AutoencoderKL"),
    "text_encoder": Part(
        "it encodes the prompts (CLIP-L)", "text_encoders.clip_l.transformer.", "transformers", "CLIPTextModel"
    ),
    "text_encoder_2": Part("it encodes the prompts (T5)", "text_encoders.t5xxl.transformer.", "transformers", "T5EncoderModel"),
    "tokenizer": Part("it splits the prompts for text_encoder"),
    "tokenizer_2": Part("it splits the prompts for text_encoder_2"),
}


class PromptEncoder(Encoder):
    def __init__(self, clip, tokenizer, t5, t5_tokenizer, t5_tokens=512):
        """A CLIPText without projection, a T5Encoder, and a PromptTokenizer for each."""
        self.clip, self.tokenizer, self.t5, self.t5_tokenizer, self.t5_tokens = clip, tokenizer, t5, t5_tokenizer, t5_tokens
        self.clip_tokens = int(min(tokenizer.longest, clip.config.max_position_embeddings))

    @property
    def device(self):
        return self.clip.text_model.final_layer_norm.weight.device

    def _encode(self, prompts, negative):  # both are encoded alike
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CLIP's 77 tokens give the pooled vector alone; words are lost where T5 cuts
            ids = self.tokens(self.tokenizer, self.clip, prompts, self.clip_tokens)
        _, pooled = self.clip(ids)
        return Condition(self.t5(self.tokens(self.t5_tokenizer, self.t5, prompts, self.t5_tokens)), pooled)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None, base=None, t5="load", t5_tokens=512):
        """The encoders and tokenizers of a release: see TextToImage.from_pretrained.

        t5          "load", or "stream" (layer by layer from disk: its 9 GB are never in memory at once)
        t5_tokens   how many tokens T5 sees, 1 … 512; Black Forest Labs give schnell 256
        """
        if t5 not in ("load", "stream") or not 1 <= t5_tokens <= 512:
            raise InputError(
                f"t5 is {t5!r}, of {t5_tokens} tokens; expected 'load' or 'stream' of 1 … 512 tokens: FLUX sees T5's alone"
            )
        release = Release(path, base, FLUX)
        sizes, where = (
            release.transformer_config(),
            {part: release.need(part) for part in PARTS if "text" in part or "token" in part},
        )
        prefix = {"prefix": PARTS["text_encoder"].prefix} if where["text_encoder"].is_file() else {}
        clip = CLIPText.from_pretrained(where["text_encoder"], dtype, device, projected=False, **prefix)
        if (width := clip.config.hidden_size) != sizes.pooled_projection_dim:
            raise InputError(f"{where['text_encoder']}: CLIP has width {width}; expected {sizes.pooled_projection_dim}")
        encoder = T5Encoder.from_pretrained(where["text_encoder_2"], dtype, device, stream=t5 == "stream")
        if (width := encoder.config.d_model) != sizes.joint_attention_dim:
            raise InputError(f"{where['text_encoder_2']}: T5 has width {width}; expected {sizes.joint_attention_dim}")
        tokenizers = [PromptTokenizer(where[part]) for part in ("tokenizer", "tokenizer_2")]
        return cls(clip, tokenizers[0], encoder, tokenizers[1], t5_tokens)

    def save_pretrained(self, path):
        clip = save_encoder(path, "", self.clip, self.tokenizer, PARTS["text_encoder"].name)
        return clip | save_encoder(path, "_2", self.t5, self.t5_tokenizer, PARTS["text_encoder_2"].name)


@dataclasses.dataclass
class Scheduler(scheduler.Scheduler):
    """Euler steps on `ode.time_grid`. dev's shift grows with the image: its logarithm is a straight line in the number of
    tokens, through base_shift at base_image_seq_len and max_shift at max_image_seq_len, beyond these too. schnell has none."""

    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    def __post_init__(self):
        if self.max_image_seq_len <= self.base_image_seq_len:
            lengths = f"base_image_seq_len is {self.base_image_seq_len}, max_image_seq_len {self.max_image_seq_len}"
            raise InputError(f"{lengths}; expected a larger one")

    SAMPLER = {
        **{key: kinds for key, kinds in scheduler.Scheduler.SAMPLER.items() if key != "use_dynamic_shifting"},
        "time_shift_type": ("exponential",),
    }

    def times(self, steps, shift, shape, device):
        return ode.time_grid(steps, shift or self.shift_at(shape), device=device)

    def shift_at(self, shape):
        """The shift for latents of `shape` [C, H, W]."""
        if not self.use_dynamic_shifting:
            return self.shift
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        tokens = shape[1] * shape[2] / 4
        logarithm = self.base_shift + slope * (tokens - self.base_image_seq_len)
        if abs(logarithm) > 50:
            raise InputError(f"scheduler_config.json: the shift of the time grid is e^{logarithm:.3g}; expected e^50 at most")
        return math.exp(logarithm)

    @classmethod
    def of(cls, transformer):
        return cls(shift=3.0, use_dynamic_shifting=True) if transformer.guidance_embeds else cls()


def latents(config):
    return Latents(config.in_channels // 4, patch=2, side=128)  # 1024 px; no file tells it


FLUX = Family(
    name="FLUX.1",
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    parts=PARTS,
    telltale="double_blocks.",
    transformer=Flux,
    autoencoder=Autoencoder,
    encoder=PromptEncoder,
    scheduler=Scheduler,
    latents=latents,
    targets=lora.MMDIT_TARGETS,
    t5="text_encoder_2",
)
