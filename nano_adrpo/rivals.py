"""Other answers to "adaptive in which way?": coefficients of two papers, for the same losses as ADRPO's (adrpo.py).

    ADRPO      β_i = β0 − A_i                 by the sample's advantage
    GARDO      β_i = β0 or 0                  by whether the sample's reward is uncertain: `uncertainty_gate`
    FG-ExPO    β   = β0 · f(accuracy)         one for the whole batch, by how much of it is right: `accuracy_beta`

Only the coefficient is taken of each paper. What else they do stands at the function. Pure functions of tensors.
"""

import math

import torch

from nano_adrpo.errors import InputError


def uncertainty_gate(rewards, auxiliary, beta0, share=0.1):
    """GARDO's gate (He et al. 2025, arXiv 2512.24138): the divergence acts only where the reward is uncertain. [N] -> [N].

        U_i = w(R)_i − mean_k w(R_k)_i        w: the share of the batch that a sample beats, ties counting half
        β_i = β0 where U_i > 0 is among the highest `share` of the batch, else 0

    rewards     [N], R, what is trained on
    auxiliary   [K, N], rewards R_k that are not trained on; only their order counts
    beta0       β0, in the units of `rewards`
    share       of the samples; the paper speaks of about 10 %. Equal U at the edge all count

    U and the share were read off the abstract and the published code (github.com/tinnerhrhe/GARDO, commit ae5d268,
    scripts/train_sd3_grpo_gardo.py), which ranks over the whole batch, as this does. Departures:
      * That code numbers ranks from the best down, so its U is high where R ranks a sample lower than the others do. Here it
        is high where R ranks it higher, as in a sample that exploits R.
      * It gates a share of the samples with U ≥ 0, which it moves between 2 % and 20 % by the mean U of earlier rounds, and
        divides by their number. Here the share is fixed, and the mean is over all samples, as for every other method.
      * Left out: the reference that follows the policy, and the reward for diversity. The policy's loss is not theirs but
        `flow_loss`, whose weight is A.

    Raises InputError without an auxiliary reward.
    """
    rewards = rewards.float()
    if not len(auxiliary):
        raise InputError("no auxiliary rewards; expected at least one, since uncertainty is its disagreement with the reward")
    # N·K·2·U, in whole numbers: equal ones are equal
    U = len(auxiliary) * _wins(rewards) - torch.stack([_wins(other.to(rewards)) for other in auxiliary]).sum(dim=0)
    edge = U.sort(descending=True).values[max(1, round(share * len(U))) - 1]
    return beta0 * ((U >= edge) & (U > 0)).to(U)


def _wins(rewards):
    """How many more samples each one beats than beat it, N·(2w − 1)."""
    return (rewards[:, None] - rewards).sign().sum(dim=1)


def accuracy_beta(rewards, beta0):
    """A β for the whole batch, by its accuracy p, after FG-ExPO (Lin et al. 2026, arXiv 2605.11403). [N] -> a number.

        β = β0 · (1 − cos πp)                 0 where nothing is right, β0 at a half, 2·β0 where all is

    rewards   [N], each in [0, 1]: 1 is right, and part of a point counts in part

    The abstract says that β is "a smooth nonlinear function of the batch's mean accuracy", relaxed when the model struggles and
    tightened when it succeeds. The function itself could not be read where this was written, so this one is not theirs: it is
    one of that description, and has the range 0 … 2·β0 of ADRPO with its clip ±β0. Left out: the Gaussian curriculum.

    Raises InputError for a reward outside [0, 1].
    """
    rewards = rewards.float()
    if rewards.min() < 0 or rewards.max() > 1:
        found = f"{rewards.min():g} … {rewards.max():g}"
        raise InputError(f"rewards are {found}; expected 0 … 1, right or wrong, since β follows from their mean, the accuracy")
    return beta0 * (1 - math.cos(math.pi * rewards.mean().item()))
