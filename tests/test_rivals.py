"""rivals.py: the gate and the β by accuracy, with numbers by hand, and their lines and the controls' in the scripts."""

import flow_runs
import grpo_runs
import pytest
import scripts
import torch
from scripts import lines

import train_grpo
from nano_adrpo import rivals
from nano_adrpo.errors import InputError

few_flow, few_grpo = flow_runs.few, grpo_runs.few


def gate(rewards, *auxiliary, **options):
    return rivals.uncertainty_gate(torch.tensor(rewards), [torch.tensor(other) for other in auxiliary], 2.0, **options).tolist()


def test_the_gate_opens_where_the_reward_is_above_the_others():
    # Win rates of R: (.5, 1.5, 2.5, 3.5)/4; of the other: (2.5, .5, 3.5, 1.5)/4. U = (−2, 1, −1, 2)/4.
    R, other = [0.0, 1.0, 5.0, 9.0], [3.0, -8.0, 4.0, 2.0]
    assert gate(R, other, share=0.25) == [0, 0, 0, 2]
    assert gate(R, other, share=0.5) == [0, 2, 0, 2]
    assert gate(R, other, share=1.0) == [0, 2, 0, 2]  # never where the others are above the reward
    assert gate(R, other) == [0, 0, 0, 2]  # at least one sample, however small the share
    # Of two others the mean counts: the second agrees with R, which halves U. A third has it all the other way round.
    assert gate(R, other, R, share=0.5) == [0, 2, 0, 2]
    assert gate(R, [0.0, 1.0, 9.0, 5.0], [1.0, 0.0, 5.0, 9.0], share=0.5) == [0, 2, 0, 2]  # U = (−.5, .5, −.5, .5)/4


def test_only_the_order_counts_and_ties_count_half():
    R, other = [0.0, 1.0, 5.0, 9.0], [3.0, -8.0, 4.0, 2.0]
    assert gate([x**3 - 7 for x in R], [x / 100 for x in other], share=0.5) == gate(R, other, share=0.5)
    assert gate(R, R) == [0] * 4  # agreement
    assert gate([0, 1, 5, 9], [3, -8, 4, 2], share=0.25) == gate(R, other, share=0.25)
    assert gate([False, False, True, True], [False] * 4, share=0.25) == [0, 0, 2, 2]
    assert gate([0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], share=0.25) == [0, 0, 2, 2]  # equal U at the edge


@pytest.mark.parametrize("seed", [0, 31, 33])  # of the last two, shares in float32 would tell equal ones apart
def test_equal_disagreements_are_equal_for_any_number_of_samples(seed):
    draw = torch.Generator().manual_seed(seed)
    R, *others = torch.rand(3, 48, generator=draw)

    def wins(x):
        return [sum((a > b) - (a < b) for b in x.tolist()) for a in x.tolist()]

    U = [2 * a - b - c for a, b, c in zip(*map(wins, (R, *others)))]  # whole numbers
    edge = sorted(U, reverse=True)[5 - 1]  # a tenth of 48
    assert gate(R.tolist(), *[other.tolist() for other in others]) == [2.0 * (u >= edge) for u in U]


def test_a_gate_needs_another_reward():
    with pytest.raises(InputError, match="no auxiliary rewards"):
        gate([0.0, 1.0])


@pytest.mark.parametrize("right, beta", [(0, 0.0), (2, 0.15), (4, 0.3), (8, 0.6)])
def test_beta_follows_the_accuracy(right, beta):
    # 1 − cos(πp) at p = 0, 1/4, 1/2, 1; at 1/4 it is 1 − √½.
    beta = 0.3 * (1 - 0.5**0.5) if right == 2 else beta
    rewards = torch.tensor([1.0] * right + [0.0] * (8 - right))
    assert rivals.accuracy_beta(rewards, 0.3) == pytest.approx(beta, abs=1e-12)


def test_rewards_that_are_no_accuracy_are_refused():
    assert rivals.accuracy_beta(torch.tensor([0.25, 0.75]), 0.3) == pytest.approx(0.3)
    for right in ([1, 0, 1, 1], [True, False, True, True]):
        assert rivals.accuracy_beta(torch.tensor(right), 0.3) == pytest.approx(0.3 * (1 + 0.5**0.5))
    for rewards in ([0.0, 2.0], [-0.1, 1.0]):
        with pytest.raises(InputError, match="expected 0 … 1, right or wrong"):
            rivals.accuracy_beta(torch.tensor(rewards), 0.3)


# --------------------------------------------------------------------------------------------------------------- in the scripts


def test_the_gate_reads_the_rewards_of_weight_0(tmp_path, few_flow):
    # Two groups of two. R is the brightness; the other reward is its opposite, or the same, which opens no gate.
    (tmp_path / "mine.py").write_text(
        "def bright(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"
        "def dark(images, prompts):\n    return -bright(images, prompts)\n"
        "def same(images, prompts):\n    return bright(images, prompts)\n"
    )
    mine, options = tmp_path / "mine.py", ["--method", "gardo-gate", "--beta0", 0.5, "--no-eval-first"]
    for other, opened in (("dark", 1), ("same", 0)):
        row = lines(few_flow(other, *options, "--reward", f"{mine}:bright", f"{mine}:{other}@0"))[0]
        assert (row["beta_max"], row["beta_mean"]) == (0.5 * opened, 0.5 * opened / 4)
        assert row["reward"] == row["bright"]


def test_methods_are_the_table():
    R, A = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([1.5, -1.5, 0.1, 0.0])
    args = train_grpo.parse(["--group-size", "2", "--beta0", "0.5", "--a-max", "0.25"])
    beta = {name: torch.as_tensor(method(R, A, args)).tolist() for name, method in train_grpo.METHODS.items()}
    assert beta == {
        "adrpo": pytest.approx([0.25, 1.0, 0.4, 0.5]),
        "grpo": 0.5,
        "accuracy-beta": pytest.approx(0.5 * (1 - 0.5**0.5)),  # a quarter is right: 1 − cos(π/4)
        "shuffled": pytest.approx([0.4, 0.5, 0.25, 1.0]),  # of the other group
        "anti": pytest.approx([0.75, 0.0, 0.6, 0.5]),
    }


def test_an_accuracy_is_needed_for_a_beta_by_accuracy(few_grpo, capsys):
    line = scripts.refused(capsys, lambda: few_grpo("sum", "--method", "accuracy-beta", "--reward", "format@2"))
    assert "round 1: rewards are 2 … 2; expected 0 … 1, right or wrong" in line


@pytest.mark.parametrize("method", ["accuracy-beta", "shuffled", "anti"])
def test_every_method_trains_in_its_own_way(few_grpo, method):
    ways = [few_grpo(name, "--method", name, "--rounds", 2, "--beta0", 0.5, "--lr", 1e-2) for name in ("adrpo", "grpo", method)]
    assert len({(way / "metrics.jsonl").read_text().splitlines()[-1].partition('"seconds')[0] for way in ways}) == 3
