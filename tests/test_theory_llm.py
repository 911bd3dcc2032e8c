"""docs/theory.md, language models: an enumerated bandit (K one-token completions, every group of size G) follows the expected
gradient of policy_loss until it rests. Where it should rest comes from closed forms and one-dimensional equations."""

import itertools
import math
from pathlib import Path

import pytest
import torch

import nano_adrpo
from nano_adrpo import adrpo

THEORY = (Path(nano_adrpo.__file__).parents[1] / "docs" / "theory.md").read_text(encoding="utf-8")
F64 = torch.float64
REF, RIGHT = (0.7, 0.2, 0.1), (0.0, 1.0, 1.0)  # one wrong arm, two right ones
GRADED = (0.0, 0.3, 1.0)  # p_ref as above


def enumerate_groups(arms, size):
    """Every group, order left out: its arms [M, G] and the log of the number of its orders [M]."""
    groups = list(itertools.combinations_with_replacement(range(arms), size))
    orders = [math.lgamma(size + 1) - sum(math.lgamma(group.count(a) + 1) for a in range(arms)) for group in groups]
    return torch.tensor(groups), torch.tensor(orders, dtype=F64)


class Bandit:
    def __init__(self, rewards, reference, size):
        self.rewards, self.ref = torch.tensor(rewards, dtype=F64), torch.tensor(reference, dtype=F64).log()
        self.groups, self.orders = enumerate_groups(len(reference), size)
        self.size = size

    def slope(self, logits, beta, kl="k3", adaptive=False, normalize=True, clip=None, shift=None):
        """The gradient of the expected loss in the logits, each divided by its arm's probability (the natural gradient)."""
        logits = logits.clone().requires_grad_()
        logp = logits.log_softmax(0)
        # The loss is homogeneous in (A, beta): a group's probability, held fixed, goes in there, and `count` undoes the mean.
        weight = (self.orders + logp.detach()[self.groups].sum(1)).exp().repeat_interleave(self.size)  # [M·G]
        arms = self.groups.flatten()
        advantages = adrpo.group_advantages(self.rewards[arms], self.size, normalize)
        coefficient = adrpo.adaptive_beta(advantages, beta, clip) if adaptive else torch.full_like(advantages, beta)
        if shift is not None:
            advantages = advantages + shift(advantages)
        chosen, ref, mask = logp[arms, None], self.ref[arms, None], torch.ones(len(arms), 1)
        estimated = weight * coefficient if kl != "exact" else 0.0
        estimator = "k3" if kl == "exact" else kl
        loss = adrpo.policy_loss(chosen, chosen, ref, mask, weight * advantages, estimated, kl=estimator, count=self.size)
        if kl == "exact":  # the divergence over all arms, the same for every sample of the group
            loss = loss + (weight * coefficient).sum() / self.size * (logp.exp() * (logp - self.ref)).sum()
        return torch.autograd.grad(loss, logits)[0] / logp.detach().exp()

    def rest(self, beta, kl="k3", start=None, tolerance=1e-10, **options):
        """-> log-probabilities where the exact gradient vanishes, from the reference unless told otherwise."""
        logp = self.ref if start is None else torch.tensor(start, dtype=F64).log()
        step = 0.3 if kl == "k3" else min(0.3 / beta, 3.0)
        for _ in range(2000):
            slope = self.slope(logp, beta, kl, **options)
            logp = (logp - step * slope.clamp(-10, 10)).log_softmax(0)
            if slope.abs().max() < tolerance:
                return logp
        raise AssertionError(f"still moving: slope {slope.tolist()}")


def zero_of(f, low, high):
    """Bisection; f falls through 0 between low and high."""
    assert f(low) > 0 > f(high)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return middle


def tilted(reference, exponents):
    return (torch.tensor(reference, dtype=F64).log() + torch.as_tensor(exponents, dtype=F64)).softmax(0)


def logit(s):
    return math.log(s / (1 - s))


# ------------------------------------------------------------------------------------ advantages in the reward's units


@pytest.mark.parametrize("kl", ["k2", "exact"])
@pytest.mark.parametrize("size", [2, 5])
def test_unnormalised_reverse_kl_is_the_optimum_of_eq_1_up_to_the_own_sample_in_the_mean(kl, size):
    # A_i = R_i − mean holds R_i itself at 1/G: given the arm, A is (1 − 1/G)·(R − E R) on average.
    beta = 0.4
    end = Bandit(GRADED, REF, size).rest(beta, kl, normalize=False)
    expected = tilted(REF, [(1 - 1 / size) * r / beta for r in GRADED])
    assert torch.allclose(end.exp(), expected, atol=1e-8)


@pytest.mark.parametrize("beta", [0.04, 0.4])
def test_unnormalised_k3_is_a_ratio_not_an_exponential(beta):
    size = 4
    c = 1 - 1 / size
    mu = zero_of(lambda mu: sum(q * beta / (mu - c * r) for q, r in zip(REF, GRADED)) - 1, c + 1e-12, c + beta)
    expected = [q * beta / (mu - c * r) for q, r in zip(REF, GRADED)]
    end = Bandit(GRADED, REF, size).rest(beta, "k3", normalize=False).exp()
    assert end.tolist() == pytest.approx(expected, abs=1e-8)
    # μ is β + c·E[R] at the end, as the page says
    assert mu == pytest.approx(beta + c * sum(p * r for p, r in zip(expected, GRADED)), abs=1e-9)


# ------------------------------------------------------------------------------------------------ normalised advantages


def test_groups_of_two_see_ranks_only():
    # ±1/√2 whatever the two rewards are: the reward is replaced by how often the arm wins.
    beta, end = 0.3, Bandit(GRADED, REF, 2).rest(0.3, "k2")
    p = end.exp().tolist()
    wins = [0.0 - p[1] - p[2], p[0] - p[2], p[0] + p[1]]
    assert torch.allclose(end.exp(), tilted(REF, [w / (math.sqrt(2) * beta) for w in wins]), atol=1e-3)  # the 1e-4 beside std
    other = Bandit((-7.0, 40.0, 41.0), REF, 2).rest(beta, "k2")
    assert torch.allclose(end.exp(), other.exp(), atol=1e-3)


def population_end(beta):
    """p ∝ p_ref·exp(R/(β·σ)), σ the standard deviation of R under p itself: one equation for σ."""

    def law(sigma):
        return tilted(REF, [r / (beta * sigma) for r in GRADED])

    def excess(sigma):
        p, r = law(sigma), torch.tensor(GRADED, dtype=F64)
        return sigma - ((p * r * r).sum() - (p * r).sum() ** 2).sqrt().item()

    return law(zero_of(lambda x: -excess(x), 0.3, 0.6))


def test_large_groups_divide_beta_by_the_policys_own_spread():
    beta = 2.0
    expected = population_end(beta)
    ends = [Bandit(GRADED, REF, size).rest(beta, "k2", tolerance=1e-7).exp() for size in (10, 40)]
    errors = [(end - expected).abs().max().item() for end in ends]
    assert errors[1] < 0.01 and 3 < errors[0] / errors[1] < 6  # the error falls like 1/G


def bound(beta):
    return 2 * math.asinh(beta) - 2 * math.sqrt(1 + beta**2) / beta


def test_large_groups_with_a_reverse_kl_rest_only_while_beta_is_large():
    # In the limit logit(s) − 1/(β·√(s(1 − s))) = logit(s_ref); its left side is at most bound(β), here against a scan.
    for beta in (0.04, 0.5, 3.0):
        scan = (logit(i / 1e5) - 1 / (beta * math.sqrt(i / 1e5 * (1 - i / 1e5))) for i in range(1, 100_000))
        assert max(scan) == pytest.approx(bound(beta), rel=1e-4)
    reference, size = (0.7, 0.3), 200
    assert zero_of(lambda beta: logit(0.3) - bound(beta), 0.5, 3) == pytest.approx(1.082, abs=5e-4)
    bandit, top = Bandit((0.0, 1.0), reference, size), (size - 1) / math.sqrt(size)

    limit = zero_of(lambda z: logit(0.3) + (1 + math.exp(z)) / math.exp(z / 2) / 1.5 - z, logit(0.3), 1.0)
    assert logit(bandit.rest(1.5, "k2", tolerance=1e-7)[1].exp().item()) == pytest.approx(limit, abs=0.03)
    # Below it the policy runs to where a lone loser is rare; its A = −(G − 1)/√G is the largest there is, and that stops it.
    for beta, start in ((0.8, None), (1.5, (1e-5, 1 - 1e-5))):
        end = bandit.rest(beta, "k2", start=start, tolerance=1e-7)
        assert (end[1] - end[0]).item() == pytest.approx(logit(0.3) + top / beta, rel=0.02)


def test_large_groups_with_k3_always_rest():
    beta, reference = 0.5, (0.7, 0.3)
    wrong = zero_of(lambda e: 0.7 - e - math.sqrt(e * (1 - e)) / beta, 1e-9, 0.5)
    assert Bandit((0.0, 1.0), reference, 200).rest(beta, "k3", tolerance=1e-7)[0].exp().item() == pytest.approx(wrong, rel=0.03)
    small = zero_of(lambda e: 0.7 - e - math.sqrt(e * (1 - e)) / 0.04, 1e-9, 0.5)
    assert small == pytest.approx((0.04 * 0.7) ** 2, rel=0.01)


def shares(size, s):
    return [math.comb(size, k) * s**k * (1 - s) ** (size - k) for k in range(size + 1)]


def gap(size, s):
    """E[A | right] − E[A | wrong], rewards 0 and 1, k of the group right."""
    total = 0.0
    for k in range(1, size):
        deviation = math.sqrt(k * (size - k) / (size * (size - 1)))
        total += shares(size, s)[k] * (k / size) * (1 - k / size) / (deviation + 1e-4)
    return total / (s * (1 - s))


def right_share(beta, kl, adaptive, size, s_ref, clip=None):
    """Where right and wrong arms balance: b_wrong·h_wrong − b_right·h_right + gap = 0, in z = logit(s)."""
    clip = beta if clip is None else clip

    def balance(z):
        s, e = 1 / (1 + math.exp(-z)), 1 / (1 + math.exp(z))
        log_right, log_wrong = -math.log1p(math.exp(-z)) - math.log(s_ref), -math.log1p(math.exp(z)) - math.log(1 - s_ref)
        h_right, h_wrong = log_right, log_wrong
        if kl == "k3":
            h_right, h_wrong = 1 - math.exp(-log_right), 1 - math.exp(-log_wrong)
        b_right = b_wrong = beta
        if adaptive:  # |A| ≥ 1/√G is beyond the clip: β0 − c where the group has a loser, β0 + c where it has a winner
            b_right, b_wrong = beta - clip * (1 - s ** (size - 1)), beta + clip * (1 - e ** (size - 1))
        if adaptive and kl == "exact":
            b_right = b_wrong = s * b_right + e * b_wrong
        exact_gap = gap(size, s) if e > 1e-12 else (size - 1) / size / (1 / math.sqrt(size) + 1e-4)
        return b_wrong * h_wrong - b_right * h_right + exact_gap

    return zero_of(balance, -3.0, 100.0)


def law(z):
    """Wrong arm, KL to the reference, entropy, where the right arms keep the reference's proportions."""
    e = 1 / (1 + math.exp(z))
    p = [e, (1 - e) * 2 / 3, (1 - e) / 3]
    return e, sum(a * math.log(a / q) for a, q in zip(p, REF)), -sum(a * math.log(a) for a in p)


METHODS = {"GRPO β0": (1, False), "GRPO 2β0": (2, False), "ADRPO β0": (1, True)}


def test_a_binary_rewards_gap_at_its_three_marks():
    assert gap(2, 0.3) == pytest.approx(1 / math.sqrt(2), rel=1e-3)  # groups of two: whatever the share
    assert gap(400, 0.3) == pytest.approx(1 / math.sqrt(0.3 * 0.7), rel=0.01)  # large groups: 1/σ
    assert gap(8, 1 - 1e-6) == pytest.approx(7 / math.sqrt(8), rel=1e-3)  # a lone loser


@pytest.mark.parametrize("beta0", [0.04, 0.25])
@pytest.mark.parametrize("kl", ["k3", "k2", "exact"])
def test_the_table_of_ends(beta0, kl):
    row, wrongs, entropies = [], [], []
    bandit = Bandit(RIGHT, REF, 8)
    for times, adaptive in ((1, False), (1, True), (2, False)):  # GRPO at β0, ADRPO-GRPO at β0, GRPO at 2β0
        wrong, divergence, entropy = law(right_share(times * beta0, kl, adaptive, 8, 0.3))
        end = bandit.rest(times * beta0, kl, adaptive=adaptive).tolist()
        # The right arms keep the reference's 2 : 1.
        assert end == pytest.approx([math.log(wrong), *(math.log((1 - wrong) * x / 3) for x in (2, 1))], abs=1e-6)
        row.append(f"{wrong:.2g} · {divergence:.3f} · {entropy:.3f}")
        wrongs.append(wrong)
        entropies.append(entropy)
    assert f"| {beta0} | {kl} | {' | '.join(row)} |" in THEORY
    if kl != "exact":
        assert wrongs[0] < wrongs[1] < wrongs[2] and entropies[0] <= entropies[1] <= entropies[2]


@pytest.mark.parametrize("beta", [0.04, 0.08, 0.25, 0.5])
def test_the_tables_optimum_of_eq_1(beta):
    wrong, divergence, entropy = law(logit(0.3) + 1 / beta)
    cell = f"{wrong:.2g} · {divergence:.3f} · {entropy:.3f}"
    row = next(line for line in THEORY.splitlines() if line.startswith(f"| {0.04 if beta < 0.1 else 0.25} | π_ref"))
    assert row.split(" | ")[2 if beta in (0.04, 0.25) else 4].removesuffix(" |") == cell


@pytest.mark.parametrize("clip", [0.5, 1, 2])
def test_with_clip_c_the_end_is_near_grpo_at_beta0_plus_c(clip):
    beta0, bandit = 0.04, Bandit(RIGHT, REF, 8)
    end = bandit.rest(beta0, "k3", adaptive=True, clip=clip * beta0)[0].exp().item()
    other = bandit.rest(beta0 * (1 + clip), "k3")[0].exp().item()
    assert 0.97 < end / other < 1
    assert end == pytest.approx(law(right_share(beta0, "k3", True, 8, 0.3, clip * beta0))[0], abs=1e-8)


# ---------------------------------------------------------------------------------------- what the adaptive coefficient does


@pytest.mark.parametrize("s", [0.3, 0.9, 0.99])
def test_what_a_right_and_a_wrong_arm_feel(s):
    # One arm fixed, the G − 1 others enumerated: the mean coefficient of Eq. 7 over the groups that hold the arm.
    beta0, size = 0.04, 8
    for arm, expected in ((1.0, beta0 * s ** (size - 1)), (0.0, beta0 * (2 - (1 - s) ** (size - 1)))):
        felt = 0.0
        for k, share in enumerate(shares(size - 1, s)):
            rewards = torch.tensor([arm] + [1.0] * k + [0.0] * (size - 1 - k), dtype=F64)
            felt += share * adrpo.adaptive_beta(adrpo.group_advantages(rewards, size, normalize=True), beta0)[0].item()
        assert felt == pytest.approx(expected, rel=1e-9)


def test_a_wider_clip_repels_the_right_arms_from_the_references_proportions():
    def imbalance(clip, steps):
        logp, bandit = torch.tensor([0.19, 0.55, 0.26], dtype=F64).log(), Bandit(RIGHT, REF, 8)
        for _ in range(steps):
            logp = (logp - 0.3 * bandit.slope(logp, 0.25, "k3", adaptive=True, clip=clip)).log_softmax(0)
        return abs((logp[1] - logp[2]).item() - math.log(2))

    assert imbalance(0.25, 100) < 0.5 * imbalance(0.25, 0) and imbalance(0.5, 100) > 1.5 * imbalance(0.5, 0)


@pytest.mark.parametrize("reference, rewards", [(REF, RIGHT), (REF, GRADED)])
def test_an_exact_kl_hardly_feels_the_adaptive_coefficient(reference, rewards):
    # Σ A = 0 over a group: with A never clamped (|A| ≤ (G − 1)/√G = 1.5) the coefficient of the group is β0.
    bandit = Bandit(rewards, reference, 4)
    ends = [bandit.rest(1.6, "exact", adaptive=adaptive) for adaptive in (False, True)]
    assert torch.allclose(*ends, atol=1e-8)


def arm_means(p, rewards, size, beta0=0.0, clip=0.0):
    """Ā and b of each arm, E[A | arm] and E[β0 − clamp(A) | arm], every ordered group spelt out."""
    means = []
    for arm in range(len(p)):
        A_mean = b_mean = 0.0
        for others in itertools.product(range(len(p)), repeat=size - 1):
            values = [rewards[a] for a in (arm, *others)]
            mean = sum(values) / size
            deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (size - 1))
            A = (values[0] - mean) / (deviation + 1e-4)
            A_mean += math.prod(p[a] for a in others) * A
            b_mean += math.prod(p[a] for a in others) * (beta0 - min(max(A, -clip), clip))
        means.append((A_mean, b_mean))
    return means


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_graded_rewards_rest_where_c_says(kl, adaptive):
    beta0 = 0.3  # clamps some of the advantages, not all
    p = Bandit(GRADED, REF, 4).rest(beta0, kl, adaptive=adaptive).exp().tolist()
    h = [math.log(x / q) if kl == "k2" else 1 - q / x for x, q in zip(p, REF)]
    balance = [b * slope - A for (A, b), slope in zip(arm_means(p, GRADED, 4, beta0, beta0 if adaptive else 0.0), h)]
    assert max(balance) - min(balance) < 1e-8
    if kl == "k3" and not adaptive:
        assert balance == pytest.approx([0.0] * 3, abs=1e-8)  # so π = π_ref / (1 − Ā/β)


@pytest.mark.parametrize("beta0", [1.6, 3.0])
def test_never_clamped_it_resembles_the_flows_fixed_point(beta0):
    # (β0 − Ā)·log(p/p_ref) = Ā + λ with one λ for all arms, against β0·log(p/p_ref) = Ā + λ for fixed β
    bandit = Bandit(GRADED, REF, 4)
    laws = {}
    for adaptive in (False, True):
        laws[adaptive] = p = bandit.rest(beta0, "k2", adaptive=adaptive).exp().tolist()
        A = [A for A, _ in arm_means(p, GRADED, 4)]
        multiplier = [(beta0 - a * adaptive) * math.log(x / q) - a for a, x, q in zip(A, p, REF)]
        assert max(multiplier) - min(multiplier) < 1e-8
    # Further and wider, as the flow's law: the best arm gains, and the best and the worst gain on the middle.
    assert laws[True][2] > laws[False][2]
    assert all(laws[True][arm] / laws[True][1] > laws[False][arm] / laws[False][1] for arm in (0, 2))
    divergence = {k: sum(x * math.log(x / q) for x, q in zip(p, REF)) for k, p in laws.items()}
    assert divergence[True] > divergence[False]


def test_where_good_answers_are_common_it_ends_nearer_to_the_reference():
    reference = [0.1, 0.3, 0.6]
    ends = [Bandit(GRADED, reference, 4).rest(3.0, "k2", adaptive=adaptive).exp().tolist() for adaptive in (False, True)]
    grpo, adrpo = (sum(x * math.log(x / q) for x, q in zip(p, reference)) for p in ends)
    assert adrpo < 0.8 * grpo


@pytest.mark.parametrize("adaptive", [False, True])
def test_k1_regularises_nothing(adaptive):
    bandit, beta0 = Bandit(GRADED, REF, 4), 0.3
    logits = torch.tensor([0.2, -0.4, 0.1], dtype=F64)
    slope = bandit.slope(logits, beta0, "k1", adaptive=adaptive)
    # Fixed β: no trace of it. Adaptive: the clamped advantages stand beside A in the policy gradient.
    plain = bandit.slope(logits, 0.0, shift=(lambda A: A.clamp(-beta0, beta0)) if adaptive else None)
    assert torch.allclose(slope, plain, atol=1e-12)
    logp = bandit.ref
    for _ in range(300):
        logp = (logp - 0.3 * bandit.slope(logp, beta0, "k1", adaptive=adaptive)).log_softmax(0)
    assert (logp[:2] < math.log(1e-20)).all()


@pytest.mark.parametrize("start", [(0.98, 0.01, 0.01), (0.02, 0.08, 0.9)])
def test_the_end_does_not_depend_on_the_start(start):
    bandit = Bandit(GRADED, REF, 4)
    for adaptive in (False, True):
        ends = [bandit.rest(0.2, "k3", start=s, adaptive=adaptive, tolerance=1e-9) for s in (None, start)]
        assert torch.allclose(*ends, atol=1e-6)
