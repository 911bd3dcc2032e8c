"""Sampling from a decoder: `generate`, the distribution that it draws from, and the cache of keys and values.

Three things save time, and none changes the distribution. The cache keeps the keys and values of earlier tokens, so that a new
token costs one token. Equal prompts that follow each other, as those of a group do, go through the model once, and their keys
and values are then copied. Samples that have ended leave the batch as soon as they are a quarter of it.

A row of the batch is drawn with random numbers of its own, one for each token: its completion depends on no other row.

A GPU would wait for the CPU with this: which rows leave depends on numbers, and every token's tensors have shapes of their own.
There the steps are "fixed" instead: all rows stay, attention reads the whole cache under a mask, and the numbers are looked at
every 16 tokens. "compiled" ones are the same, as a CUDA graph. All three draw the same tokens, up to float rounding.
"""

import torch
import torch.nn.functional as F

from nano_adrpo.errors import InputError, NotFinite

LOOK, ROUND = 16, 256  # fixed steps: tokens between two looks at what was drawn; what the cache's size is a multiple of


@torch.no_grad()
def generate(model, ids, mask, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos=None, generator=None, ended=None,
             clips=None, steps=None):  # fmt: skip
    """Samples a completion of every prompt, up to and including its first eos, or the token at which `ended` says so.

    ids [B, T], mask [B, T]   prompts, padded on the left; mask None: no padding
    temperature               0 is greedy
    top_k, top_p              see `probabilities`
    eos                       an id, several, or None; what follows the end of a row is filled with (the first) eos
    generator                 None is torch's own; it gives B × max_new_tokens numbers, row after row, however many are used. On
                              the CPU's, two calls on one half of the rows each thus sample what one call on all rows does. Or
                              these numbers themselves (`uniform`)
    ended                     None, or a function: tokens of completions so far [n, C] -> [n], whether they end there
    clips                     what the prompts' placeholders stand for, of models that hear (models/omni.py)
    steps                     "growing", "fixed" or "compiled" (see above); None: growing on the CPU, fixed elsewhere

    -> (ids [B, T + N], mask of the completions [B, N] in the dtype of `mask`); N ≤ max_new_tokens is the longest one's length.
    Raises InputError naming an argument that does not fit, NotFinite for logits that are not finite.
    """
    batch, length = ids.shape
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    stop = torch.as_tensor([] if eos is None else eos, dtype=ids.dtype, device=ids.device).flatten()
    check(model.config, ids, mask.bool(), max_new_tokens, temperature, top_k, top_p, stop)
    fixed = (steps or ("growing" if ids.device.type == "cpu" else "fixed")) != "growing"
    size = length + max_new_tokens
    if fixed:  # of a few sizes only, so that few steps are compiled
        size = min(-(-size // ROUND) * ROUND, model.config.positions)
    u = (generator if torch.is_tensor(generator) else uniform(batch, max_new_tokens, generator, ids.device)).to(ids.device)

    first = torch.ones(batch, dtype=torch.bool, device=ids.device)  # whether a prompt differs from the one before it
    first[1:] = ((ids[1:] != ids[:-1]) | (mask[1:] != mask[:-1])).any(dim=1)
    if (embeddings := model.embed(ids, clips)) is not None:  # [B, T, D]
        first[1:] |= (embeddings[1:] != embeddings[:-1]).flatten(1).any(dim=1)
        embeddings = embeddings[first]
    seen = F.pad(mask.bool(), (0, size - length), value=True)  # [B, size], the tokens that attention sees
    padded = not seen.all()  # else attention needs no mask
    cache = Cache(model.config, int(first.sum()), size, model.model.embed_tokens.weight)

    fill = int(stop[0]) if len(stop) else 0
    out, completion = F.pad(ids, (0, max_new_tokens), value=fill), F.pad(torch.zeros_like(mask), (0, max_new_tokens))
    live = torch.arange(batch, device=ids.device)  # the samples in the batch
    going = torch.ones_like(live, dtype=torch.bool)  # those of them that have not ended
    odd = torch.zeros((), dtype=torch.bool, device=ids.device)  # whether a logit was not finite
    with torch.inference_mode():
        hidden = model.model(ids[first], seen[first, :length] if padded else None, cache, embeddings)[:, -1]
        row = first.cumsum(0) - 1  # [B], where a sample's prompt stands among those that went through the model
        hidden = hidden[row]
        cache.select(row)
        forward = model.model
        if fixed:
            cache.fix()
        if steps == "compiled":
            for tensor in (cache.keys, cache.values, cache.length):
                torch._dynamo.mark_static_address(tensor)  # the graph writes to it and need not copy it
            forward = torch.compile(forward, mode="reduce-overhead", dynamic=False)
        for count in range(1, max_new_tokens + 1):
            end = length + count
            probs = probabilities(model.head(hidden), temperature, top_k, top_p)  # [live, V]
            odd = odd | probs[:, 0].isnan().any()  # a softmax with one logit that is not finite is NaN everywhere
            tokens = draw(probs, u[live, count - 1]).masked_fill(~going, fill)  # [live]
            out[live, end - 1], completion[live, end - 1] = tokens.to(ids.dtype), going.to(mask.dtype)
            going = going & ~torch.isin(tokens, stop)
            if ended:
                going = going & ~ended(out[live, length:end])
            if not fixed or count % LOOK == 0 or count == max_new_tokens:
                if odd:
                    raise NotFinite("a logit is not finite, so that no token can be sampled")
                if not going.any() or count == max_new_tokens:
                    break
                if not fixed and 4 * going.sum() <= 3 * len(going):  # all these copies move at most four times the cache
                    cache.select(going.nonzero()[:, 0])
                    live, tokens, seen, going = live[going], tokens[going], seen[going], going[going]
            hidden = forward(tokens[:, None], seen[:, : size if fixed else end] if padded else None, cache)[:, -1]
    end = length + int(completion.sum(dim=1).max())
    return out[:, :end], completion[:, length:end]


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


def uniform(batch, max_new_tokens, generator=None, device=None):
    """The random numbers of `generate`, one for each row and token: float64 [B, max_new_tokens] in [0, 1), on the generator's
    device."""
    device = generator.device if generator else device
    return torch.rand(batch, max_new_tokens, dtype=torch.float64, device=device, generator=generator)


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution to sample from: softmax(logits / temperature), cut to the top_k likeliest tokens (0: all) and then,
    renormalised, to the smallest set of likeliest tokens whose probability reaches top_p. Of equals the lower id comes first.

    logits [B, V] -> [B, V], float32; temperature 0 gives 1 to the likeliest token.

    >>> probabilities(torch.tensor([[0.125, 0.25, 0.5, 0.125]]).log(), top_p=0.75)
    tensor([[0.0000, 0.3333, 0.6667, 0.0000]])
    """
    if temperature == 0:
        largest = logits.float().amax(dim=-1, keepdim=True)  # times 0 it is NaN where a softmax would be
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]) + 0 * largest
    probs = (logits.float() / temperature).softmax(dim=-1)
    if not top_k and top_p == 1:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = 0
    ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    before = F.pad(ordered.cumsum(dim=-1)[:, :-1], (1, 0))  # [B, V], the probability of all likelier tokens
    if top_p < 1:
        ordered.masked_fill_(before >= top_p * (1 - 1e-6), 0)  # float32's sum of 0.5 and 0.25 may fall just short of 0.75
    return torch.zeros_like(probs).scatter(-1, order, ordered / ordered.sum(dim=-1, keepdim=True))


def draw(probs, u):
    """The token of each row at which the running sum of probs [B, V] exceeds u [B], in [0, 1), of the whole sum: a sample of
    probs where u is uniform. -> [B]. A token of probability 0 adds nothing to the sum, so that it is never drawn.

    >>> draw(torch.tensor([[0.0, 0.25, 0.0, 0.75]] * 4), torch.tensor([0.0, 0.24, 0.25, 0.99], dtype=torch.float64))
    tensor([1, 1, 3, 3])
    """
    sums = probs.cumsum(dim=-1, dtype=torch.float64)  # its rounding is below that of the probabilities
    tokens = torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True)[:, 0]
    return tokens.clamp(max=probs.shape[1] - 1)  # of probabilities that are not numbers


class Cache:
    """Keys and values of the tokens so far: two tensors [layers, B, heads, size, d], of which `length` columns are filled.

    After `fix` all shapes stay as they are: attention reads every column, under a mask, and `length` is a tensor.
    """

    def __init__(self, config, batch, size, like):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, size, config.head_dim)
        self.keys, self.values, self.length, self.fixed = like.new_empty(shape), like.new_empty(shape), 0, False

    def columns(self, new):
        """How many columns attention reads once `new` tokens are appended."""
        return self.keys.shape[3] if self.fixed else self.length + new

    def append(self, layer, k, v):
        """One layer's k and v [B, heads, T, d] of the newest tokens (T = 1 after `fix`) -> those of all columns that attention
        reads, [B, heads, columns, d]. The model moves `length` on when every layer has appended."""
        if self.fixed:
            self.keys[layer].index_copy_(2, self.length[None], k), self.values[layer].index_copy_(2, self.length[None], v)
            return self.keys[layer], self.values[layer]
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end], self.values[layer, :, :, self.length : end] = k, v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, rows):
        """Keeps these rows of the batch, by index; a row may come more than once."""
        self.keys, self.values = self.keys.index_select(1, rows), self.values.index_select(1, rows)

    def fix(self):
        for tensor in (self.keys, self.values):
            tensor[:, :, :, self.length :] = 0  # a mask hides these, but 0 times what is no number is none
        self.length, self.fixed = torch.tensor(self.length, device=self.keys.device), True
