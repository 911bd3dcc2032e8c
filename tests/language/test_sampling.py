"""Sampling from a decoder: what `generate` draws, how it ends, which rows go through the model, what is refused."""

import math

import pytest
import torch

from bench.measure import Operations
from nano_adrpo.language.sampling import Cache, draw, probabilities
from nano_adrpo.models.decoder import Config, Decoder

IDS = torch.tensor([[1, 5, 2, 12, 7, 7, 0, 3], [4, 4, 9, 11, 8, 6, 10, 2]])


@pytest.fixture
def model():
    """A Qwen3 of 13 tokens and random weights."""
    sizes = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Decoder(Config("qwen3", **sizes, num_key_value_heads=2, head_dim=6, max_position_embeddings=128))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.8, 0.8, generator=generator)
    return model.eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batches(model, run):
    """-> what `run` gives, and the shape [rows, tokens] of every batch that went through the model."""
    shapes = []
    hook = model.model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    try:
        return run(), shapes
    finally:
        hook.remove()


def test_greedy_is_the_argmax_of_the_full_forward(model):
    out, completion = model.generate(IDS, None, 10, temperature=0)
    assert out.shape == (2, 18) and completion.all() and completion.dtype == torch.bool
    assert torch.equal(model(out)[:, 7:-1].argmax(-1), out[:, 8:]) and torch.equal(out[:, :8], IDS)


def test_left_padded_rows_decode_as_alone(model):
    ids = torch.tensor([[7, 7, 1, 5, 2], [4, 9, 11, 8, 6], [7, 7, 7, 7, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    out, completion = model.generate(ids, mask, 9, temperature=0)
    assert completion.dtype == mask.dtype and completion.tolist() == [[1] * 9] * 3
    for row in range(3):
        alone, _ = model.generate(ids[row : row + 1, mask[row].bool()], None, 9, temperature=0)
        assert out[row, 5:].tolist() == alone[0, -9:].tolist()


@pytest.mark.parametrize("eos", [5, [8, 5], torch.tensor([1, 8])])
def test_a_row_ends_with_its_first_eos_and_leaves(model, eos):
    prompts, stop = torch.arange(13)[:, None], torch.as_tensor(eos).flatten().tolist()
    free, _ = model.generate(prompts, None, 12, temperature=0)
    lengths = [next((i + 1 for i, token in enumerate(row) if token in stop), 12) for row in free[:, 1:].tolist()]
    assert len(set(lengths)) > 3  # rows end at different times
    (out, completion), shapes = batches(model, lambda: model.generate(prompts, None, 12, temperature=0, eos=eos))
    longest = max(lengths)
    for row, length in enumerate(lengths):
        assert out[row, 1:].tolist() == free[row, 1 : length + 1].tolist() + [stop[0]] * (longest - length)
        assert completion[row].tolist() == [i < length for i in range(longest)]
    live = [13]  # the rows of each batch: those that have ended leave once they are a quarter
    for end in range(1, longest):
        going = sum(length > end for length in lengths)
        live.append(going if going <= 0.75 * live[-1] else live[-1])
    assert [rows for rows, _ in shapes] == live and live[-1] < 13
    ended, completion = model.generate(prompts[:1], None, 12, temperature=0, eos=int(free[0, 1]))
    assert ended.shape == (1, 2) and completion.tolist() == [[True]]


def test_a_row_ends_where_it_is_told(model):
    prompts = torch.arange(13)[:, None]
    (out, mask), (expected, ends) = (
        model.generate(prompts, None, 12, temperature=0, **options)
        for options in ({"eos": [8], "ended": lambda tokens: tokens[:, -1] == 5}, {"eos": [8, 5]})
    )
    assert torch.equal(out, expected) and torch.equal(mask, ends) and not mask.all()
    third = lambda tokens: torch.full((len(tokens),), tokens.shape[1] == 3)  # noqa: E731
    out, mask = model.generate(prompts, None, 12, temperature=0, ended=third)
    assert out.shape == (13, 4) and mask.all()  # all tokens so far are given


def test_equal_prompts_in_a_row_go_through_the_model_once(model):
    ids = torch.tensor([[7, 1, 5], [7, 1, 5], [7, 1, 5], [2, 2, 2], [2, 2, 2], [7, 1, 5]])
    mask = torch.ones_like(ids)
    mask[2, 0] = 0  # the same ids, but another prompt
    (out, _), shapes = batches(model, lambda: model.generate(ids, mask, 6, temperature=0))
    assert shapes == [(4, 3)] + [(6, 1)] * 5
    for row in range(6):
        alone, _ = model.generate(ids[row : row + 1], mask[row : row + 1], 6, temperature=0)
        assert out[row].tolist() == alone[0].tolist()


def test_a_copied_cache_scores_as_the_full_forward(model):
    ids, more = IDS[[0, 0, 1]], torch.tensor([[1, 2], [3, 4], [5, 6]])
    cache = Cache(model.config, 2, 10, model.model.embed_tokens.weight)
    cache.keys.fill_(math.nan), cache.values.fill_(math.nan)  # what was not written is never read
    model.model(IDS, None, cache)
    cache.select(torch.tensor([0, 0, 1]))
    hidden = model.model(more, None, cache)
    torch.testing.assert_close(model.head(hidden), model(torch.cat([ids, more], dim=1))[:, 8:], atol=1e-5, rtol=0)
    assert cache.length == 10


def test_sampling_is_a_function_of_the_generator(model):
    def run(seed):
        return model.generate(IDS.repeat(8, 1), None, 6, generator=generator(seed))[0]

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_sampled_frequencies_follow_the_distribution(model):
    """Chi-square of 20,000 first and second tokens. Each fails by luck with a chance of 1e-6, how often 51.4 is exceeded with
    12 degrees of freedom, and 33.4 with the 4 of top_k=5."""
    ids = IDS[:1].repeat(20000, 1)
    for options, quantile in (({"temperature": 1.7}, 51.4), ({"temperature": 0.8, "top_k": 5}, 33.4)):
        out, _ = model.generate(ids, None, 2, generator=generator(), **options)
        common = int(out[:, 8].mode().values)
        for rows, end in ((out, 8), (out[out[:, 8] == common], 9)):
            counts = torch.bincount(rows[:, end], minlength=13)
            logp = (model(rows[:1, :end])[0, -1].double() / options["temperature"]).log_softmax(-1)
            keep = logp >= logp.sort().values[-options.get("top_k", 13)]
            expected = len(rows) * logp.exp() * keep / (logp.exp() * keep).sum()
            assert (counts[~keep] == 0).all() and expected[keep].min() > 5
            assert (((counts - expected) ** 2)[keep] / expected[keep]).sum() < quantile


def test_a_rows_tokens_come_from_its_own_numbers(model):
    """Its completion is the same whatever stands beside it, and however the rows are split: the second half's numbers follow
    the first half's."""
    prompts = IDS[[0, 1, 1, 0, 0, 1]]
    whole, mask = model.generate(prompts, None, 6, eos=[3, 5], generator=generator())
    assert len(set(mask.sum(dim=1).tolist())) > 1  # rows leave the batch
    for sizes in ([3, 3], [1, 5], [1] * 6):
        same, done = generator(), 0
        for rows in prompts.split(sizes):
            out, _ = model.generate(rows, None, 6, eos=[3, 5], generator=same)
            assert torch.equal(out, whole[done : done + len(rows), : out.shape[1]])
            done += len(rows)
    other = prompts.clone()
    other[0] = 6
    out, _ = model.generate(other, None, 6, eos=[3, 5], generator=generator())
    columns = min(out.shape[1], whole.shape[1])
    assert torch.equal(out[1:, :columns], whole[1:, :columns])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 5}, {"eos": [3, 5]}])
def test_fixed_and_compiled_steps_draw_the_same(model, monkeypatch, padded, options):
    compiled = []  # by torch.compile's tracing alone; the code that inductor writes takes minutes here
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda run, **how: compiled.append(how) or compile(run, backend="eager", dynamic=False)
    )
    prompts, mask = IDS[[0, 0, 1, 1, 1, 0]], torch.ones(6, 8, dtype=torch.long)
    if padded:
        mask[1, :3], mask[4, :7] = 0, 0
    expected, *others = (
        model.generate(prompts, mask, 40, generator=generator(), steps=steps, **options)
        for steps in (None, "growing", "fixed", "compiled")
    )
    for out, completion in others:
        assert torch.equal(out, expected[0]) and torch.equal(completion, expected[1])
    assert compiled == [{"mode": "reduce-overhead", "dynamic": False}]


def test_fixed_steps_have_one_shape_and_are_waited_for_once_in_sixteen(model):
    """Every operation of 256 tokens reads the shapes of the token before, and the CPU reads no number of the device but the
    answer to one question in 16 tokens: have all ended, is a logit no number?"""
    model.config.max_position_embeddings = 512

    def seen(new, steps):
        with Operations() as operations:
            out, _ = model.generate(IDS[[0, 1, 1]], None, new, eos=[], generator=generator(), steps=steps)
        assert out.shape == (3, 8 + new)
        return operations

    fewer, more = seen(16, "fixed"), seen(256, "fixed")
    assert more.waits - fewer.waits == 2 * (256 - 16) / 16
    each, rest = divmod(len(more.shapes) - len(fewer.shapes), 240 // 16)
    assert rest == 0  # each 16 tokens cost the same operations
    for tokens in range(1, 240 // 16):
        assert more.shapes[-40 - each * (tokens + 1) : -40 - each * tokens] == more.shapes[-40 - each : -40]
    assert seen(32, "growing").waits - seen(16, "growing").waits > 2 * 16  # which a GPU would wait for at every token


def test_a_draw_inverts_the_running_sum():
    # A million numbers in equal steps: each token gets its share of them to within one, and one of probability 0 none, at the
    # ends and inside. The probabilities need not add up to 1.
    probs = torch.tensor([0.0, 0.25, 0.0, 1e-5, 0.5, 0.25, 0.0]) * 1.7
    u = (torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6
    counts = torch.bincount(draw(probs.expand(len(u), -1), u), minlength=7)
    torch.testing.assert_close(counts, (probs / probs.sum() * 10**6).round().long(), atol=1, rtol=0)
    assert (counts[probs == 0] == 0).all()
    # The largest number below 1 still is below the whole sum, though the sum of these float32 is not 1.
    probs = torch.cat([torch.full((1, 1000), 0.1), torch.zeros(1, 1000)], dim=1).softmax(dim=-1) * (torch.arange(2000) < 1000)
    for last in (1 - 2**-53, 0.0):
        assert draw(probs, torch.tensor([last], dtype=torch.float64)).item() == (999 if last else 0)


def test_ids_may_be_int32(model):
    for eos in (None, [3, 0]):
        (out, mask), (expected, _) = (model.generate(x, None, 9, temperature=0, eos=eos) for x in (IDS.int(), IDS))
        assert out.dtype == torch.int32 and out.tolist() == expected.tolist() and mask.dtype == torch.bool


P = torch.tensor([[0.125, 0.5, 0.25, 0.125]])


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.125, 0.5, 0.25, 0.125]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 4 / 22, 1 / 22]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 3}, [1 / 7, 4 / 7, 2 / 7, 0]),  # of equals the lower id
        ({"top_k": 4}, [0.125, 0.5, 0.25, 0.125]),
        ({"top_k": 99}, [0.125, 0.5, 0.25, 0.125]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),  # never empty
        ({"top_p": 0.5}, [0, 1, 0, 0]),  # 0.5 is reached by one
        ({"top_p": 0.51}, [0, 2 / 3, 1 / 3, 0]),
        ({"top_p": 0.75}, [0, 2 / 3, 1 / 3, 0]),
        ({"top_p": 0.76}, [1 / 7, 4 / 7, 2 / 7, 0]),
        ({"top_p": 0.999}, [0.125, 0.5, 0.25, 0.125]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),  # top_p sees what top_k left: 2/3 ≥ 0.6
        ({"top_k": 2, "top_p": 0.7}, [0, 2 / 3, 1 / 3, 0]),
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),  # and what the temperature made: 16/22 ≥ 0.7
    ],
)
def test_probabilities(options, expected):
    logits = P.log() + 3
    got = probabilities(logits, **options)
    torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.float32), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits, P.log() + 3)  # the input is as it was


@pytest.mark.parametrize("p, kept", [(0.5, 1), (0.8, 2), (1.0 - 1e-7, 3)])
def test_top_p_reaches_p_in_spite_of_rounding(p, kept):
    assert int((probabilities(torch.tensor([[0.5, 0.3, 0.2]]).log(), top_p=p) > 0).sum()) == kept


def test_logits_that_are_not_finite_are_refused(model):
    for bad in (math.nan, math.inf):
        model.lm_head.weight.data[4, 4] = bad
        for options in ({}, {"top_k": 3}, {"top_p": 0.9}, {"steps": "fixed"}, {"temperature": 0}):
            with pytest.raises(FloatingPointError, match="a logit is not finite, so that no token can be sampled"):
                model.generate(IDS, None, 4, **options)


def test_arguments_that_do_not_fit_are_refused(model):
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"temperature": -1}, "temperature is -1; expected 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0; expected above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"eos": 13}, r"eos is \[13\]; expected ids below the vocabulary's 13"),
        ({"max_new_tokens": 121}, "a prompt of 8 and 121 new tokens exceed the model's 128 positions"),
        ({"mask": torch.tensor([[1] * 8, [1] * 7 + [0]])}, "not that of prompts padded on the left"),
        ({"mask": torch.tensor([[1] * 8, [1, 0] * 3 + [1, 1]])}, "not that of prompts padded on the left"),
        ({"mask": torch.zeros(2, 8)}, "at least one 1, in every row"),
        ({"mask": torch.ones(2, 7)}, r"mask is \[2, 7\]; expected \[2, 8\]"),
        ({"mask": torch.ones(1, 8)}, r"mask is \[1, 8\]; expected \[2, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(IDS, **{"mask": None, "max_new_tokens": 4, **options})
