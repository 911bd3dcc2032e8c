"""A real model and a real vocabulary: SmolLM2-135M-Instruct as examples/smollm2.py writes it against transformers, and CLIP's
tokenizer against transformers and open_clip. Needs the extras `parity` and `real`; run with -m real."""

import gzip
import importlib.util
import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from nano_adrpo.language import chat
from nano_adrpo.models.decoder import Decoder
from nano_adrpo.models.tokenizers import PromptTokenizer

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "smollm2.py"
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
TEXTS = [line for page in PAGES for line in page.read_text("utf-8").splitlines() if line.strip()]  # tables, formulas, Greek
TEXTS += ["It's 12,345 – don't DON'T", "cafe\u0301 naïve 漢字 🙂👍🏽 \u0130", " a\t\tb\r\nc\u00a0d\u3000e ", "x²+½ <|im_end|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "smollm2"
    runpy.run_path(SCRIPT)["main"](["--out", str(out)])
    return out


def test_smollm2_is_transformers_smollm2(folder):
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    ours = Decoder.from_pretrained(folder)
    codec, tokenizer = chat.TextCodec(ours), AutoTokenizer.from_pretrained(folder, padding_side="left")
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert codec.tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert codec.tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
    questions = ["What is the capital of France?", "Which colour has a clear sky at noon? Answer with one word."]
    talks = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        talks, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    assert [chat.render(folder, talk) for talk in talks] == tokenizer.apply_chat_template(
        talks, add_generation_prompt=True, tokenize=False
    )
    ids, mask = codec.encode(questions, longest=64)
    assert torch.equal(mask, inputs["attention_mask"]) and torch.equal(ids * mask, inputs["input_ids"] * mask)
    with torch.no_grad():
        expected, found = theirs(**inputs).logits, ours(ids, mask)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-4, rtol=0)
        written = theirs.generate(**inputs, max_new_tokens=16, do_sample=False)[:, ids.shape[1] :]
        completions, kept = ours.generate(ids, mask, 16, temperature=0, eos=codec.eos)
    texts = codec.decode(completions[:, ids.shape[1] :], kept)
    assert texts == tokenizer.batch_decode(written, skip_special_tokens=True)
    assert "Paris" in texts[0] and "blue" in texts[1].lower()  # it is the real model


@pytest.fixture(scope="module")
def vocabulary():
    found = importlib.util.find_spec("open_clip")
    assert found, "the package open-clip-torch is not installed; expected it to be, as in the extra real"
    return Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture
def clip_folder(vocabulary, tmp_path):
    """CLIP's tokenizer as bigG's folder has it: vocab.json, merges.txt, and the pad token "!", whose id is 0."""
    merges = gzip.decompress(vocabulary.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]  # 49408 tokens in all
    letters = list(bytes_to_unicode().values())
    ends = "<|startoftext|>", "<|endoftext|>"
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges), *ends]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "!"}
    config |= {"bos_token": ends[0], "eos_token": ends[1], "unk_token": ends[1]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.filterwarnings("ignore:the prompt")  # a longer one is cut
def test_clips_tokenizer_on_the_real_vocabulary_is_transformers(clip_folder):
    ours, theirs = PromptTokenizer(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")["input_ids"]
    assert torch.equal(ours(TEXTS, 77), expected)
    assert ours(["a photo of a cat"], 8).tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407, 0]]  # as published


@pytest.mark.filterwarnings("ignore:the prompt")
def test_clips_tokenizer_on_the_real_vocabulary_is_open_clips(clip_folder, vocabulary):
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", vocabulary.parent / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)  # the file alone: the package would import torchvision and timm
    spec.loader.exec_module(module)
    texts = [text for text in TEXTS if text.isascii()]  # theirs repairs broken letters first
    assert len(texts) > 100 and torch.equal(PromptTokenizer(clip_folder)(texts, 77), module.SimpleTokenizer()(texts))
