"""Rewards of text by name, files of problems."""

import re
from fractions import Fraction

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from nano_adrpo.models.decoder import Config, RewardModel
from nano_adrpo.rewards import text
from nano_adrpo.rewards.text import Problem, read_problems

PROBLEMS = [Problem("17+48=", Fraction(65))] * 5
COMPLETIONS = ["#### 1", "#### 65", "it is 65", "no number", "so 1"]
RIGHT, STATED = [0, 1, 1, 0, 0], [1, 1, 0, 0, 0]


def scores(*specs):
    return {name: numbers.tolist() for name, numbers in text.parse(specs)(COMPLETIONS, PROBLEMS).items()}


def test_names_and_weights():
    assert scores("exact") == {"reward": RIGHT} and scores("format@2") == {"reward": [2, 2, 0, 0, 0]}
    assert scores("exact@2", "format@-0.5") == {"reward": [-0.5, 1.5, 2, 0, 0], "exact": RIGHT, "format": STATED}
    with pytest.raises(
        ValueError, match="expected one of exact, format, reward_model:FOLDER, FILE.py:FUNCTION, a reward_model"
    ):
        scores("deceptive")


def test_a_users_function_sees_prompts_and_completions(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def f(prompts, completions):\n    return [p + c == '17+48=so 1' for p, c in zip(prompts, completions)]\n"
    )
    assert scores(f"{tmp_path / 'mine.py'}:f") == {"reward": [0, 0, 0, 0, 1]}


TOKENS = ["<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>", "user", "model", "\n", *"0123456789+=# it so number"]
TOKENS = list(dict.fromkeys(TOKENS))


def reward_folder(path, **files):
    """A tiny RewardModel of random weights whose tokens are Gemma's marks and characters."""
    model = RewardModel(Config("gemma", len(TOKENS), 16, 24, 2, 2, 64))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<[^>]*>|user|model|."), "isolated")
    model.files = {"tokenizer.json": tokenizer.to_str().encode(), **files}
    model.save_pretrained(path)
    return path


def expected(folder, *rows):
    """The model's numbers for rows of tokens, one row at a time."""
    model = RewardModel.from_pretrained(folder)
    return [pytest.approx(model(torch.tensor([[TOKENS.index(token) for token in row]])).item(), abs=1e-4) for row in rows]


def test_a_reward_model_reads_question_and_completion(tmp_path):
    folder = reward_folder(tmp_path / "rm")
    numbers = expected(folder, *("17+48=" + completion for completion in COMPLETIONS))
    assert len({number.expected for number in numbers}) == 5
    for batch in (16, 2):  # shorter ones are padded
        reward = text.parse([f"reward_model:{folder}"], batch=batch)
        assert reward(COMPLETIONS, PROBLEMS)["reward"].tolist() == numbers
    assert text.parse([str(folder)])(COMPLETIONS, PROBLEMS)["reward"].tolist() == numbers


def test_a_reward_model_reads_a_conversation_where_it_has_a_template(tmp_path):
    template = b"{{ '<start_of_turn>' }} System role not supported"  # how Gemma's is told
    folder = reward_folder(tmp_path / "rm", **{"chat_template.jinja": template})
    row = ["<bos>", "<start_of_turn>", "user", "\n", *"17+48=", "<end_of_turn>", "\n"]
    row += ["<start_of_turn>", "model", "\n", *"so 1", "<end_of_turn>", "\n"]
    assert text.parse([str(folder)])(["so 1"], PROBLEMS[:1])["reward"].tolist() == expected(folder, row)


def test_a_reward_model_without_its_tokenizer_is_named(tmp_path):
    folder = reward_folder(tmp_path / "rm")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"--reward {folder}: the model's folder has no tokenizer.json"):
        text.parse([str(folder)])


def test_the_docstrings_example_runs(tmp_path):
    example = re.search(r"mine\.py\n\n((?:    .*\n)+)", text.__doc__)[1]
    (tmp_path / "mine.py").write_text("".join(line[4:] for line in example.splitlines(keepends=True)))
    assert "`--reward exact mine.py:short@0.1`" in text.__doc__
    given = text.parse(["exact", f"{tmp_path / 'mine.py'}:short@0.1"])(["65", "6" * 100], PROBLEMS[:2])
    assert given["exact"].tolist() == [1, 0] and given["short"].tolist() == pytest.approx([-0.02, -1])
    assert given["reward"].tolist() == pytest.approx([1 - 0.002, -0.1])


def test_problems_in_gsm8k_format(tmp_path):
    file = tmp_path / "test.jsonl"
    lines = [
        '{"question": "How many?\\u2028All?", "answer": "2 + 2 = <<2+2=4>>4\\n#### 4"}', "",
        '{"question": "ü?", "answer": "#### -1,080.5", "id": 3}',
    ]  # fmt: skip
    file.write_text("\n".join(lines), encoding="utf-8")
    assert read_problems(file) == [Problem("How many?\u2028All?", Fraction(4)), Problem("ü?", Fraction("-1080.5"))]
    assert [problem.question for problem in read_problems(file, " Think.")] == ["How many?\u2028All? Think.", "ü? Think."]


def test_a_bad_file_of_problems_is_named_with_its_line(tmp_path):
    file = tmp_path / "bad.jsonl"
    for content, message in (
        (b"\n \n", ": no problems; expected a JSON object on every line"),
        (b'{"question": "a", "answer": "#### 1"}\n{"question"', ", line 2: not valid JSON"),
        (b'{"question": "\xff", "answer": "#### 1"}', ": not a text file in UTF-8"),
        (b'{"question": "\\ud83d", "answer": "#### 1"}', ", line 1: not valid JSON"),
        (b"[1]", ", line 1: expected a JSON object"),
        (b'{"question": "", "answer": "#### 1"}', ", line 1: expected an object with a text under 'question'"),
        (b'\n{"question": "a", "answer": 4}', ", line 2: expected an object with a text under 'answer'"),
        (b'{"question": "a", "answer": "4"}', ", line 1: 'answer' has no number after '####'"),
        (b'{"question": "a", "answer": "#### four"}', ", line 1: 'answer' has no number after '####'"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file}{message}"):
            read_problems(file)
    with pytest.raises(FileNotFoundError, match="absent.jsonl: no such file"):
        read_problems(tmp_path / "absent.jsonl")
