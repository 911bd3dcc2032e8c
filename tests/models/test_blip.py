"""BLIP and ImageReward: written out in loops, padding, normalisation, full-size files."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from nano_adrpo.models import blip


def build(**image):
    config = blip.Config(blip.TextConfig(**tiny.BLIP_TEXT), blip.VisionConfig(**tiny.BLIP_VISION | image), 10)
    return tiny.blip_fill(blip.BLIP(config))


def build_reward(**text):
    vision = blip.VisionConfig(**tiny.IMAGE_REWARD_VISION)
    return tiny.blip_fill(blip.ImageReward(blip.Config(blip.TextConfig(**tiny.BLIP_TEXT | text), vision)), 1)


# The two towers for one image and one text, in float64, as written in the papers (ViT: arXiv 2010.11929, BERT: 1810.04805,
# BLIP: 2201.12086, figure 2): weights by name, one patch, one head and one query at a time.


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w, name, x, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / ((x**2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def attention(q, k, v, heads):
    width, out = q.shape[1] // heads, torch.zeros_like(q)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(len(q)):
            scores = [(q[i, part] @ k[j, part] / width**0.5).exp() for j in range(len(k))]
            out[i, part] = sum(score * v[j, part] for j, score in enumerate(scores)) / sum(scores)
    return out


def image_tokens(w, pixels, sizes, eps):
    patch, side = sizes["patch_size"], sizes["image_size"] // sizes["patch_size"]
    tokens = [w["embeddings.class_embedding"][0, 0]]
    for row in range(side):
        for column in range(side):
            window = pixels[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            kernel = w["embeddings.patch_embedding.weight"]
            tokens.append((kernel * window).sum(dim=(1, 2, 3)) + w["embeddings.patch_embedding.bias"])
    x = torch.stack(tokens) + w["embeddings.position_embedding"][0]
    for i in range(sizes["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        qkv = linear(w, f"{layer}.self_attn.qkv", norm(w, f"{layer}.layer_norm1", x, eps))
        attended = attention(*qkv.split(sizes["hidden_size"], dim=1), sizes["num_attention_heads"])
        x = x + linear(w, f"{layer}.self_attn.projection", attended)
        hidden = gelu(linear(w, f"{layer}.mlp.fc1", norm(w, f"{layer}.layer_norm2", x, eps)))
        x = x + linear(w, f"{layer}.mlp.fc2", hidden)
    return norm(w, "post_layernorm", x, eps)


def text_tokens(w, ids, sizes, image=None, eps=1e-12):
    embeddings = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(w, "embeddings.LayerNorm", embeddings, eps)
    for i in range(sizes["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for name in ["attention"] if image is None else ["attention", "crossattention"]:
            source = x if name == "attention" else image
            q, k, v = (
                linear(w, f"{layer}.{name}.self.{part}", tokens)
                for part, tokens in (("query", x), ("key", source), ("value", source))
            )
            attended = linear(w, f"{layer}.{name}.output.dense", attention(q, k, v, sizes["num_attention_heads"]))
            x = norm(w, f"{layer}.{name}.output.LayerNorm", x + attended, eps)
        hidden = linear(w, f"{layer}.output.dense", gelu(linear(w, f"{layer}.intermediate.dense", x)))
        x = norm(w, f"{layer}.output.LayerNorm", x + hidden, eps)
    return x


def below(model, prefix):
    tensors = model.state_dict().items()
    return {name.removeprefix(prefix): tensor.double() for name, tensor in tensors if name.startswith(prefix)}


@torch.no_grad()
def test_blip_written_out():
    model, (pixels, ids, mask) = build(), tiny.blip_inputs()
    w, vision, text = below(model, ""), below(model, "vision_model."), below(model, "text_encoder.")
    for row, length in enumerate((9, 5, 2)):  # padding: the row's own tokens alone
        image = image_tokens(vision, pixels[row].double(), tiny.BLIP_VISION, 1e-5)
        alone, pair = (text_tokens(text, ids[row, :length], tiny.BLIP_TEXT, tokens) for tokens in (None, image))
        logits = linear(w, "itm_head", pair[0])
        assert (model.encode_image(pixels)[row] - linear(w, "vision_proj", image[0])).abs().max() < 1e-5
        assert (model.encode_text(ids, mask)[row] - linear(w, "text_proj", alone[0])).abs().max() < 1e-5
        assert (model.match_logits(pixels, ids, mask)[row] - logits).abs().max() < 1e-5
        assert abs(model.match(pixels, ids, mask)[row] - 1 / (1 + (logits[0] - logits[1]).exp())) < 1e-5


@torch.no_grad()
def test_image_reward_written_out():
    model, (pixels, ids, mask) = build_reward(), tiny.blip_inputs()
    pixels = pixels * 1e-3  # so faint that the norms' eps shows: 1e-6 in this ViT, where BLIP's config says 1e-5
    for parameter in model.blip["visual_encoder"].embeddings.parameters():
        parameter *= 1e-2
    w = below(model, "")
    vision, text = below(model, "blip.visual_encoder."), below(model, "blip.text_encoder.")
    for row, length in enumerate((9, 5, 2)):
        image = image_tokens(vision, pixels[row].double(), tiny.IMAGE_REWARD_VISION, 1e-6)
        x = text_tokens(text, ids[row, :length], tiny.BLIP_TEXT, image)[0]
        for i in (0, 2, 4, 6, 7):
            x = linear(w, f"mlp.layers.{i}", x)
        assert abs(model(pixels, ids, mask)[row] - (x[0] - 0.16717362830052426) / 1.0333394966054072) < 1e-5


@torch.no_grad()
def test_image_rewards_normalisation():
    model, (pixels, ids, mask) = build_reward(), tiny.blip_inputs()
    last = model.mlp["layers"][-1]
    last.weight.zero_()
    for output, reward in ((0.16717362830052426, 0), (0.16717362830052426 + 1.0333394966054072, 1)):
        last.bias.fill_(output)
        assert model(pixels, ids, mask).tolist() == pytest.approx([reward] * 3, abs=1e-6)


@torch.no_grad()
def test_padding_is_invisible_behind_a_mask():
    model, reward, (pixels, ids, mask) = build(), build_reward(), tiny.blip_inputs()
    other, wider = ids.where(mask.bool(), 11), torch.nn.functional.pad(ids, (0, 4), value=7)
    for call in (model.encode_text, lambda *text: model.match(pixels, *text), lambda *text: reward(pixels, *text)):
        expected = call(ids, mask)
        assert torch.allclose(call(other, mask.bool()), expected, atol=1e-6)
        assert torch.allclose(call(wider, torch.nn.functional.pad(mask, (0, 4)).float()), expected, atol=1e-6)
        assert torch.allclose(call(ids), call(ids, torch.ones_like(ids)), atol=1e-6)
        assert not torch.allclose(call(ids)[1:], expected[1:], atol=1e-3)


@torch.no_grad()
def test_rows_are_pairs_of_their_own():
    model, reward, (pixels, ids, mask) = build(), build_reward(), tiny.blip_inputs()
    for call in (model.match, reward):
        together, other = call(pixels, ids, mask), call(pixels.roll(1, 0), ids, mask)
        assert together.shape == (3,) and together.dtype == torch.float32
        assert not torch.isclose(together, other, atol=1e-4).any()  # another image, another score
        for row in range(3):
            alone = call(pixels[row : row + 1], ids[row : row + 1], mask[row : row + 1])
            assert torch.allclose(alone, together[row : row + 1], atol=1e-5)
    assert ((model.match(pixels, ids) > 0) & (model.match(pixels, ids) < 1)).all()


def test_both_towers_are_differentiable():
    for model in (build(), build_reward()):
        call = model.match if isinstance(model, blip.BLIP) else model
        pixels, ids, mask = tiny.blip_inputs()
        pixels.requires_grad_()
        call(pixels, ids, mask).sum().backward()
        assert pixels.grad.isfinite().all() and pixels.grad.abs().sum() > 0
        untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert all(name.startswith(("vision_proj", "text_proj")) for name in untouched)


def assert_same(again, model):
    """The same weights, bit for bit. Outputs may differ in the last bit: tensors mapped from a file begin anywhere in memory,
    and matrix products round by alignment."""
    ours, theirs = again.state_dict(), model.state_dict()
    assert again.config == model.config and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    inputs = tiny.blip_inputs()
    scores = (each.match(*inputs) if isinstance(each, blip.BLIP) else each(*inputs) for each in (again, model))
    assert torch.allclose(*scores, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_folders_round_trip(tmp_path, dtype):
    model, reward, (pixels, ids, mask) = build(), build_reward(), tiny.blip_inputs()
    model.save_pretrained(tmp_path / "blip")
    reward.save_pretrained(tmp_path / "reward")
    assert sorted(file.name for file in (tmp_path / "reward").iterdir()) == ["ImageReward.safetensors", "med_config.json"]
    assert_same(blip.BLIP.from_pretrained(tmp_path / "blip"), model)
    assert_same(blip.ImageReward.from_pretrained(tmp_path / "reward"), reward)

    for kind, folder in ((blip.BLIP, tmp_path / "blip"), (blip.ImageReward, tmp_path / "reward")):
        half = kind.from_pretrained(folder, dtype)
        assert {parameter.dtype for parameter in half.parameters()} == {dtype}
        half.save_pretrained(tmp_path / "half" / kind.__name__)
        kept = kind.from_pretrained(tmp_path / "half" / kind.__name__)
        assert {parameter.dtype for parameter in kept.parameters()} == {dtype}
        score, full = (half.match, model.match) if kind is blip.BLIP else (half, reward)
        assert score(pixels, ids, mask).dtype == torch.float32
        assert (score(pixels, ids, mask) - full(pixels, ids, mask)).abs().max() < 0.1
        meta = kind.from_pretrained(folder, device="meta")
        assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}


@torch.no_grad()
def test_image_reward_from_one_file(tmp_path):
    # All sizes from the shapes: both towers' heads are then 64 wide.
    reward = build_reward(hidden_size=128, num_attention_heads=2)
    reward.save_pretrained(tmp_path)
    unused = {
        "blip.text_encoder.embeddings.position_ids": torch.arange(14)[None],
        "blip.vision_proj.weight": torch.ones(10, 128, dtype=torch.float64),  # its dtype is not the model's
        "blip.vision_proj.bias": torch.ones(10),
        "blip.text_proj.weight": torch.ones(10, 128),
        "blip.text_proj.bias": torch.ones(10),
    }
    save_file(load_file(tmp_path / "ImageReward.safetensors") | unused, tmp_path / "other name.safetensors")
    assert_same(blip.ImageReward.from_pretrained(tmp_path / "other name.safetensors"), reward)


@torch.no_grad()
def test_shards_and_position_ids(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    tiny.shards(tmp_path, tensors | {"text_encoder.embeddings.position_ids": torch.arange(14)[None]}, "model")
    assert_same(blip.BLIP.from_pretrained(tmp_path), model)


def test_configs_may_leave_out_the_defaults(tmp_path):
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in blip.BLIP(blip.Config()).state_dict().items()}
    tiny.headers_only(tmp_path / "model.safetensors", shapes)
    tiny.write_json(tmp_path / "config.json", {"model_type": "blip", "text_config": {"num_attention_heads": 12}})
    config = blip.BLIP.from_pretrained(tmp_path, device="meta").config
    assert (config.vision_config.image_size, config.image_text_hidden_size) == (384, 256)
    assert (config.text_config.vocab_size, config.text_config.num_attention_heads) == (30524, 12)


def parameters(width, layers, image_size, vocabulary=30524):
    """Parameters of a ViT with patches of 16 and of a BERT-base that looks at it, layer by layer."""
    vit_layer = 2 * 2 * width + 4 * width * (width + 1) + 2 * 4 * width * width + 5 * width
    vit = width * (1 + (image_size // 16) ** 2 + 1) + width * (3 * 16 * 16 + 1) + layers * vit_layer + 2 * width
    attention, to_image = (768 * (2 * 769 + 2 * (source + 1)) + 2 * 768 for source in (768, width))
    bert_layer = attention + to_image + 2 * 4 * 768 * 768 + 5 * 768 + 2 * 768
    return vit + 768 * (vocabulary + 512 + 2) + 12 * bert_layer


@pytest.mark.parametrize("width, layers, heads, count", [(768, 12, 12, 223_744_258), (1024, 24, 16, 446_128_642)])
def test_full_size_parameter_counts(width, layers, heads, count):
    # Salesforce/blip-itm-base-coco and -large-coco. The counts are transformers'.
    vision = blip.VisionConfig(width, 4 * width, layers, heads)
    with torch.device("meta"):
        model = blip.BLIP(blip.Config(blip.TextConfig(num_attention_heads=12), vision))
    assert sum(p.numel() for p in model.parameters()) == count
    assert count == parameters(width, layers, 384) + 256 * (width + 1) + 256 * 769 + 2 * 769


def test_image_reward_in_full_size(tmp_path):
    # THUDM/ImageReward, header by header; the release's file is 1,786,880,927 bytes long, nearly all of it float32.
    vit, text, width = "blip.visual_encoder", "blip.text_encoder", 1024
    shapes = {
        f"{vit}.cls_token": (1, 1, width), f"{vit}.pos_embed": (1, 197, width),
        f"{vit}.patch_embed.proj.weight": (width, 3, 16, 16), f"{vit}.patch_embed.proj.bias": (width,),
        f"{text}.embeddings.word_embeddings.weight": (30524, 768), f"{text}.embeddings.position_embeddings.weight": (512, 768),
    }  # fmt: skip

    def layer(name, out, into=None):
        shapes.update({f"{name}.weight": (out, into) if into else (out,), f"{name}.bias": (out,)})

    for i in range(24):
        layer(f"{vit}.blocks.{i}.norm1", width)
        layer(f"{vit}.blocks.{i}.attn.qkv", 3 * width, width)
        layer(f"{vit}.blocks.{i}.attn.proj", width, width)
        layer(f"{vit}.blocks.{i}.norm2", width)
        layer(f"{vit}.blocks.{i}.mlp.fc1", 4 * width, width)
        layer(f"{vit}.blocks.{i}.mlp.fc2", width, 4 * width)
    layer(f"{vit}.norm", width)
    layer(f"{text}.embeddings.LayerNorm", 768)
    for i in range(12):
        for name, source in (("attention", 768), ("crossattention", width)):
            layer(f"{text}.encoder.layer.{i}.{name}.self.query", 768, 768)
            layer(f"{text}.encoder.layer.{i}.{name}.self.key", 768, source)
            layer(f"{text}.encoder.layer.{i}.{name}.self.value", 768, source)
            layer(f"{text}.encoder.layer.{i}.{name}.output.dense", 768, 768)
            layer(f"{text}.encoder.layer.{i}.{name}.output.LayerNorm", 768)
        layer(f"{text}.encoder.layer.{i}.intermediate.dense", 3072, 768)
        layer(f"{text}.encoder.layer.{i}.output.dense", 768, 3072)
        layer(f"{text}.encoder.layer.{i}.output.LayerNorm", 768)
    for i, into, out in ((0, 768, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        layer(f"mlp.layers.{i}", out, into)
    kept = dict(shapes)
    layer("blip.vision_proj", 256, width)
    layer("blip.text_proj", 256, 768)
    tiny.headers_only(tmp_path / "ImageReward.safetensors", shapes, "F32")
    assert 1_786_880_927 * 0.9998 < (tmp_path / "ImageReward.safetensors").stat().st_size < 1_786_880_927

    med_config = {"hidden_size": 768, "num_attention_heads": 12, "encoder_width": 768}  # the release's code overrides the last
    tiny.write_json(tmp_path / "med_config.json", med_config)
    ours = blip.ImageReward.from_pretrained(tmp_path, device="meta")
    keys = {name: blip.image_reward_key(name) for name in ours.state_dict()}
    assert {keys[name]: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == kept
    assert ours.config.vision_config == blip.VisionConfig(1024, 4096, 24, 16, 224, layer_norm_eps=1e-6)
    head = 1024 * 769 + 128 * 1025 + 64 * 129 + 16 * 65 + 17
    assert sum(p.numel() for p in ours.parameters()) == parameters(1024, 24, 224) + head == 446_206_689


def test_inputs_that_do_not_fit_are_refused():
    model, reward, (pixels, ids, _) = build(), build_reward(), tiny.blip_inputs()
    for call in (model.match, reward):
        with pytest.raises(ValueError, match="pixels are 15 × 10; expected 15 × 15"):
            call(pixels[..., :10], ids)
        with pytest.raises(ValueError, match="the prompt has 18 tokens; expected at most 14"):
            call(pixels, ids.repeat(1, 2))
