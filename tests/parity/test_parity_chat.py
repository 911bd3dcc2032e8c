"""Chat templates against transformers' rendering of the public jinja texts (those of Qwen1.5, Qwen2, Qwen2.5, Qwen2.5-Math,
Qwen3 and Gemma, without their branches for tools), and the demo's folder in transformers. Needs the extra `parity`."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nano_adrpo.demo import GRPO, HERE, arithmetic_recipe
from nano_adrpo.language import chat
from nano_adrpo.models.decoder import Decoder

QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = r"""{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
QWEN15 = QWEN2.replace("You are a helpful assistant.", "You are a helpful assistant")  # its full stop came with Qwen2
MATH = QWEN25.replace(
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    r"Please reason step by step, and put your final answer within \\boxed{}.",
)
QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' }}
                {{- content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief. "}
ASK, ASK_AGAIN = {"role": "user", "content": " 2 + 2?\n"}, {"role": "user", "content": "sure?\n\n¿?"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm, two\nand two\n</think>\n\n4 "}
PLAIN = {"role": "assistant", "content": "\nit is 4"}
TALKS = [
    [ASK], [SYSTEM, ASK], [ASK, THOUGHT], [ASK, PLAIN], [ASK, PLAIN, ASK_AGAIN], [SYSTEM, ASK, THOUGHT, ASK_AGAIN],
    [ASK, THOUGHT, ASK_AGAIN, PLAIN, ASK], [SYSTEM, ASK, THOUGHT, THOUGHT], [ASK, PLAIN, PLAIN, PLAIN],
]  # fmt: skip


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize(
    "jinja",
    [QWEN15, QWEN2, QWEN25, MATH, QWEN3, GEMMA],
    ids=["qwen1.5", "qwen2", "qwen2.5", "qwen2.5-math", "qwen3", "gemma"],
)
def test_templates_render_as_transformers_renders_them(jinja, place):
    content = jinja if place.endswith("jinja") else json.dumps({"chat_template": jinja})
    ours = chat.template_of(SimpleNamespace(files={place: content.encode()}))
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=arithmetic_recipe.build_tokenizer(), bos_token="<bos>", chat_template=jinja
    )
    talks = TALKS[:1] + TALKS[2:5] + TALKS[6:7] if jinja == GEMMA else TALKS  # Gemma: no system, and turns alternate
    for talk, prompt in itertools.product(talks, [True, False]):
        expected = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
        assert ours(talk, add_generation_prompt=prompt) == expected
        if jinja == QWEN3:
            expected = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt, enable_thinking=False)
            assert ours(talk, thinking=False, add_generation_prompt=prompt) == expected


@torch.no_grad()
@pytest.mark.parametrize("name", arithmetic_recipe.MIXTURES)
def test_the_demo_is_an_ordinary_folder(tmp_path, name):
    ours = Decoder.from_pretrained(HERE / name)
    ours.save_pretrained(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    texts = ["47+38=", "99+99="]
    inputs = tokenizer(texts, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    ids, mask = chat.encode_prompts(chat.tokenizer_of(ours), texts, longest=6)
    assert torch.equal(inputs["input_ids"], ids) and (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    torch.testing.assert_close(ours(ids, mask), model(**inputs).logits, atol=1e-4, rtol=0)
    theirs = model.generate(**inputs, max_new_tokens=GRPO["max_new_tokens"], do_sample=False)
    got, completion = ours.generate(ids, mask, GRPO["max_new_tokens"], temperature=0, eos=chat.stop_ids(ours))
    written = chat.decode(chat.tokenizer_of(ours), got[:, 6:], completion)
    assert written == tokenizer.batch_decode(theirs[:, 6:], skip_special_tokens=True)
    assert all("####" in text for text in written)
