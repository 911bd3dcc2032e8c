"""The losses against numbers by hand, closed forms and invariances."""

import math

import pytest
import torch

from nano_adrpo import adrpo


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------------ advantages and adaptive β


def test_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 2.0, 6.0, -1.0, -1.0, 5.0])
    assert adrpo.group_advantages(rewards, 3).tolist() == [-2.0, -1.0, 3.0, -2.0, -2.0, 4.0]
    normalized = adrpo.group_advantages(rewards, 3, normalize=True)
    # unbiased: the squares of (−2, −1, 3) sum to 14, of (−2, −2, 4) to 24
    expected = [a / (math.sqrt(7) + 1e-4) for a in (-2, -1, 3)] + [a / (math.sqrt(12) + 1e-4) for a in (-2, -2, 4)]
    assert normalized.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [0.1, 1e7 + 1, -3.3])
@pytest.mark.parametrize("normalize", [False, True])
def test_equal_rewards_give_exactly_zero(value, normalize):
    assert adrpo.group_advantages(torch.full((21,), value), 7, normalize).tolist() == [0.0] * 21


def test_a_common_offset_changes_nothing():
    rewards = torch.tensor([0.0, 0.5, 1.0, 2.0])
    assert torch.equal(adrpo.group_advantages(rewards + 1024, 4), adrpo.group_advantages(rewards, 4))


def test_advantages_follow_their_group_through_a_permutation():
    rewards = draws(12)
    order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11])
    assert torch.equal(adrpo.group_advantages(rewards[order], 4), adrpo.group_advantages(rewards, 4)[order])


def test_advantages_are_float32_for_half_precision_and_integers():
    assert adrpo.group_advantages(torch.tensor([1, 2]), 2).tolist() == [-0.5, 0.5]
    assert adrpo.group_advantages(torch.tensor([1, 2], dtype=torch.bfloat16), 2).dtype == torch.float32


@pytest.mark.parametrize(
    "rewards, group_size", [(torch.zeros(4), 1), (torch.zeros(5), 2), (torch.zeros(0), 2), (torch.zeros(2, 2), 2)]
)
def test_rewards_that_form_no_groups_are_refused(rewards, group_size):
    with pytest.raises(ValueError, match="expected"):
        adrpo.group_advantages(rewards, group_size)


def test_adaptive_beta_at_and_beyond_the_clamp():
    advantages = torch.tensor([-9.0, -0.04, -0.01, 0.0, 0.01, 0.04, 9.0])
    assert adrpo.adaptive_beta(advantages, 0.04).tolist() == pytest.approx([0.08, 0.08, 0.05, 0.04, 0.03, 0.0, 0.0])
    assert adrpo.adaptive_beta(advantages, 0.04, 0.02).tolist() == pytest.approx([0.06, 0.06, 0.05, 0.04, 0.03, 0.02, 0.02])
    assert adrpo.adaptive_beta(advantages, 0.04, (-1.0, 0.02)).tolist() == pytest.approx(
        [1.04, 0.08, 0.05, 0.04, 0.03, 0.02, 0.02]
    )
    assert adrpo.adaptive_beta(torch.zeros(3), 0.5).tolist() == [0.5] * 3


@pytest.mark.parametrize("beta0, clip", [(0, None), (-1, None), (float("nan"), None), (1, (2, 1)), (1, -1), (1, float("nan"))])
def test_a_bad_strength_or_range_is_refused(beta0, clip):
    with pytest.raises(ValueError, match="expected"):
        adrpo.adaptive_beta(torch.zeros(2), beta0, clip)


# -------------------------------------------------------------------------------------------------------------- flow losses


def test_flow_loss_by_hand():
    v, u, v_ref = (
        torch.tensor([[1.0, 3.0], [0.0, 2.0]]),
        torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
        torch.tensor([[1.0, 1.0], [2.0, 2.0]]),
    )
    # |v − u|² = (1 + 4)/2, (0 + 4)/2; |v − v_ref|² = (0 + 4)/2, (4 + 0)/2
    loss = adrpo.flow_loss(v, u, v_ref, weight=torch.tensor([2.0, -1.0]), beta=torch.tensor([0.5, 3.0]))
    assert loss.item() == (2 * 2.5 + 0.5 * 2 - 1 * 2 + 3 * 2) / 2


def test_a_constant_offset_gives_its_divergence_and_gradient():
    v_ref = draws(5, 3, 4, 4)
    v = (v_ref + 0.3).requires_grad_()
    loss = adrpo.flow_loss(v, draws(5, 3, 4, 4, seed=1), v_ref, weight=0.0, beta=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(2 * 0.09)
    assert torch.allclose(v.grad, torch.full_like(v, 2 * 2 * 0.3 / v.numel()))
    assert adrpo.flow_loss(v_ref, v_ref + 1, v_ref, weight=0.0, beta=2.0).item() == 0.0


def test_the_gradient_vanishes_at_the_stated_minimum():
    # n samples met at one point: v is one vector for all of them, and v* = v_ref + mean(A·(u − v_ref)) / β0.
    n, beta0 = 64, 1.7
    u, v_ref, advantages = draws(n, 6), draws(6, seed=1), adrpo.group_advantages(draws(n, seed=2), 8)
    v = (v_ref + (advantages[:, None] * (u - v_ref)).mean(dim=0) / beta0).requires_grad_()
    a, b = adrpo.adaptive_coefficients(advantages, beta0, clip=100.0)
    adrpo.flow_loss(v.expand(n, 6), u, v_ref.expand(n, 6), a, b).backward()
    assert v.grad.abs().max() < 1e-15


@pytest.mark.parametrize("advantage", [-5.0, 0.0, 0.7, 5.0])
def test_the_curvature_is_beta0_whatever_the_advantage(advantage):
    beta0, dim = 1.3, 4
    a = torch.tensor([advantage], dtype=torch.float64)
    beta = adrpo.adaptive_beta(a, beta0, 10.0)
    hessian = torch.autograd.functional.hessian(
        lambda v: adrpo.flow_loss(v[None], draws(1, dim), draws(1, dim, seed=1), a, beta), draws(dim, seed=2)
    )
    assert torch.allclose(hessian, 2 * beta0 / dim * torch.eye(dim, dtype=torch.float64))  # |·|² is a mean, so 2/dim


def test_zero_advantages_are_the_fixed_beta_baseline():
    v, u, v_ref = (draws(6, 5, seed=seed) for seed in range(3))
    v.requires_grad_()
    weight = torch.zeros(6, dtype=torch.float64)
    adaptive = adrpo.flow_loss(v, u, v_ref, weight, adrpo.adaptive_beta(weight, 0.8))
    fixed = adrpo.flow_loss(v, u, v_ref, weight, 0.8)
    assert torch.equal(adaptive, fixed)
    assert torch.equal(*(torch.autograd.grad(loss, v)[0] for loss in (adaptive, fixed)))


def test_a_one_hot_weight_is_that_samples_loss():
    v, u, v_ref = (draws(4, 2, 3, seed=seed) for seed in range(3))
    for i in range(4):
        one = torch.eye(4, dtype=torch.float64)[i]
        expected = sum((v[i, a, b].item() - u[i, a, b].item()) ** 2 for a in range(2) for b in range(3)) / 6 / 4
        assert adrpo.flow_loss(v, u, v_ref, one, 0.0).item() == pytest.approx(expected)


def test_the_order_and_the_split_of_the_batch_change_nothing():
    v, u, v_ref, weight, beta = *(draws(6, 5, seed=seed) for seed in range(3)), draws(6, seed=3), draws(6, seed=4)
    whole = adrpo.flow_loss(v, u, v_ref, weight, beta)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert adrpo.flow_loss(v[order], u[order], v_ref[order], weight[order], beta[order]).item() == pytest.approx(
        whole.item(), rel=1e-14
    )
    thirds = [adrpo.flow_loss(v[s], u[s], v_ref[s], weight[s], beta[s], count=6) for s in (slice(0, 2), slice(2, 6))]
    assert sum(thirds).item() == pytest.approx(whole.item(), rel=1e-14)
    pairs = [adrpo.flow_dpo_loss(v[s], u[s], v_ref[s], [0], [1], 2.0, count=3) for s in (slice(0, 2), slice(2, 4), slice(4, 6))]
    together = adrpo.flow_dpo_loss(v, u, v_ref, slice(0, None, 2), slice(1, None, 2), 2.0)
    assert sum(pairs).item() == pytest.approx(together.item(), rel=1e-14)


def test_both_coefficients_come_from_one_clamped_advantage():
    # The mistake that this prevents: A clamped to ±8 beside a β0 − A clamped to ±β0 add up to −6 … 8 where β0 is 1.
    advantages = torch.tensor([-20.0, -3.0, 0.5, 7.0, 20.0])
    for clip in (8, (-8, 8), (-2.0, 9.0), None):
        weight, beta = adrpo.adaptive_coefficients(advantages, 1.0, clip)
        assert torch.equal(weight + beta, torch.ones(5))
        assert torch.equal(beta, adrpo.adaptive_beta(advantages, 1.0, clip))
    assert adrpo.adaptive_coefficients(advantages, 1.0, 8)[0].tolist() == [-8, -3, 0.5, 7, 8]


def test_gradients_agree_with_finite_differences():
    u, v_ref, weight, beta = draws(4, 3, seed=1), draws(4, 3, seed=2), draws(4, seed=3), draws(4, seed=4)
    v = draws(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: adrpo.flow_loss(v, u, v_ref, weight, beta), v)
    pairs = torch.tensor([0, 2]), torch.tensor([3, 1])
    assert torch.autograd.gradcheck(lambda v: adrpo.flow_dpo_loss(v, u, v_ref, *pairs, 2.0), v)


def test_the_reference_gets_no_gradient_and_inputs_stay_as_they_were():
    tensors = [draws(4, 3, seed=seed).requires_grad_() for seed in range(3)]
    before = [tensor.detach().clone() for tensor in tensors]
    rewards = draws(4, seed=5)
    kept = rewards.clone()
    weight, _ = adrpo.adaptive_coefficients(adrpo.group_advantages(rewards, 2, normalize=True), 0.1)
    (
        adrpo.flow_loss(*tensors, weight, adrpo.adaptive_beta(rewards, 0.1)) + adrpo.flow_dpo_loss(*tensors, [0], [1], 1.0)
    ).backward()
    assert tensors[0].grad is not None and tensors[2].grad is None
    assert all(torch.equal(a, b) for a, b in zip(tensors, before)) and torch.equal(rewards, kept)


def test_bfloat16_velocities_are_compared_in_float32():
    v, u = torch.full((2, 1000), 1.0, dtype=torch.bfloat16), torch.full((2, 1000), 0.90234375, dtype=torch.bfloat16)
    loss = adrpo.flow_loss(v, u, v, 1.0, 1.0)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0.09765625**2, rel=1e-6)


@pytest.mark.parametrize(
    "shapes, coefficient",
    [
        (((2, 3), (2, 3), (2, 4)), 1.0),
        (((2, 3), (3,), (2, 3)), 1.0),
        (((2, 3),) * 3, torch.ones(3)),
        (((2, 3),) * 3, torch.ones(2, 1)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(shapes, coefficient):
    with pytest.raises(ValueError, match="shape"):
        adrpo.flow_loss(*(torch.zeros(shape) for shape in shapes), coefficient, 0.0)


def test_interpolate_by_hand():
    x0, x1 = torch.tensor([[[0.0, 2.0]], [[4.0, 4.0]]]), torch.tensor([[[4.0, 4.0]], [[0.0, 8.0]]])
    x_t, u = adrpo.interpolate(x0, x1, torch.tensor([0.25, 1.0]))
    assert x_t.tolist() == [[[1.0, 2.5]], [[0.0, 8.0]]] and u.tolist() == [[[4.0, 2.0]], [[-4.0, 4.0]]]


# ---------------------------------------------------------------------------------------------------------------- baselines


def test_reward_weights_have_mean_one_in_each_group():
    rewards = torch.tensor([0.0, 1.0, 2.0, 700.0, 700.0, 701.0])
    weights = adrpo.reward_weights(rewards, tau=2.0, group_size=3)
    e = [math.exp(2 * r) for r in (0, 1, 2)]
    assert weights[:3].tolist() == pytest.approx([3 * x / sum(e) for x in e], rel=1e-6)
    assert weights.reshape(2, 3).mean(dim=1).tolist() == pytest.approx([1.0, 1.0])
    assert adrpo.reward_weights(rewards, 0.0, 3).tolist() == pytest.approx([1.0] * 6)


def test_best_and_worst_of_each_group():
    rewards = torch.tensor([1.0, 3.0, 3.0, 0.0, -2.0, -1.0, -5.0, -1.0])
    assert adrpo.best_of_group(rewards, 4).tolist() == [0, 1, 0, 0, 0, 1, 0, 0]
    best, worst = adrpo.best_and_worst(rewards, 4)
    assert best.tolist() == [1, 5] and worst.tolist() == [3, 6]


def test_flow_dpo_loss_by_hand():
    u = torch.zeros(2, 1)
    v, v_ref = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [2.0]])
    # winner: 1 − 4 = −3; loser: 9 − 4 = 5; −log σ(−0.1·(−3 − 5)) = log(1 + e^−0.8)
    assert adrpo.flow_dpo_loss(v, u, v_ref, [0], [1], 0.1).item() == pytest.approx(math.log(1 + math.exp(-0.8)))
    assert adrpo.flow_dpo_loss(v_ref, u, v_ref, [0], [1], 0.1).item() == pytest.approx(math.log(2))
