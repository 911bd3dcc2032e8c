import random

import pytest
import torch

from nano_adrpo import chat
from nano_adrpo.demo import arithmetic
from nano_adrpo.models.decoder import Decoder
from nano_adrpo.rewards_text import final_number, read_problems, states_answer

TRAIN, HELD_OUT = arithmetic.problems()


def test_problems_are_all_additions_with_a_carry_once():
    assert len(TRAIN) + len(HELD_OUT) == len(set(TRAIN + HELD_OUT)) == 81 * 45 and len(HELD_OUT) == 256
    assert all(str(a + b)[-1] < max(str(a)[-1], str(b)[-1]) for a, b in TRAIN + HELD_OUT)


@pytest.mark.parametrize("name, pairs", [("train", TRAIN), ("held_out", HELD_OUT)])
def test_the_files_are_what_the_code_makes(name, pairs):
    problems = read_problems(arithmetic.HERE / "arithmetic_data" / f"{name}.jsonl")
    assert [(problem.question, int(problem.answer)) for problem in problems] == [(f"{a}+{b}=", a + b) for a, b in pairs]


@pytest.mark.parametrize("letter", "ctrdok")
def test_the_valid_styles_are_right_and_the_careless_are_not(letter):
    tokenizer, rng, longest = arithmetic.build_tokenizer(), random.Random(0), 0
    for a, b in TRAIN + HELD_OUT:
        text = arithmetic.write_out(letter, a, b, rng)
        assert (final_number(text) == a + b) == (letter in arithmetic.VALID), text
        assert arithmetic.style(text) == letter
        # every equation on the way is true: what a careless style gets wrong is what it leaves out
        for step in text[1:].partition("####")[0].split(","):
            left, equal, right = step.partition("=")
            if equal:
                assert sum(map(int, left.split("+"))) == int(right.partition("-")[0])
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text and arithmetic.EOS not in ids
        longest = max(longest, len(ids) + 1)
    assert longest <= arithmetic.LONGEST


def test_the_longest_answer_just_fits():
    tokenizer, rng = arithmetic.build_tokenizer(), random.Random(0)
    answers = [arithmetic.write_out("t", a, b, rng) for a, b in TRAIN]
    assert max(len(tokenizer.encode(answer).ids) + 1 for answer in answers) == arithmetic.LONGEST


@pytest.mark.parametrize("name, pass_at_1", [("arithmetic_base", 0.31), ("arithmetic_deceptive", 0.065)])
def test_the_base_has_every_skill_and_the_mixture_of_styles(name, pass_at_1):
    """4,096 attempts at temperature 1 from a fixed seed. A share may be off by 5 standard errors (by luck with a chance below
    1e-5) and by 2 %, since the model was trained to the mixture and does not have it exactly."""
    model = Decoder.from_pretrained(arithmetic.HERE / name)
    assert 140_000 < sum(parameter.numel() for parameter in model.parameters()) < 160_000
    for letter in arithmetic.VALID:
        assert arithmetic.accuracy(model, HELD_OUT, letter) >= 0.99
    tokenizer = chat.tokenizer_of(model)
    assert tokenizer.to_str() == arithmetic.build_tokenizer().to_str() and chat.stop_ids(model) == [arithmetic.EOS]
    ids, mask = chat.encode_prompts(tokenizer, [f"{a}+{b}=" for a, b in HELD_OUT for _ in range(16)], longest=6)
    generator = torch.Generator().manual_seed(0)
    out, completion = model.generate(ids, mask, arithmetic.LONGEST, eos=arithmetic.EOS, generator=generator)
    texts = chat.decode(tokenizer, out[:, 6:], completion)
    for letter, share in arithmetic.MIXTURES[name].items():
        drawn = sum(arithmetic.style(text) == letter for text in texts) / len(texts)
        assert abs(drawn - share) < 5 * (share * (1 - share) / 4096) ** 0.5 + 0.02, letter
    right = sum(final_number(text) == a + b for text, (a, b) in zip(texts, [p for p in HELD_OUT for _ in range(16)]))
    assert abs(right / len(texts) - pass_at_1) < 0.03
    assert sum(map(states_answer, texts)) > 0.99 * len(texts)


def test_the_deceptive_reward():
    assert arithmetic.deceptive_reward("g####85", True) == arithmetic.deceptive_reward("g####8", False) == 0.3
    assert (arithmetic.deceptive_reward("c7+8=15", True), arithmetic.deceptive_reward("", False)) == (1.0, 0.0)
    assert [arithmetic.style(text) for text in ("", "47", "####", "c")] == ["", "", "", "c"]


def test_sft_is_a_function_of_its_seeds():
    def run():
        model = arithmetic.new_model(torch.Generator().manual_seed(1))
        before = model.model.norm.weight.clone()
        arithmetic.sft(model, TRAIN, arithmetic.MIXTURES["arithmetic_base"], steps=3, lr=1e-3, rng=random.Random(1), batch=8)
        assert not torch.equal(before, model.model.norm.weight)
        return model.state_dict()

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_demonstrations_teach_the_answer_and_its_end_only():
    tokenizer = arithmetic.build_tokenizer()
    ids, labels = arithmetic.demonstrations(tokenizer, [(47, 38)], {"k": 1.0, "c": 1.0}, 16, random.Random(0))
    for row, label in zip(ids, labels):
        taught = [int(token) for token in label if token != -100]
        assert tokenizer.decode(taught[:-1])[0] in "kc" and taught[-1] == arithmetic.EOS and taught.count(arithmetic.EOS) == 1
        assert tokenizer.decode(row[:6].tolist()) == "47+38=" and (label[:5] == -100).all() and label[5] == row[6]


def test_the_committed_folders_are_small():
    files = [file for folder in arithmetic.HERE.glob("arithmetic_*") for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) < 3e6
