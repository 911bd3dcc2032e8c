"""ADRPO, the paper (Adaptive Divergence Regularized Policy Optimization, NeurIPS 2025, arXiv 2510.18053).

    loss = L_RL + (β0 − A) · L_D            A: advantage of the sample, β0: baseline strength

A sample better than its group is regularised less, a worse one more. Everything here is a pure function of tensors. Every flow
method but DPO is `flow_loss` with other coefficients:

    method             weight                   beta
    RAFT               best_of_group(R, G)      0
    ORW-CFM-W2         reward_weights(R, τ, G)  β
    fixed β            A, clamped               β0
    ADRPO-FM (Eq. 6)   A, clamped               β0 − A        both from adaptive_coefficients(A, β0, clip)

and both LLM methods are `policy_loss`:

    GRPO (Eq. 3)       –                        β             0 is allowed: no KL
    ADRPO-GRPO (Eq. 7) –                        β0 − A        adaptive_beta(A, β0, clip)

Conventions. t = 0 is noise x0 ~ N(0, I), t = 1 is data x1. The samples of one prompt are contiguous: N = prompts × group size,
group g is rows g·G … g·G + G − 1. A squared error is the mean over a sample's elements, so that losses do not grow with the
resolution. Float64 stays float64; everything else is computed in float32.

Where this departs from the paper's formulas, or they leave a choice:
  * The advantage is clamped to [A_min, A_max], by default ±β0, before it enters β. ±β0 is the paper's choice in its audio
    experiment (Table 3); for images its range is not known. In the flow loss the same clamped A stands in both terms: then
    weight + beta = β0 for every sample, and the pointwise minimum is v_ref + E[A·(u − v_ref)] / β0 (docs/theory.md).
  * A in the flow loss is R − mean, in units of the reward: β0 is in those units too, and under Adam, which divides any common
    factor out, only A/β0 matters. A in the LLM loss is normalised, so β0 is a pure number (0.04 in the audio experiment).
  * The policy-gradient term of Eq. 7 takes A as it is, unclamped. The default KL is GRPO's k3, without the ratio as a factor.
    TRL 1.16 multiplies it by the ratio unless use_bias_correction_kl=False; the product has k2's gradient.
"""

import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------ advantages and adaptive β


def group_advantages(rewards, group_size, normalize=False):
    """A_i = R_i − mean of its group's R, the advantage of Eqs. 6 and 7, [N].

    rewards     [N], N a multiple of group_size
    normalize   False: in units of the reward (flow). True: divided by the group's unbiased standard deviation + 1e-4 (GRPO)

    A group whose rewards are all equal has A = 0 exactly. Raises ValueError where the rewards do not form groups of ≥ 2.

    >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), group_size=2)
    tensor([-1.,  1.,  0.,  0.])
    """
    groups = _groups(rewards, group_size)  # [N/G, G]
    groups = groups - groups[:, :1]  # equal rewards become exact zeros, and a large common offset costs no digits
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)
    return advantages.flatten()


def adaptive_coefficients(advantages, beta0, clip=None):
    """(A, β0 − A), A clamped once to [A_min, A_max]: the two coefficients of Eq. 6. For every sample they add up to β0.

    advantages   [N], `group_advantages(rewards, G)`, not clamped before
    beta0        baseline strength β0 > 0, in the advantage's units
    clip         (A_min, A_max), or a number c for ±c, or None for ±β0

    >>> adaptive_coefficients(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]), beta0=2.0, clip=4)
    (tensor([-4., -1.,  0.,  1.,  4.]), tensor([ 6.,  3.,  2.,  1., -2.]))
    """
    if not beta0 > 0:
        raise ValueError(f"beta0 is {beta0}; expected a positive number")
    clip = beta0 if clip is None else clip
    low, high = clip if isinstance(clip, (tuple, list)) else (-clip, clip)
    if not low <= high:
        raise ValueError(f"the advantage's range is [{low}, {high}]; expected A_min ≤ A_max")
    A = _float(advantages).clamp(low, high)
    return A, beta0 - A


def adaptive_beta(advantages, beta0, clip=None):
    """β0 − clamp(A) alone, the coefficient of the divergence in Eq. 7, whose policy gradient takes A unclamped. Arguments as
    for `adaptive_coefficients`.

    >>> adaptive_beta(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]), beta0=2.0)
    tensor([4., 3., 2., 1., 0.])
    """
    return adaptive_coefficients(advantages, beta0, clip)[1]


# ------------------------------------------------------------------------------------------------------------ flow matching


def interpolate(x0, x1, t):
    """The straight path of flow matching: x_t = (1 − t)·x0 + t·x1 and its velocity u = x1 − x0.

    x0, x1   [N, ...], noise and data
    t        [N], in [0, 1]
    returns  x_t and u, both [N, ...]
    """
    t = t.reshape(-1, *[1] * (x1.dim() - 1))  # [N, 1, ...]
    return (1 - t) * x0 + t * x1, x1 - x0


def flow_loss(v, u, v_ref, weight, beta, count=None):
    """mean_i[ weight_i·|v − u|²_i + beta_i·|v − v_ref|²_i ]: Eq. 6 and its baselines (table above). Scalar.

    v, u, v_ref    [N, ...], policy's velocity, target x1 − x0, reference's velocity; |·|² is the mean over all but N
    weight, beta   [N] or a number
    count          how many samples to divide by; None: the N of this call. A micro-batch passes the whole batch's number, and
                   the losses of the micro-batches then add up to the batch's

    The first term is L_RL, the second L_D: the bound E|v − v_ref|² on the squared Wasserstein-2 distance (ORW-CFM-W2,
    arXiv 2502.06061), up to a Lipschitz factor. The reference and the coefficients get no gradient.
    """
    loss = _coefficient(weight, v) * squared_error(v, u) + _coefficient(beta, v) * squared_error(v, v_ref.detach())  # [N]
    return loss.sum() / (count or len(loss))


def squared_error(a, b):
    """|a − b|², the mean over all dimensions but the first: [N, ...] -> [N]."""
    if a.shape != b.shape:
        raise ValueError(f"shapes {list(a.shape)} and {list(b.shape)} differ")
    return (_float(a) - _float(b)).square().reshape(len(a), -1).mean(dim=1)


def reward_weights(rewards, tau, group_size):
    """ORW-CFM-W2's ω = exp(τ·R), normalised to mean 1 within each group: G · softmax(τ·R). [N] -> [N].

    The normalisation keeps a prompt of high rewards from outweighing the others, and the loss's scale from growing with τ.
    """
    groups = _groups(rewards, group_size)
    return (group_size * torch.softmax(tau * groups, dim=1)).flatten()


def best_of_group(rewards, group_size):
    """RAFT's weight: 1 for the best sample of each group (the first of equals), 0 for the others. [N] -> [N]."""
    groups = _groups(rewards, group_size)
    return F.one_hot(groups.argmax(dim=1), group_size).to(groups.dtype).flatten()


def flow_dpo_loss(v, u, v_ref, winner, loser, beta_dpo, count=None):
    """DPO for flows (Wallace et al. 2023, arXiv 2311.12908, Eq. 14, with the flow's squared error). Scalar.

        − mean_p log σ( −β_dpo · [ (|v − u|² − |v_ref − u|²)_winner − (|v − u|² − |v_ref − u|²)_loser ] )

    v, u, v_ref     [N, ...] as in `flow_loss`
    winner, loser   [P] or slices, rows of the better and the worse sample of each pair (`best_and_worst`)
    beta_dpo        strength, in 1 / squared velocity per element
    count           how many pairs to divide by; None: the P of this call, as in `flow_loss`
    """
    excess = squared_error(v, u) - squared_error(v_ref.detach(), u)  # [N]
    loss = -F.logsigmoid(-beta_dpo * (excess[winner] - excess[loser]))  # [P]
    return loss.sum() / (count or len(loss))


def best_and_worst(rewards, group_size):
    """DPO's pairs: the rows of the best and of the worst sample of each group, two [N/G]."""
    groups = _groups(rewards, group_size)
    first = torch.arange(len(groups), device=groups.device) * group_size
    return first + groups.argmax(dim=1), first + groups.argmin(dim=1)


# ---------------------------------------------------------------------------------------------------------- language models


def policy_loss(
    logp, old_logp, ref_logp, mask, advantages, beta, clip_eps=0.2, kl="k3", average="sequences", count=None
):  # fmt: skip
    """PPO's clipped policy gradient + beta_i · KL_i: Eq. 3 (GRPO, beta a number) and Eq. 7 (ADRPO-GRPO, beta =
    `adaptive_beta(advantages, β0)`); nothing else differs between the two. Scalar.

        − min(A·ratio, A·clip(ratio, 1 − ε, 1 + ε)) + beta·KL     per token, ratio = π_θ / π_θold

    logp, old_logp, ref_logp   [N, T], log-probabilities of the sampled tokens in nats: the policy's now, the policy's when it
                               sampled, the reference's. Only the first gets a gradient
    mask                       [N, T], 1 at tokens of the completion (its end token included), 0 elsewhere
    advantages                 [N], `group_advantages(rewards, G, normalize=True)`; not clamped here
    beta                       [N] or a number; where it is 0 there is no KL
    kl                         estimator of `kl_divergence`
    average                    "sequences": mean over sequences of each one's mean over its tokens (GRPO's paper), in which
                               a token of a short answer weighs more. "tokens": mean over all tokens
    count                      how many sequences, or tokens, to divide by; None: those of this call. A micro-batch passes the
                               whole batch's number, and the losses of the micro-batches then add up to the batch's
    """
    if average not in ("sequences", "tokens"):
        raise ValueError(f"average is {average!r}; expected 'sequences' or 'tokens'")
    shapes = [list(x.shape) for x in (logp, old_logp, ref_logp, mask)]
    if shapes != shapes[:1] * 4 or logp.dim() != 2:
        raise ValueError(f"logp, old_logp, ref_logp and mask have shapes {shapes}; expected the same [N, T]")
    A = _float(_coefficient(advantages, logp)).reshape(-1, 1)  # [N, 1]
    beta = _coefficient(beta, logp)
    beta = beta.reshape(-1, 1) if isinstance(beta, torch.Tensor) else torch.full_like(_float(logp[:1, :1]), beta)  # [N or 1, 1]
    mask = mask.bool()
    # Values at padding are undefined: they become 0 before exp can overflow.
    logp, old_logp, ref_logp = (_float(x).masked_fill(~mask, 0) for x in (logp, old_logp.detach(), ref_logp.detach()))
    ref_logp = torch.where(beta == 0, logp.detach(), ref_logp)  # β = 0: no KL, even where it would overflow (0 · inf is NaN)
    ratio = (logp - old_logp).clamp(max=80).exp()  # [N, T]; beyond e^80 exp would overflow, and 0 · inf is NaN
    gradient_term = -torch.minimum(A * ratio, A * ratio.clamp(1 - clip_eps, 1 + clip_eps))
    loss = (gradient_term + beta * kl_divergence(logp, ref_logp, kl)) * mask  # [N, T]
    if average == "tokens":
        return loss.sum() / (mask.sum().clamp(min=1) if count is None else count)
    return (loss.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / (len(loss) if count is None else count)


def kl_divergence(logp, ref_logp, estimator="k3"):
    """Estimates of KL(π_θ ‖ π_ref) per token, in nats, from tokens sampled by π_θ (Schulman 2020, "Approximating KL
    divergence"). logp, ref_logp like each other -> the same shape. The reference gets no gradient.

    r = π_ref/π_θ of the sampled token. The last column is the gradient that the estimator, as a loss, has in the mean over
    tokens of π_θ, if β is the same for all samples:

        k1   −log r            unbiased          zero: E[∇ log π_θ] = 0, so it regularises nothing
        k2   (log r)² / 2      biased, ≥ 0       that of KL(π_θ ‖ π_ref), the reverse KL, exactly
        k3   r − 1 − log r     unbiased, ≥ 0     mean of (1 − π_ref/π_θ)·∇ log π_θ: that of KL(π_ref ‖ π_θ), the forward KL

    An adaptive β differs between samples, so k1's gradient is then not zero. It still does not regularise: it acts as a second
    policy gradient, of the clamped advantages (docs/theory.md). All this holds for tokens of π_θ itself, not after several
    steps on the same samples.
    """
    log_r = _float(ref_logp.detach()) - _float(logp)
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r.square() / 2
    if estimator == "k3":
        return log_r.exp() - 1 - log_r
    raise ValueError(f"estimator is {estimator!r}; expected 'k1', 'k2' or 'k3'")


# ------------------------------------------------------------------------------------------------------------------- shared


def _float(x):
    return x if x.dtype == torch.float64 else x.float()


def _groups(rewards, group_size):
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}; expected at least 2, since an advantage compares samples of one prompt")
    if rewards.dim() != 1 or len(rewards) == 0 or len(rewards) % group_size:
        raise ValueError(f"rewards have shape {list(rewards.shape)}; expected [N], N a multiple of group_size = {group_size}")
    return _float(rewards).reshape(-1, group_size)


def _coefficient(value, v):
    # A number, or one value per sample: anything else would broadcast silently into another loss. It gets no gradient,
    # even if a network has computed the rewards.
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() and value.shape != v.shape[:1]:
        raise ValueError(f"a coefficient has shape {list(value.shape)}; expected a number or [{len(v)}]")
    return value.detach()
