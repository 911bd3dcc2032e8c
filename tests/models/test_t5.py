"""T5's encoder: distances and attention by hand, both layouts, layer by layer from disk, full-size names."""

import math
import weakref

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from nano_adrpo.files import safetensors
from nano_adrpo.models import t5
from nano_adrpo.models.t5 import Config, T5Encoder

SIZES = dict(vocab_size=50, d_model=12, d_kv=5, d_ff=20, num_layers=3, num_heads=2)


def build(**changes):
    return tiny.fill(T5Encoder(Config(**{**SIZES, **changes})), std=0.4)


def tokens(length=9, rows=2):
    return torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture
def folder(tmp_path):
    build().save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def test_distances_fall_into_the_buckets_of_the_paper():
    # 32 rows: 16 for keys before the query or at it, 16 behind. Of each, 8 for distances 0 … 7 and 8 for 8 … 128, whose edges
    # are 8·16^(i/8): 8, 11.3, 16, 22.6, 32, 45.3, 64, 90.5.
    edges = [8, 12, 16, 23, 32, 46, 64, 91]
    row = [d if d < 8 else 7 + sum(d >= edge for edge in edges) for d in range(400)]
    assert row[127] == row[399] == 15 and row[8] == 8 and row[11] == 8 and row[12] == 9
    table = t5.buckets(400, Config(**SIZES))
    assert table[:, 0].tolist() == row  # the key is the first token
    assert table[0].tolist() == [0] + [16 + b for b in row[1:]]
    assert torch.equal(table[7:, 7:], table[:-7, :-7])  # only the distance counts


def test_one_block_by_hand():
    model, ids = build(num_layers=1), [3, 17, 3, 8, 42, 1, 9, 9, 30, 2, 11]
    p = {name: tensor.detach().double() for name, tensor in model.named_parameters()}

    def norm(x, name):
        return x / math.sqrt((x**2).mean() + 1e-6) * p[name]

    first = "encoder.block.0.layer"
    xs = [p["shared.weight"][i] for i in ids]
    normed = [norm(x, f"{first}.0.layer_norm.weight") for x in xs]
    q, k, v = ([p[f"{first}.0.SelfAttention.{name}.weight"] @ x for x in normed] for name in "qkv")
    out = []
    for i in range(len(ids)):
        heads = []
        for head in range(2):
            part = slice(5 * head, 5 * head + 5)
            scores = []
            for j in range(len(ids)):
                distance = abs(i - j)
                bucket = (min(8, distance)) + (16 if j > i else 0)  # 8 … 11 share a bucket
                table = p[f"{first}.0.SelfAttention.relative_attention_bias.weight"][bucket, head]
                scores.append(q[i][part] @ k[j][part] + table)
            shares = torch.stack(scores).softmax(0)
            heads.append(sum(share * v[j][part] for j, share in enumerate(shares)))
        x = xs[i] + p[f"{first}.0.SelfAttention.o.weight"] @ torch.cat(heads)
        h = norm(x, f"{first}.1.layer_norm.weight")
        a, b = (p[f"{first}.1.DenseReluDense.{name}.weight"] @ h for name in ("wi_0", "wi_1"))
        gelu = a / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        x = x + p[f"{first}.1.DenseReluDense.wo.weight"] @ (gelu * b)
        out.append(norm(x, "encoder.final_layer_norm.weight"))
    assert (model(torch.tensor([ids]))[0].double() - torch.stack(out)).abs().max() < 1e-5


def test_gradients_reach_every_weight_once_asked_for():
    model = build()
    assert not any(p.requires_grad for p in model.parameters())
    frozen, model = model(tokens()), model.requires_grad_(True)
    output = model(tokens())
    assert (output - frozen).abs().max() < 1e-5
    output.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_padding_changes_nothing():
    model, ids = build(), tokens()
    alone = model(ids)
    for left, right in ((0, 4), (3, 0), (2, 2)):
        padded = torch.nn.functional.pad(ids, (left, right), value=7)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        assert (model(padded, mask)[:, left : left + 9] - alone).abs().max() < 1e-5
    mask[1] = 0
    assert model(padded, mask).isfinite().all()


def test_what_is_saved_is_loaded(folder):
    model = T5Encoder.from_pretrained(folder)
    assert torch.equal(model(tokens()), build()(tokens()))
    assert set(load_file(folder / "model.safetensors")) == set(model.state_dict())


@pytest.mark.parametrize("prefix", ["", t5.PREFIX])
@pytest.mark.parametrize(
    "embeddings", [("shared.weight",), ("encoder.embed_tokens.weight",), ("shared.weight", "encoder.embed_tokens.weight")]
)
def test_a_single_file_tells_its_sizes(tmp_path, prefix, embeddings):
    tensors = build().state_dict()
    table = tensors.pop("shared.weight")
    tensors = {prefix + name: tensor for name, tensor in [*tensors.items(), *((name, table.clone()) for name in embeddings)]}
    if prefix:
        tensors["model.diffusion_model.pos_embed"] = torch.ones(3)
    tensors[prefix.removesuffix("transformer.") + "logit_scale"] = torch.tensor(4.6)
    save_file(tensors, tmp_path / "t5xxl.safetensors")
    for stream in (False, True):
        model = T5Encoder.from_pretrained(tmp_path / "t5xxl.safetensors", stream=stream)
        assert model.config == Config(**SIZES) and torch.equal(model(tokens()), build()(tokens()))


def test_dtypes_and_the_fp16_variant(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({name: t.half() for name, t in tensors.items()}, folder / "model.fp16.safetensors")
    for stream in (False, True):
        model = T5Encoder.from_pretrained(folder, stream=stream)
        assert {p.dtype for p in model.parameters()} == {torch.float16} and model(tokens()).dtype == torch.float16
        assert T5Encoder.from_pretrained(folder, torch.float32, stream=stream)(tokens()).dtype == torch.float32


def test_a_whole_t5_gives_its_encoder(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"decoder.final_layer_norm.weight": torch.ones(12), "lm_head.weight": torch.ones(50, 12)},
        folder / "model.safetensors",
    )
    assert torch.equal(T5Encoder.from_pretrained(folder)(tokens()), build()(tokens()))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_streamed_is_the_same_bit_for_bit_with_one_block_in_memory(folder, dtype, monkeypatch):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tiny.shards(folder, tensors, "model")
    expected, alive, most, read = T5Encoder.from_pretrained(folder, dtype)(tokens()), [], [0], safetensors.Checkpoint.read

    def watched(checkpoint, key, device=None):  # every tensor read for use, and how many numbers of them live at once
        tensor = read(checkpoint, key, device)
        if not tensor.is_meta:
            alive.append(weakref.ref(tensor))
            most.append(sum(t().numel() for t in alive if t() is not None))
        return tensor

    monkeypatch.setattr(safetensors.Checkpoint, "read", watched)
    T5Encoder.from_pretrained(folder, dtype)  # the watch sees a model that is kept, where no copy is made
    assert max(most) == sum(t.numel() for t in tensors.values()) or dtype
    alive.clear(), most.clear()
    streamed = T5Encoder.from_pretrained(folder, dtype, stream=True)
    assert not alive and all(p.is_meta and p.dtype == expected.dtype for p in streamed.parameters())
    for mask in (None, torch.ones(2, 9)):  # with gradients enabled as they are by default
        assert torch.equal(streamed(tokens(), mask), expected)
    assert len(alive) == 2 * (len(tensors) + 1)  # the table of distances twice
    if dtype is None:  # where what is read is what is used
        assert max(most) == sum(t.numel() for name, t in tensors.items() if name.startswith("encoder.block.0."))
    assert not any(t() is not None for t in alive)
    assert expected.dtype == (dtype or torch.float32)


def test_half_precision_is_near(folder):
    exact = build()(tokens())
    for dtype, error in ((torch.bfloat16, 0.05), (torch.float16, 0.005)):
        model, seen = T5Encoder.from_pretrained(folder, dtype), []
        for block in model.encoder["block"]:
            block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].dtype))
        assert (model(tokens()).float() - exact).norm() / exact.norm() < error
        assert seen == [torch.float32] * 3  # the sum over the blocks
    tensors = {
        name: 3000 * t if ".wo." in name or "DenseReluDense.wi_1" in name else t for name, t in build().state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")  # sums that float16 cannot hold
    exact, half = (T5Encoder.from_pretrained(folder, dtype)(tokens()).float() for dtype in (torch.float32, torch.float16))
    assert (half - exact).norm() / exact.norm() < 0.02


def test_the_full_size_files_fit(tmp_path):
    shapes = tiny.t5_full_size()
    tiny.headers_only(tmp_path / "t5xxl_fp16.safetensors", shapes)
    model = T5Encoder.from_pretrained(tmp_path / "t5xxl_fp16.safetensors", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 4_762_310_656
    assert model.config == Config(32128, 4096, 64, 10240, 24, 64)
    release = {t5.PREFIX + name: shape for name, shape in shapes.items()} | {t5.PREFIX + t5.ALIAS: (32128, 4096)}
    release |= {"text_encoders.t5xxl.logit_scale": (), "model.diffusion_model.context_embedder.weight": (1536, 4096)}
    tiny.headers_only(tmp_path / "sd3_medium_incl_clips_t5xxlfp16.safetensors", release)
    for options in (dict(device="meta"), dict(stream=True)):  # neither reads a tensor
        model = T5Encoder.from_pretrained(tmp_path / "sd3_medium_incl_clips_t5xxlfp16.safetensors", **options)
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
        assert all(p.is_meta and p.dtype == torch.float16 for p in model.parameters())
    folder, names = tmp_path / "text_encoder_3", sorted(shapes)
    folder.mkdir()
    for i in (0, 1):
        tiny.headers_only(folder / f"model-{i}.safetensors", {name: shapes[name] for name in names[i::2]})
    index = {name: f"model-{i}.safetensors" for i in (0, 1) for name in names[i::2]}
    tiny.write_json(folder / "model.safetensors.index.json", {"weight_map": index})
    config = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128)
    tiny.write_json(folder / "config.json", {"model_type": "t5", "feed_forward_proj": "gated-gelu", **config})
    assert {n: tuple(p.shape) for n, p in T5Encoder.from_pretrained(folder, device="meta").named_parameters()} == shapes


def test_streaming_makes_the_same_checks_and_keeps_nothing_to_save(folder, tmp_path):
    with pytest.raises(ValueError, match="stream=True has no weights to save"):
        T5Encoder.from_pretrained(folder, stream=True).save_pretrained(tmp_path / "out")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for change, message in (
        ({"encoder.final_layer_norm.weight": None}, f"{folder}: key 'encoder.final_layer_norm.weight' is missing"),
        ({"scaled_fp8": torch.ones(1)}, f"{file}: key 'scaled_fp8' is not part of T5Encoder"),
        ({"shared.weight": torch.ones(50, 11)}, f"{file}: key 'shared.weight' has shape [50, 11]; expected [50, 12]"),
    ):
        save_file({name: tensor for name, tensor in (tensors | change).items() if tensor is not None}, file)
        with pytest.raises(ValueError) as error:
            T5Encoder.from_pretrained(folder, stream=True)
        assert str(error.value).startswith(message)


def test_float8_needs_a_dtype(tmp_path):
    tensors = {name: t.to(torch.float8_e4m3fn) for name, t in build().state_dict().items()}
    save_file(tensors, tmp_path / "t5xxl_fp8.safetensors")
    for stream in (False, True):
        with pytest.raises(ValueError, match="fp8.safetensors: key '.*' is stored as torch.float8_e4m3fn; expected a dtype"):
            T5Encoder.from_pretrained(tmp_path / "t5xxl_fp8.safetensors", stream=stream)
        model = T5Encoder.from_pretrained(tmp_path / "t5xxl_fp8.safetensors", torch.bfloat16, stream=stream)
        assert model(tokens()).dtype == torch.bfloat16 and model(tokens()).isfinite().all()
