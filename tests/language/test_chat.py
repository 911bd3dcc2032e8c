import json
import re
from types import SimpleNamespace

import pytest
import torch

from nano_adrpo.demo.arithmetic_recipe import build_tokenizer
from nano_adrpo.language import chat

TOKENIZER = json.loads(build_tokenizer().to_str())


def model(vocab_size=24, eos=None, **files):
    """What these functions need of a model. files: name without its ending .json, or of another file -> its value."""
    config = SimpleNamespace(vocab_size=vocab_size, eos_token_id=eos, model_type="qwen2")
    named = {name if "." in name else f"{name}.json": value for name, value in files.items()}
    content = {name: value if isinstance(value, bytes) else json.dumps(value).encode() for name, value in named.items()}
    return SimpleNamespace(config=config, files=content)


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


def test_a_tokenizer_must_be_there():
    with pytest.raises(ValueError, match="no tokenizer.json, nor vocab.json and merges.txt"):
        chat.tokenizer_of(model(vocab={}))
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
        chat.tokenizer_of(model(tokenizer={}))
    cut = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}  # a setting left in some files
    tokenizer = chat.tokenizer_of(model(tokenizer=TOKENIZER | {"truncation": cut}))
    assert len(tokenizer.encode("1+2=").ids) == 4
    # A special token that tokenizer_config.json alone lists is one: found in a text, and left out of what is read.
    tokenizer = chat.tokenizer_of(model(tokenizer=TOKENIZER, tokenizer_config={"eos_token": "="}))
    ids = tokenizer.encode("1+2=").ids
    assert tokenizer.decode(ids) == "1+2" and tokenizer.decode(ids, skip_special_tokens=False).endswith("=")


def test_vocab_and_merges_by_hand():
    pairs = {"vocab": {"1": 0, "2": 1, "12": 2, "Ġ": 3, "a": 4, "b": 5, "ab": 6}, "merges.txt": b"#version: 0.2\n1 2\na b\n"}

    def ids(**files):
        return chat.tokenizer_of(model(**pairs, **files)).encode("12 ab").ids

    assert ids() == ids(tokenizer_config={"tokenizer_class": "Qwen2TokenizerFast"}) == [0, 1, 3, 6]  # digits stand alone
    assert ids(tokenizer_config={"tokenizer_class": "GPT2Tokenizer"}) == [2, 3, 6]
    for files, message in (
        ({"tokenizer_config": {"tokenizer_class": "BartTokenizer"}}, "tokenizer_config.json.* is 'BartTokenizer'; expected"),
        ({"vocab": {"1": 0}}, "vocab.json and merges.txt: not a tokenizer"),
        ({"merges.txt": b"\xff"}, "vocab.json and merges.txt: not a tokenizer"),
        ({"added_tokens": {"<x>": 9}}, "vocab.json: token '<x>' has id 7; expected 9"),
    ):
        with pytest.raises(ValueError, match=message):
            chat.tokenizer_of(model(**pairs | files))


def test_an_id_beyond_the_model_is_refused_where_a_text_has_it():
    codec = chat.TextCodec(model(23, eos=1, tokenizer=TOKENIZER))  # the tokenizer has the ids 0 … 23; 23 is "g"
    assert codec.encode(["1+2="], 9)[0].shape == (1, 4)
    with pytest.raises(ValueError, match="prompt 1 has the token 'g' with id 23; the model's ids are below 23"):
        codec.encode(["1", "1g"], 9)


def test_stop_ids_are_those_of_all_files():
    files = {"tokenizer": TOKENIZER, "tokenizer_config": {"eos_token": {"content": "<eos>"}}}  # of id 1
    assert chat.stop_ids(model(eos=7)) == chat.stop_ids(model(eos=[7])) == [7]
    assert chat.stop_ids(model(eos=7, generation_config={"eos_token_id": [3, 2]})) == [3, 2, 7]
    assert chat.stop_ids(model(eos=7, generation_config={"eos_token_id": 0}, **files)) == [0, 7, 1]
    assert chat.stop_ids(model(eos=[1, 7], generation_config={}, **files)) == [1, 7]
    assert chat.stop_ids(model(tokenizer=TOKENIZER, special_tokens_map={"eos_token": "g"})) == [23]
    assert chat.stop_ids(model(23, eos=7, tokenizer=TOKENIZER, special_tokens_map={"eos_token": "g"})) == [7]  # never written
    for eos in ([1, 24], "1", 1.5, {"a": 1}, [[1]], True):
        expected = eos if isinstance(eos, list) else [eos]
        with pytest.raises(ValueError, match=re.escape(f"'eos_token_id' is {expected}; the model's ids are below 24")):
            chat.stop_ids(model(eos=eos))
    with pytest.raises(ValueError, match="generation_config.json: (not valid JSON|expected a JSON object)"):
        chat.stop_ids(model(eos=7, generation_config=5))
    with pytest.raises(ValueError, match="neither generation_config.json nor config.json has an 'eos_token_id'"):
        chat.stop_ids(model(tokenizer_config={"eos_token": "absent"}, tokenizer=TOKENIZER))


# ----------------------------------------------------------------------------------------------------------------- templates

TALK = [{"role": "user", "content": " <ü>\n", "name": None}, {"role": "assistant", "content": "4", "reasoning": "2+2"}]
# Template -> its text for TALK. transformers' settings: no line end behind a block, no blanks before one, no HTML signs.
TEXTS = {
    "  {% if true %}\n  a\n  {% endif %}\nb": "  a\nb",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content | trim }}{% endfor %}": "<ü>",
    "{{ messages[0] | tojson }}": '{"role": "user", "content": " <ü>\\n"}',
    "{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}": '{\n "a": 2,\n "b": 1\n}',
    "{% generation %}{% set x = 1 %}\n4{% endgeneration %}{{ x }}": "4",
    "{{ strftime_now('%Y') | length }}{{ dict(a=1) }}{{ dict.fromkeys('b') }}": "4{'a': 1}{'b': None}",
    "{% set ns = namespace({'a': 1}, self=2) %}{% set ns.b = 3 %}{{ [ns.a, ns.self, ns.b] }}": "[1, 2, 3]",
    "{{ messages[1].reasoning_content }} {{ messages[1].thinking }} {{ messages[1]['reasoning'] }}": "2+2 2+2 2+2",
    "{{ bos_token + eos_token }}{{ pad_token }} {{ tools }} {{ documents }}": "<b></s> None None",
    "{{ add_generation_prompt }}": "True",
}


def test_templates_by_hand():
    config = {"bos_token": {"content": "<b>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    whole = "|".join(TEXTS)
    assert chat.render(model(tokenizer_config=config | {"chat_template": whole}), TALK) == "|".join(TEXTS.values())
    given = model(tokenizer_config={"chat_template": "{{ tools[0].name }} {{ documents }}"})
    assert chat.render(given, TALK, tools=[{"name": "f"}]) == "f None"


REFUSED = {
    "{{ raise_exception('No\nsystem') }}": "'TemplateError: No system'",
    "{% if %}": "TemplateSyntaxError: Expected an expression",
    "{{ nobody.content }}": "UndefinedError: 'nobody' is undefined",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ namespace(_a=1) }}": "SecurityError: the name '_a' begins with '_'",
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "it takes more than 0.5 s",
    "{{ 10 ** (10 ** 9) }}": "it takes more than 0.5 s",
    "{{ 'a' * 10 ** 10 }}": "MemoryError",
    "{{ 'a' * (10 ** 7 + 1) }}": "it has 10000001 characters; expected at most 10000000",
    "{% macro deep() %}{{ deep() }}{% endmacro %}{{ deep() }}": "RecursionError",
}


@pytest.mark.parametrize("template", REFUSED)
def test_a_template_that_fails_or_takes_too_much_is_one_line(template):
    with pytest.raises(ValueError, match=re.escape(REFUSED[template])) as error:
        chat.render(model(**{"chat_template.jinja": template.encode()}), TALK)
    assert str(error.value).startswith("chat_template.jinja: the chat template writes no prompt: ")
    assert len(str(error.value).splitlines()) == 1


def test_which_template_of_a_folder_counts(tmp_path):
    question = [{"role": "user", "content": "1"}]
    several = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}]
    files = {
        "chat_template.json": b'{"chat_template": "a"}',
        "tokenizer_config.json": json.dumps({"chat_template": several}).encode(),
        "chat_template.jinja": b"d",
        "additional_chat_templates/default.jinja": b"e",
    }
    (tmp_path / "additional_chat_templates").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}: no chat template"):
        chat.render(tmp_path, question)
    for (name, content), expected in zip(files.items(), "acde"):
        (tmp_path / name).write_bytes(content)
        assert chat.template_of(tmp_path).text == chat.template_of(str(tmp_path)).text == expected
    assert chat.render(tmp_path, question) == "e"
    for bad in (several[:1], {"tool_use": "b"}, [1], 5):
        with pytest.raises(ValueError, match="tokenizer_config.json: key 'chat_template' has no template named 'default'"):
            chat.template_of(model(tokenizer_config={"chat_template": bad}))
    with pytest.raises(ValueError, match="chat_template.jinja: not a text file in UTF-8"):
        chat.template_of(model(**{"chat_template.jinja": b"\xff"}))


SIGNS = """{% set sign = {'user': '-', 'system': '+'} %}
{% for m in messages %}{{ sign[m.role] + m.content }}{% endfor %}{% if enable_thinking %}={% endif %}"""


def test_a_codec_asks_as_it_is_told(tmp_path):
    (tmp_path / "own.jinja").write_text(SIGNS)
    folder = model(eos=1, tokenizer=TOKENIZER, tokenizer_config={"chat_template": "3{{ messages[0].content }}"})

    def asked(*questions, **options):
        codec = chat.TextCodec(folder, **options)
        ids, mask = codec.encode(questions, 9)
        return codec.decode(ids, mask)

    assert asked("1", "22", "1") == ["31", "322", "31"] and asked("1", template="none") == ["1"]
    own = tmp_path / "own.jinja"
    assert asked("1", template=own) == asked("1", template=own, thinking="off") == ["-1"]
    assert asked("1", template=own, system="2", thinking="on") == ["+2-1="]
    for options, message in (
        ({"template": "none", "system": ""}, "--system and --thinking: expected only with a chat template"),
        ({"template": "none", "thinking": "on"}, "--system and --thinking: expected only with a chat template"),
        ({"thinking": "off"}, "--thinking: the chat template in tokenizer_config.json does not read enable_thinking"),
        ({"template": tmp_path / "absent"}, "absent: no such file"),
        ({"stop": ["a", ""]}, "--stop: expected texts that are not empty"),
    ):
        with pytest.raises(ValueError, match=message):
            chat.TextCodec(folder, **options)


# ---------------------------------------------------------------------------------------------------------------- stop texts


def test_a_text_ends_before_a_stop_text_and_its_mask_behind():
    codec = chat.TextCodec(model(eos=1, tokenizer=TOKENIZER), stop=["=4", "####"])
    rows = ["12=45", "1####2", "12=3,", "1=####"]
    ids, mask = codec.encode(rows, 9)
    assert codec.decode(ids, mask) == ["12", "1", "12=3,", "1="]
    ends = [[codec.stopped(torch.tensor([codec.tokenizer.encode(row).ids[:n]])).item() for n in range(1, 4)] for row in rows]
    assert ends == [[False] * 3, [False, True, True], [False] * 3, [False, False, True]]
    assert codec.ended is not None and chat.TextCodec(model(eos=1, tokenizer=TOKENIZER)).ended is None
