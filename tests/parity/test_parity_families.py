"""The way that docs/language.md shows, from an instruct model and a user's own file to an adapter in peft, on a tiny folder of
every listed family with its public chat template. Needs the extra `parity`."""

import json
import re
import shlex
import sys
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers
from test_parity_chat import PUBLIC
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import train_grpo
from nano_adrpo import evaluate, lora, sample
from nano_adrpo.evaluation import plots
from nano_adrpo.models.decoder import Decoder

PAGE = (Path(train_grpo.__file__).parent / "docs" / "language.md").read_text("utf-8")
SECTION = PAGE.partition("## From an instruct model and your own file to an adapter\n")[2].partition("\n## ")[0]
(ROW,), (REWARD, OPEN), (COMMANDS,) = (
    re.findall(rf"```{kind}\n(.*?)```", SECTION, re.DOTALL) for kind in ("json", "python", "sh")
)
COMMANDS = [shlex.split(line)[1:] for line in COMMANDS.replace("\\\n", " ").splitlines()]  # without the word python
MAINS = {"train_grpo.py": train_grpo, "nano_adrpo.sample": sample, "nano_adrpo.evaluate": evaluate, "nano_adrpo.lora": lora}
SMALLER = {
    "train_grpo.py": "--rounds 2 --no-eval-first --prompts-per-round 2 --group-size 4 --max-new-tokens 4 --lr 1e-2",
    "nano_adrpo.sample": "--max-new-tokens 4",
    "nano_adrpo.evaluate": "--max-new-tokens 4 --samples 2",
}
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 1024,
}  # fmt: skip
# family: transformers' class, the public template, the token that ends a turn, and what the configs of its releases set
FAMILIES = {
    "qwen2": ("Qwen2", "qwen2", "<|im_end|>", {"tie_word_embeddings": True, "sliding_window": 32768, "max_window_layers": 2}),
    "qwen2.5": ("Qwen2", "qwen2_5", "<|im_end|>", {"rope_theta": 1e6}),
    "qwen3": ("Qwen3", "qwen3", "<|im_end|>", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "llama3.2": ("Llama", "llama3_2", "<|eot_id|>", {"tie_word_embeddings": True, "rope_theta": 5e5}),
    "gemma": ("Gemma", "gemma", "<end_of_turn>", {"hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 1}),
}
MARKS = {
    "<|im_end|>": ["<|im_start|>", "<|im_end|>"],
    "<|eot_id|>": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "<end_of_turn>": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
}


def write_model(folder, family):
    """A folder as a release has it, written by transformers: random weights, a tokenizer of bytes and the family's marks."""
    kind, template, end, special = FAMILIES[family]
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS[end]])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=MARKS[end][0], eos_token=end, chat_template=PUBLIC[template]
    ).save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.token_to_id(end), "bos_token_id": tokenizer.token_to_id(MARKS[end][0])}
    config = getattr(transformers, f"{kind}Config")(vocab_size=tokenizer.get_vocab_size(), **SIZES | special | ids)
    tiny.fill(getattr(transformers, f"{kind}ForCausalLM")(config)).save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_documented_way_ends_in_an_adapter_that_peft_opens(tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "pyplot", lambda file: None)
    write_model(tmp_path / "MODEL", family)
    rows = [json.loads(ROW) | {"word": word} for word in "abcd"]
    for name in ("mine.jsonl", "held_out.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("mine.py").write_text(REWARD)
    ran = []
    for command in COMMANDS:
        name, *options = command[command[0] == "-m" :]
        monkeypatch.setattr(sys, "argv", [name, *options, *SMALLER.get(name, "").split()])
        MAINS[name].main()
        ran.append(name)
    assert ran == list(MAINS)
    written = [json.loads(line) for line in Path("runs/mine.jsonl").read_text().splitlines()]
    assert [row["word"] for row in written] == list("abcd") and all("completion" in row for row in written)

    opened = {}
    exec(OPEN, opened)  # the page's lines
    theirs, ours = opened["model"].eval(), lora.load(Decoder.from_pretrained("MODEL"), "runs/mine/adapter")
    assert isinstance(theirs, peft.PeftModel)
    merged = AutoModelForCausalLM.from_pretrained("runs/mine-merged")
    ids = torch.tensor([[5, 70, 256, 9, 33]])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        assert (ours(ids) - expected).abs().max() < 1e-4 and (merged(input_ids=ids).logits - expected).abs().max() < 1e-4
        with theirs.disable_adapter():
            assert (theirs(input_ids=ids).logits - expected).abs().max() > 1e-2
