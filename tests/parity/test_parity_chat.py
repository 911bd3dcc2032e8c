"""Chat templates against transformers' rendering of the public ones: all that TRL ships and a few more; tokenizers from
vocab.json and merges.txt; and the demo's folder in transformers. Needs the extra `parity`."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nano_adrpo.demo import GRPO, HERE, arithmetic_recipe
from nano_adrpo.language import chat, template
from nano_adrpo.models.decoder import Config, Decoder, companions

PUBLIC = {file.stem: file.read_text("utf-8") for file in Path(trl.__file__).parent.glob("chat_templates/*.jinja")}
# Those of the listed families that TRL does not ship.
PUBLIC["qwen2"] = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PUBLIC["chatml behind a bos"] = "{{ bos_token }}" + PUBLIC["qwen2"]
PUBLIC["llama2"] = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SYSTEM = {"role": "system", "content": "Be brief. "}
ASK, ASK_AGAIN = {"role": "user", "content": " 2 + 2?\n"}, {"role": "user", "content": "sure?\n\n¿?"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm, two\nand two\n</think>\n\n4 "}
PLAIN = {"role": "assistant", "content": "\nit is 4"}
TALKS = [
    [ASK], [SYSTEM, ASK], [ASK, THOUGHT], [ASK, PLAIN], [ASK, PLAIN, ASK_AGAIN], [SYSTEM, ASK, THOUGHT, ASK_AGAIN],
    [ASK, THOUGHT, ASK_AGAIN, PLAIN, ASK], [SYSTEM, ASK, THOUGHT, THOUGHT], [ASK, PLAIN, PLAIN, PLAIN],
    [ASK, PLAIN | {"reasoning": "2 and 2", "name": None}, ASK_AGAIN, PLAIN | {"thinking": "a", "reasoning": "b"}],
]  # fmt: skip


NAMED = {"bos_token": "<bos>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.mark.parametrize("name", PUBLIC)
def test_templates_render_as_transformers_renders_them(name):
    theirs = PreTrainedTokenizerFast(tokenizer_object=arithmetic_recipe.build_tokenizer(), **NAMED, chat_template=PUBLIC[name])
    ours, rendered = template.environment().from_string(PUBLIC[name]), 0
    ways = {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}, {}
    for talk, values in itertools.product(TALKS, ways):
        try:
            expected = theirs.apply_chat_template(talk, tokenize=False, **values)
        except Exception:  # what their jinja refuses, ours refuses too
            with pytest.raises(jinja2.TemplateError):
                template.write(ours, talk, NAMED | values)
            continue
        assert template.write(ours, talk, NAMED | values) == expected
        rendered += 1
    assert rendered >= 3


@pytest.mark.parametrize(
    "name, form",
    [
        ("qwen3", "tokenizer_config.json"),
        ("gemma", "list"),
        ("llama3_2", "chat_template.jinja"),
        ("deepseek_r1_distill", "named"),
    ],
)
def test_a_folder_renders_as_in_transformers(tmp_path, name, form):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=arithmetic_recipe.build_tokenizer(), **NAMED)
    tokenizer.chat_template = PUBLIC[name] if form[0] in "tc" else {"default": PUBLIC[name], "tool_use": "wrong"}
    tokenizer.save_pretrained(tmp_path, save_jinja_files=form in ("chat_template.jinja", "named"))
    if form == "list":  # as older versions wrote it
        several = [{"name": each, "template": text} for each, text in tokenizer.chat_template.items()]
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": several}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for talk in TALKS[:1] + TALKS[4:5]:
        assert chat.render(tmp_path, talk) == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


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


TEXTS = [
    "It's 12,345 – don't DON'T",
    "a\n\n  b \r\n\tc  ",
    "cafe\u0301 naïve 漢字 🙂",
    "<|im_start|>user\nhi<|im_end|>x<mine>y",
    "x  <|endoftext|>  y",
]


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("kind, family", [("Qwen2Tokenizer", "qwen3"), ("GPT2Tokenizer", "llama")])
def test_vocab_and_merges_are_read_as_in_transformers(tmp_path, kind, family, older):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, show_progress=False))
    trained.model.save(str(tmp_path))
    size = trained.get_vocab_size()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<mine>"]
    config, special = {"tokenizer_class": kind}, {"eos_token": "<|im_end|>"}
    if older:
        (tmp_path / "added_tokens.json").write_text(json.dumps({mark: size + i for i, mark in enumerate(marks)}))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    else:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        added = {size + i: {"content": mark, "special": mark != "<mine>", **flags} for i, mark in enumerate(marks)}
        config |= special | {
            "additional_special_tokens": ["<|im_start|>"],
            "added_tokens_decoder": added,
            "pad_token": "<|endoftext|>",
        }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == kind
    model = SimpleNamespace(files=companions(tmp_path), config=Config(family, size + 4, 16, 16, 1, 1, 8))
    ours = chat.tokenizer_of(model)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert chat.stop_ids(model) == [theirs.eos_token_id]
