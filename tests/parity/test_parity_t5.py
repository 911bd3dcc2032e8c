"""T5's encoder against transformers' T5EncoderModel, both ways."""

import pytest
import tiny
import torch
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Model

from nano_adrpo.models.t5 import T5Encoder

SIZES = dict(vocab_size=60, d_model=24, d_ff=40, num_layers=3, feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def theirs(heads=3, width=8, kind=T5EncoderModel, **sizes):
    return tiny.fill(kind(T5Config(**{**SIZES, **sizes}, num_heads=heads, d_kv=width)), heads, std=0.08)


@torch.no_grad()
def difference(ours, model, length, device="cpu"):
    ids = torch.randint(1, 60, (3, length), generator=torch.Generator().manual_seed(length)).to(device)
    mask = torch.ones_like(ids)
    mask[0, length - length // 3 :] = 0
    mask[1, : length // 4] = 0
    plain = (ours(ids) - model(ids).last_hidden_state).abs().max()
    masked = ((ours(ids, mask) - model(ids, attention_mask=mask).last_hidden_state) * mask[..., None]).abs().max()
    return max(plain, masked).item()


@pytest.mark.parametrize("heads, width", [(3, 8), (1, 64), (4, 5)])
@pytest.mark.parametrize("size", ["2KB", "10GB"])
def test_outputs_agree(tmp_path, heads, width, size):
    model = theirs(heads, width)
    model.save_pretrained(tmp_path, max_shard_size=size)
    ours, streamed = (T5Encoder.from_pretrained(tmp_path, stream=stream) for stream in (False, True))
    for length in (1, 2, 17, 77, 300):
        assert difference(ours, model, length) < 1e-5
        assert difference(streamed, model, length) < 1e-5


@pytest.mark.parametrize("count", [4, 6, 12, 33])
def test_other_buckets_agree(tmp_path, count):
    model = theirs(relative_attention_num_buckets=count, relative_attention_max_distance=30, layer_norm_epsilon=1e-3)
    model.save_pretrained(tmp_path)
    assert difference(T5Encoder.from_pretrained(tmp_path), model, 60) < 1e-5


def test_theirs_opens_ours(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path / "theirs")
    ours = T5Encoder.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again, info = T5EncoderModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert difference(ours, again.eval(), 20) < 1e-5


@pytest.mark.parametrize("kind", [T5ForConditionalGeneration, T5Model])
def test_the_encoder_of_a_whole_t5(tmp_path, kind):
    model = theirs(kind=kind)
    model.save_pretrained(tmp_path)
    assert difference(T5Encoder.from_pretrained(tmp_path), model.encoder, 20) < 1e-5


def test_bfloat16_is_as_near_to_float32_as_theirs(tmp_path):
    model = theirs()
    model.bfloat16().save_pretrained(tmp_path)
    ours = T5Encoder.from_pretrained(tmp_path)
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        exact = model.float()(ids).last_hidden_state
        half = T5EncoderModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()(ids).last_hidden_state
        output = ours(ids)
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).norm() < 1.2 * (half.float() - exact).norm() < 0.1 * exact.norm()


def test_a_config_of_transformers_4_is_the_same(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path)
    old = dict(architectures=["T5EncoderModel"], classifier_dropout=0.0, d_ff=40, d_kv=8, d_model=24, decoder_start_token_id=0)
    old |= dict(dense_act_fn="gelu_new", dropout_rate=0.1, eos_token_id=1, feed_forward_proj="gated-gelu", num_layers=3)
    old |= dict(initializer_factor=1.0, is_encoder_decoder=True, is_gated_act=True, layer_norm_epsilon=1e-6, model_type="t5")
    old |= dict(num_decoder_layers=3, num_heads=3, output_past=True, pad_token_id=0, relative_attention_max_distance=128)
    old |= dict(relative_attention_num_buckets=32, tie_word_embeddings=False, torch_dtype="float32", use_cache=True)
    tiny.write_json(tmp_path / "config.json", old | dict(transformers_version="4.41.2", vocab_size=60))  # as SD3's own
    assert difference(T5Encoder.from_pretrained(tmp_path), model, 20) < 1e-5


def test_float16_is_theirs_where_sums_leave_its_range(tmp_path):
    # Both compute `wo` in float32 and keep the sum so; weights ×700 take the sum to 1e5, beyond float16.
    model = theirs()
    with torch.no_grad():
        for block in model.encoder.block:
            block.layer[1].DenseReluDense.wi_1.weight.mul_(700)
            block.layer[1].DenseReluDense.wo.weight.mul_(700)
    model.half().save_pretrained(tmp_path)
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        expected = T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float16).eval()(ids, output_hidden_states=True)
        output = T5Encoder.from_pretrained(tmp_path)(ids)
    assert max(state.abs().max() for state in expected.hidden_states[:-1]) > 65504
    assert output.dtype == torch.float16 and output.isfinite().all()
    assert (output.float() - expected.last_hidden_state.float()).norm() < 0.002 * output.float().norm()


def test_the_full_size_is_transformers():
    config = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        model = T5EncoderModel(config)
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}  # the tied embeddings once
    assert sum(p.numel() for p in model.parameters()) == 4_762_310_656
    assert names == tiny.t5_full_size()


@pytest.mark.cuda
def test_outputs_agree_on_cuda(tmp_path):
    model = theirs().cuda()
    model.save_pretrained(tmp_path)
    for stream in (False, True):
        assert difference(T5Encoder.from_pretrained(tmp_path, device="cuda", stream=stream), model, 77, "cuda") < 1e-4
