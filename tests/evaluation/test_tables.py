"""Tables: means and standard errors by hand, Markdown, JSON."""

import json
import math

import pytest

from nano_adrpo.evaluation import tables

NAN = float("nan")


def test_errors_are_over_training_runs_or_over_noises():
    """Of two numbers the standard error is half their distance: s/√2 with s = |a − b|/√2."""
    noises = tables.summary([[{"x": 1.0}, {"x": 2.0}]])
    assert noises == {"x": pytest.approx((1.5, 0.5))}
    runs = tables.summary([[{"x": 1.0}, {"x": 3.0}], [{"x": 6.0}, {"x": 8.0}]])
    assert runs == {"x": pytest.approx((4.5, 2.5))}  # of the runs' means, 2 and 7
    mean, error = tables.summary([[{"x": 4.0}]])["x"]
    assert mean == 4 and math.isnan(error)


def test_a_row_has_the_last_step_and_the_path():
    steps = [[[{"round": n, "x": n + seed}] for seed in (0.0, 1.0)] for n in (0, 10)]
    row = tables.row("ADRPO β0=1", 0.1, steps)
    assert (row["setting"], row["lr"]) == ("ADRPO β0=1", 0.1)
    assert row["final"] == {"x": pytest.approx((10.5, 0.5))}
    assert row["path"] == [{"round": 0, "x": 0.5}, {"round": 10, "x": 10.5}]
    assert row["runs"] == 2 and row["noise"] == {}  # of one noise


def test_the_error_over_training_runs_is_told_from_the_one_over_noises():
    """Of three runs with the same two noises: runs' means 1.5, 5.5, 8.5; noises' means 4 and 19 / 3."""
    runs = [[{"x": 1.0}, {"x": 2.0}], [{"x": 3.0}, {"x": 8.0}], [{"x": 8.0}, {"x": 9.0}]]
    row = tables.row("ADRPO", None, [runs])
    mean = 31 / 6
    over_runs = math.sqrt(sum((x - mean) ** 2 for x in (1.5, 5.5, 8.5)) / 2 / 3)
    assert row["final"]["x"] == pytest.approx((mean, over_runs)) and row["noise"]["x"] == pytest.approx((19 / 3 - 4) / 2)
    assert tables.cell(*tables.numbers(row, "x")) == "5.17 ± 2 (1)"
    alone = tables.row("SD3", None, [runs[:1]])
    assert alone["noise"] == {} and tables.cell(*tables.numbers(alone, "x")) == "1.5 (0.5)"  # brackets are never over runs
    assert tables.row("PNGS", None, [[runs[0], runs[1][:1]]])["noise"] == {}  # not the same noises


def test_markdown():
    rows = [
        {"setting": "a", "lr": 1e-4, "final": {"x": (1.2345, 0.0456), "y": (2.0, NAN)}, "path": [{"x": 0.5, "y": 1.0}]},
        {"setting": "b", "lr": 3e-4, "final": {"x": (1e-6, 1e-7)}, "path": [{"x": 0.5}]},
    ]
    rows = [row | {"runs": 3, "noise": {}} for row in rows]
    assert tables.table(rows, "base model") == (
        "| setting | lr | x | y |\n| --- | --- | --- | --- |\n| base model | – | 0.5 | 1 |\n"
        "| a | 0.0001 | 1.23 ± 0.05 | 2 |\n| b | 0.0003 | 1e-06 ± 1e-07 | – |\n"
    )
    plain = [row | {"lr": None} for row in rows]
    assert tables.table(plain) == (
        "| setting | x | y |\n| --- | --- | --- |\n| a | 1.23 ± 0.05 | 2 |\n| b | 1e-06 ± 1e-07 | – |\n"
    )


def test_json_has_null_for_an_error_that_is_not_a_number():
    rows = [{"setting": "a", "lr": None, "final": {"x": (1.0, NAN), "y": (2.0, 0.5)}, "path": []}]
    text = json.dumps(tables.as_json(rows), allow_nan=False)
    assert json.loads(text)[0]["final"] == {"x": [1.0, None], "y": [2.0, 0.5]}
    assert math.isnan(rows[0]["final"]["x"][1])  # unchanged


def test_a_cell_does_not_end_at_a_bar_in_its_text():
    assert tables.markdown(["a", "b"], [["x|y", "z"]]) == "| a | b |\n| --- | --- |\n| x\\|y | z |\n"
