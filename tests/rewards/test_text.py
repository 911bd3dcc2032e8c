"""Rewards of text by name, files of problems."""

import re
from fractions import Fraction

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from nano_adrpo.errors import InputError
from nano_adrpo.models.decoder import Config, RewardModel
from nano_adrpo.rewards import expressions, text
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
        ValueError,
        match="one of exact, format, math, choice, answer_format, reward_model:FOLDER, FILE.py:FUNCTION, a reward_model",
    ):
        scores("deceptive")


def test_a_users_function_sees_prompts_completions_and_rows(tmp_path):
    row = {"question": "17+48=", "answer": "so\n#### 65", "level": {"hard": 3}}
    problem = Problem("17+48= Think.", Fraction(65), row, few_shot="1+1= 2\n")
    check = "[p == '17+48= Think.' and c == 'so 1'{} for p, c in zip(p, c)]"
    for signature, rows in (
        ("p, c", ""), ("p, c, weight=1", " and weight == 1"), ("p, c, *more", " and not more"),
        ("p, c, **more", " and not more"),
        ("p, c, rows", f" and rows == [{row}] * 2"), ("p, c, rows=None", f" and rows == [{row}] * 2"),
        ("p, c, weight=1, *, rows", f" and rows == [{row}] * 2"), ("p, c, lines", f" and lines == [{row}] * 2"),
    ):  # fmt: skip
        (tmp_path / "mine.py").write_text(f"def f({signature}):\n    return {check.format(rows)}\n")
        reward = text.parse([f"{tmp_path / 'mine.py'}:f"])
        assert reward(["so 1", "so 2"], [problem] * 2)["reward"].tolist() == [1, 0], signature


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


# As Gemma's, but it takes a system message, as a user's.
TEMPLATE = b"""{{ bos_token }}{% for m in messages %}
<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}{{ '\\n' + m.content + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}=={% endif %}{% if enable_thinking %}it{% endif %}"""


def test_a_reward_model_reads_a_conversation_where_it_has_a_template(tmp_path):
    names = {"chat_template.jinja": TEMPLATE, "tokenizer_config.json": b'{"bos_token": "<bos>"}'}
    folder = reward_folder(tmp_path / "rm", **names)

    def turn(role, words):
        return ["<start_of_turn>", role, "\n", *words, "<end_of_turn>", "\n"]

    row, answer = ["<bos>", *turn("user", "17+48=")], turn("model", "so 1")
    assert text.parse([str(folder)])(["so 1"], PROBLEMS[:1])["reward"].tolist() == expected(folder, row + answer)
    told = text.parse([str(folder)], system="so", thinking="on")(["so 1"], PROBLEMS[:1])
    assert told["reward"].tolist() == expected(folder, ["<bos>", *turn("user", "so"), *row[1:], *answer, *"it"])


def test_a_reward_models_template_that_takes_no_system_message_says_so_at_once(tmp_path):
    refuses = b"{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    folder = reward_folder(tmp_path / "rm", **{"chat_template.jinja": refuses})
    with pytest.raises(ValueError, match=f"--reward {folder}: chat_template.jinja: .* 'TemplateError: No system role'"):
        text.parse([str(folder)], system="so")


def test_a_reward_model_without_its_tokenizer_is_named(tmp_path):
    folder = reward_folder(tmp_path / "rm")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"--reward {folder}: the model's folder has no tokenizer.json"):
        text.parse([str(folder)])


def test_the_docstrings_example_runs(tmp_path):
    example = re.search(r"mine\.py\n\n((?:    .*\n)+)", text.__doc__)[1]
    (tmp_path / "mine.py").write_text("".join(line[4:] for line in example.splitlines(keepends=True)))
    assert "`--reward exact mine.py:short@0.1`" in text.__doc__
    problems = [Problem("17+48=", Fraction(65), {"characters": 100})] * 2
    given = text.parse(["exact", f"{tmp_path / 'mine.py'}:short@0.1"])(["65", "6" * 100], problems)
    assert given["exact"].tolist() == [1, 0] and given["short"].tolist() == pytest.approx([-0.02, -1])
    assert given["reward"].tolist() == pytest.approx([1 - 0.002, -0.1])


def test_problems_in_gsm8k_format(tmp_path):
    file = tmp_path / "test.jsonl"
    lines = [
        '{"question": "How many?\\u2028All?", "answer": "2 + 2 = <<2+2=4>>4\\n#### 4"}', "",
        '{"question": "ü?", "answer": "#### -1,080.5", "id": 3}',
    ]  # fmt: skip
    file.write_text("\n".join(lines), encoding="utf-8")
    problems = read_problems(file)
    assert [problem.question for problem in problems] == ["How many?\u2028All?", "ü?"]
    assert [problem.answer for problem in problems] == [4, Fraction("-1080.5")]
    assert problems[1].row == {"question": "ü?", "answer": "#### -1,080.5", "id": 3}
    assert [problem.question for problem in read_problems(file, " Think.")] == ["How many?\u2028All? Think.", "ü? Think."]
    (problem, _), rows = read_problems(file, " Think.", few_shot="Q: 1?\nA: 1\n\nQ: "), [problem.row for problem in problems]
    assert (problem.prompt, problem.question) == ("Q: 1?\nA: 1\n\nQ: How many?\u2028All? Think.", "How many?\u2028All? Think.")
    assert problem.row == rows[0]


def test_problems_need_no_number_and_no_answer(tmp_path):
    def answers(lines, name="test.jsonl", **options):
        (tmp_path / name).write_text(lines, encoding="utf-8")
        problems = read_problems(tmp_path / name, **options)
        return [(problem.question, problem.answer) for problem in problems], [problem.row for problem in problems]

    for given, expected in (
        ("0", 0), ("42", 42), ("0.3", Fraction(3, 10)), ('"42"', 42), ('"1,000 dollars"', 1000),
        ('"Mars"', "Mars"), ('"x > 5"', "x > 5"),
        ('"#### Mars"', "Mars"), (r'"so $\\boxed{\\frac12}$"', Fraction(1, 2)), (r'"\\boxed{x/2}"', "x/2"), ("true", "True"),
        ("null", None), ('""', None), ('"#### "', None), ('["a"]', None), ('{"a": 1}', None),
    ):  # fmt: skip
        (pair,), (row,) = answers(f'{{"prompt": "a", "answer": {given}}}\n')
        assert pair == ("a", expected) and row["prompt"] == "a" and type(pair[1]) in (Fraction, str, type(None))
    assert answers('{"prompt": "a"}\n{"question": "b", "prompt": "c"}\n')[0] == [("a", None), ("b", None)]
    pairs, rows = answers("What is 2+2?\r\n\n  # Why?\u2028Now? \n", "lines.txt")
    assert pairs == [("What is 2+2?", None), ("# Why?\u2028Now?", None)] and rows[0] == {"prompt": "What is 2+2?"}
    assert answers('\n{"prompt": "a", "answer": 1}\n', "JSON.TXT")[0] == [("a", 1)]  # never JSON as text


def test_a_bad_file_of_problems_is_named_with_its_line(tmp_path):
    file = tmp_path / "bad.jsonl"
    for content, message in (
        (b"\n \n", ": no problems; expected a JSON object on every line"),
        (b'{"question": "a", "answer": "#### 1"}\n{"question"', ", line 2: not valid JSON"),
        (b'{"question": "\xff", "answer": "#### 1"}', ": not a text file in UTF-8"),
        (b'{"question": "\\ud83d", "answer": "#### 1"}', ", line 1: not valid JSON"),
        (b"[1]", ", line 1: expected a JSON object"),
        (b'{"question": "", "answer": "#### 1"}', ", line 1: expected an object with a text under 'question'"),
        (b'{"prompt": ["a"]}', ", line 1: expected an object with a text under 'question' or 'prompt'"),
        (b'\n{"question": "a"}', ", line 2: expected a text or number under 'answer'; the reward exact needs it"),
        (b'{"question": "a", "answer": "#### "}', ", line 1: expected a text or number under 'answer'"),
        (b'{"question": "a", "answer": [4]}', ", line 1: expected a text or number under 'answer'"),
        (b'{"question": "a", "answer": ' + b"4" * 5000 + b"}", ", line 1: not valid JSON"),
        (b"plain lines", ", line 1: not valid JSON"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file}{message}") as error:
            read_problems(file, needed_by="exact")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="absent.jsonl: no such file"):
        read_problems(tmp_path / "absent.jsonl")


def test_rewards_that_need_an_answer_are_known():
    for specs, name in (
        (["format", "exact@2"], "exact"),
        (["math"], "math"),
        (["format", "mine.py:exact", "reward_model:exact"], None),
    ):
        assert text.needs_answers(specs) == name


def test_math_without_its_library_is_one_line(monkeypatch):
    monkeypatch.setattr(expressions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--reward math: the library math-verify is not installed; expected it to"):
        text.parse(["math"])


def test_math_asks_for_what_is_not_equal_already(monkeypatch):
    asked = []
    monkeypatch.setattr(expressions.Expressions, "__init__", lambda self: setattr(self, "process", None))
    monkeypatch.setattr(expressions.Expressions, "equal", lambda self, *pair: asked.append(pair) or len(asked) == 1)
    said = ["#### 0.50", "<think> 1/2", r"#### \sqrt{1/4}", r"<think>x</think>so $2^{-1}$", r"\boxed{y}"]
    given = text.parse(["math"])(said, [Problem("half?", Fraction(1, 2))] * 4 + [Problem("y?", "x/2")])
    right = r"\boxed{1/2}"
    assert asked == [("", right), (r"\boxed{\sqrt{1/4}}", right), ("so $2^{-1}$", right), (r"\boxed{y}", r"\boxed{x/2}")]
    assert given["reward"].tolist() == [1, 1, 0, 0, 0]
