import json
import re
from types import SimpleNamespace

import pytest
import torch

from nano_adrpo.demo.arithmetic_recipe import build_tokenizer
from nano_adrpo.language import chat

TOKENIZER = json.loads(build_tokenizer().to_str())


def model(vocab_size=24, eos=None, **files):
    """What these functions need of a model. files: name without its ending -> value."""
    files = {f"{name}.json": json.dumps(value).encode() for name, value in files.items()}
    return SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size, eos_token_id=eos), files=files)


def test_prompts_become_a_batch_padded_on_the_left():
    tokenizer = chat.tokenizer_of(model(tokenizer=TOKENIZER))
    ids, mask = chat.encode_prompts(tokenizer, ["1+2=", "34", "5+67="], longest=5)
    assert mask.tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]
    assert [tokenizer.decode(row[keep.bool()].tolist()) for row, keep in zip(ids, mask)] == ["1+2=", "34", "5+67="]
    ended = torch.cat([ids, torch.ones(3, 1).long()], 1), torch.cat([mask, torch.ones(3, 1)], 1)
    assert chat.decode(tokenizer, *ended)[1] == "34"
    with pytest.raises(ValueError, match="prompt 1 has 5 tokens; expected 1 … 4: '5[+]67='"):
        chat.encode_prompts(tokenizer, ["1", "5+67="], longest=4)
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        chat.encode_prompts(tokenizer, [""], longest=4)


def test_a_tokenizer_must_be_there_and_fit():
    with pytest.raises(ValueError, match="no tokenizer.json"):
        chat.tokenizer_of(model())
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
        chat.tokenizer_of(model(tokenizer={}))
    with pytest.raises(ValueError, match="the id 23; the model's are below 23"):
        chat.tokenizer_of(model(23, tokenizer=TOKENIZER))
    cut = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}  # a setting left in some files
    tokenizer = chat.tokenizer_of(model(tokenizer=TOKENIZER | {"truncation": cut}))
    assert len(tokenizer.encode("1+2=").ids) == 4


def test_stop_ids():
    assert chat.stop_ids(model(eos=7)) == chat.stop_ids(model(eos=[7])) == [7]
    assert chat.stop_ids(model(eos=7, generation_config={"eos_token_id": [1, 2]})) == [1, 2]
    assert chat.stop_ids(model(eos=7, generation_config={"eos_token_id": 0})) == [0]
    assert chat.stop_ids(model(eos=7, generation_config={})) == [7]
    for eos in ([1, 24], "1", 1.5, {"a": 1}, [[1]], True):
        expected = eos if isinstance(eos, list) else [eos]
        with pytest.raises(ValueError, match=re.escape(f"'eos_token_id' is {expected}; the model's ids are below 24")):
            chat.stop_ids(model(eos=eos))
    with pytest.raises(ValueError, match="generation_config.json: (not valid JSON|expected a JSON object)"):
        chat.stop_ids(model(eos=7, generation_config=5))
    with pytest.raises(ValueError, match="neither generation_config.json nor config.json has an 'eos_token_id'"):
        chat.stop_ids(model())


def test_templates_written_out():
    question = [{"role": "user", "content": "1+1?"}]
    assert chat.chatml(question) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.chatml(question, system="Hi.", add_generation_prompt=False) == (
        "<|im_start|>system\nHi.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
    )
    assert chat.qwen3(question, thinking=False).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert chat.gemma(question) == "<bos><start_of_turn>user\n1+1?<end_of_turn>\n<start_of_turn>model\n"
    for bad in ([{"role": "system", "content": ""}], question * 2, [{"role": "assistant", "content": ""}]):
        with pytest.raises(ValueError, match="Gemma takes user and assistant in turns"):
            chat.gemma(bad)
    assert question == [{"role": "user", "content": "1+1?"}]


def test_an_unknown_template_is_refused():
    assert chat.template_of(model()) is None and chat.template_of(model(tokenizer_config={"eos_token": "x"})) is None
    several, with_bos = [{"name": "default", "template": "x"}], "{{ bos_token }}{{ '<|im_start|>' }}"  # ChatML, but not Qwen's
    for jinja in ("{{ messages }}", several, "<|im_start|><think>", with_bos):
        with pytest.raises(ValueError, match="implemented"):
            chat.template_of(model(tokenizer_config={"chat_template": jinja}))


@pytest.mark.parametrize(
    "jinja, system",
    [
        ("{{ '<|im_start|>system\\nIt\\'s \\\\boxed{}: 4\\n<|im_end|>\\n' }}", "It's \\boxed{}: 4\n"),
        ('{{ "<|im_start|>system\nÜber, it\'s me.<|im_end|>" }}', "Über, it's me."),
        ("{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}", None),
    ],
)
def test_the_default_system_message_is_the_templates_own(jinja, system):
    render = chat.template_of(model(tokenizer_config={"chat_template": jinja}))
    question = [{"role": "user", "content": "4?"}]
    assert render(question) == chat.chatml(([{"role": "system", "content": system}] if system else []) + question)
    own = [{"role": "system", "content": "Mine."}, *question]
    assert render(own) == chat.chatml(own)


def test_a_default_system_message_in_an_unknown_place_is_refused():
    for jinja in (
        "<|im_start|>system\nHi.<|im_end|>\n",
        "{% set system_message = 'Hi.' %}{{ '<|im_start|>system\\n' + system_message }}",
    ):
        with pytest.raises(ValueError, match="default system message in an unknown place"):
            chat.template_of(model(tokenizer_config={"chat_template": jinja}))
