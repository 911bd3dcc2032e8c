"""log π(token): against log_softmax and gather, the gradients' precision, and that no tensor of all logits is held."""

import math

import decoder_models
import pytest
import torch
from decoder_models import IDS, folder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import Operations
from nano_adrpo.models import token_scores
from nano_adrpo.models.decoder import Decoder
from nano_adrpo.models.token_scores import TokenScores

model = decoder_models.model


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2"])  # a tied head, a head of its own, capped logits
@pytest.mark.parametrize("chunk", [13, 13 * 3, 2**24])
@pytest.mark.parametrize("start, temperature", [(1, 1.0), (5, 0.7), (7, 1.3)])
def test_token_logprobs_equal_log_softmax_and_gather(tmp_path, monkeypatch, family, chunk, start, temperature):
    monkeypatch.setattr(token_scores, "CHUNK", chunk)
    model = Decoder.from_pretrained(folder(tmp_path / family, family))
    mask = torch.ones_like(IDS)
    mask[0, :3], mask[1, 6:] = 0, 0
    upstream = (torch.arange(2 * (8 - start)).float().view(2, -1) * 0.9).sin() * mask[:, start:]

    full = (model(IDS, mask)[:, :-1] / temperature).log_softmax(-1)[:, start - 1 :]
    expected = full.gather(-1, IDS[:, start:, None])[..., 0]
    (expected * upstream).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    logp, entropy = model.token_logprobs(IDS, mask, start, temperature, entropy=True)
    seen = mask[:, start:].bool()
    assert logp.shape == (2, 8 - start) and logp.dtype == torch.float32 and logp.isfinite().all()
    torch.testing.assert_close(logp[seen], expected[seen], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy[seen], torch.distributions.Categorical(logits=full).entropy()[seen])
    assert not entropy.requires_grad
    (logp * upstream).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(model.token_logprobs(IDS, mask, start, temperature), logp)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_under_a_frozen_head_the_gradient_is_the_same_and_backward_computes_no_logits(tmp_path, family, temperature):
    model = Decoder.from_pretrained(folder(tmp_path / family, family))
    upstream, gradients = torch.arange(14.0).view(2, 7).cos(), []
    head = model.lm_head.weight if family == "qwen3" else model.model.embed_tokens.weight
    for trained in (True, False):
        model.zero_grad()
        head.requires_grad_(trained)
        logp = model.token_logprobs(IDS, temperature=temperature)
        with FlopCounterMode(display=False) as counter:
            (logp * upstream).sum().backward()
        gradients.append([p.grad.clone() for p in model.model.layers.parameters()])
        if trained:
            flops = counter.get_total_flops()
    assert head.grad is None and flops - counter.get_total_flops() == 2 * 2 * 14 * 13 * 16  # logits, and of hidden
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_no_entropy_where_nobody_asks(model, monkeypatch):
    with Operations() as without:
        model.token_logprobs(IDS)
    with Operations() as with_it:
        model.token_logprobs(IDS, entropy=True)
    assert len(with_it.names) - len(without.names) >= 4  # exp, times, sum, minus


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_the_heads_gradient_is_summed_in_float32(monkeypatch, dtype, tolerance):
    # 2,000 positions, each a chunk of its own: a running sum in half precision would stop growing at 2⁸ or 2¹¹ times the
    # summands, or drift. The hidden states are 1 and W is 0, so that each adds (1 at the token − 1/V) exactly.
    monkeypatch.setattr(token_scores, "CHUNK", 8)
    hidden, weight = torch.ones(2000, 4, dtype=dtype), torch.zeros(8, 4, dtype=dtype, requires_grad=True)
    TokenScores.apply(hidden, weight, torch.zeros(2000, dtype=torch.long), 1.0, None, False)[0].sum().backward()
    expected = (torch.eye(8)[0] - 1 / 8)[:, None].expand(8, 4) * 2000
    torch.testing.assert_close(weight.grad.float(), expected, rtol=tolerance, atol=0)


def test_ids_may_be_int32(model):
    ids = IDS.int()
    assert torch.equal(model(ids), model(IDS)) and torch.equal(model.token_logprobs(ids), model.token_logprobs(IDS))


def test_token_logprobs_hold_no_tensor_of_all_logits(tmp_path, monkeypatch):
    monkeypatch.setattr(token_scores, "CHUNK", 4 * 500)
    model = Decoder.from_pretrained(folder(tmp_path / "model", vocab_size=500))
    ids = torch.arange(64).view(4, 16)
    with Largest() as plain:
        model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum().backward()
    with Largest() as chunked:
        model.token_logprobs(ids, entropy=True)[0].sum().backward()
    assert plain.numel == 4 * 16 * 500 and chunked.numel == 500 * 16  # the embedding matrix


def test_a_head_learns_on_top_of_a_frozen_transformer(model):
    model.token_logprobs(IDS).sum().backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model.model.requires_grad_(False)
    model.token_logprobs(IDS).sum().backward()
    torch.testing.assert_close(model.lm_head.weight.grad, gradient)


def test_token_logprobs_of_no_tokens(model):
    assert model.token_logprobs(IDS, start=8).shape == (2, 0)


def test_a_uniform_head_scores_minus_log_of_the_vocabulary(model):
    model.lm_head.weight.data.zero_()
    logp, entropy = model.token_logprobs(IDS, entropy=True)
    torch.testing.assert_close(logp, torch.full((2, 7), -math.log(13)))
    torch.testing.assert_close(entropy, torch.full((2, 7), math.log(13)))


@pytest.mark.parametrize("start, temperature", [(0, 1.0), (9, 1.0), (1, 0.0), (1, math.nan)])
def test_token_logprobs_refuse(model, start, temperature):
    with pytest.raises(ValueError, match="expected 1 … 8 and above 0"):
        model.token_logprobs(IDS, None, start, temperature)
