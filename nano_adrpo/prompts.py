"""What SD3's transformer sees of a prompt, and the text encoders that make it.

  * context: CLIP-L's and CLIP-bigG's hidden states side by side, padded with zeros to the transformer's width (77 tokens), and
    behind them T5's tokens (256); where a release goes without T5, zeros stand there, as diffusers' pipeline has it
  * pooled: both CLIPs' pooled outputs side by side
  * nothing is masked: padding is encoded and attended to, as diffusers' encode_prompt leaves it

Prompts are encoded once and ahead of everything else, so `PromptEncoder` loads without the transformer, and `cached` keeps the
result on disk: a second run loads no encoder at all.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from nano_adrpo import weights
from nano_adrpo.models.clip import CLIPText
from nano_adrpo.models.t5 import T5Encoder
from nano_adrpo.prompt_tokenizer import PromptTokenizer
from nano_adrpo.release import PARTS, Release


@dataclasses.dataclass
class Condition:
    """What the network sees of B prompts. condition[rows] picks and repeats prompts, e.g. condition[[0, 0, 1, 1]]."""

    context: torch.Tensor  # [B, L, D], token embeddings
    pooled: torch.Tensor  # [B, P]

    def __getitem__(self, rows):
        return Condition(self.context[rows], self.pooled[rows])

    def to(self, *args, **kwargs):
        """As torch.Tensor.to: another device, another dtype."""
        return Condition(self.context.to(*args, **kwargs), self.pooled.to(*args, **kwargs))


class PromptEncoder:
    def __init__(self, clips, tokenizers, width, t5=None, t5_tokenizer=None, t5_tokens=0):
        """clips and tokenizers: a CLIPText and a PromptTokenizer per CLIP, in order; width: the transformer's
        joint_attention_dim; t5_tokens: how many tokens stand behind CLIP's, zeros without a `t5`."""
        self.clips, self.tokenizers, self.width = clips, tokenizers, width
        self.t5, self.t5_tokenizer, self.t5_tokens = t5, t5_tokenizer, t5_tokens
        self.clip_tokens = int(min(tokenizers[0].longest, *(clip.config.max_position_embeddings for clip in clips)))
        for tokenizer in (*tokenizers, *([t5_tokenizer] if t5 else [])):
            tokenizer.reported = tokenizers[0].reported  # a long prompt is reported by the first that cuts it

    @property
    def device(self):
        return self.clips[0].text_projection.weight.device

    @torch.no_grad()
    def encode(self, prompts, batch=64, device=None):
        """A list of B strings -> Condition: context [B, L, D], pooled [B, P], on `device` (None: the encoders').

        Each distinct prompt is encoded once, `batch` at a time."""
        texts, rows = _distinct(prompts)
        parts = [self._encode(texts[i : i + batch]).to(device or self.device) for i in range(0, len(texts), batch)]
        whole = Condition(torch.cat([part.context for part in parts]), torch.cat([part.pooled for part in parts]))
        return _in_order(whole, rows)

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
        """B strings -> ids [B, length]. Raises ValueError for a tokenizer of another encoder, as far as its ids tell."""
        ids, known = tokenizer(prompts, length), encoder.config.vocab_size
        if (highest := ids.max().item()) >= known:
            raise ValueError(
                f"{tokenizer.path}: gives a token the id {highest}; expected less than its encoder's {known} tokens"
            )
        return ids.to(self.device)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None, base=None, t5="load", t5_tokens=256):
        """The encoders and tokenizers of a release: see Release for path and base.

        t5   "load", "stream" (layer by layer from disk: its 9 GB are never in memory at once), or "zeros" (do without)
        """
        if t5 not in ("load", "stream", "zeros") or not 1 <= t5_tokens <= 512:
            raise ValueError(f"t5 is {t5!r}, of {t5_tokens} tokens; expected 'load', 'stream' or 'zeros', of 1 … 512 tokens")
        release = Release(path, base)
        config, suffixes = release.transformer_config(), ["", "_2"] if release.expects("text_encoder_2") else [""]
        third = release.expects("text_encoder_3") and t5 != "zeros"
        where = {part: release.need(part) for s in suffixes + ["_3"] * third for part in (f"text_encoder{s}", f"tokenizer{s}")}
        tokenizers = [PromptTokenizer(where[f"tokenizer{suffix}"]) for suffix in suffixes]
        clips = []
        for part in (f"text_encoder{suffix}" for suffix in suffixes):
            prefix = {"prefix": PARTS[part][1]} if where[part].is_file() else {}
            clips.append(CLIPText.from_pretrained(where[part], dtype, device, **prefix))
        width, pooled = sum(c.config.hidden_size for c in clips), sum(c.config.projection_dim for c in clips)
        if width > config.joint_attention_dim or pooled != config.pooled_projection_dim:
            raise ValueError(
                f"{path}: the text encoders give width {width} and pooled width {pooled}; transformer/config.json expects at "
                f"most {config.joint_attention_dim} and exactly {config.pooled_projection_dim}"
            )
        if not third:
            t5_tokens = t5_tokens if "text_encoder_3" in release.index or release.expects("text_encoder_3") else 0
            return cls(clips, tokenizers, config.joint_attention_dim, t5_tokens=t5_tokens)
        encoder = T5Encoder.from_pretrained(where["text_encoder_3"], dtype, device, stream=t5 == "stream")
        if (width := encoder.config.d_model) != config.joint_attention_dim:
            raise ValueError(f"{where['text_encoder_3']}: T5 has width {width}; expected {config.joint_attention_dim}")
        return cls(clips, tokenizers, config.joint_attention_dim, encoder, PromptTokenizer(where["tokenizer_3"]), t5_tokens)

    def save_pretrained(self, path):
        """Writes the encoders and tokenizers into diffusers' folders; -> their entries of model_index.json. A streamed T5 stays
        where it is: the entry stands, and who opens the folder needs the release as its base."""
        index = {}
        parts = [*zip(("", "_2"), self.clips, self.tokenizers)] + ([("_3", self.t5, self.t5_tokenizer)] if self.t5 else [])
        for suffix, encoder, tokenizer in parts:
            if not any(parameter.is_meta for parameter in encoder.parameters()):  # as a streamed one's are
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


def read_prompts(file):
    """The prompts of a file: one a line, or in a .jsonl file a JSON object with "prompt" a line; empty lines are passed over.
    Raises FileNotFoundError, or ValueError naming the file and the line."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file; expected prompts, one a line")
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")  # splitlines() would end a line at U+2028 too
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text file in UTF-8 ({error})") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not (line := line.strip()):
            continue
        if Path(file).suffix == ".jsonl":
            try:
                line = json.loads(line)["prompt"]
                line.encode()  # half a character, as in "\ud83d", is no text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ValueError(f'{file}, line {number}: expected a JSON object with a text "prompt"') from None
        prompts.append(line)
    if not prompts:
        raise ValueError(f"{file}: no prompts in it; expected one a line")
    return prompts


def _distinct(prompts):
    """-> the distinct prompts in order, and for each prompt its row among them."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts is {prompts!r}; expected a list of strings")
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    return list(rows), [rows[prompt] for prompt in prompts]


def _in_order(condition, rows):
    return condition if rows == list(range(len(condition.context))) else condition[rows]


def cached(file, prompts, path, dtype=None, device=None, base=None, t5="load", t5_tokens=256):
    """PromptEncoder.from_pretrained(path, …).encode(prompts) on the CPU, read from the safetensors file `file` where that was
    made from the same prompts and encoders in the same dtype; else the encoders are loaded once and `file` is written."""
    file, (texts, rows) = Path(file), _distinct(prompts)
    settings = [texts, str(dtype), torch.device(device or "cpu").type, t5 == "zeros", t5_tokens]
    wanted = fingerprint(Release(path, base), settings)
    if file.exists():
        stored = weights.Checkpoint(file)
        if stored.home.keys() != {"context", "pooled", "fingerprint"}:
            raise ValueError(f"{file}: not a file of prompt embeddings; it is not written over")
        if torch.equal(stored.read("fingerprint"), wanted):
            return _in_order(Condition(stored.read("context"), stored.read("pooled")), rows)
    file.parent.mkdir(parents=True, exist_ok=True)  # what cannot be is told before the encoders are loaded
    condition = PromptEncoder.from_pretrained(path, dtype, device, base, t5, t5_tokens).encode(texts, device="cpu")
    weights.save(file, {**vars(condition), "fingerprint": wanted})
    return _in_order(condition, rows)


def fingerprint(release, settings):
    """SHA-256 as 32 bytes of the settings and of all that the encoders are: small files as they are, weight files by header,
    size and time of change, since hashing 11 GB would take as long as loading them."""
    config, parts = release.transformer_config(), [part for part in PARTS if part.startswith(("text_encoder", "tokenizer"))]
    listed = [(release.expects(part), part in release.index) for part in parts]  # T5 may be there, zeros, or no tokens at all
    digest = hashlib.sha256(json.dumps([settings, listed, config.joint_attention_dim, config.pooled_projection_dim]).encode())
    for part in filter(release.expects, parts):
        where = release.find(part)
        for file in sorted(where.iterdir()) if where and where.is_dir() else [where] if where else []:
            if file.suffix == ".safetensors" or file == where:
                size = file.stat().st_size
                with file.open("rb") as opened:  # of a damaged file, which the encoder will name, at most all of it
                    header = opened.read(min(int.from_bytes(opened.read(8), "little"), size))
                digest.update(repr([part, file.name, size, file.stat().st_mtime_ns, header]).encode())
            elif file.suffix in (".json", ".txt"):
                digest.update(repr([part, file.name, file.read_bytes()]).encode())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
