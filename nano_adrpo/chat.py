"""Text on its way into a decoder and out of it: the tokenizer of a model folder, its end-of-text ids, prompts as padded
batches, and the chat templates of Qwen and Gemma.

A folder's chat template is a small program in jinja. None is run here: the public ones are written out below as functions of
the messages, [{"role": "user", "content": …}, …] with the roles system, user and assistant and content that is text, and
`template_of` tells by its fixed parts which of them a folder has.
"""

import functools
import json

import torch
from tokenizers import Tokenizer


def tokenizer_of(model):
    """The tokenizers.Tokenizer in a model's folder. Raises ValueError where there is none or its ids are not the model's."""
    if "tokenizer.json" not in model.files:
        raise ValueError("the model's folder has no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_str(model.files["tokenizer.json"].decode())
    except Exception as error:  # the package raises Exception itself
        raise ValueError(f"tokenizer.json: not a tokenizer ({error})") from None
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if highest >= (size := model.config.vocab_size):
        raise ValueError(f"tokenizer.json has the id {highest}; the model's are below {size}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def stop_ids(model):
    """The ids that end a completion, a list: generation_config.json's, where chat models list more, or else config.json's."""
    ids = settings(model, "generation_config.json").get("eos_token_id")
    ids = model.config.eos_token_id if ids is None else ids
    if ids is None or ids == []:
        raise ValueError("neither generation_config.json nor config.json has an 'eos_token_id'; completions would never end")
    ids = [ids] if isinstance(ids, int) else list(ids)
    if not all(0 <= index < model.config.vocab_size for index in ids):
        raise ValueError(f"'eos_token_id' is {ids}; the model's ids are below {model.config.vocab_size}")
    return ids


def settings(model, name):
    """The object in a JSON file of the model's folder, {} where the file is not there."""
    try:
        return dict(json.loads(model.files.get(name, "{}")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: not a JSON object ({error})") from None


def encode_prompts(tokenizer, texts, longest, special=False, device=None):
    """Texts as one batch, padded on the left: (ids [B, T], mask [B, T], 1 at tokens), both int64.

    longest   the most tokens that a prompt may have; ValueError naming the first that has more
    special   whether to add the tokenizer's own first and last tokens; a chat template has written them already
    """
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=special)]
    for index, row in enumerate(rows):
        if not 0 < len(row) <= longest:
            raise ValueError(f"prompt {index} has {len(row)} tokens; expected 1 … {longest}: {texts[index][:60]!r}")
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
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n" * add_generation_prompt


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
    return prompt + "<think>\n\n</think>\n\n" * (add_generation_prompt and not thinking)


def gemma(messages, add_generation_prompt=True):
    """Gemma, the first and the second. There is no system role, and user and assistant take turns: else ValueError.

    >>> print(gemma([{"role": "user", "content": " 2+2? "}]))
    <bos><start_of_turn>user
    2+2?<end_of_turn>
    <start_of_turn>model
    <BLANKLINE>
    """
    for index, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[index % 2]:
            raise ValueError(f"message {index} is of role {message['role']!r}; Gemma takes user and assistant in turns")
    names = {"user": "user", "assistant": "model"}
    turns = [f"<start_of_turn>{names[m['role']]}\n{m['content'].strip()}<end_of_turn>\n" for m in messages]
    return "<bos>" + "".join(turns) + "<start_of_turn>model\n" * add_generation_prompt


QWEN2 = "You are a helpful assistant."
QWEN25 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def template_of(model):
    """The function above that renders what the jinja template in the model's folder renders; None where it has no template.
    Raises ValueError for a template that is none of these."""
    jinja = model.files.get("chat_template.jinja", b"").decode()
    jinja = jinja or settings(model, "tokenizer_config.json").get("chat_template")
    if not jinja:
        return None
    if not isinstance(jinja, str):
        raise ValueError("tokenizer_config.json: 'chat_template' is a list of several; only a single one is implemented")
    if "<start_of_turn>" in jinja and "System role not supported" in jinja:
        return gemma
    if "<|im_start|>" in jinja and "enable_thinking" in jinja and "last_query_index" in jinja:
        return qwen3
    if "<|im_start|>" in jinja and "<think>" not in jinja:
        return functools.partial(chatml, system=next((text for text in (QWEN25, QWEN2) if text in jinja), None))
    raise ValueError("the chat template of the model's folder is not implemented; expected Qwen2's, 2.5's, 3's or Gemma's")
