"""Figure 4: reward and entropy over the rounds, mean and standard error over seeds by hand."""

import json
import math

import pytest

from nano_adrpo.evaluation import plots, progress


@pytest.fixture
def runs(tmp_path):
    """GRPO on two seeds whose rewards are n and n + 2 in round n of 10; ADRPO on one, which skipped round 3."""

    def run(name, reward, skipped=()):
        rows = [{"round": 0, "eval": {"reward": -1, "entropy": 9}}]
        for n in range(1, 11):
            rows.append({"round": n, "skipped": 1} if n in skipped else {"round": n, "reward": reward(n), "entropy": 1 / n})
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    grpo = [run("a", lambda n: n), run("b", lambda n: n + 2)]
    return {"GRPO β=1": grpo, "ADRPO β0=1": [run("c", lambda n: 3 * n, skipped=[3])]}


def test_the_table_has_a_mean_of_each_fifth(runs):
    """Of GRPO's first two rounds the seeds' means are 1.5 and 3.5, so 2.5 with an error of half their distance."""
    lines = progress.table(runs).splitlines()
    assert lines[0] == "| rollouts | setting | " + " | ".join(f"{n} % of the rounds" for n in (20, 40, 60, 80, 100)) + " |"
    assert lines[2] == "| reward | GRPO β=1 | 2.5 ± 1 | 4.5 ± 1 | 6.5 ± 1 | 8.5 ± 1 | 10.5 ± 1 |"
    assert lines[3] == "| reward | ADRPO β0=1 | 4.5 | 13.5 | 19.5 | 25.5 | 30 |"  # nine rounds: 1 2, 4 5, 6 7, 8 9, 10
    assert lines[4].startswith("| entropy | GRPO β=1 | 0.75 ± 0 | 0.292 ± 0 |") and len(lines) == 6


def test_the_picture_has_a_band_of_the_standard_error(tmp_path, runs, monkeypatch):
    figures, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda plt, figure, file: (save(plt, figure, file), figures.append(figure)))
    progress.picture(tmp_path / "figure4.png", runs)
    assert (tmp_path / "figure4.png").read_bytes().startswith(b"\x89PNG")
    reward, entropy = figures[0].axes
    assert (reward.get_ylabel(), entropy.get_xlabel()) == ("reward (higher is better)", "round")
    grpo, adrpo = reward.lines
    assert grpo.get_xydata().tolist() == [[n, n + 1] for n in range(1, 11)]
    assert adrpo.get_xdata().tolist() == [n for n in range(1, 11) if n != 3]
    heights = reward.collections[0].get_paths()[0].vertices
    assert {y - x for x, y in heights} == {0, 2}  # n + 1 ± 1
    assert len(reward.collections[1].get_paths()) == 0 or all(
        math.isnan(y) for path in reward.collections[1].get_paths() for _, y in path.vertices
    )  # one seed has no band
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(runs)
    assert grpo.get_color() != adrpo.get_color() == entropy.lines[1].get_color()


def test_a_metric_that_no_round_has_leaves_its_panel_empty(tmp_path, runs):
    (tmp_path / "d").write_text('{"round": 1, "reward": 0.5}\n{"round": 2, "reward": 0.5}\n')
    progress.picture(tmp_path / "figure.png", runs | {"flow": [tmp_path / "d"]})
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
