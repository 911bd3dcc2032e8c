"""Evaluation of a language model on problems: rewards, pass@k, entropy, divergence from the reference."""

import contextlib

import torch
import torch.nn.functional as F

from nano_adrpo import metrics
from nano_adrpo.adrpo import kl_divergence
from nano_adrpo.evaluation.images import alone
from nano_adrpo.language.rollout import roll_out, score_all
from nano_adrpo.language.sampling import uniform
from nano_adrpo.rewards.text import right


@torch.no_grad()
def evaluate(
    model, codec, problems, reward, judge, reference, *, samples, max_new_tokens, longest, batch, score_batch,
    score_temperature=1.0, seed=0, autocast=contextlib.nullcontext, mine=alone, gather=alone, **sampling,
):  # fmt: skip
    """Samples `samples` completions of each problem, with the same random numbers in every evaluation.

    model, codec        the Decoder and its language.chat.TextCodec
    problems            [rewards.text.Problem]
    reward, judge       rewards.Rewards of text; None, or a function (completions, problems) -> {metric: number}
    reference           `with reference() as frozen:` gives the model that the KL is measured from; None: no KL
    batch, score_batch  completions sampled, and scored, at a time
    score_temperature   the temperature of the log-probabilities and entropies
    mine, gather        how several processes share the work, see training/distributed.py
    sampling            temperature, top_k, top_p, steps of Decoder.generate

    -> {metric: number}, {metric: standard error over the problems}, and the completions, those of one problem contiguous.
    reward and its terms; pass@1, pass@8 (of 8 samples or more) where every problem has an answer; entropy and kl_k1, kl_k3 in
    nats per token, length in tokens, and what the judge adds, of which no error is known. The KL's estimators are means over
    tokens that π draws: where a temperature of 0, top_k or top_p draws from something else, there is no KL.
    """
    asked = [problem for problem in problems for _ in range(samples)]
    from_policy = sampling.get("temperature", 1) > 0 and not sampling.get("top_k", 0) and sampling.get("top_p", 1) == 1
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    u = mine(uniform(len(asked), max_new_tokens, generator))
    texts, rewards, scores, own = [], [], [], mine(asked)
    for start in range(0, len(own), batch):
        some = own[start : start + batch]
        with autocast():
            rollout = roll_out(model, codec, some, max_new_tokens, longest, u[start : start + batch], **sampling)
            logp, entropy = score_all(model, rollout, score_batch, score_temperature, entropy=True)
            of_tokens = {"mask": rollout.mask.bool(), "entropy": entropy}
            if reference and from_policy:
                with reference() as frozen:
                    ref_logp = score_all(frozen, rollout, score_batch, score_temperature)
                of_tokens |= {f"kl_{kind}": kl_divergence(logp, ref_logp, kind) for kind in ("k1", "k3")}
        texts += rollout.texts
        rewards.append(reward(rollout.texts, some))
        scores.append({name: F.pad(value, (0, max_new_tokens - value.shape[1])) for name, value in of_tokens.items()})
    rewards, scores = ({name: torch.cat([each[name] for each in some]) for name in some[0]} for some in (rewards, scores))
    texts, rewards, scores = gather((texts, rewards, scores), len(asked))
    mask = scores.pop("mask")
    correct, lengths = right(texts, asked), mask.sum(dim=1).cpu().double()
    # What each metric is the mean of: numbers, and how many of them each problem has.
    ones, alike = [1] * len(problems), [samples] * len(problems)
    tokens = lengths.reshape(-1, samples).sum(dim=1).int().tolist()
    measured = {reward_name(name): (each, alike) for name, each in rewards.items()}
    for k in (1, 8):
        if correct and k <= samples:
            of_problems = [metrics.pass_at_k(row[None], k) for row in torch.tensor(correct).reshape(-1, samples)]
            measured[f"pass@{k}"] = torch.tensor(of_problems).double(), ones
    measured |= {name: (each[mask], tokens) for name, each in scores.items()}
    measured["length"] = lengths, alike
    values = {name: numbers.mean().item() for name, (numbers, _) in measured.items()}
    errors = {name: metrics.clustered_error(*each) for name, each in measured.items()} if len(problems) > 1 else {}
    judged = {name: float(value) for name, value in judge(texts, asked).items()} if judge else {}
    return values | judged, errors, texts


def reward_name(term):
    """What a term of rewards.Rewards is called in a log; the sum is "reward"."""
    return term if term == "reward" else f"reward_{term}"


def reward_means(rewards):
    """{name: [N]}, as rewards.Rewards gives them -> {"reward": mean of the sum, "reward_NAME": mean of each term}."""
    return {reward_name(term): values.mean().item() for term, values in rewards.items()}
