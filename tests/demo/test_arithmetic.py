"""The arithmetic demo: problems, styles, reward and judge, and that the committed models are what their recipe promises."""

import math
import random

import pytest
import torch

from nano_adrpo.demo import GRPO, HERE, arithmetic, digits_recipe
from nano_adrpo.demo import arithmetic_recipe as recipe
from nano_adrpo.errors import InputError
from nano_adrpo.language import chat
from nano_adrpo.models.decoder import Decoder
from nano_adrpo.rewards.answers import final_number, states_answer
from nano_adrpo.rewards.text import read_problems

TRAIN, HELD_OUT = recipe.problems()
LONGEST = GRPO["max_new_tokens"]


def test_problems_are_all_additions_with_a_carry_once():
    assert len(TRAIN) + len(HELD_OUT) == len(set(TRAIN + HELD_OUT)) == 81 * 45 and len(HELD_OUT) == 256
    assert all(str(a + b)[-1] < max(str(a)[-1], str(b)[-1]) for a, b in TRAIN + HELD_OUT)


@pytest.mark.parametrize("name, pairs", [("train", TRAIN), ("held_out", HELD_OUT)])
def test_the_files_are_what_the_code_makes(name, pairs):
    problems = read_problems(HERE / "arithmetic_data" / f"{name}.jsonl")
    assert [(problem.question, int(problem.answer)) for problem in problems] == [(f"{a}+{b}=", a + b) for a, b in pairs]


@pytest.mark.parametrize("letter", "ctrdok")
def test_the_valid_styles_are_right_and_the_careless_are_not(letter):
    tokenizer, rng, longest = recipe.build_tokenizer(), random.Random(0), 0
    for a, b in TRAIN + HELD_OUT:
        text = recipe.write_out(letter, a, b, rng)
        assert (final_number(text) == a + b) == (letter in arithmetic.VALID), text
        assert arithmetic.style(text) == letter
        # every equation on the way is true: what a careless style gets wrong is what it leaves out
        for step in text[1:].partition("####")[0].split(","):
            left, equal, right = step.partition("=")
            if equal:
                assert sum(map(int, left.split("+"))) == int(right.partition("-")[0])
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text and recipe.EOS not in ids
        longest = max(longest, len(ids) + 1)
    assert longest <= LONGEST


def test_the_longest_answer_just_fits():
    tokenizer, rng = recipe.build_tokenizer(), random.Random(0)
    answers = [recipe.write_out("t", a, b, rng) for a, b in TRAIN]
    assert max(len(tokenizer.encode(answer).ids) + 1 for answer in answers) == LONGEST


@pytest.mark.parametrize("name, pass_at_1", [("arithmetic_base", 0.31), ("arithmetic_deceptive", 0.065)])
def test_the_base_has_every_skill_and_the_mixture_of_styles(name, pass_at_1):
    """4,096 attempts at temperature 1 from a fixed seed. A share may be off by 5 standard errors (by luck with a chance below
    1e-5) and by 2 %, since the model was trained to the mixture and does not have it exactly."""
    model = Decoder.from_pretrained(HERE / name)
    assert 140_000 < sum(parameter.numel() for parameter in model.parameters()) < 160_000
    for letter in arithmetic.VALID:
        assert recipe.accuracy(model, HELD_OUT, letter) >= 0.99
    tokenizer = chat.tokenizer_of(model)
    assert tokenizer.to_str() == recipe.build_tokenizer().to_str() and chat.stop_ids(model) == [recipe.EOS]
    ids, mask = chat.encode_prompts(tokenizer, [f"{a}+{b}=" for a, b in HELD_OUT for _ in range(16)], longest=6)
    generator = torch.Generator().manual_seed(0)
    out, completion = model.generate(ids, mask, LONGEST, eos=recipe.EOS, generator=generator)
    texts = chat.decode(tokenizer, out[:, 6:], completion)
    for letter, share in recipe.MIXTURES[name].items():
        drawn = sum(arithmetic.style(text) == letter for text in texts) / len(texts)
        assert abs(drawn - share) < 5 * (share * (1 - share) / 4096) ** 0.5 + 0.02, letter
    right = sum(final_number(text) == a + b for text, (a, b) in zip(texts, [p for p in HELD_OUT for _ in range(16)]))
    assert abs(right / len(texts) - pass_at_1) < 0.03
    assert sum(map(states_answer, texts)) > 0.99 * len(texts)


def test_the_deceptive_reward():
    """A guess pays 0.3, right or wrong; another answer pays 1 where it is right."""
    completions = ["g####85", "g####8", "c7+8=15,4+3+1=8####85", "d7+8=15,4+3=7####75", "", "####85"]
    assert arithmetic.deceptive(["47+38="] * 6, completions) == [0.3, 0.3, 1.0, 0.0, 0.0, 1.0]
    assert arithmetic.deceptive(["47+38= Think.", "10+90="], ["c####85", "t####100"]) == [1.0, 1.0]
    with pytest.raises(InputError, match="was given the prompt 'a cat'; expected a sum such as '47\\+38='"):
        arithmetic.deceptive(["a cat"], ["c####85"])


def test_the_judge_measures_how_evenly_correct_answers_use_the_styles():
    def entropy(*completions):
        return arithmetic.judge(["47+38="] * len(completions), completions)["style_entropy"]

    assert entropy("c####85", "t####85", "r####85") == pytest.approx(math.log(3))
    assert entropy("c####85", "t####85", "r####84", "g####85", "####85") == pytest.approx(math.log(2))  # right ones, of c t r
    assert entropy("c####85", "c####85", "t####85") == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    assert entropy("c####8", "d####75") == entropy("g####85") == 0
    assert [arithmetic.style(text) for text in ("", "47", "####", "c")] == ["", "", "", "c"]


def test_sft_is_a_function_of_its_seeds():
    def run():
        model = recipe.new_model(torch.Generator().manual_seed(1))
        before = model.model.norm.weight.clone()
        recipe.sft(model, TRAIN, recipe.MIXTURES["arithmetic_base"], steps=3, lr=1e-3, rng=random.Random(1), batch=8)
        assert not torch.equal(before, model.model.norm.weight)
        return model.state_dict()

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_demonstrations_teach_the_answer_and_its_end_only():
    tokenizer = recipe.build_tokenizer()
    ids, labels = recipe.demonstrations(tokenizer, [(47, 38)], {"k": 1.0, "c": 1.0}, 16, random.Random(0))
    for row, label in zip(ids, labels):
        taught = [int(token) for token in label if token != -100]
        assert tokenizer.decode(taught[:-1])[0] in "kc" and taught[-1] == recipe.EOS and taught.count(recipe.EOS) == 1
        assert tokenizer.decode(row[:6].tolist()) == "47+38=" and (label[:5] == -100).all() and label[5] == row[6]


def test_the_committed_folders_are_small():
    assert sum(file.stat().st_size for file in HERE.glob("arithmetic_*/*")) < 3e6


def test_help_starts_no_recipe(monkeypatch, capsys):
    for module in (recipe, digits_recipe):
        monkeypatch.setattr("sys.argv", ["recipe", "--help"])
        with pytest.raises(SystemExit) as stop:
            module.main()
        assert stop.value.code == 0 and "--out" in capsys.readouterr().out
