"""Who leaves a deep local optimum? A bandit: one prompt, twelve answers of one token, a softmax policy with a logit for each.

A guess pays 0.3 and is the reference's most common answer; three right answers pay 1, and the reference hardly
ever tries them. Small groups, many seeds at once: every seed has a row of logits of its own, which no other row's
gradient reaches.
"""

import torch

from nano_adrpo import adrpo

REFERENCE = torch.tensor([0.4, *[0.003] * 3, *[0.591 / 8] * 8])  # the guess, the right answers, the rest
REWARDS = torch.tensor([0.3, 1.0, 1.0, 1.0, *[0.0] * 8])
GROUPS, SIZE = 2, 8


def betas(A, beta0, generator):
    """What is compared: {name: a number or one a sample, from the normalised advantages A [N]}."""
    adaptive = adrpo.adaptive_beta(A, beta0)
    return {
        "GRPO": torch.full_like(A, beta0),
        "ADRPO": adaptive,
        "shuffled": adaptive[torch.randperm(len(A), generator=generator)],  # of other samples, of any seed
        "anti": 2 * beta0 - adaptive,  # β0 + clamp(A)
    }


def escapes(method, beta0, kl, seeds=64, steps=300, lr=0.1):
    """Share of seeds that give a right answer more often than not after `steps` Adam steps, one for each rollout."""
    generator = torch.Generator().manual_seed(0)
    logits = REFERENCE.log().repeat(seeds, 1).requires_grad_()  # [S, K]
    optimizer = torch.optim.Adam([logits], lr)
    for _ in range(steps):
        logp = logits.log_softmax(dim=1)
        drawn = torch.multinomial(logp.exp(), GROUPS * SIZE, replacement=True, generator=generator)  # [S, N]
        A = adrpo.group_advantages(REWARDS[drawn].flatten(), SIZE, normalize=True)  # [S·N]
        taken, ref = logp.gather(1, drawn).reshape(-1, 1), REFERENCE.log()[drawn].reshape(-1, 1)
        beta = betas(A, beta0, generator)[method]
        loss = adrpo.policy_loss(
            taken, taken.detach(), ref, torch.ones_like(taken), A, beta, kl=kl, count=GROUPS * SIZE
        )  # a sum over seeds: each has a mean over its own samples
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right = logits.softmax(dim=1)[:, REWARDS == 1].sum(dim=1)
    return (right > 0.5).float().mean().item()
