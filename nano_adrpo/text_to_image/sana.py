"""SANA-1.5: what differs from the other families.

The transformer sees of a prompt 300 tokens of Gemma 2's hidden states behind its last norm, and a mask of their padding:

  * a prompt is lower-cased, as diffusers' pipeline does it and NVIDIA's own code does not (lower=False keeps its capitals), and
    put behind an instruction to enhance it, whose tokens are dropped but for the first and the last
  * a negative prompt stands there without the instruction: it is another encoding than the same text as a prompt

The public release asks for DPM-Solver. Here Euler steps on SD3's grid take its place, with the same shift; diffusers' pipeline
draws the same with a FlowMatchEulerDiscreteScheduler, which is what is saved.
"""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from nano_adrpo import files
from nano_adrpo.errors import InputError
from nano_adrpo.files import config as configs
from nano_adrpo.models.dc_ae import DeepAutoencoder
from nano_adrpo.models.decoder import TextEncoder
from nano_adrpo.models.sana import Sana
from nano_adrpo.models.tokenizers import PromptTokenizer, encode_batch
from nano_adrpo.text_to_image.condition import Condition, Encoder, save_encoder
from nano_adrpo.text_to_image.family import FOLDER, Family, Latents, Part, Release
from nano_adrpo.text_to_image.scheduler import Scheduler

PARTS = {
    "transformer": Part(FOLDER, None, "diffusers", "SanaTransformer2DModel"),
    "vae": Part("it turns latents into images", None, "diffusers", "AutoencoderDC"),
    "text_encoder": Part("it encodes the prompts (Gemma 2)", None, "transformers", "Gemma2Model"),
    "tokenizer": Part("it splits the prompts for text_encoder"),
}
TOKENS = 300  # that the transformer sees, the first of which begins the text

# Gemma's chat model was asked for a better prompt when Sana was trained, word for word so (SanaPipeline's default).
INSTRUCTION = """\
Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image generation. \
Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships to \
create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.
Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully on a warm \
sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, a diverse \
crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.
Please generate only the enhanced description for the prompt below and avoid including any additional commentary or evaluations:
User Prompt: """


class PromptEncoder(Encoder):
    alike, lower = False, True

    def __init__(self, gemma, tokenizer, instruction=INSTRUCTION):
        """instruction: what stands in front of a prompt; "" is nothing."""
        self.gemma, self.tokenizer, self.instruction = gemma, tokenizer, instruction

    @property
    def device(self):
        return self.gemma.model.norm.weight.device

    def _encode(self, prompts, negative):
        before = "" if negative else self.instruction
        before_ids = encode_batch(self.tokenizer.tokenizer, [before])[0].ids if before else []
        # The window of 300 tokens is the first and the 299 that end here. It begins at the instruction's last token, a blank
        # that becomes one token with the prompt's first word.
        end = TOKENS + max(len(before_ids) - 2, 0)
        ids, mask = self.ids(prompts, before, end)
        hidden = self.gemma(ids, mask) * mask[..., None]  # [B, T, D]; zeros at padding, which no one reads
        hidden, mask = F.pad(hidden, (0, 0, 0, end - ids.shape[1])), F.pad(mask, (0, end - ids.shape[1]))
        window = [0, *range(end - TOKENS + 1, end)]
        return Condition(hidden[:, window], mask=mask[:, window])

    def ids(self, prompts, before, end):
        """B strings -> ids and mask [B, T] of `before` and the prompt, padded on the right to the longest, cut at `end`."""
        rows = [encoding.ids for encoding in encode_batch(self.tokenizer.tokenizer, [before + p.strip() for p in prompts])]
        self.tokenizer.report({p: len(row) - end + TOKENS for p, row in zip(prompts, rows) if len(row) > end}, TOKENS)
        rows = [torch.tensor(row[:end]) for row in rows]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad)
        if (highest := ids.max().item()) >= (known := self.gemma.config.vocab_size):
            raise InputError(
                f"{self.tokenizer.path}: gives a token the id {highest}; expected less than its encoder's {known} tokens"
            )
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        return ids.to(self.device), mask.to(self.device)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None, base=None, t5=None, instruction=INSTRUCTION):
        """The encoder and tokenizer of a release: see TextToImage.from_pretrained. There is no T5."""
        release = Release(path, base, SANA)
        expected = release.transformer_config().caption_channels
        folder, words = release.need("text_encoder"), release.need("tokenizer")
        tokenizer, gemma = PromptTokenizer(words, padding_side="right"), TextEncoder.from_pretrained(folder, dtype, device)
        if (width := gemma.config.hidden_size) != expected:
            raise InputError(f"{folder}: the text encoder has width {width}; expected {expected}")
        return cls(gemma, tokenizer, instruction)

    def save_pretrained(self, path):
        return save_encoder(path, "", self.gemma, self.tokenizer, PARTS["text_encoder"].name)


class SanaScheduler(Scheduler):
    @classmethod
    def read(cls, file):
        values = files.read_json(file)
        if values.get("_class_name") != DPM_SOLVER:
            return super().read(file)
        configs.only(values, FLOW, file, ("prediction_type", "use_flow_sigmas"))
        values["shift"] = values.get("flow_shift", 1.0)
        return configs.parse(cls, values, file)


DPM_SOLVER = "DPMSolverMultistepScheduler"
# With these its states are (1 − sigma)·data + sigma·noise, and the network gives noise − data.
FLOW = {"prediction_type": ("flow_prediction",), "use_flow_sigmas": (True,), "use_dynamic_shifting": (False,)}


SANA = Family(
    name="SANA",
    pipelines=("SanaPipeline", "SanaPAGPipeline"),
    parts=PARTS,
    telltale="caption_norm.",
    transformer=Sana,
    autoencoder=DeepAutoencoder,
    encoder=PromptEncoder,
    scheduler=SanaScheduler,
    latents=lambda config: Latents(config.in_channels, 1, config.sample_size),
    targets=("to_q", "to_k", "to_v", "to_out.0"),
)
