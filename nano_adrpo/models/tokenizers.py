"""Texts to token ids, as the text encoders of flow models and the CLIP and BLIP models of the rewards were trained to see them.

`open_tokenizer` opens any tokenizer.json, `byte_pairs` the vocab.json and merges.txt of Qwen2 and GPT-2. `PromptTokenizer` is
that of CLIP, T5 and Gemma, from a folder with tokenizer_config.json and either tokenizer.json or CLIP's vocab.json and
merges.txt. `BertTokenizer` is BLIP's. The ids are those that transformers makes of the same folders.
"""

import contextlib
import dataclasses
import math
import os
import warnings
from pathlib import Path
from typing import Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence

from nano_adrpo import files
from nano_adrpo.errors import InputError, MissingFile
from nano_adrpo.files import config as configs
from nano_adrpo.models.tokenizer_check import check


def open_tokenizer(source, where):
    """The tokenizers.Tokenizer of a tokenizer.json, its padding and truncation switched off.

    source    the path of the file, or its bytes
    where     the name of the file, for messages: raises MissingFile, or InputError where it is no tokenizer
    """
    text = source if isinstance(source, bytes) else files.read_text(source).encode()
    check(text, where)
    with refused(where):
        tokenizer = Tokenizer.from_str(text.decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextlib.contextmanager
def refused(where, what="not a tokenizer"):
    """Turns whatever the tokenizers package raises inside into an InputError that names the file `where`, or the text."""
    try:
        with quiet():
            yield
    except InputError:
        raise
    except BaseException as error:  # noqa: BLE001, the package raises nothing more specific
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # such as Ctrl-C
            raise
        reason = str(error).partition("\n")[0]
        raise InputError(f"{where}: {what} ({reason})") from None


@contextlib.contextmanager
def quiet():
    """Inside, nothing is written to the process's stderr, where the package in Rust writes a page when it panics."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def encode_batch(tokenizer, prompts, special=True):
    """tokenizer.encode_batch, with the tokenizer's own first and last tokens or without. InputError where a prompt is no text,
    as half a character of a broken JSON escape is none, or has what the tokenizer cannot encode."""
    for prompt in prompts:
        try:
            prompt.encode()
        except (UnicodeEncodeError, AttributeError):
            raise InputError(f"the prompt {prompt!r} is not Unicode text") from None
    try:
        with refused("the prompts"):
            return tokenizer.encode_batch(list(prompts), add_special_tokens=special)
    except InputError:
        for prompt in prompts:
            with refused(f"the prompt {prompt[:80]!r}", "the tokenizer cannot encode it"):
                tokenizer.encode(prompt, add_special_tokens=special)
        raise


def decode_batch(tokenizer, rows, special=False):
    """tokenizer.decode_batch of lists of ids, special tokens left out or kept. InputError where it fails."""
    with refused("a completion", "the tokenizer cannot decode it"):
        return tokenizer.decode_batch(rows, skip_special_tokens=not special)


class BertTokenizer:
    """BERT's word pieces, from a folder with tokenizer.json, or with vocab.txt alone (of bert-base-uncased: lower case, no
    accents)."""

    def __init__(self, path):
        where, vocabulary = Path(path) / "tokenizer.json", Path(path) / "vocab.txt"
        if where.is_file():
            self.tokenizer = open_tokenizer(where, where)
        elif vocabulary.is_file():
            where, self.tokenizer = vocabulary, word_pieces(vocabulary)
        else:
            raise MissingFile(f"{path}: no tokenizer.json and no vocab.txt in this folder")
        self.pad, cls, sep, unk = (self.tokenizer.token_to_id(f"[{name}]") for name in ("PAD", "CLS", "SEP", "UNK"))
        if None in (self.pad, cls, sep, unk):
            raise InputError(f"{where}: expected BERT's [PAD], [CLS], [SEP] and [UNK] among the tokens")
        if where == vocabulary:
            self.tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
            self.tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))

    def __call__(self, prompts, length=35):
        """B strings -> ids and mask [B, L]: [CLS], pieces, [SEP], padding to the longest. A prompt of more than `length` tokens
        (35 is what ImageReward and its BLIP score cut at) loses pieces before its [SEP]."""
        rows = [encoding.ids for encoding in encode_batch(self.tokenizer, prompts)]
        for i, (prompt, ids) in enumerate(zip(prompts, rows)):
            if len(ids) > length:
                short = prompt if len(prompt) <= 80 else prompt[:79] + "…"
                warnings.warn(f"the prompt {short!r} has {len(ids)} tokens and is cut to {length}", stacklevel=2)
                rows[i] = ids[: length - 1] + ids[-1:]
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=self.pad)
        return ids, pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)


def word_pieces(file):
    """BERT's tokenizer from a vocab.txt with one piece a line."""
    lines = files.read_text(file).removesuffix("\n").split("\n")
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(lines)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return tokenizer


@dataclasses.dataclass
class Settings:
    """Keys of tokenizer_config.json."""

    model_max_length: float | None = None  # None: any
    padding_side: Literal["right"] | None = None
    truncation_side: Literal["right"] | None = None


class PromptTokenizer:
    """Every prompt becomes one length, padded with the folder's `pad_token`: SD3's are "<|endoftext|>" (CLIP-L), "!" (bigG) and
    "<pad>" (T5)."""

    def __init__(self, path, padding_side=None):
        """padding_side: None is the folder's; "right" where a pipeline pads there whatever the folder says."""
        self.path = path = Path(path)
        self.files = {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
        where = path / "tokenizer_config.json"
        if where.name not in self.files:
            raise MissingFile(f"{where}: no such file")
        self.config = settings(self.files, path)
        source = path / "tokenizer.json"
        if source.name not in self.files:
            if "vocab.json" not in self.files:
                raise MissingFile(f"{source}: no such file, nor CLIP's vocab.json and merges.txt")
            source = path / "vocab.json"
            self.config = CLIP_TOKENS | {key: value for key, value in self.config.items() if value is not None}
        with refused(source):
            self.tokenizer = clip_tokenizer(path, self.config) if source.stem == "vocab" else open_tokenizer(source, source)
            mark_special(self.tokenizer, self.config, source)
        values = self.config | ({"padding_side": padding_side} if padding_side else {})
        self.longest = configs.parse(Settings, values, where).model_max_length or math.inf
        pad = _content(self.config.get("pad_token"))
        self.pad = self.tokenizer.token_to_id(pad) if isinstance(pad, str) else None
        if self.pad is None:
            raise InputError(f"{where}: key 'pad_token' is {pad!r}; expected a token of {source.name}")
        self.reported = set()  # prompts whose loss of words was reported

    def __call__(self, prompts, length):
        """B strings -> ids [B, length]: begin, words, end, padding. A longer prompt loses words before its end token, with a
        warning the first time."""
        rows, cut = [], {}
        for prompt, encoding in zip(prompts, encode_batch(self.tokenizer, prompts)):
            ids = encoding.ids
            if len(ids) > length:
                cut[prompt] = len(ids)
                ids = ids[: length - 1] + ids[-1:]
            rows.append(ids + [self.pad] * (length - len(ids)))
        self.report(cut, length)
        return torch.tensor(rows)

    def report(self, cut, length):
        """Warns of prompts that are cut to `length`, {prompt: its number of tokens}, once of each."""
        cut = {prompt: count for prompt, count in cut.items() if prompt not in self.reported}
        if cut:
            self.reported.update(cut)
            (prompt, count), others = next(iter(cut.items())), f" (and {len(cut) - 1} more)" if len(cut) > 1 else ""
            prompt = prompt if len(prompt) <= 80 else prompt[:79] + "…"
            warnings.warn(f"the prompt {prompt!r} has {count} tokens and is cut to {length}{others}", stacklevel=3)

    def save_pretrained(self, path):
        """Writes the folder as it was read."""
        Path(path).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            files.write_bytes(Path(path) / name, content)


# The small files of a tokenizer folder: read with it and written again.
FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model",
)  # fmt: skip
CLIP_TOKENS = {name: "<|endoftext|>" for name in ("eos_token", "unk_token", "pad_token")} | {"bos_token": "<|startoftext|>"}

# Those of a model folder.
COMPANIONS = (
    "generation_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",  # of clips and images
    *FILES,
)  # fmt: skip


def companions(folder):
    """{name: bytes} of the small files beside the weights: read with the model and written again, so that a trained folder is
    whole."""
    found = [file for name in COMPANIONS for file in sorted(Path(folder).glob(name)) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def _content(token):
    return token.get("content") if isinstance(token, dict) else token


def settings(small, folder=""):
    """The object in tokenizer_config.json, with what older folders have in special_tokens_map.json and added_tokens.json.

    small    {name: bytes} of a folder's small files; `folder` stands before their names in messages
    """
    config, special, added = (
        files.parse_json(small.get(name, "{}"), Path(folder) / name)
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    if "added_tokens_decoder" in config:
        return special | config
    added = {str(i): {"content": content} for content, i in added.items()}
    return config | special | ({"added_tokens_decoder": added} if added else {})


def named_tokens(config):
    """The tokens that have a name in tokenizer_config.json: {"bos_token": "<s>", …}, without those that are null."""
    named = {f"{name}_token": config.get(f"{name}_token") for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    return {name: text for name, token in named.items() if isinstance(text := _content(token), str)}


def clip_tokenizer(path, config):
    """CLIP's byte-pair encoding (Radford et al. 2021) from vocab.json and merges.txt: text is lower-cased and its white space
    one blank; words, single digits and runs of punctuation are encoded apart, each ending in </w>."""
    if not (path / "merges.txt").is_file():
        raise MissingFile(f"{path / 'merges.txt'}: no such file; vocab.json needs it")
    merges = read_merges((path / "merges.txt").read_text(encoding="utf-8"))
    names = {name: _content(config[name]) for name in CLIP_TOKENS}
    vocabulary = files.read_json(path / "vocab.json")
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


def read_merges(text):
    """merges.txt -> the pairs that become one token, in the order in which they were learnt."""
    return [tuple(line.split()) for line in text.split("\n") if line.strip() and not line.startswith("#version")]


# Qwen2 cuts a text into words, single digits, runs of punctuation and white space before it pairs their bytes.
QWEN2_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_pairs(small, model_type=None):
    """Byte-pair encoding of UTF-8 bytes (Radford et al. 2019) from vocab.json and merges.txt: Qwen2's or GPT-2's, as the
    tokenizer_config.json's tokenizer_class says or else the model's type. small: {name: bytes} of a folder's small files."""
    config = settings(small)
    kind = config.get("tokenizer_class") or ("Qwen2Tokenizer" if model_type in ("qwen2", "qwen3") else None)
    kind = kind.removesuffix("Fast") if isinstance(kind, str) else kind
    allowed = {"tokenizer_class": ("Qwen2Tokenizer", "GPT2Tokenizer")}
    configs.only({"tokenizer_class": kind}, allowed, "tokenizer_config.json, where the folder has no tokenizer.json")
    prefix = bool(config.get("add_prefix_space"))
    with refused("vocab.json and merges.txt"):
        merges = read_merges(small["merges.txt"].decode())
        tokenizer = Tokenizer(models.BPE(files.parse_json(small["vocab.json"], "vocab.json"), merges))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(prefix), decoders.ByteLevel()
        if kind == "Qwen2Tokenizer":
            tokenizer.normalizer = normalizers.NFC()
            words = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(prefix, use_regex=False)])
        mark_special(tokenizer, {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"} | config, "vocab.json")
    return tokenizer


def mark_special(tokenizer, config, where):
    """Makes the tokenizer find the special tokens that the config lists in a text too, as transformers does: with "!" as
    padding, every "!" of a prompt is that token. A listed token that the vocabulary lacks is added to it, under its id there.
    Raises InputError naming the file `where` for a token that has another id than the list says."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed, more = config.get("added_tokens_decoder") or {}, config.get("additional_special_tokens") or []
    named = [config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token") if config.get(name)]
    tokens = [*named, *more, *(listed.values() if isinstance(listed, dict) else [listed])]
    for token in tokens:
        if not isinstance(_content(token), str) or not _content(token):
            raise InputError(f"{where}: its tokenizer_config.json lists the token {token!r}; expected a text")
    ids = {token["content"]: int(i) for i, token in listed.items()}
    tokens = {_content(token): token for token in tokens}  # the last one counts
    marked, added = set(map(_content, [*named, *more])), [*ids, *map(_content, more)]
    for content, token in sorted(tokens.items(), key=lambda item: ids.get(item[0], math.inf)):
        options = {"special": content in marked} | (token if isinstance(token, dict) else {})
        flags = {
            flag: options[flag] for flag in ("single_word", "lstrip", "rstrip", "normalized", "special") if flag in options
        }
        if content not in known and (content in added or tokenizer.token_to_id(content) is not None):
            add = tokenizer.add_special_tokens if flags["special"] else tokenizer.add_tokens
            add([AddedToken(content, **flags)])
        if (found := tokenizer.token_to_id(content)) != ids.get(content, found):
            raise InputError(f"{where}: token {content!r} has id {found}; expected {ids[content]}")
