"""The decoder. Expected values are numbers computed once with transformers, enumerations, or the same model asked another way;
test_parity_decoder.py asks transformers itself, and tests/language/test_sampling.py has `generate`."""

import json
import math
import struct

import decoder_models
import pytest
import torch
from decoder_models import FAMILIES, IDS, LLAMA3, folder

from nano_adrpo import demo, files
from nano_adrpo.files import safetensors
from nano_adrpo.language.sampling import Cache
from nano_adrpo.models import decoder
from nano_adrpo.models.decoder import Decoder, RewardModel

model = decoder_models.model

# transformers 5.23 on the same weights: log-probabilities of token 3 and 12 after the first, fourth and last of IDS[0],
# and the rewards of both rows.
GOLDEN = {
    "qwen2": [[-1.53022, -1.53542], [-1.41571, -3.67074], [-2.11742, -3.07952]],
    "qwen3": [[-1.49576, -2.23706], [-2.33438, -2.46025], [-1.43639, -2.29481]],
    "llama": [[-2.09442, -2.78926], [-1.65555, -2.8772], [-3.68912, -3.52721]],
    "gemma": [[-5.32933, -6.40747], [-6.25241, -4.75487], [-1.52025, -4.47101]],
    "gemma2": [[-4.44746, -3.12653], [-2.05356, -1.96332], [-1.96441, -1.98912]],
    "reward": [0.37352, 2.81441],
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_of_every_family(tmp_path, family):
    logits = Decoder.from_pretrained(folder(tmp_path / family, family))(IDS)
    picked = logits.log_softmax(-1)[0, [0, 3, 7]][:, [3, 12]]
    torch.testing.assert_close(picked, torch.tensor(GOLDEN[family]), atol=2e-5, rtol=0)


# The same of llama with rope stretched, where IDS are longer than the trained length.
ROPES = {
    "linear": ({"type": "linear", "factor": 3.0}, 128),
    "dynamic": ({"type": "dynamic", "factor": 3.0}, 5),
    "yarn": ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 5, "beta_fast": 2.0, "beta_slow": 0.1}, 20),
}
STRETCHED = {
    "linear": [[-2.09442, -2.78926], [-1.78631, -2.84938], [-2.93441, -2.86907]],
    "dynamic": [[-2.09442, -2.78926], [-1.31313, -3.28835], [-4.76375, -4.00369]],
    "yarn": [[-2.09442, -2.78926], [-1.37142, -3.09865], [-4.75449, -3.93375]],
}


@pytest.mark.parametrize("kind", ROPES)
def test_log_probabilities_beyond_the_trained_length(tmp_path, kind):
    rope, positions = ROPES[kind]
    path = folder(tmp_path / kind, "llama", rope_scaling=rope, max_position_embeddings=positions)
    picked = Decoder.from_pretrained(path)(IDS).log_softmax(-1)[0, [0, 3, 7]][:, [3, 12]]
    torch.testing.assert_close(picked, torch.tensor(STRETCHED[kind]), atol=2e-5, rtol=0)


def test_reward_of_the_last_token(tmp_path):
    model = RewardModel.from_pretrained(folder(tmp_path / "rm", "gemma", RewardModel))
    torch.testing.assert_close(model(IDS), torch.tensor(GOLDEN["reward"]), atol=2e-5, rtol=0)
    left = torch.tensor([[0, 0, 1], [0, 1, 1]])
    right = torch.tensor([[1, 0, 0], [1, 1, 0]])
    alone = torch.stack([model(torch.tensor([[3]]))[0], model(torch.tensor([[5, 0]]))[0]])  # ids of 0 are tokens here
    torch.testing.assert_close(model(torch.tensor([[9, 9, 3], [9, 5, 0]]), left), alone)
    torch.testing.assert_close(model(torch.tensor([[3, 9, 9], [5, 0, 9]]), right), alone)
    assert model(IDS).dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_nothing(tmp_path, family):
    model = Decoder.from_pretrained(folder(tmp_path / family, family))
    plain = model(IDS)
    junk = torch.full((2, 3), 5)
    for sides, at in (((junk, IDS), slice(3, None)), ((IDS, junk), slice(0, 8))):
        ids = torch.cat(sides, dim=1)
        mask = torch.zeros_like(ids)
        mask[:, at] = 1
        for kind in (mask, mask.bool(), mask.float()):
            logits = model(ids, kind)
            assert logits.isfinite().all()
            torch.testing.assert_close(logits[:, at], plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(IDS[:, :1]), plain[:, :1], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(IDS[:, :1], torch.ones(2, 1)), plain[:, :1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"mask is \[2, 7\]; expected \[2, 8\]"):
        model(IDS, torch.ones(2, 7))


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_a_cache_equals_the_full_forward(tmp_path, family):
    model = Decoder.from_pretrained(folder(tmp_path / family, family))
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    full = model(IDS, mask)
    cache = Cache(model.config, 2, 8, model.model.embed_tokens.weight)
    for begin, end in ((0, 3), (3, 4), (4, 6), (6, 7), (7, 8)):
        hidden = model.model(IDS[:, begin:end], mask[:, :end], cache)
        seen = mask[:, begin:end].bool()
        torch.testing.assert_close(model.head(hidden)[seen], full[:, begin:end][seen], atol=1e-5, rtol=0)


def test_bfloat16_computes_norms_and_rotations_in_float32(tmp_path):
    path = folder(tmp_path / "model")
    exact, rounded = Decoder.from_pretrained(path), Decoder.from_pretrained(path, dtype=torch.bfloat16)
    assert rounded(IDS).dtype == torch.bfloat16
    assert (rounded(IDS).float() - exact(IDS)).abs().max() < 0.1
    norm = rounded.model.norm
    large = torch.full((1, 16), 300.0, dtype=torch.float16)  # its square is beyond float16
    torch.testing.assert_close(norm.to(torch.float16)(large), norm.weight[None], atol=1e-3, rtol=0)


def test_gradient_checkpointing_changes_no_gradient(model):
    model.token_logprobs(IDS).sum().backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.model.gradient_checkpointing = True
    model.token_logprobs(IDS).sum().backward()
    for parameter, gradient in zip(model.parameters(), plain):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-5)


# folders


def public_shapes(config, bias=(), qk_norm=None, tied=True):
    """The keys and shapes of a public release, written out from its sizes."""
    vocab, dim, inner, layers, heads, shared, size = config
    shapes = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, dim)
    for layer in range(layers):
        block = {
            "input_layernorm.weight": (dim,), "post_attention_layernorm.weight": (dim,),
            "self_attn.q_proj.weight": (heads * size, dim), "self_attn.k_proj.weight": (shared * size, dim),
            "self_attn.v_proj.weight": (shared * size, dim), "self_attn.o_proj.weight": (dim, heads * size),
            "mlp.gate_proj.weight": (inner, dim), "mlp.up_proj.weight": (inner, dim), "mlp.down_proj.weight": (dim, inner),
        }  # fmt: skip
        block |= {f"self_attn.{name}_proj.bias": (block[f"self_attn.{name}_proj.weight"][0],) for name in bias}
        if qk_norm:
            block |= {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


PUBLIC = {
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
            "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "max_position_embeddings": 32768, "max_window_layers": 24, "sliding_window": 32768, "use_sliding_window": False,
            "use_mrope": False, "rope_theta": 1000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        },
        public_shapes((151936, 896, 4864, 24, 14, 2, 64), bias="qkv"),
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "vocab_size": 151936,
            "hidden_size": 1024, "head_dim": 128, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "max_position_embeddings": 40960, "max_window_layers": 28, "rope_scaling": None,
            "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True,
        },
        public_shapes((151936, 1024, 3072, 28, 16, 8, 128), qk_norm=True),
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
            "head_dim": 64, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "max_position_embeddings": 131072, "mlp_bias": False, "attention_bias": False,
            "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "factor": 32.0},
            "tie_word_embeddings": True,
        },
        public_shapes((128256, 2048, 8192, 16, 32, 8, 64)),
    ),
    "Gemma-2B": (
        2_506_172_416,
        {
            "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048,
            "head_dim": 256, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
            "num_key_value_heads": 1, "hidden_act": "gelu", "hidden_activation": None, "rope_theta": 10000.0,
        },
        public_shapes((256000, 2048, 16384, 18, 8, 1, 256)),
    ),
}  # fmt: skip


def hollow(file, shapes):
    """A bfloat16 safetensors file whose header is whole and whose data is a hole in the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(header).encode()
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + end)


@pytest.mark.parametrize("name", PUBLIC)
def test_full_size_names_shapes_and_parameter_counts_on_meta(tmp_path, name):
    count, config, shapes = PUBLIC[name]
    files.write_json(tmp_path / "config.json", config)
    hollow(tmp_path / "model.safetensors", shapes)
    model = Decoder.from_pretrained(tmp_path, device="meta")
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())


@pytest.mark.parametrize("model_class, family", [(Decoder, name) for name in FAMILIES] + [(RewardModel, "gemma")])
def test_a_folder_round_trips(tmp_path, model_class, family):
    path = folder(tmp_path / "in", family, model_class)
    (path / "tokenizer.json").write_text('{"ü": 1}', encoding="utf-8")
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (path / "notes.md").write_text("not the model's")
    model = model_class.from_pretrained(path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "out")
    again = model_class.from_pretrained(tmp_path / "out")
    assert again.config == model.config and torch.equal(again(IDS), model(IDS))
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.bfloat16}
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["architectures"] == [family.capitalize() + model_class.task] and values["torch_dtype"] == "bfloat16"
    model.save_pretrained(path)  # over the folder it came from
    assert torch.equal(model_class.from_pretrained(path)(IDS), model(IDS))


def test_tied_files_with_and_without_a_head(tmp_path):
    path = folder(tmp_path / "model", "qwen2")
    plain = Decoder.from_pretrained(path)
    tensors = dict(plain.state_dict())
    embeddings = tensors["model.embed_tokens.weight"]
    safetensors.save(path / "model.safetensors", {**tensors, "lm_head.weight": embeddings.clone()})
    assert torch.equal(Decoder.from_pretrained(path)(IDS), plain(IDS))
    Decoder.from_pretrained(path, device="meta")
    del tensors["model.embed_tokens.weight"]
    safetensors.save(path / "model.safetensors", {**tensors, "lm_head.weight": embeddings})
    assert torch.equal(Decoder.from_pretrained(path)(IDS), plain(IDS))
    safetensors.save(path / "model.safetensors", {**plain.state_dict(), "lm_head.weight": embeddings + 1})
    with pytest.raises(ValueError, match="model.safetensors: key 'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        Decoder.from_pretrained(path)


def test_an_index_may_list_a_tied_head_and_omit_leftover_buffers(tmp_path):
    path = folder(tmp_path / "model", "qwen2")
    plain, shard = Decoder.from_pretrained(path), "model-00001-of-00001.safetensors"
    tensors = {**plain.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    (path / "model.safetensors").unlink()
    safetensors.save(path / shard, tensors)
    listed = dict.fromkeys([*plain.state_dict(), "lm_head.weight"], shard)
    files.write_json(path / "model.safetensors.index.json", {"weight_map": listed})
    assert torch.equal(Decoder.from_pretrained(path)(IDS), plain(IDS))


def test_shards_dtypes_and_leftover_buffers(tmp_path):
    path = folder(tmp_path / "model")
    whole = Decoder.from_pretrained(path)
    tensors = {**whole.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    (path / "model.safetensors").unlink()
    homes = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for file in set(homes.values()):
        safetensors.save(path / file, {name: tensors[name].to(torch.float16) for name in tensors if homes[name] == file})
    files.write_json(path / "model.safetensors.index.json", {"weight_map": homes})
    model = Decoder.from_pretrained(path)
    assert model.lm_head.weight.dtype == torch.float16
    torch.testing.assert_close(Decoder.from_pretrained(path, dtype=torch.float32)(IDS), whole(IDS), atol=5e-3, rtol=0)


def test_both_forms_of_rotary_settings(tmp_path):
    config = decoder.read_config(folder(tmp_path / "4", "llama"))
    rope = {**LLAMA3, "rope_theta": 500.0}
    new = folder(tmp_path / "5", "llama", rope_theta=None, rope_scaling=None, rope_parameters=rope)
    assert decoder.read_config(new) == config
    old = {**LLAMA3, "type": "llama3"}
    assert decoder.read_config(folder(tmp_path / "old", "llama", rope_scaling=old)) == config
    del rope["original_max_position_embeddings"]
    bare = folder(tmp_path / "bare", "llama", rope_scaling=None, rope_parameters=rope)
    assert decoder.read_config(bare).rope_scaling["original_max_position_embeddings"] == 128
    plain = folder(tmp_path / "plain", "qwen2", rope_theta=5.0, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    assert decoder.read_config(plain).rope_theta == 7.0 and decoder.read_config(plain).rope_scaling is None


def test_what_a_config_leaves_out_is_its_familys_default(tmp_path):
    def read(**values):
        files.write_json(tmp_path / "config.json", values)
        return decoder.read_config(tmp_path)

    assert (read(model_type="qwen3").head_dim, read(model_type="qwen2").head_dim) == (128, 128)
    assert read(model_type="qwen3", hidden_size=1024, num_attention_heads=64).head_dim == 128
    assert read(model_type="qwen2", hidden_size=1024, num_attention_heads=64).head_dim == 16
    assert read(model_type="llama").num_key_value_heads == 32
    assert read(model_type="llama", num_attention_heads=8).num_key_value_heads == 8
    assert read(model_type="qwen2", num_attention_heads=64, num_key_value_heads=None).num_key_value_heads == 64
    gemma = read(model_type="gemma")
    assert gemma.tie_word_embeddings and gemma.hidden_act == "gelu_pytorch_tanh" and gemma.vocab_size == 256000
    assert (gemma.bos_token_id, gemma.eos_token_id, gemma.pad_token_id) == (2, 1, 0)
    assert not read(model_type="llama").tie_word_embeddings and read(model_type="llama").vocab_size == 32000
    # windows that are configured and never act
    with pytest.raises(ValueError, match="'sliding_window' is 4096; expected at least the model's 32768 positions"):
        read(model_type="qwen2", use_sliding_window=True)  # in use: from layer 28 of 32 on
    read(model_type="qwen2", use_sliding_window=True, max_window_layers=32)
    slides = ["full_attention", "sliding_attention"] * 16
    for kinds in (None, ["full_attention"] * 32, slides):
        for window in ({"use_sliding_window": False, "sliding_window": 4096}, {"sliding_window": None}):
            read(model_type="qwen2", layer_types=kinds, **window)
        read(model_type="qwen3", use_sliding_window=True, sliding_window=32768, layer_types=kinds)
    read(model_type="qwen2", use_sliding_window=True, layer_types=["full_attention"] * 32)
    read(model_type="qwen2", architectures=["Qwen2ForSomethingOfMyOwn"])  # the tensors tell


def test_how_many_positions_a_model_has(tmp_path):
    def positions(**rope):
        files.write_json(
            tmp_path / "config.json", {"model_type": "llama", "max_position_embeddings": 512, "rope_scaling": rope}
        )
        return decoder.read_config(tmp_path).positions

    assert positions() == 512 and positions(**LLAMA3) == 512
    assert positions(type="linear", factor=2.5) == positions(rope_type="dynamic", factor=2.5) == 1280
    yarn = {"type": "yarn", "factor": 4.0}
    assert positions(**yarn) == 2048 and positions(**yarn, original_max_position_embeddings=128) == 512


def test_the_cache_never_reads_what_was_not_written(model):
    cache = Cache(model.config, 2, 20, model.model.embed_tokens.weight)
    cache.keys.fill_(math.nan), cache.values.fill_(math.nan)
    model.model(IDS, torch.ones_like(IDS), cache)
    assert model.model(IDS[:, :1], torch.ones(2, 9), cache).isfinite().all() and cache.length == 9


def test_small_files_beside_the_weights_are_written_again(tmp_path):
    model, more = Decoder.from_pretrained(demo.GRPO["model"]), {"chat_template.json": b"{}", "chat_template.jinja": b"x"}
    model.files |= {**more, "additional_chat_templates/rag.jinja": b"y"}
    model.save_pretrained(tmp_path)
    assert Decoder.from_pretrained(tmp_path).files == model.files and len(model.files) == 6
