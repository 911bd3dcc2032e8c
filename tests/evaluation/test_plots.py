"""Pictures, looked at through matplotlib's own objects: what is where, what covers what, what is framed."""

import importlib.util
import json

import pytest
import torch

from nano_adrpo.evaluation import plots


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    found, save = [], plots.save

    def keep(plt, figure, file):
        figure.renderer = figure.canvas.get_renderer()
        save(plt, figure, file)
        found.append(figure)

    monkeypatch.setattr(plots, "save", keep)
    return found


def test_grids_have_a_row_per_prompt_and_frames_where_a_judge_looked(tmp_path, figures):
    images = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 1, 4, 4)
    right = {"after": torch.tensor([True, False, False, True, True, True]), "before": None}
    plots.grids(tmp_path / "grid.png", {"before": images, "after": images}, ["a cat", "a dog"], right)
    before, after = figures[0].axes
    assert (before.get_title(), after.get_title()) == ("before", "after")
    assert [tick.get_text() for tick in before.get_yticklabels()] == ["a cat", "a dog"] and not after.get_yticklabels()
    shown = after.images[0].get_array()
    assert shown.shape == (2 * 6, 3 * 6)  # a pixel of gap on every side of an image
    for index in range(6):
        row, sample = divmod(index, 3)
        centre = shown[6 * row + 1 : 6 * row + 5, 6 * sample + 1 : 6 * sample + 5]
        assert abs(centre - index / 5).max() < 1e-6
        patch = after.patches[index]
        assert patch.get_x() == 6 * sample and patch.get_y() == 6 * row and patch.get_width() == 5
    green, red = (0.17, 0.63, 0.17), (0.84, 0.15, 0.16)  # tab:green, tab:red
    colors = [patch.get_edgecolor()[:3] for patch in after.patches]
    assert colors == [pytest.approx(color, abs=0.01) for color in (green, red, red, green, green, green)]
    assert len(before.patches) == 0 and (tmp_path / "grid.png").stat().st_size > 1000


def test_curves_have_a_panel_per_metric_that_says_which_way_is_better(tmp_path, figures):
    rows = [{"round": 1, "reward": 0.0}] + [{"round": n, "eval": {"reward": n, "w2": 2 * n, "mine": 1}} for n in (0, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots.curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl", "w2")
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == ["reward", "W2", "mine", ""]
    assert [axis.get_ylabel() for axis in axes[:3]] == ["higher is better", "to the reference\nlower is nearer", ""]
    assert axes[1].lines[0].get_xydata().tolist() == [[0, 0], [5, 10]]
    assert (axes[3].get_xlabel(), axes[3].get_ylabel()) == (
        "W2 (to the reference, lower is nearer)", "reward (higher is better)",
    )  # fmt: skip


def test_a_metric_that_some_evaluations_lack_has_a_gap(tmp_path, figures):
    found = [{"reward": 0}, {"reward": 1, "right_length": 7}, {"reward": 2}]
    rows = [{"round": n, "eval": {"w2": 0, **each}, "eval_train": {"w2": 0, **each}} for n, each in enumerate(found)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots.curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl", "w2")
    panel = next(axis for axis in figures[0].axes if axis.get_title() == "right length")
    assert [line.get_ydata()[1] for line in panel.lines] == [7, 7] and all(y != y for y in panel.lines[0].get_ydata()[::2])


def test_curves_tell_training_from_held_out_prompts(tmp_path, figures):
    rows = [{"round": n, "eval": {"reward": n, "joint/binding": 1}, "eval_train": {"reward": n + 1}} for n in (0, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots.curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl", "reward")
    panel = figures[0].axes[0]
    assert [line.get_xydata().tolist() for line in panel.lines] == [[[0, 0], [5, 5]], [[0, 1], [5, 6]]]
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["held-out", "training"]
    assert [axis.get_title() for axis in figures[0].axes] == ["reward", ""]


def test_shares_are_stacked_right_ones_below_in_greens(tmp_path, figures):
    shares = [
        {"wrong/guessed": 0.7, "right/slow": 0.1, "right/fast": 0.2},
        {"wrong/guessed": 0.0, "right/slow": 0.4, "right/fast": 0.6},
    ]
    rows = [{"round": 10 * n, "eval": {"reward": 1, **values}} for n, values in enumerate(shares)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots.shares(tmp_path / "shares.png", tmp_path / "metrics.jsonl")
    axis = figures[0].axes[0]
    slow, fast, guessed = axis.collections
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in (slow, fast, guessed)]
    assert tops == pytest.approx([0.4, 1.0, 1.0]) and axis.get_ylim() == (0, 1) and axis.get_xlim() == (0, 10)
    for area, green in ((slow, True), (fast, True), (guessed, False)):
        red, tone, blue, _ = area.get_facecolor()[0]
        assert (tone > max(red, blue) + 0.05) == green and (abs(red - blue) < 0.01) >= (not green)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["wrong: guessed", "right: fast", "right: slow"]
    (tmp_path / "metrics.jsonl").write_text('{"round": 0, "eval": {"reward": 1}}\n')
    plots.shares(tmp_path / "none.png", tmp_path / "metrics.jsonl")
    assert not (tmp_path / "none.png").exists()


def test_trade_offs_name_every_end_and_cover_nothing(tmp_path, figures):
    """Twelve settings that end at nearly the same place."""
    paths = [[{"w2": 0, "reward": 0}, {"w2": 1 + n / 9, "reward": 5 + n / 99}] for n in range(12)]
    rows = [{"setting": f"{'ADRPO' if n % 2 else 'GRPO'} β={n}, clip", "path": path} for n, path in enumerate(paths)]
    plots.pictures(rows, "w2", ("reward",), tmp_path / "picture.png")
    figure = figures[0]
    axis, renderer = figure.axes[0], figure.renderer
    names = [text for text in axis.texts if text.get_text()]
    assert sorted(text.get_text() for text in names) == sorted(f"β={n}, clip" for n in range(12))
    boxes = [text.get_window_extent(renderer) for text in names]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    stars = axis.transData.transform([(row["path"][-1]["w2"], row["path"][-1]["reward"]) for row in rows])
    assert not any(box.padded(3).contains(*star) for box in boxes for star in stars)
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["GRPO", "ADRPO"] and axis.get_legend() is None
    assert not legend.get_window_extent(renderer).overlaps(axis.get_window_extent(renderer))
    assert axis.get_xlabel() == "W2 (to the reference, lower is nearer)" and axis.get_xscale() == "symlog"


def test_without_matplotlib_a_line_says_what_was_left_out(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest))
    plots.grids(tmp_path / "grid.png", {"a": torch.zeros(2, 1, 2, 2)}, ["a"])
    plots.curves(tmp_path / "curves.png", tmp_path / "no-such-file", "w2")
    plots.pictures([], "w2", ("reward",), tmp_path / "picture.png")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2].partition(",")[0] for line in lines] == ["left out"] * 3
    assert lines[0] == f"{tmp_path / 'grid.png'}: left out, matplotlib is not installed (pip install matplotlib)"
    assert not list(tmp_path.iterdir())
