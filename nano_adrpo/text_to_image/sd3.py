"""What is SD3's own: where the parts of a release lie, what its text encoders make of a prompt, its scheduler.

A release has a transformer, an autoencoder (VAE), three text encoders and their tokenizers. There are two public layouts:
diffusers' pipeline folder, which has a folder for each part and lists them in model_index.json; and Stability's single file,
whose keys begin differently for each part and which never has the tokenizers.

The transformer sees of a prompt

  * context: the hidden states of CLIP-L and CLIP-bigG side by side, padded with zeros to the transformer's width (77 tokens),
    then T5's tokens (256). Without T5 these are zeros, as in diffusers' pipeline
  * pooled: the pooled outputs of both CLIPs side by side

Nothing is masked: padding is encoded and attended to, as in diffusers' encode_prompt.
"""

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F

from nano_adrpo import files
from nano_adrpo.errors import InputError, MissingFile
from nano_adrpo.files import config, safetensors
from nano_adrpo.models.clip import CLIPText
from nano_adrpo.models.mmdit import MMDiT
from nano_adrpo.models.t5 import T5Encoder
from nano_adrpo.models.tokenizers import PromptTokenizer
from nano_adrpo.text_to_image.condition import Condition

# Each part: what it is for, as messages say it, and how its keys begin in Stability's single file.
PARTS = {
    "transformer": ("expected a folder in diffusers' SD3 pipeline layout or a single file", "model.diffusion_model."),
    "vae": ("it turns latents into images", "first_stage_model."),
    "text_encoder": ("it encodes the prompts (CLIP-L)", "text_encoders.clip_l.transformer."),
    "text_encoder_2": ("it encodes the prompts (CLIP-bigG)", "text_encoders.clip_g.transformer."),
    "text_encoder_3": ("it encodes the prompts (T5; t5='zeros' does without)", "text_encoders.t5xxl.transformer."),
    "tokenizer": ("it splits the prompts for text_encoder", None),
    "tokenizer_2": ("it splits the prompts for text_encoder_2", None),
    "tokenizer_3": ("it splits the prompts for text_encoder_3", None),
}


class Release:
    """Finds the parts of a release: in `path`, a folder or a single file, or else in the folder `base`."""

    def __init__(self, path, base=None):
        self.path, self.base = Path(path), base and Path(base)
        if not self.path.exists():  # asked here, since base must not stand in for a mistyped path
            raise MissingFile(f"{path}: no such file or folder; {PARTS['transformer'][0]}")
        if base and not self.base.is_dir():
            raise MissingFile(f"{base}: no such folder; expected one in diffusers' SD3 pipeline layout")
        self.keys = safetensors.Checkpoint(path).home if self.path.is_file() else None  # None: a folder
        self.folders = [folder for folder in (self.path, self.base) if folder and folder.is_dir()]
        self.index = {}  # model_index.json: part -> [library, class], [null, null] for a part that the model does without
        for folder in self.folders[::-1]:
            if (file := folder / "model_index.json").is_file():
                self.index |= files.read_json(file)
                if not str(name := self.index.get("_class_name", "StableDiffusion3")).startswith("StableDiffusion3"):
                    raise InputError(f"{file}: '_class_name' is {name!r}; expected 'StableDiffusion3Pipeline'")

    def find(self, part):
        """-> the folder or the single file that has `part`; None where none has."""
        prefix = PARTS[part][1] if part in PARTS else None
        if self.keys is not None and (part == "transformer" or prefix and any(key.startswith(prefix) for key in self.keys)):
            return self.path
        return next((folder / part for folder in self.folders if (folder / part).is_dir()), None)

    def expects(self, part):
        """Whether the model has `part`, even if its files are missing. A single file is SD3's, which has all."""
        if self.keys is not None and self.find(part) == self.path:
            return True
        if part in self.index:
            return self.index[part] not in (None, [None, None])
        return self.keys is not None or self.find(part) is not None

    def need(self, part):
        """As find, but raises MissingFile where none has it."""
        if found := self.find(part):
            return found
        nor = f", nor in {self.base}" if self.base else ""
        if self.keys is not None:
            raise MissingFile(f"{self.path}: no {part} in this file{nor}; {PARTS[part][0]}; base=FOLDER can bring it")
        missing = f"{self.path}: no transformer/ in it" if part == "transformer" else f"{self.path / part}: no such folder"
        raise MissingFile(f"{missing}{nor}; {PARTS[part][0]}")

    def transformer_config(self):
        """Read from config.json or the headers alone. The dtype is given because a float8 file has none to compute in."""
        return MMDiT.from_pretrained(self.need("transformer"), torch.float32, "meta").config


class PromptEncoder:
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

    @torch.no_grad()
    def encode(self, prompts, batch=64, device=None):
        """A list of B strings -> Condition: context [B, L, D], pooled [B, P], on `device` (None: the encoders').

        Encodes each distinct prompt once, `batch` at a time."""
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"prompts is {prompts!r}; expected a list of strings")
        distinct = list(dict.fromkeys(prompts))
        batches = [distinct[i : i + batch] for i in range(0, len(distinct), batch)]
        encoded = [self._encode(texts).to(device or self.device) for texts in batches]
        condition = Condition(torch.cat([some.context for some in encoded]), torch.cat([some.pooled for some in encoded]))
        rows = {prompt: row for row, prompt in enumerate(distinct)}
        return condition if len(distinct) == len(prompts) else condition[[rows[prompt] for prompt in prompts]]

    def _encode(self, prompts):
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

    def tokens(self, tokenizer, encoder, prompts, length):
        """B strings -> ids [B, length]. Raises InputError for a tokenizer of another encoder, as far as its ids tell."""
        ids, known = tokenizer(prompts, length), encoder.config.vocab_size
        if (highest := ids.max().item()) >= known:
            raise InputError(
                f"{tokenizer.path}: gives a token the id {highest}; expected less than its encoder's {known} tokens"
            )
        return ids.to(self.device)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None, base=None, t5="load", t5_tokens=256):
        """The encoders and tokenizers of a release: see Release for path and base.

        t5   "load", "stream" (layer by layer from disk: its 9 GB are never in memory at once), or "zeros" (do without)
        """
        if t5 not in ("load", "stream", "zeros") or not 1 <= t5_tokens <= 512:
            raise InputError(f"t5 is {t5!r}, of {t5_tokens} tokens; expected 'load', 'stream' or 'zeros', of 1 … 512 tokens")
        release = Release(path, base)
        sizes, suffixes = release.transformer_config(), ["", "_2"] if release.expects("text_encoder_2") else [""]
        with_t5 = release.expects("text_encoder_3") and t5 != "zeros"
        needed = [*suffixes, "_3"] if with_t5 else suffixes
        where = {part: release.need(part) for s in needed for part in (f"text_encoder{s}", f"tokenizer{s}")}
        tokenizers = [PromptTokenizer(where[f"tokenizer{suffix}"]) for suffix in suffixes]
        clips = []
        for part in (f"text_encoder{suffix}" for suffix in suffixes):
            prefix = {"prefix": PARTS[part][1]} if where[part].is_file() else {}
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
        """Writes the encoders and tokenizers into diffusers' folders; -> their entries of model_index.json.

        A streamed T5 is not written. Its entry is, so that the folder opens only with the release as its base."""
        index = {}
        encoders = [*zip(("", "_2"), self.clips, self.tokenizers)] + ([("_3", self.t5, self.t5_tokenizer)] if self.t5 else [])
        for suffix, encoder, tokenizer in encoders:
            if not any(parameter.is_meta for parameter in encoder.parameters()):  # a streamed encoder's are
                encoder.save_pretrained(path / f"text_encoder{suffix}")
            tokenizer.save_pretrained(path / f"tokenizer{suffix}")
            name = "T5EncoderModel" if encoder is self.t5 else "CLIPTextModelWithProjection"
            words = tokenizer.config.get("tokenizer_class", "PreTrainedTokenizerFast")
            index[f"text_encoder{suffix}"] = ["transformers", name]
            # As in SD3's own index: transformers 4 reads tokenizer.json only with a class of this name.
            index[f"tokenizer{suffix}"] = ["transformers", "T5TokenizerFast" if words == "T5Tokenizer" else words]
        if self.t5_tokens and not self.t5:
            index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
        return index


@dataclasses.dataclass
class Scheduler:
    """What scheduler_config.json says of the sampler. The defaults are diffusers' own."""

    num_train_timesteps: int = 1000  # the network is told sigma times this
    shift: float = 1.0  # of the time grid, see ode.time_grid


SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"
# Keys that turn diffusers' sampler into another one, and their defaults. Only the defaults are implemented.
SAMPLER = {
    "_class_name": (SCHEDULER_CLASS,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "invert_sigmas": (False,),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "stochastic_sampling": (False,),
}


def read_scheduler(file):
    """scheduler_config.json -> Scheduler. Raises InputError naming the key for a sampler that is not SD3's."""
    values = files.read_json(file)
    config.only(values, SAMPLER, file)
    return config.parse(Scheduler, values, file)
