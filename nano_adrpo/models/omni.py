"""Qwen2.5-Omni's thinker (2025, arXiv 2503.20215) for audio and text: it hears clips and answers in text.

  * front end: Whisper's (Radford et al. 2022, arXiv 2212.04356): the logarithm of 128 mel bands, a frame every 10 ms
  * audio tower: Whisper's encoder, but in chunks of 2 s: two convolutions, of which the second halves the frames; sinusoidal
    positions that start at 0 in every chunk; pre-norm blocks whose attention stays within the chunk. Then pairs are averaged
    and projected: one token for 40 ms
  * text: Qwen2.5 (decoder.py). A clip's tokens take the place of its placeholders, an id that the prompt has once for each
  * positions (TMRoPE): pairs of a head turn by a token's time, height or width. A word has one number for all three, and so has
    40 ms of audio, each one more than the token before: that is plain RoPE. Within an image they differ: images and videos are
    refused. Their tower is not read, nor is the talker

The module names are the release's without `thinker.`, as transformers writes the thinker alone.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from nano_adrpo import files
from nano_adrpo.errors import InputError, NotFinite
from nano_adrpo.files import adapters, safetensors
from nano_adrpo.files import config as configs
from nano_adrpo.models import decoder

RATE, HOP, WINDOW, BANDS = 16000, 160, 400, 128  # samples a second, between frames, of a frame; mel bands of a frame
LONGEST = 300 * RATE  # samples; the public front end cuts what is longer
BATCH = 64  # chunks that go through the tower at a time


# --------------------------------------------------------------------------------------------------------------- front end


def log_mel(waveform):
    """A clip, float32 [n] at 16 kHz in [−1, 1] -> log-mel spectrogram [128, ceil(n / 160)], about −1 … 1.

    As transformers' WhisperFeatureExtractor, which fills each clip with zeros up to 300 s. Here are as many as frames can see.
    Raises InputError for a clip of another shape or dtype, of 0.02 s or less or over 300 s, NotFinite for one with NaN.
    """
    if not (isinstance(waveform, torch.Tensor) and waveform.dtype == torch.float32 and waveform.dim() == 1):
        shape = f"{waveform.dtype} {list(waveform.shape)}" if isinstance(waveform, torch.Tensor) else type(waveform).__name__
        raise InputError(f"a clip is {shape}; expected a float32 tensor [n], a mono waveform at 16 kHz")
    tokens_of(len(waveform))
    if not waveform.isfinite().all():
        raise NotFinite("a clip has samples that are not finite")
    frames = math.ceil(len(waveform) / HOP)
    size = min(HOP * (frames + 3), LONGEST)  # beyond, a frame sees zeros alone
    padded = F.pad(waveform, (0, size - len(waveform)))
    window = torch.hann_window(WINDOW, device=waveform.device)
    power = torch.stft(padded, WINDOW, HOP, window=window, return_complex=True)[:, :-1].abs() ** 2  # [201, size / 160]
    levels = (mel_filters().to(waveform.device) @ power).clamp(min=1e-10).log10()
    return ((levels.maximum(levels.max() - 8) + 4) / 4)[:, :frames]  # 80 dB below the loudest, zeros behind the clip included


@functools.cache
def mel_filters():
    """Slaney's (1998) mel filters [128, 201]: triangles of area 1, 0 … 8000 Hz, evenly spaced up to 1000 Hz, above evenly in
    the logarithm."""
    step = math.log(6.4) / 27  # of the logarithm, a band; below 1000 Hz a band is 200 / 3 Hz
    mels = torch.linspace(0, 15 + math.log(8) / step, BANDS + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * ((mels - 15) * step).exp())[:, None]  # Hz
    bins = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp(min=0)
    return (triangles * 2 / (high - low)).float()


def tokens_of(samples):
    """The number of tokens of a clip of so many samples: one for 640, which are 40 ms. Raises InputError where that is none,
    and where the clip is too long."""
    tokens = (math.ceil(samples / HOP) + 1) // 4
    if not (tokens and samples <= LONGEST):
        raise InputError(f"a clip has {samples} samples, {samples / RATE:.5g} s; expected more than 0.02 s and at most 300 s")
    return tokens


# ------------------------------------------------------------------------------------------------------------- audio tower


@dataclasses.dataclass
class AudioConfig:
    """The tower's sizes, under the names of the release's config.json."""

    d_model: int = 1280
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    output_dim: int = 3584
    n_window: int = 100  # half the frames of a chunk
    num_mel_bins: Literal[128] = BANDS
    activation_function: Literal["gelu"] = "gelu"
    scale_embedding: Literal[False] = False

    def __post_init__(self):
        if self.d_model % self.encoder_attention_heads or self.d_model % 2:
            raise InputError(f"d_model is {self.d_model}; expected an even multiple of {self.encoder_attention_heads} heads")


class AudioTower(nn.Module):
    """Log-mel spectrograms -> audio tokens, in the language model's width."""

    def __init__(self, config):
        super().__init__()
        self.config, dim = config, config.d_model
        self.conv1 = nn.Conv1d(config.num_mel_bins, dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(AudioLayer(config) for _ in range(config.encoder_layers))
        self.ln_post, self.proj = nn.LayerNorm(dim), nn.Linear(dim, config.output_dim)
        self.audio_bos_eos_token = nn.Embedding(2, config.output_dim)  # in the files; the prompt has ids of its own for these

    def forward(self, mels):
        """A list of [128, frames] -> a list of [n_i, D], n_i = (frames + 1) // 4."""
        if not mels:
            return []
        size = 2 * self.config.n_window
        chunks = [chunk for mel in mels for chunk in mel.split(size, dim=1)]
        lengths = torch.tensor([chunk.shape[1] for chunk in chunks], device=self.conv1.weight.device)  # [N], frames
        frames = torch.stack([F.pad(chunk, (0, size - chunk.shape[1])) for chunk in chunks]).to(self.conv1.weight)
        hidden = torch.cat([self.encode(*some) for some in zip(frames.split(BATCH), lengths.split(BATCH))])
        halves = [(mel.shape[1] + 1) // 2 for mel in mels]  # of each clip what `hidden` has, 20 ms each
        pairs = [clip[: len(clip) // 2 * 2].unflatten(0, (-1, 2)) for clip in hidden.split(halves)]  # each [n_i, 2, d]
        tokens = self.proj(self.ln_post(torch.cat(pairs).mean(dim=1)))
        return list(tokens.split([len(clip) for clip in pairs]))

    def encode(self, frames, lengths):
        """Chunks [N, 128, size], of which lengths [N] frames are not padding -> [sum of ceil(length / 2), d]."""
        inside = torch.arange(frames.shape[2], device=frames.device) < lengths[:, None]  # [N, size]
        x = F.gelu(self.conv1(frames)) * inside[:, None]
        x = F.gelu(self.conv2(x)).mT  # [N, size / 2, d]
        x, inside = x + sinusoids(x.shape[1], x.shape[2]).to(x), inside[:, ::2]
        attends = None if inside.all() else inside[:, None, None]  # [N, 1, 1, size / 2], keys
        for layer in self.layers:
            x = layer(x, attends)
        return x[inside]


def sinusoids(length, dim):
    """Positions [length, dim]: the sines, then the cosines, of angles whose speeds fall from 1 to 1/10000 per position."""
    speeds = torch.exp(-math.log(10000) / (dim // 2 - 1) * torch.arange(dim // 2).float())
    angles = torch.arange(length)[:, None] * speeds
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class AudioLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim, inner, self.heads = config.d_model, config.encoder_ffn_dim, config.encoder_attention_heads
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn = nn.ModuleDict({name: nn.Linear(dim, dim) for name in ("q_proj", "v_proj", "out_proj")})
        self.self_attn["k_proj"] = nn.Linear(dim, dim, bias=False)
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x, attends):
        """x [N, T, d] -> [N, T, d]; attends: boolean [N, 1, 1, T], None for all."""
        h = self.self_attn_layer_norm(x)
        q, k, v = (
            self.self_attn[name](h).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [N, heads, T, d / heads]
            for name in ("q_proj", "k_proj", "v_proj")
        )
        out = F.scaled_dot_product_attention(q, k, v, attends)
        x = x + self.self_attn["out_proj"](out.transpose(1, 2).flatten(2))
        x = x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        return x.clamp(-64504, 64504) if x.dtype == torch.float16 else x  # where float16 would overflow, as transformers


# ---------------------------------------------------------------------------------------------------------------- thinker


@dataclasses.dataclass
class Config(decoder.Config):
    """The text model's sizes, as a Qwen2's, and the thinker's."""

    audio_config: AudioConfig = dataclasses.field(default_factory=AudioConfig)
    audio_token_index: configs.Index = 151646  # the placeholder
    image_token_index: configs.Index = 151655
    video_token_index: configs.Index = 151656
    thinker: Any = dataclasses.field(default=None, compare=False)  # the file's section, written again; None: there is no file

    def __post_init__(self):
        super().__post_init__()
        if (width := self.audio_config.output_dim) != self.hidden_size:
            raise InputError(f"output_dim of the audio is {width}; expected the text's hidden_size, {self.hidden_size}")
        if self.audio_token_index >= self.vocab_size:
            raise InputError(f"audio_token_index is {self.audio_token_index}; expected below vocab_size, {self.vocab_size}")


class Omni(decoder.Decoder):
    """A Decoder whose calls take `clips`: a list in the order of the placeholders, row by row, each a float32 waveform [n] at
    16 kHz or what `embed_clips` made of it, [n_i, D]. The tower is frozen, and has no adapters (lora.py)."""

    prefix = "thinker."  # in the release, which holds talker and token2wav beside it
    not_adapted = adapters.NOT_TEXT

    def __init__(self, config):
        super().__init__(config)
        self.audio_tower = AudioTower(config.audio_config).requires_grad_(False)

    @torch.no_grad()
    def embed_clips(self, waveforms):
        """Waveforms, each float32 [n] -> their tokens, each [tokens_of(n), D]. The same tensor is computed once."""
        distinct = list({id(waveform): waveform for waveform in waveforms}.values())
        device = self.audio_tower.conv1.weight.device
        tokens = self.audio_tower([log_mel(waveform).to(device) for waveform in distinct])
        place = {id(waveform): index for index, waveform in enumerate(distinct)}
        return [tokens[place[id(waveform)]] for waveform in waveforms]

    def embed(self, ids, clips=None, start=1):
        """ids [B, T] -> embeddings [B, T, D] with the clips in the placeholders' places; None where there are none.

        start   from here on, ids may be the model's own words: placeholders there are text where the clips stand before it

        Raises InputError where clips and placeholders do not fit, and for images and videos.
        """
        clips = self.computed(clips or ())
        lengths, audio = [len(clip) for clip in clips], self.config.audio_token_index
        prompts = ids[:, :start] if start > 1 else ids
        if int((prompts == audio).sum()) != sum(lengths):
            prompts = ids
        for kind, index in (("images", self.config.image_token_index), ("videos", self.config.video_token_index)):
            if (prompts == index).any():
                raise InputError(f"ids have the placeholder of {kind}, {index}; expected audio and text alone")
        places = F.pad(prompts == audio, (0, ids.shape[1] - prompts.shape[1]))  # [B, T]
        check_places(places, lengths)
        if not lengths:
            return None
        words = self.model.embed_tokens(ids)
        return words.masked_scatter(places[..., None], torch.cat([clip.to(words) for clip in clips]))

    def computed(self, clips):
        """Clips of both kinds -> their tokens, each [n_i, D]."""
        width, has_tokens = self.config.hidden_size, [isinstance(clip, torch.Tensor) and clip.dim() == 2 for clip in clips]
        for clip in (clip for clip, has in zip(clips, has_tokens) if has):
            if not (len(clip) and clip.shape[1] == width and clip.is_floating_point()):
                found = f"{clip.dtype} {list(clip.shape)}"
                raise InputError(f"a clip is {found}; expected a waveform [n], or its tokens [1 or more, {width}]")
        tokens = iter(self.embed_clips([clip for clip, has in zip(clips, has_tokens) if not has]))
        return [clip if has else next(tokens) for clip, has in zip(clips, has_tokens)]

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None):
        """Opens a release's folder or a thinker's alone; of the files only those with tensors that are used. dtype None is the
        file's; device None the CPU."""
        return load(cls, path, dtype, device)

    def described(self):
        """The values of config.json: a release's without its talker, which vLLM opens, and transformers as a
        Qwen2_5OmniThinkerForConditionalGeneration."""
        dtype = {"torch_dtype": str(self.model.norm.weight.dtype).removeprefix("torch.")}
        kind = {"architectures": ["Qwen2_5OmniForConditionalGeneration"], "model_type": KINDS[0], "enable_audio_output": False}
        return kind | {"thinker_config": thinker_section(self.config) | dtype, **dtype}


def check_places(places, lengths):
    """Raises InputError unless the runs of placeholders, places [B, T], hold whole clips of these lengths in turn."""
    ends = places & ~F.pad(places, (0, 1))[:, 1:]  # [B, T], the last of each run
    filled = places.flatten().cumsum(0)[ends.flatten()].tolist()  # placeholders up to each run's end
    whole = torch.tensor([0, *lengths]).cumsum(0).tolist()
    if filled == whole[1:]:
        return
    rows = ends.nonzero()[:, 0].tolist()
    for row, begin, end in zip(rows, [0, *filled], filled):
        if end not in whole:
            inside = [length for length, last in zip(lengths, whole[1:]) if begin < last]
            clip = f"the next clip has {inside[0]} tokens" if inside else f"there are only {len(lengths)} clips"
            raise InputError(f"row {row} of ids has {end - begin} placeholders for audio in a row, but {clip}")
    if (filled or [0])[-1] != whole[-1]:
        raise InputError(f"there are {len(lengths)} clips, more than the {len(filled)} runs of placeholders in ids can hold")


# ------------------------------------------------------------------------------------------------------------------- files

KINDS = ("qwen2_5_omni", "qwen2_5_omni_thinker")  # model_type of the release, and of a thinker alone
USED = r"(thinker\.)?(audio_tower|model|lm_head)\..*"  # keys

# What a config.json leaves out: the 7B model's.
TEXT = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "max_position_embeddings": 32768, "max_window_layers": 28, "rope_theta": 1e6,
    "use_sliding_window": False,
}  # fmt: skip
# For transformers, which makes a tower for images in any case: the smallest, where no file tells of one.
VISION = {
    "model_type": "qwen2_5_omni_vision_encoder", "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1,
    "fullatt_block_indexes": [0],
}  # fmt: skip


def open_language_model(path, dtype=None, device=None):
    """A model folder as an Omni where its config.json says so, else as a Decoder."""
    kind = files.read_json(Path(path) / "config.json").get("model_type")
    return (Omni if kind in KINDS else decoder.Decoder).from_pretrained(path, dtype, device)


def read_config(path):
    where = Path(path) / "config.json"
    values = files.read_json(where)
    configs.only(values, {"model_type": KINDS}, where, ("model_type",))
    thinker = configs.section(values, "thinker_config", where) if values["model_type"] == KINDS[0] else values
    text, audio = (configs.section(thinker, f"{name}_config", where) for name in ("text", "audio"))
    for some, kind in ((thinker, "thinker"), (text, "text"), (audio, "audio_encoder")):
        configs.only(some, {"model_type": (f"qwen2_5_omni_{kind}",)}, where)
    named = {"model_type": "qwen2", "audio_config": audio, "thinker": thinker}
    for key in ("rope_scaling", "rope_parameters"):
        if rope := configs.section(text, key, where):
            kind = rope.get("rope_type", rope.get("type", "default"))  # "mrope" in older files: what mrope_section says
            named[key] = {**rope, "rope_type": "default" if kind == "mrope" else kind, "mrope_section": None}
    for key in ("audio_token", "image_token", "video_token"):  # transformers has two names for each
        found = [thinker[name] for name in (f"{key}_index", f"{key}_id") if name in thinker]
        named |= {f"{key}_index": found[0]} if found else {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        named[key] = next((some[key] for some in (thinker, text, values) if some.get(key) is not None), None)
    named["tie_word_embeddings"] = thinker.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return decoder.parse_config(Config, {**TEXT, **text, **named}, where)


def load(cls, path, dtype, device):
    config, file = read_config(path), safetensors.Checkpoint(path, prefix=cls.prefix, only=USED)
    if "tie_word_embeddings" not in config.thinker and "lm_head.weight" in file.home:
        config.tie_word_embeddings = False  # the text's flag is transformers' default, and does not count
    return decoder.load(cls, path, config, file, dtype, device)


def thinker_section(config):
    """The thinker's section of config.json: that of the file that the config is from, or else made from its fields."""
    thinker = config.thinker
    if thinker is None:
        text = {field.name: getattr(config, field.name) for field in dataclasses.fields(decoder.Config)}
        third = config.head_dim // 6
        sections = {"rope_type": "default", "mrope_section": [config.head_dim // 2 - 2 * third, third, third]}
        text |= {"model_type": "qwen2_5_omni_text", "rope_scaling": {**sections, **(config.rope_scaling or {})}}
        ids = {f"{key}_token_id": text.pop(f"{key}_token_id") for key in ("bos", "eos", "pad")}
        ids |= {key: getattr(config, key) for key in ("audio_token_index", "image_token_index", "video_token_index")}
        vision = VISION | {"out_hidden_size": config.hidden_size}
        audio = dataclasses.asdict(config.audio_config)
        thinker = {**ids, "vision_start_token_id": 151652, "audio_config": audio, "text_config": text, "vision_config": vision}
    own = {"architectures", "transformers_version", "dtype", "torch_dtype"}
    thinker = {key: value for key, value in thinker.items() if key not in own}
    return thinker | {"model_type": KINDS[1], "tie_word_embeddings": config.tie_word_embeddings}
