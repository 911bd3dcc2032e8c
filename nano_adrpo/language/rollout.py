"""Completions of questions and their log-probabilities: what GRPO trains on and what an evaluation reads."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Rollout(NamedTuple):
    """N completions, those of one problem contiguous."""

    ids: torch.Tensor  # [N, T], prompts padded on the left, then their completions
    seen: torch.Tensor  # [N, T], 1 at tokens, 0 at padding on either side
    mask: torch.Tensor  # [N, C], the last C columns of `seen`: 1 at the completion's tokens, its end token included
    padded: bool  # whether a prompt has padding, on its left; if none has, causal attention needs no mask
    texts: list  # N completions as text, "<think>" included where the prompt opened a thought
    clips: list | None = None  # N lists of what the model hears with the prompts; None: it hears nothing
    logp: torch.Tensor | None = None  # [N, C], log-probabilities as the engine says that made the completions (elsewhere.py)

    @staticmethod
    def cat(rollouts):
        """Some rollouts, one behind the other: padded to the longest prompt and the longest completion, as one of all rows."""
        prompt = max(rollout.ids.shape[1] - rollout.mask.shape[1] for rollout in rollouts)
        new = max(rollout.mask.shape[1] for rollout in rollouts)

        def padded(name, rollout):
            x, after = getattr(rollout, name), new - rollout.mask.shape[1]
            return F.pad(x, (prompt + new - after - x.shape[1] if name in ("ids", "seen") else 0, after))

        def together(name):
            if getattr(rollouts[0], name) is None:
                return None
            if name == "padded":
                return any(rollout.padded or rollout.ids.shape[1] - rollout.mask.shape[1] < prompt for rollout in rollouts)
            if name in ("texts", "clips"):
                return sum((getattr(rollout, name) for rollout in rollouts), [])
            return torch.cat([padded(name, rollout) for rollout in rollouts])

        return Rollout(*map(together, Rollout._fields))


@torch.no_grad()
def roll_out(model, codec, problems, max_new_tokens, longest, generator=None, **sampling):
    """Samples one completion of each of N problems. Equal ones side by side share their prompt's computation. -> Rollout

    codec       language.chat.TextCodec of the model, or language.audio.AudioCodec
    longest     the most tokens of a prompt; InputError for one that has more
    generator   or its numbers [N, max_new_tokens], see Decoder.generate
    sampling    temperature, top_k, top_p of Decoder.generate
    """
    device = model.model.embed_tokens.weight.device
    prompts = [problem.prompt for problem in problems]
    ids, prompt_mask = codec.encode(prompts, longest, device)
    clips = codec.clips(prompts)
    sampling |= {"eos": codec.eos, "ended": codec.ended, "generator": generator}
    ids, mask = model.generate(ids, prompt_mask, max_new_tokens, clips=of_rows(clips, torch.arange(len(ids))), **sampling)
    seen = torch.cat([prompt_mask, mask], dim=1)
    length = prompt_mask.shape[1]
    texts = texts_of(codec, ids[:, :length], prompt_mask, ids[:, length:], mask)
    return Rollout(ids, seen, mask, not bool(prompt_mask.all()), texts, clips)


def texts_of(codec, prompts, prompt_mask, completions, mask):
    """Completions as texts, with "<think>" in front where the prompt opened a thought."""
    ends = codec.decode(prompts[:, -8:], prompt_mask[:, -8:], cut=False)  # a stop text in the prompt stops nothing
    texts = codec.decode(completions, mask)
    return ["<think>" * end.rstrip().endswith("<think>") + text for end, text in zip(ends, texts)]


def of_rows(clips, rows):
    """The clips of these rows one behind the other, as models take them; None where none hears."""
    return clips and [clip for row in torch.as_tensor(rows).tolist() for clip in clips[row]]


def score(model, rollout, rows, temperature=1.0, entropy=False):
    """log π(token) of the completions in `rows`, [n, C], in nats; with entropy=True also π's entropy at each position [n, C].
    π is the softmax of logits / temperature: the temperature that the completions were sampled at."""
    start = rollout.ids.shape[1] - rollout.mask.shape[1]
    seen, clips = rollout.seen[rows] if rollout.padded else None, of_rows(rollout.clips, rows)
    return model.token_logprobs(rollout.ids[rows], seen, start, temperature, entropy, clips)


@torch.no_grad()
def score_all(model, rollout, batch, temperature=1.0, entropy=False, rows=None):
    """`score` of the completions in `rows` (None: all), `batch` at a time, without gradient."""
    device = rollout.ids.device
    rows = torch.arange(len(rollout.ids), device=device) if rows is None else rows.to(device)
    scores = [score(model, rollout, each, temperature, entropy) for each in rows.split(batch)]
    return tuple(torch.cat(values) for values in zip(*scores)) if entropy else torch.cat(scores)
