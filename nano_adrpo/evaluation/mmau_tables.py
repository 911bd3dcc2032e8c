"""The paper's Tables 2 and 3 from systems' answers to MMAU's questions, with what the paper's numbers leave out: intervals,
questions that were not answered, and what two systems differ by.

A percentage has its 95 % interval behind it, [low, high], or where a system has several training runs ± its standard error over
these.
"""

import itertools
import math
from typing import NamedTuple

from nano_adrpo.evaluation import mmau, tables
from nano_adrpo.metrics import mean_and_standard_error

# Right answers to the 333 questions about sound, 334 about music and 333 about speech, which Tables 2 and 3 round to percent.
PAPERS_QUESTIONS = {"sound": 333, "music": 334, "speech": 333}
TABLE_2 = {
    "Qwen2.5-Omni base": (241, 215, 230),
    "GRPO": (257, 236, 249),
    "Gemini 2.5 Pro": (250, 228, 238),
    "GPT-4o Audio": (215, 188, 222),
    "ADRPO": (273, 234, 253),
}
TABLE_3 = {
    "ADRPO 0.5×β0 [−0.02, 0.02]": (275, 238, 248),
    "ADRPO 1×β0 [−0.04, 0.04]": (273, 234, 253),
    "ADRPO 2×β0 [−0.08, 0.08]": (280, 232, 245),
    "GRPO β=0.04": (257, 236, 249),
}

ABOUT_DIFFERENCES = (
    "Points with their 95 % interval over questions (none where all differ alike, which tells no error), how many standard "
    "errors that is, and at how many questions one is right (or in more of its training runs) where the other is not. How "
    "training runs differ is not in the interval."
)


class System(NamedTuple):
    """One row of a table."""

    name: str
    right: list  # [runs][questions], whether a training run, or the system that is no run, answered a question right
    answered: list  # [runs], how many questions it answered at all
    clip: float | None = None  # of an ADRPO run the bound of its advantage in units of β0; None where there is no such number
    trained: bool = False  # whether it was given as the folders of training runs


def report(systems, pairs, questions, file):
    """All tables, Markdown. pairs: what `differences` gave; file: the name of the questions' file."""
    counts = ", ".join(f"{len(rows)} {task}" for task, rows in of_tasks(questions).items())
    texts = [
        f"{len(questions)} questions of {file} ({counts}). Right answers in %, with the 95 % interval of a share [low, high]; "
        "where a system has several training runs ± their standard error. A question without an answer counts as wrong; the "
        "last column of Table 2 leaves it out, as MMAU's own script does.",
        "## Table 2", table_2([each for each in systems if not each.trained or each.clip in (None, 1)], questions),
        papers_differences(),
    ]  # fmt: skip
    if runs := [system for system in systems if system.trained]:
        texts += ["## Table 3", table_3(runs, questions)]
    if pairs:
        texts += ["## Differences on the same questions", ABOUT_DIFFERENCES, table_of_differences(pairs)]
    for key in mmau.KINDS[1:]:
        if key in questions[0].row:
            texts += [f"## By {key}", breakdown(systems, questions, key)]
    return "\n\n".join(text.rstrip("\n") for text in texts) + "\n"


def table_2(systems, questions):
    """Markdown: systems × tasks, and the paper's."""
    tasks = of_tasks(questions)
    columns = [*tasks.values(), range(len(questions))]
    rows = [[system.name, *cells(system, columns), *of_answered(system)] for system in systems]
    names = ["system", *tasks, "total", "answered", "right of these"]
    return tables.markdown(names, rows + papers(TABLE_2, tasks, behind=["–", "–"]))


def table_3(systems, questions):
    """Markdown: the range that the advantage is clipped to × tasks, and the paper's."""
    tasks = of_tasks(questions)
    columns = [*tasks.values(), range(len(questions))]
    systems = sorted(systems, key=lambda system: math.inf if system.clip is None else system.clip)
    rows = [[system.name, str(len(system.right)), *cells(system, columns)] for system in systems]
    return tables.markdown(["range of A", "runs", *tasks, "total"], rows + papers(TABLE_3, tasks, before=["1"]))


def breakdown(systems, questions, key):
    """Markdown: accuracy by what the questions have under a key of mmau.KINDS, systems side by side."""
    found = sorted(mmau.groups(questions, key).items())
    columns = [cells(system, [rows for _, rows in found]) for system in systems]
    lines = [[name, str(len(rows)), *each] for (name, rows), *each in zip(found, *columns)]
    return tables.markdown([key, "questions", *(system.name for system in systems)], lines)


def differences(systems):
    """-> a dict for each pair of systems: how much more often the first is right on the same questions. Over several training
    runs a question counts by the share of runs that are right; how runs differ is not in the error."""
    found = []
    for second, first in itertools.combinations(systems, 2):
        a, b = ([sum(runs) / len(runs) for runs in zip(*system.right)] for system in (first, second))
        mean, error = mmau.paired_difference(a, b)
        found.append({
            "first": first.name, "second": second.name, "difference": mean, "error": None if math.isnan(error) else error,
            "first_better": sum(x > y for x, y in zip(a, b)), "second_better": sum(x < y for x, y in zip(a, b)),
        })  # fmt: skip
    return found


def table_of_differences(pairs):
    """Markdown of `differences`."""
    lines = []
    for pair in pairs:
        mean, error = pair["difference"], pair["error"] or 0.0
        low, high = mean - mmau.Z95 * error, mean + mmau.Z95 * error
        counts = [str(pair["first_better"]), str(pair["second_better"])]
        points = f"{100 * mean:+.2f}" + (f" [{100 * low:+.1f}, {100 * high:+.1f}]" if error else "")
        lines.append([pair["first"], pair["second"], points, f"{mean / error:+.1f}" if error else "–", *counts])
    names = ["first", "second", "first − second", "standard errors", "first better at", "second better at"]
    return tables.markdown(names, lines)


def papers_differences():
    """What the paper's own numbers tell apart, in words. Its predictions are not public, so its systems count as unpaired."""
    total, words = sum(PAPERS_QUESTIONS.values()), []
    adrpo, grpo = (sum(TABLE_2[name]) for name in ("ADRPO", "GRPO"))
    half, _, double, _ = map(sum, TABLE_3.values())
    for name, a, b in (("ADRPO − GRPO", adrpo, grpo), ("0.5×β0 − 1×β0", half, adrpo), ("2×β0 − 1×β0", double, adrpo)):
        errors = (a - b) / total / mmau.unpaired_error(a, b, total)
        words.append(f"{name} is {a} − {b} of {total:,} questions, {errors:+.1f} standard errors")
    return f"The paper's numbers are of one run each. Unpaired, {'; '.join(words)}."


def as_json(systems, questions):
    """[{"system", "runs": [{"answered", "total": [right, questions], KIND: {name: [right, questions]}}]}]"""
    kinds = {key: mmau.groups(questions, key) for key in mmau.KINDS if key in questions[0].row}

    def run(right, answered):
        of_kinds = {
            key: {name: [sum(right[row] for row in rows), len(rows)] for name, rows in found.items()}
            for key, found in kinds.items()
        }
        return {"answered": answered, "total": [sum(right), len(right)], **of_kinds}

    return [{"system": each.name, "runs": [run(*pair) for pair in zip(each.right, each.answered)]} for each in systems]


# ------------------------------------------------------------------------------------------------------------ rows and cells


def of_tasks(questions):
    """{task: rows}, the paper's three first and in its order."""
    found = mmau.groups(questions, "task")
    return {task: found[task] for task in dict.fromkeys([*PAPERS_QUESTIONS, *sorted(found)]) if task in found}


def cells(system, groups):
    """Of each group of rows the accuracy, as text."""
    found = []
    for rows in groups:
        counts = [sum(right[row] for row in rows) for right in system.right]
        mean, error = mean_and_standard_error([100 * count / len(rows) for count in counts])
        found.append(with_interval(counts[0], len(rows)) if len(counts) == 1 else f"{mean:.2f} ± {error:.2f}")
    return found


def of_answered(system):
    """How many questions have an answer, and the share of right ones among these, which the official script calls total."""
    shares = [sum(right) / count if count else math.nan for right, count in zip(system.right, system.answered)]
    count, share = sum(system.answered) / len(shares), sum(shares) / len(shares)
    return [f"{count:g} of {len(system.right[0])}", "–" if math.isnan(share) else f"{100 * share:.2f}"]


def with_interval(correct, total):
    low, high = mmau.interval(correct, total)
    return f"{100 * correct / total:.2f} [{100 * low:.1f}, {100 * high:.1f}]"


def papers(table, tasks, before=(), behind=()):
    """Lines of the paper's numbers. before, behind: cells before and behind the accuracies."""
    lines = []
    for name, counts in table.items():
        known = dict(zip(PAPERS_QUESTIONS, counts))
        of_task = [with_interval(known[task], PAPERS_QUESTIONS[task]) if task in known else "–" for task in tasks]
        total = with_interval(sum(counts), sum(PAPERS_QUESTIONS.values()))
        lines.append([f"*the paper's {name}*", *before, *of_task, total, *behind])
    return lines
