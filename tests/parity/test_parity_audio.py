"""A question about a sound as ids, against transformers' Qwen2_5OmniProcessor. Needs the extra `parity`."""

import pytest
import tiny_omni
import torch
from transformers import AutoTokenizer, WhisperFeatureExtractor
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor

from nano_adrpo.files.wav import read_wav, write_wav
from nano_adrpo.language.audio import TEMPLATE, AudioCodec
from nano_adrpo.models.omni import Omni


class Processor(Qwen2_5OmniProcessor):
    """Of text and audio alone: no processor of images is needed."""

    def check_argument_for_proper_class(self, name, value):
        pass


@pytest.mark.parametrize("system", [None, "You are a speech recognition model."])
def test_prompts_are_the_processors(tmp_path, system):
    folder = tiny_omni.folder(tmp_path / "omni")
    tokenizer, features = AutoTokenizer.from_pretrained(folder), WhisperFeatureExtractor.from_pretrained(folder)
    processor = Processor(None, None, features, tokenizer, chat_template=tiny_omni.TEMPLATE)
    questions, talks = ["What is it?", "Which of ['a', \"b's\"]?\n\nSay <answer>", "Who?"], []
    for seed, question in enumerate(questions):
        write_wav(tmp_path / f"{seed}.wav", tiny_omni.clip((0.5, 0.0201, 2.37)[seed], seed))
        parts = [{"type": "audio", "audio": "…"}, {"type": "text", "text": question}]
        talks.append([{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": parts}])
    texts = [processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False) for talk in talks]
    sounds = [read_wav(tmp_path / f"{seed}.wav").numpy() for seed in range(3)]
    expected = processor(text=texts, audio=sounds, padding=True, padding_side="left", return_tensors="pt")
    prompts = [(question, str(tmp_path / f"{seed}.wav")) for seed, question in enumerate(questions)]
    (tmp_path / "published.jinja").write_text(TEMPLATE)
    for template in (None, tmp_path / "published.jinja"):
        ids, mask = AudioCodec(Omni.from_pretrained(folder), system, template).encode(prompts, 500)
        assert torch.equal(mask, expected["attention_mask"]) and torch.equal(ids * mask, expected["input_ids"] * mask)
