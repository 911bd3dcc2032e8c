"""Sampling from a decoder: `generate`, the distribution that it draws from, and the cache of keys and values.

Three things save time, and none changes the distribution. The cache keeps the keys and values of earlier tokens, so that a new
token costs one token. Equal prompts that follow each other, as those of a group do, go through the model once, and their keys
and values are then copied. Samples that have ended leave the batch as soon as they are a quarter of it.
"""

import torch
import torch.nn.functional as F

from nano_adrpo.errors import InputError, NotFinite


@torch.no_grad()
def generate(model, ids, mask, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos=None, generator=None, ended=None):
    """Samples a completion of every prompt, up to and including its first eos, or the token at which `ended` says so.

    ids [B, T], mask [B, T]   prompts, padded on the left; mask None: no padding
    temperature               0 is greedy
    top_k, top_p              see `probabilities`
    eos                       an id, several, or None; what follows the end of a row is filled with (the first) eos
    generator                 None is torch's own
    ended                     None, or a function: tokens of completions so far [n, C] -> [n], whether they end there

    -> (ids [B, T + N], mask of the completions [B, N] in the dtype of `mask`); N ≤ max_new_tokens is the longest one's length.
    Raises InputError naming an argument that does not fit, NotFinite for logits that are not finite.
    """
    batch, length = ids.shape
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    stop = torch.as_tensor([] if eos is None else eos, dtype=ids.dtype, device=ids.device).flatten()
    check(model.config, ids, mask.bool(), max_new_tokens, temperature, top_k, top_p, stop)
    size = length + max_new_tokens

    first = torch.ones(batch, dtype=torch.bool, device=ids.device)  # whether a prompt differs from the one before it
    first[1:] = ((ids[1:] != ids[:-1]) | (mask[1:] != mask[:-1])).any(dim=1)
    seen = F.pad(mask.bool(), (0, max_new_tokens), value=True)  # [B, size], the tokens that attention sees
    padded = not seen.all()  # else attention needs no mask
    cache = Cache(model.config, int(first.sum()), size, model.model.embed_tokens.weight)

    fill = int(stop[0]) if len(stop) else 0
    out, completion = F.pad(ids, (0, max_new_tokens), value=fill), F.pad(torch.zeros_like(mask), (0, max_new_tokens))
    live = torch.arange(batch, device=ids.device)  # the samples in the batch
    going = torch.ones_like(live, dtype=torch.bool)  # those of them that have not ended
    with torch.inference_mode():
        hidden = model.model(ids[first], seen[first, :length] if padded else None, cache)[:, -1]
        row = first.cumsum(0) - 1  # [B], where a sample's prompt stands among those that went through the model
        hidden = hidden[row]
        cache.select(row)
        for end in range(length, size):
            probs = probabilities(model.head(hidden), temperature, top_k, top_p)  # [live, V]
            if probs[:, 0].isnan().any():  # a softmax with one such logit is NaN everywhere
                raise NotFinite("a logit is not finite, so that no token can be sampled")
            tokens = torch.multinomial(probs, 1, generator=generator)[:, 0].masked_fill(~going, fill)  # [live]
            out[live, end], completion[live, end] = tokens.to(ids.dtype), going.to(mask.dtype)
            going = going & ~torch.isin(tokens, stop)
            if ended:
                going = going & ~ended(out[live, length : end + 1])
            if not going.any() or end == size - 1:
                break
            if 4 * going.sum() <= 3 * len(going):  # all copies made for this move at most four times the cache
                cache.select(going.nonzero()[:, 0])
                live, tokens, seen, going = live[going], tokens[going], seen[going], going[going]
            hidden = model.model(tokens[:, None], seen[:, : end + 1] if padded else None, cache)[:, -1]
    return out[:, : end + 1], completion[:, length : end + 1]


def check(config, ids, mask, max_new_tokens, temperature, top_k, top_p, stop):
    """Raises InputError naming the argument of `generate` that does not fit."""
    known = bool(((stop >= 0) & (stop < config.vocab_size)).all())
    for name, value, fits, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, temperature >= 0, "0 (greedy) or above"),
        ("top_k", top_k, top_k >= 0, "0 (off) or above"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (off)"),
        ("eos", stop.tolist(), known, f"ids below the vocabulary's {config.vocab_size}"),
    ):
        if not fits:
            raise InputError(f"{name} is {value}; expected {expected}")
    length, limit = ids.shape[1], config.positions
    if length + max_new_tokens > limit:
        raise InputError(f"a prompt of {length} and {max_new_tokens} new tokens exceed the model's {limit} positions")
    if mask.shape != ids.shape:
        raise InputError(f"mask is {list(mask.shape)}; expected {list(ids.shape)}")
    if not mask[:, -1:].any(dim=1).all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise InputError("mask is not that of prompts padded on the left; expected zeros, then at least one 1, in every row")


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution to sample from: softmax(logits / temperature), cut to the top_k likeliest tokens (0: all) and then,
    renormalised, to the smallest set of likeliest tokens whose probability reaches top_p. Of equals the lower id comes first.

    logits [B, V] -> [B, V], float32; temperature 0 gives 1 to the likeliest token.

    >>> probabilities(torch.tensor([[0.125, 0.25, 0.5, 0.125]]).log(), top_p=0.75)
    tensor([[0.0000, 0.3333, 0.6667, 0.0000]])
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    probs = (logits.float() / temperature).softmax(dim=-1)
    if not top_k and top_p == 1:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = 0
    ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    before = F.pad(ordered.cumsum(dim=-1)[:, :-1], (1, 0))  # [B, V], the probability of all likelier tokens
    if top_p < 1:
        ordered[before >= top_p * (1 - 1e-6)] = 0  # float32's sum of 0.5 and 0.25 may fall just short of 0.75
    return torch.zeros_like(probs).scatter(-1, order, ordered / ordered.sum(dim=-1, keepdim=True))


class Cache:
    """Keys and values of the tokens so far: two tensors [layers, B, heads, size, d], of which `length` columns are filled."""

    def __init__(self, config, batch, size, like):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, size, config.head_dim)
        self.keys, self.values, self.length = like.new_empty(shape), like.new_empty(shape), 0

    def append(self, layer, k, v):
        """One layer's k and v [B, heads, T, d] of the newest tokens -> those of all tokens, [B, heads, length + T, d]. The
        model moves `length` on when every layer has appended."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end], self.values[layer, :, :, self.length : end] = k, v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, rows):
        """Keeps these rows of the batch, by index; a row may come more than once."""
        self.keys, self.values = self.keys.index_select(1, rows), self.values.index_select(1, rows)
