"""MMAU's rule, files and numbers; the paper's Tables 2 and 3 as counts."""

import itertools
import json
import math
import random
import re

import pytest

from nano_adrpo.errors import InputError
from nano_adrpo.evaluation import mmau, mmau_tables

# ---------------------------------------------------------------------------------------------------------------- the rule

MAN = ["Man", "Woman", "Child", "Robot"]
NOISE = ["Thunder", "Birds chirping", "White noise", "Wind blowing"]
DOG = ["A dog barking", "A cat meowing", "Silence"]
SECONDS = ["1.63 seconds", "2.74 seconds", "1.53 seconds"]
RAIN = ["Rain", "Heavy rain", "Snow"]
COUNT = ["one", "two", "three", "four"]
ORDER = ["first: neutral, second: frustration", "first: frustration, second: neutral", "both: neutral"]

# (answer, choices, what is right, what is wrong): verdicts of the benchmark's own evaluation.py.
VERDICTS = [
    ("Man", MAN, ["The speaker is a man.", "MAN", "man man"], ["It is a man, not a woman.", "Men", "A", "", " . "]),
    ("White noise", NOISE, ["noise that is white", "White-noise"], ["whitenoise", "White_noise", "White noise, thunder"]),
    ("A dog barking", DOG, ["Barking: a dog!"], ["dog barking"]),
    ("Yes", ["Yes", "No"], ["yes."], ["Yes, no doubt"]),
    ("F#", ["F", "F#", "G"], ["F", "F#"], ["G", "F or G"]),
    ("F", ["F", "F#", "G"], ["F#"], []),
    ("1.63 seconds", SECONDS, ["63 point 1 seconds"], ["1.53 seconds", "1.63"]),
    ("Heavy rain", RAIN, ["Rain, heavy at times"], ["Rain"]),
    ("Rain", RAIN, ["Rain"], ["Heavy rain"]),
    ("Two", ["One", "Two", "Three"], [], ["2"]),
    ("C minor", ["C major", "C minor"], ["c MINOR"], ["C Minor (not major)"]),
    ("Café", ["Café", "Bar"], ["CAFÉ"], ["cafe"]),
    ("don't know", ["don't know", "yes"], ["don t know"], ["dont know"]),
    (ORDER[0], ORDER, [ORDER[1]], [ORDER[2]]),  # the wrong choice has the right words
    ("three", COUNT, ["it says three"], ["option four words: three"]),
    ("Happy", ["Happy", "Sad"], ["<answer>Happy</answer>"], ["<answer>Sad</answer>"]),
    ("fourteen", ["four", "nine", "fourteen", "fourteen"], ["fourteen"], ["four"]),
    ("#", ["#", "♭"], ["x"], ["", "♭"]),  # an answer without a word: any word does
]


def test_the_verdicts_of_the_official_rule():
    for answer, choices, right, wrong in VERDICTS:
        for prediction in right + wrong:
            assert mmau.is_correct(prediction, answer, choices) is (prediction in right), (prediction, answer)


def by_definition(prediction, answer, choices):
    """The rule in its own words: all words of the answer, and none that a differing choice has and the answer has not."""
    tokens = [[*re.findall(r"\b\w+\b", text.lower())] for text in (prediction, answer, *choices)]
    said, right, others = tokens[0], tokens[1], tokens[2:]
    if len(said) == 0:
        return False
    forbidden = [word for other in others if sorted(set(other)) != sorted(set(right)) for word in other if word not in right]
    return all(word in said for word in right) and not any(word in said for word in forbidden)


def test_the_rule_on_all_small_and_many_random_texts():
    texts = [" ".join(some) for n in range(3) for some in itertools.product("ab_", repeat=n)]
    cases = [(p, a, [a, b]) for p in texts for a in texts for b in texts]
    draw, alphabet = (
        random.Random(0),
        ["a", "the", "Man", "man's", "wo-man", "C#", "C", "1.5", "É", "x_y", ",", "not", "answer"],
    )
    for _ in range(5000):
        choices = [" ".join(draw.choices(alphabet, k=draw.randint(0, 4))) for _ in range(draw.randint(1, 5))]
        some = draw.choice(choices) if draw.random() < 0.5 else ""
        cases.append((" ".join([some, *draw.choices(alphabet, k=draw.randint(0, 3))]), draw.choice(choices), choices))
    found = [mmau.is_correct(*case) for case in cases]
    assert found == [by_definition(*case) for case in cases] and 1000 < sum(found) < len(found) - 1000


def test_the_answer_in_a_completion():
    for completion, answer in (
        ("<answer> Man </answer>", "Man"),
        (" Man\n", "Man"),
        ("<think>It is low.</think>\n<answer>Man</answer>", "Man"),
        ("<answer>Man</answer><answer>Woman</answer>", "Man"),  # the first
        ("<think>maybe <answer>Woman</answer>?</think><answer>Man</answer>", "Woman"),  # a thought is text, as in the scripts
        ("<think>so <answer>Man</answer> it", "Man"),
        ("<think>Man", "<think>Man"),
        ("<answer>\nMan</answer>", "<answer>\nMan</answer>"),  # not across lines
        ("<answer>Man", "<answer>Man"),
        ("<answer></answer>", ""),
        ("", ""),
    ):
        assert mmau.answer_of(completion) == answer, completion


# ---------------------------------------------------------------------------------------------------------------- the files

ROW = {
    "id": "q1", "audio_id": "./test-mini-audios/q1.wav", "question": "Who speaks?", "choices": MAN, "answer": "Man",
    "dataset": "AudioSet", "task": "sound", "split": "test-mini", "category": ["Reasoning"], "sub-category": "Source",
    "difficulty": "easy",
}  # fmt: skip


def without(key):
    return {name: value for name, value in ROW.items() if name != key}


def written(tmp_path, value, name="questions.json"):
    text = value if isinstance(value, str) else json.dumps(value)
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def test_questions_are_read_with_all_their_dirt(tmp_path):
    dirty = ROW | {
        "id": "q2",
        "choices": ["four", "nine", " fourteen", " fourteen"],
        "answer": " fourteen",
        "difficulty": "hard",
    }
    rows = [ROW, dirty, ROW | {"id": "é", "task": "music", "answer": "Child"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for file in (written(tmp_path, rows), written(tmp_path, lines, "questions.jsonl")):
        questions, lettered = mmau.read_questions(file)
        assert [question.row for question in questions] == rows and lettered == 0
    assert questions[1].answer == " fourteen" and questions[2].id == "é"
    assert mmau.groups(questions, "difficulty") == {"easy": [0, 2], "hard": [1]}
    assert mmau.audio_file(questions[0], tmp_path) == tmp_path / "test-mini-audios" / "q1.wav"


def test_letters_before_choices_are_removed(tmp_path):
    lettered = ROW | {"choices": [f"({letter}) {choice}" for letter, choice in zip("ABCD", MAN)], "answer": "(A) Man"}
    parquet = {
        "context": None, "instruction": "Who speaks?", "choices": lettered["choices"], "answer": "(A) Man",
        "other_attributes": json.dumps({key: ROW[key] for key in ("id", "task", "dataset", "sub-category", "difficulty")}),
    }  # fmt: skip
    for row in (lettered, lettered | {"answer": "Man"}, parquet):
        (question,), count = mmau.read_questions(written(tmp_path, [row]))
        assert (question.question, question.choices, question.answer, count) == ("Who speaks?", MAN, "Man", 1)
        assert question.row["choices"] == MAN and question.kind("sub-category") == "Source"
        assert mmau.audio_file(question, "x").as_posix() == "x/test-mini-audios/q1.wav"
    bare = ROW | {"choices": ["(A) Man", "Woman"], "answer": "(A) Man"}  # not a list of letters
    assert mmau.read_questions(written(tmp_path, [bare]))[0][0].choices == bare["choices"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no questions"),
        ('[{"id": "q1",\n "question" "x"}]', "not valid JSON .*line 2"),
        ('{"id": "q1"}\n{"id": ', "line 2: not valid JSON"),
        ([3], "row 1: expected a JSON object, got 3"),
        ([without("id")], "row 1: key 'id': expected a text"),
        ([ROW, ROW], "row 2: the id 'q1' stands there twice"),
        *(([without(key)], f"question 'q1' has no key '{key}'") for key in ("question", "choices", "answer", "task")),
        *(([ROW, without(key) | {"id": "q2"}], f"question 'q2' has no key '{key}'") for key in mmau.KINDS),
        ([ROW | {"answer": "A\nghost"}], r"question 'q1', key 'answer': 'A\\nghost' is none of the choices"),
        ([ROW | {"answer": 1}], "question 'q1', key 'answer': 1 is none of"),
        ([ROW | {"choices": ["Man"]}], "question 'q1', key 'choices': expected a list of two or more texts"),
        ([ROW | {"choices": ["Man", 2]}], "question 'q1', key 'choices'"),
        ([ROW | {"question": " "}], "question 'q1', key 'question': expected a text"),
        ([ROW | {"task": None}], "question 'q1', key 'task': expected a text, got None"),
        ([{"other_attributes": "[]"}], "other_attributes': expected a JSON object"),
    ],
)
def test_bad_questions_are_refused_in_one_line(tmp_path, content, message):
    file = written(tmp_path, content)
    with pytest.raises(InputError, match=message) as refusal:
        mmau.read_questions(file)
    assert str(refusal.value).startswith(str(file)) and "\n" not in str(refusal.value)


def test_predictions_of_any_system(tmp_path):
    questions = mmau.read_questions(written(tmp_path, [ROW | {"id": f"q{i}"} for i in range(5)]))[0]
    rows = [{"id": "q3", "model_output": "Man"}, {"id": "q0", "model_prediction": ""}, {"id": "q1", "model_output": None}]
    rows.append(ROW | {"id": "q4", "model_output": "<answer>Woman</answer>", "answer": "Woman"})  # of another version
    lines = "\n".join(map(json.dumps, rows))
    for file in (written(tmp_path, rows, "a.json"), written(tmp_path, lines, "a.jsonl")):
        said, others = mmau.read_predictions(file, questions)
        assert said == ["", None, None, "Man", "<answer>Woman</answer>"] and others == 1
    assert mmau.verdicts(questions, said) == [False, False, False, True, False]
    official = mmau.with_predictions(questions, said)
    assert [row.get("model_output") for row in official] == ["", None, None, "Man", "Woman"]
    assert official[1] == questions[1].row and official[3] == {**questions[3].row, "model_output": "Man"}
    for content, message in (
        ([{"id": "q9", "model_output": "x"}], "'q9' is the id of no question"),
        ([{"id": "q1", "model_output": 3}], "question 'q1': expected a text under 'model_output', got 3"),
        ([{"model_output": "x"}], "row 1: key 'id'"),
        ([rows[0], rows[0]], "row 2: the id 'q3' stands there twice"),
        ([ROW], "no predictions; expected a text under"),
        ("[{]", "not valid JSON .*line 1"),
    ):
        with pytest.raises(InputError, match=message):
            mmau.read_predictions(written(tmp_path, content, "b.json"), questions)


# -------------------------------------------------------------------------------------------------------------- the numbers


def test_the_interval_is_where_the_normal_test_does_not_reject():
    """Wilson's interval has the shares p with |correct/total − p| ≤ 1.96·√(p(1 − p)/total)."""
    for correct, total in ((0, 7), (1, 7), (7, 7), (760, 1000), (166, 333)):
        low, high = mmau.interval(correct, total)
        inside = [p / 10**5 for p in range(10**5 + 1)
                  if abs(correct / total - p / 10**5) <= 1.959964 * (p / 10**5 * (1 - p / 10**5) / total) ** 0.5]  # fmt: skip
        assert (low, high) == pytest.approx((inside[0], inside[-1]), abs=1e-4)


def test_the_paired_difference_counts_what_differs():
    """With b questions that only A answers and c that only B does, the variance is (b + c) / n², as in McNemar's test where the
    two are equal, less (b − c)² / n³, times n / (n − 1)."""
    b, c, both, n = 30, 12, 700, 1000
    first = [1] * both + [1] * b + [0] * (n - both - b)
    second = [1] * both + [0] * b + [1] * c + [0] * (n - both - b - c)
    mean, error = mmau.paired_difference(first, second)
    assert mean == pytest.approx((b - c) / n)
    assert error == pytest.approx(math.sqrt(((b + c) / n**2 - (b - c) ** 2 / n**3) * n / (n - 1)))
    assert error < mmau.unpaired_error(both + b, both + c, n) / 2


def test_the_paper_in_counts():
    percent = {
        "Qwen2.5-Omni base": (72.37, 64.37, 69.07, 68.6), "GRPO": (77.18, 70.66, 74.77, 74.2),
        "Gemini 2.5 Pro": (75.08, 68.26, 71.47, 71.6), "GPT-4o Audio": (64.56, 56.29, 66.67, 62.5),
        "ADRPO": (81.98, 70.06, 75.98, 76.0),
    }  # fmt: skip
    clips = [(82.58, 71.26, 74.47, 76.1), percent["ADRPO"], (84.08, 69.46, 73.57, 75.7), percent["GRPO"]]
    sizes = mmau_tables.PAPERS_QUESTIONS.values()
    assert [*sizes] == [333, 334, 333] and mmau_tables.TABLE_2.keys() == percent.keys()
    for counts, row in [*zip(mmau_tables.TABLE_2.values(), percent.values()), *zip(mmau_tables.TABLE_3.values(), clips)]:
        rounded = [round(100 * count / size, 2) for count, size in zip(counts, sizes)]
        assert (*rounded, sum(counts) / 10) == row
    words = mmau_tables.papers_differences()
    assert "ADRPO − GRPO is 760 − 742 of 1,000 questions, +0.9 standard errors" in words
    assert "0.5×β0 − 1×β0 is 761 − 760 of 1,000 questions, +0.1" in words and "757 − 760 of 1,000 questions, -0.2" in words
