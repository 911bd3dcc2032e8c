"""Text on its way into a decoder and out of it: the tokenizer of a model folder, its end-of-text ids, prompts as padded
batches, and the chat templates of Qwen and Gemma.

A folder's chat template is a small program in jinja. None is run here: the public ones are written out below as functions of
the messages, [{"role": "user", "content": …}, …] with the roles system, user and assistant and content that is text, and
`template_of` tells by its fixed parts which of them a folder has.
"""

import functools
import re

import torch

from nano_adrpo.errors import InputError
from nano_adrpo.files import parse_json
from nano_adrpo.models.tokenizers import open_tokenizer


class TextCodec:
    """A decoder's way from questions to ids and back: its tokenizer, its end-of-text ids and its chat template.

    eos        the ids that end a completion, a list
    template   the function of messages that renders the folder's chat template; None: a question is the prompt as it is
    """

    def __init__(self, model):
        self.tokenizer, self.eos, self.template = tokenizer_of(model), stop_ids(model), template_of(model)

    def encode(self, questions, longest, device=None):
        """N questions -> ids and mask [N, T] of their prompts, padded on the left. Raises InputError naming the first prompt of
        more than `longest` tokens."""
        if self.template:
            questions = [self.template([{"role": "user", "content": question}]) for question in questions]
        return encode_prompts(self.tokenizer, questions, longest, special=not self.template, device=device)

    def decode(self, ids, mask):
        """Completions ids [N, C] under their mask [N, C] -> N texts, without special tokens such as the eos."""
        return decode(self.tokenizer, ids, mask)


def tokenizer_of(model):
    """The tokenizers.Tokenizer in a model's folder. Raises InputError where there is none or its ids are not the model's."""
    if "tokenizer.json" not in model.files:
        raise InputError("the model's folder has no tokenizer.json")
    tokenizer = open_tokenizer(model.files["tokenizer.json"], "tokenizer.json")
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if highest >= (size := model.config.vocab_size):
        raise InputError(f"tokenizer.json has the id {highest}; the model's are below {size}")
    return tokenizer


def stop_ids(model):
    """The ids that end a completion, a list: generation_config.json's, where chat models list more, or else config.json's."""
    ids = settings(model, "generation_config.json").get("eos_token_id")
    ids = model.config.eos_token_id if ids is None else ids
    if ids is None or ids == []:
        raise InputError("neither generation_config.json nor config.json has an 'eos_token_id'; completions would never end")
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(index) is int and 0 <= index < model.config.vocab_size for index in ids):
        raise InputError(f"'eos_token_id' is {ids}; the model's ids are below {model.config.vocab_size}")
    return ids


def settings(model, name):
    """The object in a JSON file of the model's folder, {} where the file is not there."""
    return parse_json(model.files.get(name, "{}"), name)


def encode_prompts(tokenizer, texts, longest, special=False, device=None):
    """Texts as one batch, padded on the left: (ids [B, T], mask [B, T], 1 at tokens), both int64.

    longest   the most tokens that a prompt may have; InputError naming the first that has more
    special   whether to add the tokenizer's own first and last tokens; a chat template has written them already
    """
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=special)]
    for index, row in enumerate(rows):
        if not 0 < len(row) <= longest:
            raise InputError(f"prompt {index} has {len(row)} tokens; expected 1 … {longest}: {texts[index][:60]!r}")
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def decode(tokenizer, ids, mask):
    """The texts of completions ids [B, N] under their mask [B, N], without special tokens such as the eos."""
    return tokenizer.decode_batch([row[keep].tolist() for row, keep in zip(ids, mask.bool())])


def chatml(messages, system=None, add_generation_prompt=True):
    """ChatML, as Qwen2 and Qwen2.5 have it. `system` is the system message of a conversation that brings none.

    >>> print(chatml([{"role": "user", "content": "2+2?"}]))
    <|im_start|>user
    2+2?<|im_end|>
    <|im_start|>assistant
    <BLANKLINE>
    """
    if system and [message["role"] for message in messages[:1]] != ["system"]:
        messages = [{"role": "system", "content": system}, *messages]
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def qwen3(messages, thinking=True, add_generation_prompt=True):
    """Qwen3: ChatML in which answers open with a <think> block. Those before the last question lose theirs; with
    thinking=False the prompt ends in an empty one, so that the model answers straight away."""
    asked = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=len(messages))
    shown = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            thought, closed, answer = message["content"].rpartition("</think>")
            thought, answer = thought.rpartition("<think>")[2].strip("\n"), answer.lstrip("\n") if closed else answer
            if index > asked and (thought or index == len(messages) - 1):
                answer = f"<think>\n{thought}\n</think>\n\n" + answer.lstrip("\n")
            message = {"role": "assistant", "content": answer}
        shown.append(message)
    prompt = chatml(shown, add_generation_prompt=add_generation_prompt)
    return prompt + ("<think>\n\n</think>\n\n" if add_generation_prompt and not thinking else "")


def gemma(messages, add_generation_prompt=True):
    """Gemma, the first and the second. There is no system role, and user and assistant take turns: else InputError.

    >>> print(gemma([{"role": "user", "content": " 2+2? "}]))
    <bos><start_of_turn>user
    2+2?<end_of_turn>
    <start_of_turn>model
    <BLANKLINE>
    """
    for index, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[index % 2]:
            raise InputError(f"message {index} is of role {message['role']!r}; Gemma takes user and assistant in turns")
    names = {"user": "user", "assistant": "model"}
    turns = [f"<start_of_turn>{names[m['role']]}\n{m['content'].strip()}<end_of_turn>\n" for m in messages]
    return "<bos>" + "".join(turns) + ("<start_of_turn>model\n" if add_generation_prompt else "")


def default_system(jinja):
    """The system message that a ChatML template writes where a conversation brings none; None where it writes none. Qwen2.5's
    differs from Qwen2's and from Qwen2.5-Math's. InputError where it stands elsewhere than in Qwen's templates."""
    text = re.search(r"""(['"])<\|im_start\|>system(?:\n|\\n)((?:\\.|(?!\1)[^\\])*?)<\|im_end\|>""", jinja, re.DOTALL)
    if text:
        return text[2].encode("ascii", "backslashreplace").decode("unicode-escape")  # as jinja reads a text in quotes
    if re.search(r"""(?<!['"])<\|im_start\|>system|\bset \w*system""", jinja):
        raise InputError("the chat template of the model's folder has its default system message in an unknown place")
    return None


def template_of(model):
    """The function above that renders what the jinja template in the model's folder renders; None where it has no template.
    Raises InputError for a template that is none of these."""
    jinja = model.files.get("chat_template.jinja", b"").decode()
    jinja = jinja or settings(model, "tokenizer_config.json").get("chat_template")
    if not jinja:
        return None
    if not isinstance(jinja, str):
        raise InputError("tokenizer_config.json: 'chat_template' is a list of several; only a single one is implemented")
    if "<start_of_turn>" in jinja and "System role not supported" in jinja:
        return gemma
    if "<|im_start|>" in jinja and "enable_thinking" in jinja and "last_query_index" in jinja:
        return qwen3
    if "<|im_start|>" in jinja and "<think>" not in jinja and "bos_token" not in jinja:
        return functools.partial(chatml, system=default_system(jinja))
    raise InputError("the chat template of the model's folder is not implemented; expected Qwen2's, 2.5's, 3's or Gemma's")
