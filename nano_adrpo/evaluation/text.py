"""Evaluation of a language model on problems with known answers: rewards, pass@k, entropy, divergence from the reference."""

import contextlib

import torch

from nano_adrpo import metrics
from nano_adrpo.language.rollout import roll_out, score_all
from nano_adrpo.rewards.answers import exact_answer


@torch.no_grad()
def evaluate(
    model, codec, problems, reward, judge, reference, *, samples, max_new_tokens, longest, batch, score_batch,
    score_temperature=1.0, seed=0, autocast=contextlib.nullcontext, **sampling,
):  # fmt: skip
    """Samples `samples` completions of each problem, with the same random numbers in every evaluation. -> metrics, texts.

    model, codec        the Decoder and its language.chat.TextCodec
    problems            [rewards.text.Problem]
    reward, judge       rewards.Rewards of text; None, or a function (questions, completions) -> {metric: number}
    reference           `with reference() as frozen:` gives the model that the KL is measured from
    batch, score_batch  completions sampled, and scored, at a time
    score_temperature   the temperature of the log-probabilities and entropies
    sampling            temperature, top_k, top_p of Decoder.generate

    reward and its terms, pass@1, pass@8 (of 8 samples or more), entropy and kl_k1, kl_k3 in nats per token, length in tokens,
    and what the judge adds. texts: the completions, those of one problem contiguous.
    """
    asked = [problem for problem in problems for _ in range(samples)]
    generator = torch.Generator(model.model.embed_tokens.weight.device).manual_seed(1_000_003 + seed)
    texts, rewards, scores = [], [], []
    for start in range(0, len(asked), batch):
        some = asked[start : start + batch]
        with autocast():
            rollout = roll_out(model, codec, some, max_new_tokens, longest, generator, **sampling)
            logp, entropy = score_all(model, rollout, score_batch, score_temperature)
            with reference() as frozen:
                ref_logp, _ = score_all(frozen, rollout, score_batch, score_temperature)
        tokens = rollout.mask.bool()
        texts += rollout.texts
        rewards.append(reward(rollout.texts, some))
        scores.append([value[tokens] for value in (logp, ref_logp, entropy)])
    logp, ref_logp, entropy = map(torch.cat, zip(*scores))  # each [tokens of all completions]
    correct = torch.tensor([exact_answer(text, problem.answer) for text, problem in zip(texts, asked)]).reshape(-1, samples)
    values = reward_means({name: torch.cat([each[name] for each in rewards]) for name in rewards[0]})
    values["pass@1"] = metrics.pass_at_k(correct, 1)
    if samples >= 8:
        values["pass@8"] = metrics.pass_at_k(correct, 8)
    values |= {"entropy": entropy.mean().item(), **metrics.kl_from_reference(logp, ref_logp)}
    values["length"] = len(entropy) / len(texts)
    return values | (judge([problem.question for problem in asked], texts) if judge else {}), texts


def reward_means(rewards):
    """{name: [N]}, as rewards.Rewards gives them -> {"reward": mean of the sum, "reward_NAME": mean of each term}."""
    return {name if name == "reward" else f"reward_{name}": values.mean().item() for name, values in rewards.items()}
