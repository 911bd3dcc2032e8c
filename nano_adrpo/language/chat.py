"""Text on its way into a decoder and out of it: the tokenizer of a model folder, its chat template, what ends a completion, and
prompts as padded batches."""

import math
from pathlib import Path

import torch

from nano_adrpo import files
from nano_adrpo.errors import InputError
from nano_adrpo.language.template import Template
from nano_adrpo.models import tokenizers
from nano_adrpo.models.decoder import companions


class TextCodec:
    """A decoder's way from questions to ids and back.

    system     the system message before every question; None: whatever the chat template writes of itself
    template   a file with the chat template; None: the folder's own; "none": a question is the prompt as it is
    thinking   "on" or "off" for templates that read enable_thinking; None: as they have it
    stop       texts that end a completion, too

    tokenizer, template   see `tokenizer_of` and `template_of`
    eos                   the ids that end a completion, a list; `ended` tells of stop texts, None where there are none

    Raises InputError naming the file or option that does not fit.
    """

    published = None  # the chat template of a folder without one; None: a question is the prompt as it is

    def __init__(self, model, system=None, template=None, thinking=None, stop=()):
        self.tokenizer, self.size = tokenizer_of(model), model.config.vocab_size
        self.eos, self.stop, self.ended = stop_ids(model, self.tokenizer), stop, self.stopped if stop else None
        self.template, self.system, self.prompts = template_of(model, template, thinking, self.published), system, {}
        if "" in stop:
            raise InputError("--stop: expected texts that are not empty")
        if self.template:
            self.template([conversation("?", system)])  # one that fails, or takes no system message, says so now
        elif system is not None or thinking:
            raise InputError("--system and --thinking: expected only with a chat template")
        if thinking and "enable_thinking" not in self.template.text:
            raise InputError(f"--thinking: the chat template in {self.template.where} does not read enable_thinking")

    def encode(self, questions, longest, device=None):
        """N questions -> ids and mask [N, T] of their prompts, padded on the left. Raises InputError naming the first prompt of
        more than `longest` tokens."""
        texts = self.write(questions)
        return encode_prompts(self.tokenizer, texts, longest, self.size, special=not self.template, device=device)

    def clips(self, questions):
        """What a model hears with these questions: nothing. See language.audio.AudioCodec."""

    def write(self, questions):
        """Questions -> the texts of their prompts. They are kept, as the same ones come again in every round."""
        if not self.template:
            return list(questions)
        new = [question for question in dict.fromkeys(questions) if question not in self.prompts]
        self.prompts |= zip(new, self.template([conversation(question, self.system) for question in new]) if new else ())
        return [self.prompts[question] for question in questions]

    def decode(self, ids, mask, cut=True):
        """Completions ids [N, C] under their mask [N, C] -> N texts, without special tokens such as the eos. With `cut` a text
        ends before the first of the stop texts, as vLLM's does; the mask holds the tokens that it stands in."""
        texts = decode(self.tokenizer, ids, mask)
        if not cut:
            return texts
        return [text[: min([text.find(stop) for stop in self.stop if stop in text], default=None)] for text in texts]

    def stopped(self, ids):
        """The tokens of completions so far, [N, C] -> [N], whether a stop text stands in the newest ones."""
        window = max(len(stop.encode()) for stop in self.stop) + 4  # tokens: one has a byte or more; 4 end a character before
        texts = tokenizers.decode_batch(self.tokenizer, ids[:, -window:].tolist(), special=True)
        return torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=ids.device)


def conversation(question, system=None, completion=None):
    """The messages of a question, behind the system message and before its answer where these are given."""
    turns = {"system": system, "user": question, "assistant": completion}
    return [{"role": role, "content": content} for role, content in turns.items() if content is not None]


def render(source, messages, **values):
    """Messages as the prompt of a model folder, or of a model from one: what transformers' apply_chat_template writes with
    add_generation_prompt=True. values: what else the template may read, such as enable_thinking=False."""
    if not (template := template_of(source)):
        raise InputError(f"{source if isinstance(source, str | Path) else 'the folder of the model'}: no chat template")
    return template([messages], **values)[0]


def template_of(source, choice=None, thinking=None, published=None):
    """The language.template.Template of a folder, or of a model from one; None where there is none. choice, thinking,
    published: see TextCodec."""
    small = companions(source) if isinstance(source, str | Path) else source.files
    where, text = default_template(small) if choice is None else (choice, choice != "none" and files.read_text(choice))
    if choice is None and not text:
        where, text = "the published chat template", published
    values = {"enable_thinking": thinking == "on"} if thinking else {}
    return Template(text, where, tokenizers.named_tokens(tokenizers.settings(small)) | values) if text else None


TEMPLATES = "additional_chat_templates/default.jinja", "chat_template.jinja", "tokenizer_config.json", "chat_template.json"


def default_template(small):
    """The first of these files that holds a template, and the template, of several the one named default; None, None: there is
    none. Raises InputError naming a file without a default."""
    for name in TEMPLATES:
        if name.endswith(".jinja"):
            found = files.decode(small.get(name, b""), name)
        elif isinstance(found := settings(small, name).get("chat_template"), list):
            found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = found.get("default", found) if isinstance(found, dict) else found
        if not isinstance(found, str | None):
            raise InputError(f"{name}: key 'chat_template' has no template named 'default'; --chat-template FILE gives one")
        if found:
            return name, found
    return None, None


def tokenizer_of(model):
    """The tokenizers.Tokenizer in a model's folder. Raises InputError where there is none."""
    if "tokenizer.json" in model.files:
        tokenizer = tokenizers.open_tokenizer(model.files["tokenizer.json"], "tokenizer.json")
        tokenizers.mark_special(tokenizer, tokenizers.settings(model.files), "tokenizer.json")
        return tokenizer
    if {"vocab.json", "merges.txt"} <= model.files.keys():
        return tokenizers.byte_pairs(model.files, model.config.model_type)
    raise InputError("the model's folder has no tokenizer.json, nor vocab.json and merges.txt")


def stop_ids(model, tokenizer=None):
    """The ids that end a completion, a list: those of generation_config.json, of config.json, and the tokenizer's eos_token."""
    found = settings(model.files, "generation_config.json").get("eos_token_id"), model.config.eos_token_id
    ids = [index for each in found if each is not None for index in (each if isinstance(each, list) else [each])]
    if not all(type(index) is int and 0 <= index < model.config.vocab_size for index in ids):
        raise InputError(f"'eos_token_id' is {ids}; the model's ids are below {model.config.vocab_size}")
    if token := tokenizers.named_tokens(tokenizers.settings(model.files)).get("eos_token"):
        index = (tokenizer or tokenizer_of(model)).token_to_id(token)
        ids += [] if index is None or index >= model.config.vocab_size else [index]
    if not ids:
        raise InputError("neither generation_config.json nor config.json has an 'eos_token_id'; completions would never end")
    return list(dict.fromkeys(ids))


def settings(small, name):
    """The object in one of a folder's small files, {} where the file is not there."""
    return files.parse_json(small.get(name, "{}"), name)


def encode_prompts(tokenizer, texts, longest, size=math.inf, special=False, device=None):
    """Texts as one batch, padded on the left: (ids [B, T], mask [B, T], 1 at tokens), both int64.

    longest   the most tokens that a prompt may have; InputError naming the first that has more
    size      the model's number of tokens; InputError naming a prompt with a token beyond
    special   whether to add the tokenizer's own first and last tokens; a chat template has written them already
    """
    rows = [encoding.ids for encoding in tokenizers.encode_batch(tokenizer, texts, special)]
    for index, row in enumerate(rows):
        if not 0 < len(row) <= longest:
            raise InputError(f"prompt {index} has {len(row)} tokens; expected 1 … {longest}: {texts[index][:60]!r}")
        if (top := max(row)) >= size:
            token = tokenizer.id_to_token(top)
            raise InputError(f"prompt {index} has the token {token!r} with id {top}; the model's ids are below {size}")
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def decode(tokenizer, ids, mask):
    """The texts of completions ids [B, N] under their mask [B, N], without special tokens such as the eos."""
    return tokenizers.decode_batch(tokenizer, [row[keep].tolist() for row, keep in zip(ids, mask.bool())])
