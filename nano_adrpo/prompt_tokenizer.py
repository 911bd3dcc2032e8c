"""Prompts to token ids, as the text encoders of SD3 and the CLIP models of the rewards were trained to see them.

A tokenizer folder has tokenizer_config.json and either tokenizer.json or CLIP's vocab.json and merges.txt; the ids are those
that transformers makes of it.
"""

import math
import warnings
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from nano_adrpo import weights


class PromptTokenizer:
    """Every prompt becomes one length, padded with the folder's `pad_token`: SD3's are "<|endoftext|>" (CLIP-L), "!" (bigG) and
    "<pad>" (T5)."""

    def __init__(self, path):
        self.path = path = Path(path)
        self.files = {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
        self.config = weights.read_json(path / "tokenizer_config.json")
        if "special_tokens_map.json" in self.files:  # of older folders, where it has the last word
            special = weights.read_json(path / "special_tokens_map.json")
            self.config = special | self.config if "added_tokens_decoder" in self.config else self.config | special
        if "added_tokens.json" in self.files and "added_tokens_decoder" not in self.config:  # of older folders too
            added = {
                str(i): {"content": content, "special": False}
                for content, i in weights.read_json(path / "added_tokens.json").items()
            }
            self.config["added_tokens_decoder"] = added
        source = path / "tokenizer.json"
        if source.name not in self.files:
            if "vocab.json" not in self.files:
                raise FileNotFoundError(f"{source}: no such file, nor CLIP's vocab.json and merges.txt")
            source = path / "vocab.json"
            self.config = CLIP_TOKENS | {key: value for key, value in self.config.items() if value is not None}
        weights.read_json(source)  # a damaged file is named
        try:
            self.tokenizer = clip_tokenizer(path, self.config) if source.stem == "vocab" else Tokenizer.from_file(str(source))
            mark_special(self.tokenizer, self.config)
        except FileNotFoundError:
            raise
        except Exception as error:  # the tokenizers library raises nothing more specific
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{source}: not a tokenizer ({reason})") from None
        for side in ("padding_side", "truncation_side"):
            if (value := self.config.get(side) or "right") != "right":
                raise ValueError(f"{path / 'tokenizer_config.json'}: '{side}' is {value!r}; expected 'right'")
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        pad = self.config.get("pad_token")
        self.pad = self.tokenizer.token_to_id(_content(pad)) if pad else None
        if self.pad is None:
            raise ValueError(f"{path / 'tokenizer_config.json'}: 'pad_token' is {pad!r}; expected a token of {source.name}")
        self.longest = math.inf if self.config.get("model_max_length") is None else self.config["model_max_length"]
        if type(self.longest) not in (int, float) or not self.longest > 0:
            where = f"{path / 'tokenizer_config.json'}: 'model_max_length'"
            raise ValueError(f"{where} is {self.longest!r}; expected a positive number of tokens")
        self.reported = set()  # prompts whose loss of words was reported

    def __call__(self, prompts, length):
        """B strings -> ids [B, length]: begin, words, end, padding. A longer prompt loses words before its end token, with a
        warning the first time."""
        rows, cut = [], {}
        for prompt, encoding in zip(prompts, encode_batch(self.tokenizer, prompts)):
            ids = encoding.ids
            if len(ids) > length:
                cut |= {} if prompt in self.reported else {prompt: len(ids)}
                ids = ids[: length - 1] + ids[-1:]
            rows.append(ids + [self.pad] * (length - len(ids)))
        if cut:
            self.reported.update(cut)
            (prompt, count), others = next(iter(cut.items())), f" (and {len(cut) - 1} more)" if len(cut) > 1 else ""
            prompt = prompt if len(prompt) <= 80 else prompt[:79] + "…"
            warnings.warn(f"the prompt {prompt!r} has {count} tokens and is cut to {length}{others}", stacklevel=2)
        return torch.tensor(rows)

    def save_pretrained(self, path):
        """Writes the folder as it was read."""
        Path(path).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            weights.write_bytes(Path(path) / name, content)


# The small files of a tokenizer folder: read with it and written again.
FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
CLIP_TOKENS = {name: "<|endoftext|>" for name in ("eos_token", "unk_token", "pad_token")} | {"bos_token": "<|startoftext|>"}


def encode_batch(tokenizer, prompts):
    """tokenizer.encode_batch; ValueError where a prompt is no text, as half a character of a broken JSON escape is none."""
    for prompt in prompts:
        try:
            prompt.encode()
        except (UnicodeEncodeError, AttributeError):
            raise ValueError(f"the prompt {prompt!r} is not Unicode text") from None
    return tokenizer.encode_batch(list(prompts))


def _content(token):
    return token["content"] if isinstance(token, dict) else token


def clip_tokenizer(path, config):
    """CLIP's byte-pair encoding (Radford et al. 2021) from vocab.json and merges.txt: text is lower-cased and its white space
    one blank; words, single digits and runs of punctuation are encoded apart, each ending in </w>."""
    if not (path / "merges.txt").is_file():
        raise FileNotFoundError(f"{path / 'merges.txt'}: no such file; vocab.json needs it")
    lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    names = {name: _content(config[name]) for name in CLIP_TOKENS}
    vocabulary = weights.read_json(path / "vocab.json")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=names["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    begin, end = ((name, vocabulary[name]) for name in (names["bos_token"], names["eos_token"]))
    tokenizer.post_processor = processors.RobertaProcessing(end, begin, trim_offsets=False, add_prefix_space=False)
    return tokenizer


def mark_special(tokenizer, config):
    """Makes the special tokens that the config lists be found in the text too, as transformers does: with "!" as padding,
    every "!" of a prompt is that token. A listed token that the vocabulary lacks is added to it, under the id of the list."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    ids = {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
    more = config.get("additional_special_tokens") or []
    named = [config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token") if config.get(name)]
    tokens = [*named, *more, *config.get("added_tokens_decoder", {}).values()]
    tokens = {_content(token): token for token in tokens}  # the last one counts
    added = [*ids, *map(_content, more)]
    for content, token in sorted(tokens.items(), key=lambda item: ids.get(item[0], math.inf)):
        options = {"special": True} | (token if isinstance(token, dict) else {})
        flags = {
            flag: options[flag] for flag in ("single_word", "lstrip", "rstrip", "normalized", "special") if flag in options
        }
        if content not in known and (content in added or tokenizer.token_to_id(content) is not None):
            add = tokenizer.add_special_tokens if flags["special"] else tokenizer.add_tokens
            add([AddedToken(content, **flags)])
        if (found := tokenizer.token_to_id(content)) != ids.get(content, found):
            raise ValueError(f"token {content!r} has id {found}; expected {ids[content]}")
