r"""MMAU (Sakshi et al. 2024, arXiv 2410.19168): questions about sounds, the right answer to each among its choices.

    {"id": "…", "audio_id": "./test-mini-audios/….wav", "question": "Who speaks?", "choices": ["Man", "Woman"], "answer": "Man",
     "task": "sound", "difficulty": "easy", "sub-category": "Acoustic Source Inference", …}

The rule is that of the benchmark's own evaluation.py. Scores differ from its scores in one thing: a question without a
prediction counts here, as wrong, and is left out there. Both numbers are reported.
"""

import re
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

from nano_adrpo import files
from nano_adrpo.errors import InputError, shown
from nano_adrpo.metrics import mean_and_standard_error

KINDS = ("task", "difficulty", "sub-category")  # what accuracies are reported by
OUTPUTS = ("model_output", "model_prediction")  # where predictions stand: evaluation.py reads one, its README names the other
Z95 = NormalDist().inv_cdf(0.975)  # of a 95 % interval, 1.96


# ---------------------------------------------------------------------------------------------------------------- the rule


def is_correct(prediction, answer, choices):
    """Whether a prediction names the answer and no other choice, by the official rule: of the words that stand in the choices
    it has the answer's, all of them and no others. Order, case, punctuation and all further words are free.

    A word is a run of letters, digits and underscores. Tags have to be removed before, see `answer_of`.

    >>> choices = ["A man", "A woman", "A robot"]
    >>> is_correct("I hear a MAN speaking.", "A man", choices), is_correct("A man, not a woman", "A man", choices)
    (True, False)
    >>> is_correct("man", "A man", choices)  # "a" is missing
    False
    """
    said, right = words(prediction), words(answer)
    return bool(said) and said & right.union(*map(words, choices)) == right


def words(text):
    """The set of words in a text, in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def answer_of(completion):
    """The answer text in a completion: what the first <answer>…</answer> on one line holds, else all of it, without the spaces
    around. As in the published scripts (R1-AQA, Ke-Omni-R) a thought is text like any other: an answer inside one counts, even
    where the thought never ends.

    >>> answer_of("<think>Low and calm.</think><answer> A man </answer>"), answer_of(" A man. ")
    ('A man', 'A man.')
    """
    match = re.search(r"<answer>(.*?)</answer>", completion)
    return (match[1] if match else completion).strip()


# ---------------------------------------------------------------------------------------------------------------- the files


class Question(NamedTuple):
    id: str
    question: str
    choices: list  # texts; one may stand there twice
    answer: str  # one of the choices
    row: dict  # its JSON object, in the form of MMAU's file

    def kind(self, key):
        """What its row has under a key of KINDS, fit to print; None: the whole file has nothing there."""
        value = self.row.get(key)
        value = value[0] if isinstance(value, list) else value
        return value if value is None else shown(value, 80)


def read_questions(file):
    """-> [Question] of a file in the form of mmau-test-mini.json, a JSON list, or of JSON lines; and of how many "(A) " was
    removed from the choices and the answer, since with it the rule would look for the word "a".

    Rows of the parquet copy, exported as JSON ("instruction", "other_attributes"), are read, too. A key of KINDS is needed in
    all rows or in none, "task" in all. Raises InputError naming file, row and key.
    """
    rows = [(place, published(row, place)) for place, row in read_rows(file)]
    if not rows:
        raise InputError(f"{file}: no questions; expected a JSON list of them")
    needed = ["question", "choices", "answer", *(key for key in KINDS if key == "task" or any(key in row for _, row in rows))]
    questions, lettered = {}, 0
    for place, row in rows:
        name = known_id(row, place, questions)
        for key in needed:
            if key not in row:
                raise InputError(f"{file}: question {name!r} has no key '{key}'")
        where = f"{file}: question {name!r}, key"
        if not isinstance(row["question"], str) or not row["question"].strip():
            raise InputError(f"{where} 'question': expected a text")
        if not is_texts(row["choices"]) or len(row["choices"]) < 2:
            raise InputError(f"{where} 'choices': expected a list of two or more texts, got {brief(row['choices'])}")
        for key in needed[3:]:
            if not is_texts(row[key] if isinstance(row[key], list) and len(row[key]) == 1 else [row[key]]):
                raise InputError(f"{where} '{key}': expected a text, got {brief(row[key])}")
        bare = without_letters(row)
        lettered, row = lettered + (bare is not row), bare
        if not isinstance(row["answer"], str) or row["answer"].strip() not in map(str.strip, row["choices"]):
            raise InputError(f"{where} 'answer': {brief(row['answer'])} is none of the choices {brief(row['choices'])}")
        questions[name] = Question(name, row["question"], row["choices"], row["answer"], row)
    return list(questions.values()), lettered


def read_predictions(file, questions):
    """What a system said to each of the questions, from a JSON list or JSON lines of objects with "id" and "model_output" or
    "model_prediction". -> [text, None where it said nothing], and at how many questions the file states another answer than
    the questions do, as one of an earlier version of MMAU does.

    Raises InputError naming file and row.
    """
    known, said, others = {question.id: question for question in questions}, {}, 0
    for place, row in read_rows(file):
        row = published(row, place)
        name = known_id(row, place, said)
        if name not in known:
            raise InputError(f"{file}: {name!r} is the id of no question; expected predictions for these questions")
        said[name] = next((row[key] for key in OUTPUTS if row.get(key) is not None), None)
        if not isinstance(said[name], str | None):
            raise InputError(f"{file}: question {name!r}: expected a text under '{OUTPUTS[0]}', got {brief(said[name])}")
        others += is_texts(row.get("choices")) and "answer" in row and without_letters(row)["answer"] != known[name].answer
    if all(text is None for text in said.values()):
        raise InputError(f"{file}: no predictions; expected a text under '{OUTPUTS[0]}' or '{OUTPUTS[1]}'")
    return [said.get(question.id) for question in questions], others


def with_predictions(questions, said, completions=None):
    """The questions' rows in the form that the official script reads: with what was said under "model_output", the text that is
    scored; a question without an answer has no such key. completions: what the model wrote around it."""
    rows = []
    for index, (question, text) in enumerate(zip(questions, said)):
        row = {key: value for key, value in question.row.items() if key not in OUTPUTS}
        row |= {} if text is None else {"model_output": answer_of(text)}
        rows.append(row | ({"completion": completions[index]} if completions else {}))
    return rows


def read_rows(file):
    """Yields (where it stands, dict) for every object of a JSON list or of JSON lines."""
    text = files.read_text(file)
    if text.lstrip()[:1] != "[":
        for number, row in files.read_json_lines(file):
            yield f"{file}, line {number}", row
        return
    for number, row in enumerate(files.parse_json(text, file, list), 1):
        if not isinstance(row, dict):
            raise InputError(f"{file}, row {number}: expected a JSON object, got {brief(row)}")
        yield f"{file}, row {number}", row


def known_id(row, place, seen):
    """The id of a row. Raises InputError where it has none, or has the id of one that was seen."""
    name = row.get("id")
    if not isinstance(name, str) or not name:
        raise InputError(f"{place}: key 'id': expected a text, got {brief(name)}")
    if name in seen:
        raise InputError(f"{place}: the id {name!r} stands there twice")
    return name


def published(row, place):
    """A row of the parquet copy in the form of the published file; any other as it is."""
    if "other_attributes" not in row:
        return row
    others = row["other_attributes"]
    others = files.parse_json(others, f"{place}, key 'other_attributes'") if isinstance(others, str) else others
    if not isinstance(others, dict):
        raise InputError(f"{place}, key 'other_attributes': expected a JSON object, got {brief(others)}")
    rest = {key: value for key, value in row.items() if key not in ("instruction", "other_attributes", "context")}
    question = {"question": row["instruction"]} if "instruction" in row else {}
    return {"audio_id": f"./test-mini-audios/{others.get('id')}.wav", **others, **question, **rest}


def audio_file(question, folder):
    """The path of a question's audio. Raises InputError where its row names none."""
    name = question.row.get("audio_id")
    if not isinstance(name, str) or not name:
        raise InputError(f"key 'audio_id': expected the path of an audio file, got {brief(name)}")
    return Path(folder) / name


LETTER = re.compile(r"^\s*\(([A-Z])\)\s*")


def without_letters(row):
    """The row with "Man" for "(A) Man" where its choices begin with (A), (B), … in this order; any other as it is."""
    letters = [match and match[1] for match in map(LETTER.match, row["choices"])]
    if letters != [chr(ord("A") + index) for index in range(len(letters))]:
        return row
    answer = LETTER.sub("", row["answer"]) if isinstance(row["answer"], str) else row["answer"]
    return row | {"choices": [LETTER.sub("", choice) for choice in row["choices"]], "answer": answer}


def is_texts(values):
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def brief(value):
    """A value of a file in a message."""
    return shown(repr(value), 80)


# --------------------------------------------------------------------------------------------------------------- the numbers


def verdicts(questions, said):
    """[True where a question was answered right]; what was not answered is wrong."""
    pairs = zip(questions, said)
    return [text is not None and is_correct(answer_of(text), each.answer, each.choices) for each, text in pairs]


def groups(questions, key):
    """{what the questions have under a key of KINDS: the numbers of their rows}, in the order of the file."""
    found = {}
    for index, question in enumerate(questions):
        found.setdefault(question.kind(key), []).append(index)
    return found


def interval(correct, total):
    """The 95 % interval of a share of which `correct` out of `total` were seen (Wilson 1927): -> (low, high). It has a width at
    0 and at 1, too.

    >>> [round(bound, 4) for bound in interval(760, 1000)]
    [0.7326, 0.7854]
    """
    share, width = correct / total, Z95**2 / total
    centre = (share + width / 2) / (1 + width)
    half = Z95 * (share * (1 - share) / total + width / total / 4) ** 0.5 / (1 + width)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def paired_difference(a, b):
    """How much more often A is right than B on the same questions: -> the mean of the differences and its standard error.
    Questions that both answer alike add little to the error (as in McNemar's test): it is smaller than `unpaired_error` where
    both tend to be right at the same questions, as systems do, and larger where at different ones.

    a, b   [N], 1 where a system is right; or its share of right answers over several runs
    """
    return mean_and_standard_error([float(right) - float(other) for right, other in zip(a, b)])


def unpaired_error(a, b, total):
    """The standard error of the difference of two shares, a / total and b / total, of which nothing else is known.

    >>> round((760 - 742) / 1000 / unpaired_error(760, 742, 1000), 2)  # the paper's ADRPO and GRPO on MMAU
    0.93
    """
    return sum(count * (total - count) / total**3 for count in (a, b)) ** 0.5
