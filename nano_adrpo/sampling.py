"""Sampling from a decoder: `generate`, the distribution it draws from, and the cache that makes a new token cost one token.

Three savings, none of which changes what is drawn: keys and values are kept and not computed again; samples whose tokens so
far are equal, as those of a group are at first, are one row in the model; samples that have ended leave once they are a quarter.
"""

import torch
import torch.nn.functional as F


@torch.no_grad()
def generate(model, ids, mask, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos=None, generator=None):
    """Samples a completion of every prompt, up to and including its first eos.

    ids [B, T], mask [B, T]   prompts, padded on the left; mask None: no padding
    temperature               0 is greedy
    top_k, top_p              see `probabilities`
    eos                       an id, several, or None; a row that has ended is filled up with (the first) eos
    generator                 None is torch's own

    returns (ids [B, T + N], mask of the completions [B, N] in the dtype of `mask`); N ≤ max_new_tokens is the longest one's.
    """
    batch, length = ids.shape
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    stop = torch.as_tensor([] if eos is None else eos, dtype=ids.dtype, device=ids.device).flatten()
    check(model.config, mask.bool(), max_new_tokens, temperature, top_k, top_p, stop)
    size, vocabulary = length + max_new_tokens, model.config.vocab_size

    first = torch.ones(batch, dtype=torch.bool, device=ids.device)  # is this prompt the first of a run of equal ones?
    first[1:] = ((ids[1:] != ids[:-1]) | (mask[1:] != mask[:-1])).any(dim=1)
    row = first.cumsum(0) - 1  # [live], the row of each sample in the model; those with equal tokens so far share it
    seen = F.pad(mask[first].bool(), (0, max_new_tokens), value=True)  # [rows, size], which tokens attention sees
    padded = not seen.all()  # else it needs no mask
    cache = Cache(model.config, len(seen), size, model.model.embed_tokens.weight)

    fill = int(stop[0]) if len(stop) else 0
    out, completion = F.pad(ids, (0, max_new_tokens), value=fill), F.pad(torch.zeros_like(mask), (0, max_new_tokens))
    live = torch.arange(batch, device=ids.device)  # the samples in the model; `going` are those of them that have not ended
    going = torch.ones_like(live, dtype=torch.bool)
    newest = ids[first]  # [rows, T], the tokens that the model has not seen
    with torch.inference_mode():
        for end in range(length, size):
            hidden = model.model(newest, seen[:, :end] if padded else None, cache)[:, -1]
            probs = probabilities(model.head(hidden), temperature, top_k, top_p)[row]  # [live, V]
            tokens = torch.multinomial(probs, 1, generator=generator)[:, 0].masked_fill(~going, fill)  # [live]
            out[live, end], completion[live, end] = tokens, going.to(mask.dtype)
            going = going & ~torch.isin(tokens, stop)
            count = int(going.sum())
            if count == 0:
                break
            if 4 * count <= 3 * len(live):  # all copies made for this move at most four times the cache
                live, row, tokens, going = live[going], row[going], tokens[going], going[going]
            paths, row = torch.unique(row * vocabulary + tokens, return_inverse=True)  # [rows]: the row before, its new token
            origin, newest = paths // vocabulary, paths[:, None] % vocabulary
            if not torch.equal(origin, torch.arange(len(seen), device=ids.device)):
                cache.select(origin)
                seen = seen[origin]
    return out[:, : end + 1], completion[:, length : end + 1]


def check(config, mask, max_new_tokens, temperature, top_k, top_p, stop):
    """Raises ValueError naming the argument of `generate` that does not fit."""
    known = bool(((stop >= 0) & (stop < config.vocab_size)).all())
    for name, value, fits, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, temperature >= 0, "0 (greedy) or above"),
        ("top_k", top_k, top_k >= 0, "0 (off) or above"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (off)"),
        ("eos", stop.tolist(), known, f"ids below the vocabulary's {config.vocab_size}"),
    ):
        if not fits:
            raise ValueError(f"{name} is {value}; expected {expected}")
    length, limit = mask.shape[1], config.max_position_embeddings
    if length + max_new_tokens > limit:
        raise ValueError(f"a prompt of {length} and {max_new_tokens} new tokens exceed the model's {limit} positions")
    if not mask[:, -1:].any(dim=1).all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("mask is not that of prompts padded on the left; expected zeros, then at least one 1, in every row")


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
        """Keeps these rows of the batch, by index; one may come more than once."""
        self.keys, self.values = self.keys.index_select(1, rows), self.values.index_select(1, rows)
