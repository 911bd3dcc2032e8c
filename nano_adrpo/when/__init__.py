"""When does an adaptive β help? Three experiments small enough for many seeds and for controls.

exact.py    the law that exact rounds end at, and when they stay there
ring.py     which methods blow up when many steps are taken on one rollout
bandit.py   which methods leave a deep local optimum

The controls: `shuffled` has ADRPO's coefficients, of other samples; `anti` has β0 + A. What neither does, A's place in β does.
"""

import itertools
import math

import torch

from nano_adrpo import files
from nano_adrpo.evaluation import plots
from nano_adrpo.when import bandit, exact, ring

FACTORS = {True: (0.7, 0.8, 0.9, 1.0, 1.1, 1.25), False: (0.35, 0.4, 0.45, 0.5, 0.55, 0.6)}  # clips / β0: ADRPO, fixed β
STEPS, CLIPS, RATES, STRENGTHS, SEEDS = (4, 16, 64), (1, 8), (5e-4, 2e-3), (0.5, 1.0), 5
BETAS, KINDS, CONTESTANTS = (0.04, 0.16, 0.64), ("k3", "k2"), ("GRPO", "ADRPO", "shuffled", "anti")


def compare(out):
    """Runs the three experiments; writes table.md, results.json and when.png into the folder `out`, and prints the table."""
    found = {"laws": laws(), "stability": stability(), "ring": many_steps(), "bandit": escapes()}
    files.write_json(out / "results.json", found)
    files.write_bytes(out / "table.md", (text := tables(found)).encode())
    draw(found, out / "when.png")
    print(text)


def laws():
    """Where sixteen exact rounds end: [{reward, clip, distances W1 to the law of forward KL and to that of reverse KL}]."""
    reference, beta0, rows = exact.quantiles(exact.density(exact.GRID), 300), 1.6, []
    for name, reward, clip in (
        ("tanh 2x", lambda x: (2 * x).tanh(), math.inf),
        ("tanh 2x", lambda x: (2 * x).tanh(), 0.5),
        ("sin 2x", lambda x: (2 * x).sin(), math.inf),
    ):
        end = exact.rounds(16, reference, reward, beta0, clip * beta0, True)[-1]
        forward = exact.fixed_point(reward, beta0, clip * beta0, lambda p, A: p / (beta0 - A))
        reverse = exact.fixed_point(reward, beta0, clip * beta0, lambda p, A: p * (A / beta0).exp())
        distances = [exact.distance(end, exact.quantiles(law, 300)) for law in (forward, reverse)]
        rows.append(
            {"reward": name, "clip": None if clip == math.inf else clip, "forward": distances[0], "reverse": distances[1]}
        )
    return rows


def stability():
    """How far exact rounds still move the policy, by the clip in units of β0: {method: {clip: W1 between two late rounds}}."""
    reference, beta0 = exact.quantiles(exact.density(exact.GRID), 150), 0.3
    found = {}
    for adaptive, factors in FACTORS.items():
        laws = {k: exact.rounds(14, reference, lambda x: (2 * x).tanh(), beta0, k * beta0, adaptive) for k in factors}
        moves = {k: max(exact.distance(a, b) for a, b in zip(law[-4:-1], law[-3:])) for k, law in laws.items()}
        found["ADRPO" if adaptive else "fixed β"] = moves
    return found


def many_steps():
    """{method: [{steps, clip, blown: share of runs, best: the best mean reward of a setting of which no run blew up}]}."""
    reference, found = ring.pretrain(), {}
    for method, steps, clip in itertools.product(ring.METHODS, STEPS, CLIPS):
        settings = [
            ring.train(reference, method, beta0, clip, steps, lr, SEEDS) for lr, beta0 in itertools.product(RATES, STRENGTHS)
        ]
        blown = torch.stack([w2 > ring.BLOWN for _, _, w2 in settings])  # [settings, seeds]
        whole = [(rewards.mean().item(), i) for i, (rewards, _, _) in enumerate(settings) if not blown[i].any()]
        best, which = max(whole, default=(None, None))
        entropy = None if best is None else settings[which][1].mean().item()
        row = {"steps": steps, "clip": clip, "blown": blown.float().mean().item(), "best": best, "entropy": entropy}
        found.setdefault(method, []).append(row)
    return found


def escapes():
    """{KL: {method: {β: share of 64 seeds that escape}}}."""
    return {kl: {method: {beta: bandit.escapes(method, beta, kl) for beta in BETAS} for method in CONTESTANTS} for kl in KINDS}


def tables(found):
    """The numbers in Markdown."""

    def table(*lines):
        return "".join(f"| {' | '.join(map(str, line))} |\n" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))

    def number(value):
        return "–" if value is None else f"{value:.2f}"

    ends = [
        (row["reward"], f"±{row['clip']:g}·β0" if row["clip"] else "none", f"{row['forward']:.4f}", f"{row['reverse']:.4f}")
        for row in found["laws"]
    ]
    moves = [(method, f"±{k:g}·β0", f"{move:.4f}") for method, by in found["stability"].items() for k, move in by.items()]
    cells = [
        (method, *(f"{row['blown']:.0%}, {number(row['best'])}" for row in rows)) for method, rows in found["ring"].items()
    ]
    shares = [
        (kl, method, *(f"{share:.2f}" for share in by.values()))
        for kl, some in found["bandit"].items()
        for method, by in some.items()
    ]
    settings = [f"{steps} steps, clip ±{clip:g}·β0" for steps, clip in itertools.product(STEPS, CLIPS)]
    return "\n".join([
        "Exact rounds: W1 distance of round 16 to two laws, β0 = 1.6.\n",
        table(("reward", "clip", "p_ref / (β0 − clamp(A))", "p_ref · exp(clamp(A) / β0)"), *ends),
        "Exact rounds: the largest W1 distance between rounds 11 to 14, one to the next; β0 = 0.3, R = tanh 2x.\n",
        table(("method", "clip", "still moves by"), *moves),
        f"The ring: share of {len(RATES) * len(STRENGTHS) * SEEDS} runs that blew up, and the best mean reward of a setting of "
        "which none did.\n",
        table(("method", *settings), *cells),
        "The bandit: share of 64 seeds that leave the local optimum.\n",
        table(("KL", "method", *(f"β = {beta:g}" for beta in BETAS)), *shares),
    ])  # fmt: skip


COLORS = {"ADRPO": "C0", "fixed β": "C1", "GRPO": "C1", "shuffled": "C2", "anti": "C3", "ORW-CFM-W2": "C4"}


def draw(found, file):
    """The three experiments side by side."""
    if not (plt := plots.pyplot(file)):
        return
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    for bound, (method, moves) in zip((1.0, 0.5), found["stability"].items()):
        left.semilogy(list(moves), list(moves.values()), color=COLORS[method], marker="o", label=method)
        left.axvline(bound, color=COLORS[method], linestyle=":", label=f"{method}: theory's bound")
    for method, rows in found["ring"].items():
        for clip, style in zip(CLIPS, ("-", "--")):
            shares = [row["blown"] for row in rows if row["clip"] == clip]
            middle.plot(STEPS, shares, style, color=COLORS[method], marker="o", label=method if clip == CLIPS[0] else None)
    for method in CONTESTANTS:
        for kl, style in zip(KINDS, ("-", "--")):
            shares = list(found["bandit"][kl][method].values())
            right.plot(BETAS, shares, style, color=COLORS[method], marker="o", label=method if kl == KINDS[0] else None)
    for axis, ticks in ((middle, STEPS), (right, BETAS)):
        axis.set_xscale("log")
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
    left.set_yticks(ticks := (0.001, 0.01, 0.1), map(str, ticks))
    left.set(title="exact rounds: do they come to rest?", xlabel="clip / β0", ylabel="W1 from a late round to the next")
    middle.set(
        title=f"ring: blow-ups (solid: clip ±β0; dashed: ±{CLIPS[1]}·β0)", xlabel="steps on one rollout", ylabel="share of runs"
    )
    right.set(title="bandit: escapes (solid: k3; dashed: k2)", xlabel="β", ylabel="share of 64 seeds")
    for axis in (left, middle, right):
        axis.legend(fontsize=8)
    plots.save(plt, figure, file)
