"""adrpo.py, language models: policy_loss and its KL by hand, over enumerated vocabularies, by finite differences."""

import itertools
import math

import pytest
import torch

from nano_adrpo import adrpo


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------- language models


def log_softmax(logits):
    return logits - torch.logsumexp(logits, dim=-1, keepdim=True)


LOGITS, REF = torch.tensor([0.4, -0.9, 1.1], dtype=torch.float64), torch.tensor([-0.3, 0.8, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("estimator, value, gradient", [
    ("k1", "reverse", "zero"), ("k2", None, "reverse"), ("k3", "reverse", "forward"),
])  # fmt: skip
def test_each_kl_estimator_over_an_enumerated_vocabulary(estimator, value, gradient):
    logits = LOGITS.clone().requires_grad_()
    logp, ref = log_softmax(logits), log_softmax(REF)
    p, q = logp.detach().exp(), ref.exp()
    reverse, forward = (logp.exp() * (logp - ref)).sum(), (q * (ref - logp)).sum()
    expected = (
        p * adrpo.kl_divergence(logp, ref, estimator)
    ).sum()  # the mean over sampled tokens, sampling not differentiated
    if value:
        assert expected.item() == pytest.approx(reverse.item(), abs=1e-12)
    grads = {
        name: torch.autograd.grad(loss, logits, retain_graph=True)[0]
        for name, loss in (("reverse", reverse), ("forward", forward))
    }
    assert torch.allclose(
        torch.autograd.grad(expected, logits)[0], grads.get(gradient, torch.zeros(3, dtype=torch.float64)), atol=1e-12
    )


def test_kl_estimators_by_hand():
    logp, ref = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert adrpo.kl_divergence(logp, ref, "k1").item() == 0.5 and adrpo.kl_divergence(logp, ref, "k2").item() == 0.125
    assert adrpo.kl_divergence(logp, ref).item() == pytest.approx(math.exp(-0.5) - 1 + 0.5)
    with pytest.raises(ValueError, match="'k4'; expected 'k1', 'k2' or 'k3'"):
        adrpo.kl_divergence(logp, ref, "k4")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kl_estimators_of_half_precision_are_computed_in_float32(dtype):
    logp, ref = torch.tensor([-1.0], dtype=dtype), torch.tensor([-1.0078125], dtype=dtype)  # both exact: log r = −1/128
    values = [adrpo.kl_divergence(logp, ref, kl) for kl in ("k1", "k2", "k3")]
    assert {value.dtype for value in values} == {torch.float32}
    expected = [1 / 128, 1 / 2**15, math.expm1(-1 / 128) + 1 / 128]
    assert [value.item() for value in values] == pytest.approx(expected, rel=1e-2)


def tokens(n=6, t=5, seed=0):
    logp, old, ref = (-draws(n, t, seed=seed + i).abs() for i in range(3))
    lengths = torch.tensor([5, 1, 3, 2, 4, 5])[:n]
    return logp, old, ref, (torch.arange(t) < lengths[:, None]).long(), draws(n, seed=seed + 3)


def test_policy_loss_by_hand():
    logp = torch.log(torch.tensor([[0.6, 0.1], [0.5, 0.3]], dtype=torch.float64))
    old = torch.log(torch.tensor([[0.4, 0.2], [0.5, 0.2]], dtype=torch.float64))
    ref = torch.log(torch.tensor([[0.3, 0.1], [0.5, 0.9]], dtype=torch.float64))
    mask, advantages, beta = torch.tensor([[1, 1], [1, 0]]), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    # ratios 1.5 (clipped to 1.2 for A > 0), 0.5 (A > 0: not clipped); 1. k3 at r = 0.5, 1; 1.
    first = [-2 * 1.2 + 0.5 * (0.5 - 1 + math.log(2)), -2 * 0.5 + 0]
    second = [1.0 + 0]
    sequences = adrpo.policy_loss(logp, old, ref, mask, advantages, beta)
    assert sequences.item() == pytest.approx((sum(first) / 2 + second[0]) / 2)
    assert adrpo.policy_loss(logp, old, ref, mask, advantages, beta, average="tokens").item() == pytest.approx(
        (sum(first) + second[0]) / 3
    )


@pytest.mark.parametrize(
    "ratio, advantage, slope",
    [(1.5, 1.0, 0), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0), (1.1, 1.0, -1.1), (0.9, -1.0, 0.9)],
)
def test_the_clip_acts_on_both_sides_and_only_there(ratio, advantage, slope):
    logp = torch.full((1, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    adrpo.policy_loss(logp, zero, zero, torch.ones(1, 1), torch.tensor([advantage]), beta=0.0).backward()
    assert logp.grad.item() == pytest.approx(slope)  # −A·ratio where not clipped, since d ratio / d logp = ratio


def test_before_any_update_the_ratio_is_one_and_the_gradient_is_reinforce():
    logp, _, _, mask, advantages = tokens()
    logp.requires_grad_()
    adrpo.policy_loss(logp, logp, logp, mask, advantages, beta=0.7).backward()
    # −A/(length·N) at every token of the mask; the k3 term starts with slope 0
    assert torch.allclose(logp.grad, -advantages[:, None] * mask / mask.sum(dim=1, keepdim=True) / 6)


def test_adrpo_grpo_is_grpo_with_another_beta():
    logp, old, ref, mask, advantages = tokens()
    beta = adrpo.adaptive_beta(advantages, 0.04)
    adaptive = adrpo.policy_loss(logp, old, ref, mask, advantages, beta)
    each = [
        adrpo.policy_loss(*(x[i : i + 1] for x in (logp, old, ref, mask, advantages)), beta=beta[i].item()) for i in range(6)
    ]
    assert adaptive.item() == pytest.approx(sum(each).item() / 6, rel=1e-12)
    zero = torch.zeros(6)
    adaptive, fixed = (
        adrpo.policy_loss(logp, old, ref, mask, zero, beta).item() for beta in (adrpo.adaptive_beta(zero, 0.04), 0.04)
    )
    assert adaptive == pytest.approx(fixed)


def exact_gradient(theta, rewards, beta_of, group_size=2):
    """The gradient of the expected loss of a one-token policy over every group, written out: a group (a_1 … a_G) has chance
    Π π(a_i); its loss is the mean of −A_i·log π(a_i) + beta_i·k3(a_i), samples held fixed."""
    p, q = torch.softmax(theta, 0), torch.softmax(REF, 0)
    total = torch.zeros_like(theta)
    for group in itertools.product(range(3), repeat=group_size):
        r = torch.tensor([rewards[a] for a in group], dtype=torch.float64)
        advantages = (r - r.mean()) / (r.std() + 1e-4)
        for a, advantage in zip(group, advantages):
            score = torch.eye(3, dtype=torch.float64)[a] - p  # ∇ log π(a)
            total += p[list(group)].prod() / group_size * (-advantage + beta_of(advantage) * (1 - q[a] / p[a])) * score
    return total


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_expected_gradient_over_all_completions_and_groups(adaptive):
    rewards, beta0 = [0.0, 1.0, 0.3], 0.4
    theta = LOGITS.clone().requires_grad_()
    logp, loss = log_softmax(theta), 0.0
    for group in itertools.product(range(3), repeat=2):
        chosen = logp[list(group)][:, None]  # [2, 1]
        advantages = adrpo.group_advantages(torch.tensor([rewards[a] for a in group], dtype=torch.float64), 2, normalize=True)
        beta = adrpo.adaptive_beta(advantages, beta0) if adaptive else beta0
        part = adrpo.policy_loss(chosen, chosen, log_softmax(REF)[list(group)][:, None], torch.ones(2, 1), advantages, beta)
        loss = loss + logp.detach().exp()[list(group)].prod() * part
    loss.backward()
    beta_of = (lambda a: beta0 - a.clamp(-beta0, beta0)) if adaptive else (lambda a: beta0)
    assert torch.allclose(theta.grad, exact_gradient(LOGITS, rewards, beta_of), atol=1e-12)


@pytest.mark.parametrize("average", ["sequences", "tokens"])
def test_micro_batches_and_padding_change_nothing(average):
    logp, old, ref, mask, advantages = tokens()
    beta = adrpo.adaptive_beta(advantages, 0.5)
    whole = adrpo.policy_loss(logp, old, ref, mask, advantages, beta, average=average)
    count = 6 if average == "sequences" else int(mask.sum())
    parts = [
        adrpo.policy_loss(*(x[s] for x in (logp, old, ref, mask, advantages, beta)), average=average, count=count)
        for s in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)
    wider = [
        torch.nn.functional.pad(x, (0, 3), value=value) for x, value in ((logp, -1e9), (old, -1.0), (ref, -math.inf), (mask, 0))
    ]
    assert adrpo.policy_loss(*wider, advantages, beta, average=average).item() == pytest.approx(whole.item(), rel=1e-12)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = adrpo.policy_loss(*(x[order] for x in (logp, old, ref, mask, advantages, beta)), average=average)
    assert shuffled.item() == pytest.approx(whole.item(), rel=1e-12)


def test_padding_gets_no_gradient_and_an_empty_completion_counts_as_zero():
    logp, old, ref, mask, advantages = tokens()
    mask[2] = 0
    logp.requires_grad_()
    loss = adrpo.policy_loss(logp, old, ref, mask, advantages, 0.3)
    loss.backward()
    assert torch.isfinite(loss) and logp.grad[mask == 0].abs().max() == 0 and (logp.grad[mask == 1] != 0).any()


@pytest.mark.parametrize("advantage, loss", [(1.0, -1.2), (0.0, 0.0)])
def test_a_ratio_that_would_overflow_is_clipped_and_has_no_gradient(advantage, loss):
    logp, old = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[-100.0]])
    found = adrpo.policy_loss(logp, old, old, torch.ones(1, 1), torch.tensor([advantage]), 0.0)
    found.backward()
    assert found.item() == pytest.approx(loss) and logp.grad.item() == 0


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_policy_gradients_agree_with_finite_differences(kl):
    logp, old, ref, mask, advantages = tokens()
    old = logp + 0.05 * draws(6, 5, seed=9)  # inside the clip, where the loss is smooth
    beta = draws(6, seed=8)
    assert torch.autograd.gradcheck(
        lambda x: adrpo.policy_loss(x, old, ref, mask, advantages, beta, kl=kl), logp.requires_grad_()
    )


def test_only_the_policy_gets_a_gradient_and_inputs_stay_as_they_were():
    logp, old, ref, mask, advantages = tokens()
    tensors = [x.requires_grad_() for x in (logp, old, ref)]
    before = [x.detach().clone() for x in (*tensors, mask, advantages)]
    adrpo.policy_loss(*tensors, mask, advantages, 0.1).backward()
    assert logp.grad is not None and old.grad is None and ref.grad is None
    assert all(torch.equal(a, b) for a, b in zip((*tensors, mask, advantages), before))


def test_advantages_and_coefficients_are_constants_of_the_loss():
    # Rewards of a network that was called outside no_grad: the policy's gradient is as if they were numbers, theirs is none.
    rewards = draws(6).requires_grad_()
    advantages = adrpo.group_advantages(rewards, 3, normalize=True)
    weight, beta = adrpo.adaptive_coefficients(advantages, 0.5)
    logp, old, ref, mask, _ = tokens()
    v = draws(6, 4).requires_grad_()
    logp.requires_grad_()

    def gradients(*constants):
        loss = adrpo.policy_loss(logp, old, ref, mask, constants[0], constants[1])
        loss = loss + adrpo.flow_loss(v, draws(6, 4, seed=1), draws(6, 4, seed=2), constants[2], constants[1])
        return torch.autograd.grad(loss, [logp, v, rewards], allow_unused=True)

    attached, plain = gradients(advantages, beta, weight), gradients(advantages.detach(), beta.detach(), weight.detach())
    assert attached[2] is None and all(torch.equal(a, b) for a, b in zip(attached[:2], plain))


def test_policy_loss_refuses_what_would_broadcast():
    logp, old, ref, mask, advantages = tokens()
    for arguments in (
        (logp, old[:, :1], ref, mask, advantages, 0.1),
        (logp, old, ref, mask, advantages[:1], 0.1),
        (logp, old, ref, mask, advantages, torch.ones(5)),
    ):
        with pytest.raises(ValueError, match="shape"):
            adrpo.policy_loss(*arguments)
    for shape in ((6,), (6, 6, 6)):  # one number a sequence, or all logits: [N] advantages would broadcast into another loss
        with pytest.raises(ValueError, match=r"expected the same \[N, T\]"):
            adrpo.policy_loss(*(torch.zeros(shape) for _ in range(3)), torch.ones(shape), advantages, 0.1)
    with pytest.raises(ValueError, match="average is 'batch'"):
        adrpo.policy_loss(logp, old, ref, mask, advantages, 0.1, average="batch")
