"""Tiny checkpoints for the tests: weights that a seed fixes, and files written without this project's code."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

MMDIT = dict(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=64, num_attention_heads=2,
    joint_attention_dim=20, caption_projection_dim=128, pooled_projection_dim=12, pos_embed_max_size=10,
)  # fmt: skip
MMDIT_STYLES = {
    "sd3-medium": MMDIT,
    "sd3.5-medium": MMDIT | dict(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "sd3.5-large": MMDIT | dict(qk_norm="rms_norm"),
}
CLIP_TEXT = dict(
    vocab_size=99, hidden_size=32, intermediate_size=48, projection_dim=24, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=16,
)  # fmt: skip
CLIP_VISION = dict(
    hidden_size=40,
    intermediate_size=48,
    projection_dim=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=12,
    patch_size=4,
)
CLIP_STYLES = {"openai": dict(hidden_act="quick_gelu", eos_token_id=2), "laion": dict(hidden_act="gelu", eos_token_id=90)}


# How far a transformer's golden outputs (of order 10) may be off: its time embedding takes sines of up to 1000 radians in
# float32, whose last bits depend on the processor. On one machine ours and diffusers' agree to 1e-5 (tests/parity/).
PROCESSORS = 1e-3


def fill(model, seed=0, std=0.15):
    """The same weights for the same names and shapes, whoever wrote the model class; buffers stay."""
    for name, parameter in sorted(model.named_parameters()):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(name.encode()) * 31 + parameter.numel())
        with torch.no_grad():
            values = std * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values + 1 if "norm" in name and name.endswith("weight") and parameter.dim() == 1 else values)
    return model.eval()


def mmdit_inputs(height=8, width=12):
    generator = torch.Generator().manual_seed(7)
    latents, context, pooled = (torch.randn(4, *shape, generator=generator) for shape in ((4, height, width), (5, 20), (12,)))
    return latents, torch.tensor([0.0, 0.3, 0.875, 1.0]), context, pooled


def clip_inputs():
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 80, (3, 9), generator=generator)
    ids[0, 5:], ids[1, 7:], ids[2, 8:] = 98, 98, 98  # padded with the highest id
    ids[0, 4], ids[1, 6], ids[2, 7] = 90, 90, 90
    return ids, torch.randn(3, 3, 12, 12, generator=generator)


def write_json(file, value):
    Path(file).write_text(json.dumps(value))


def headers_only(file, shapes, dtype="F16"):
    """A safetensors file of full size by its header, whose data take no disk space (a sparse file of zeros)."""
    width, offset, header = {"F16": 2, "BF16": 2, "F32": 4}[dtype], 0, {}
    for name, shape in shapes.items():
        end = offset + width * math.prod(shape)
        header[name], offset = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + offset)


def shards(folder, tensors, stem, count=3):
    """A sharded checkpoint with its index."""
    names, weight_map = sorted(tensors), {}
    for i in range(count):
        file = f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name].contiguous() for name in names[i::count]}, Path(folder) / file)
        weight_map |= {name: file for name in names[i::count]}
    write_json(Path(folder) / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def to_stability(tensors, layers, dual=()):
    """diffusers' SD3 keys -> Stability's, spelt out: the reverse of what the loader does, written without it."""
    out, t = {}, dict(tensors)

    def swap(x):
        return torch.cat([x[len(x) // 2 :], x[: len(x) // 2]])

    out["pos_embed"] = t["pos_embed.pos_embed"]
    for kind in ("weight", "bias"):
        out[f"x_embedder.proj.{kind}"] = t[f"pos_embed.proj.{kind}"]
        out[f"context_embedder.{kind}"] = t[f"context_embedder.{kind}"]
        for i, layer in ((0, 1), (2, 2)):
            out[f"t_embedder.mlp.{i}.{kind}"] = t[f"time_text_embed.timestep_embedder.linear_{layer}.{kind}"]
            out[f"y_embedder.mlp.{i}.{kind}"] = t[f"time_text_embed.text_embedder.linear_{layer}.{kind}"]
        out[f"final_layer.linear.{kind}"] = t[f"proj_out.{kind}"]
        out[f"final_layer.adaLN_modulation.1.{kind}"] = swap(t[f"norm_out.linear.{kind}"])
        for i in range(layers):
            old, new, last = f"transformer_blocks.{i}", f"joint_blocks.{i}", i == layers - 1
            x, c = f"{new}.x_block", f"{new}.context_block"
            out[f"{x}.adaLN_modulation.1.{kind}"] = t[f"{old}.norm1.linear.{kind}"]
            modulation = t[f"{old}.norm1_context.linear.{kind}"]
            out[f"{c}.adaLN_modulation.1.{kind}"] = swap(modulation) if last else modulation
            out[f"{x}.attn.qkv.{kind}"] = torch.cat([t[f"{old}.attn.to_{p}.{kind}"] for p in "qkv"])
            out[f"{c}.attn.qkv.{kind}"] = torch.cat([t[f"{old}.attn.add_{p}_proj.{kind}"] for p in "qkv"])
            out[f"{x}.attn.proj.{kind}"] = t[f"{old}.attn.to_out.0.{kind}"]
            out[f"{x}.mlp.fc1.{kind}"] = t[f"{old}.ff.net.0.proj.{kind}"]
            out[f"{x}.mlp.fc2.{kind}"] = t[f"{old}.ff.net.2.{kind}"]
            if not last:
                out[f"{c}.attn.proj.{kind}"] = t[f"{old}.attn.to_add_out.{kind}"]
                out[f"{c}.mlp.fc1.{kind}"] = t[f"{old}.ff_context.net.0.proj.{kind}"]
                out[f"{c}.mlp.fc2.{kind}"] = t[f"{old}.ff_context.net.2.{kind}"]
            if i in dual:
                out[f"{x}.attn2.qkv.{kind}"] = torch.cat([t[f"{old}.attn2.to_{p}.{kind}"] for p in "qkv"])
                out[f"{x}.attn2.proj.{kind}"] = t[f"{old}.attn2.to_out.0.{kind}"]
    norms = {"attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k", "attn2.norm_q": "x_block.attn2.ln_q"}
    norms |= {"attn2.norm_k": "x_block.attn2.ln_k", "attn.norm_added_q": "context_block.attn.ln_q"}
    norms |= {"attn.norm_added_k": "context_block.attn.ln_k"}
    for i in range(layers):
        for old, new in norms.items():
            if f"transformer_blocks.{i}.{old}.weight" in t:
                out[f"joint_blocks.{i}.{new}.weight"] = t[f"transformer_blocks.{i}.{old}.weight"]
    return {name: tensor.contiguous().clone() for name, tensor in out.items()}


# SD3's parts in small: both CLIPs have heads of 64, as single files presume; the tokenizers' words are few.
SD3 = MMDIT | dict(in_channels=16, out_channels=16, joint_attention_dim=224, pooled_projection_dim=192, pos_embed_max_size=12)
SD3_CLIP = dict(vocab_size=525, num_hidden_layers=3, max_position_embeddings=77, eos_token_id=2, bos_token_id=0)
SD3_CLIPS = {
    "text_encoder": SD3_CLIP | dict(hidden_size=64, intermediate_size=96, num_attention_heads=1, projection_dim=64),
    "text_encoder_2": SD3_CLIP
    | dict(hidden_size=128, intermediate_size=80, num_attention_heads=2, projection_dim=128, hidden_act="gelu"),
}
SD3_T5 = dict(
    vocab_size=300, d_model=224, d_kv=16, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
    is_encoder_decoder=False, tie_word_embeddings=False,
)  # fmt: skip
SD3_VAE = dict(
    in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=16, norm_num_groups=32, scaling_factor=1.5305,
    shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip


def clip_tokenizer(folder, pad):
    """vocab.json, merges.txt and their two companions as SD3's public folders have them: 512 bytes, 11 merges, two specials."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    merges = ["t h", "th e</w>", "o n", "on e</w>", "i n", "in g</w>", "! !</w>", "a n", "an d</w>", "' s</w>", "1 2</w>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]

    def token(content, normalized=True):
        return dict(content=content, lstrip=False, normalized=normalized, rstrip=False, single_word=False)

    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    decoder = {"523": token("<|startoftext|>") | {"special": True}, "524": token("<|endoftext|>", False) | {"special": True}}
    decoder = {"0": token("!", False) | {"special": True}} | decoder if pad == "!" else decoder
    config = dict(add_prefix_space=False, added_tokens_decoder=decoder, do_lower_case=True, errors="replace", pad_token=pad)
    config |= ends | dict(model_max_length=77, tokenizer_class="CLIPTokenizer", clean_up_tokenization_spaces=True)
    write_json(Path(folder) / "tokenizer_config.json", config)
    special = {name: token(content) for name, content in ends.items()} | {"pad_token": pad}
    write_json(Path(folder) / "special_tokens_map.json", special)
    write_json(Path(folder) / "vocab.json", {word: i for i, word in enumerate(words)})
    (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def t5_tokenizer(folder):
    """tokenizer.json and tokenizer_config.json as T5's: unigrams after a white-space split, </s> behind."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    words = ["▁", "▁the", "▁a", "s", "ing", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?-'"]
    vocabulary = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], *([word, -2.0 - i / 10] for i, word in enumerate(words))]
    names = ["<pad>", "</s>", "<unk>"]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    metaspace = dict(type="Metaspace", replacement="▁", prepend_scheme="always", split=True)
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    tokenizer = dict(
        version="1.0", truncation=None, padding=None, normalizer=None, decoder=metaspace,
        added_tokens=[dict(id=i, content=name, **flags) for i, name in enumerate(names)],
        pre_tokenizer=dict(type="Sequence", pretokenizers=[dict(type="WhitespaceSplit"), metaspace]),
        post_processor=dict(
            type="TemplateProcessing", single=[{"Sequence": {"id": "A", "type_id": 0}}, end],
            pair=[{"Sequence": {"id": "A", "type_id": 0}}, end, {"Sequence": {"id": "B", "type_id": 0}}, end],
            special_tokens={"</s>": dict(id="</s>", ids=[1], tokens=["</s>"])},
        ),
        model=dict(type="Unigram", unk_id=2, vocab=vocabulary, byte_fallback=False),
    )  # fmt: skip
    write_json(Path(folder) / "tokenizer.json", tokenizer)
    config = dict(zip(("pad_token", "eos_token", "unk_token"), names)) | dict(extra_ids=0, additional_special_tokens=[])
    write_json(Path(folder) / "tokenizer_config.json", config | dict(model_max_length=512, tokenizer_class="T5Tokenizer"))


def t5_full_size():
    """Key -> shape of T5-XXL's encoder, version 1.1."""
    shapes = {"shared.weight": (32128, 4096), "encoder.final_layer_norm.weight": (4096,)}
    for layer in range(24):
        at = f"encoder.block.{layer}.layer"
        shapes |= {f"{at}.0.SelfAttention.{name}.weight": (4096, 4096) for name in "qkvo"}
        shapes |= {f"{at}.{i}.layer_norm.weight": (4096,) for i in (0, 1)}
        shapes |= {f"{at}.1.DenseReluDense.{name}.weight": (10240, 4096) for name in ("wi_0", "wi_1")}
        shapes[f"{at}.1.DenseReluDense.wo.weight"] = (4096, 10240)
    return shapes | {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64)}


AWKWARD = [
    "The one, AND the Ring", "Café É Straße İstanbul ǅ", "cafe\u0301 n\u0303", "emoji 😀👩\u200d👩\u200d👧 flag 🇩🇪",
    "漢字かな 한국어 中文",
    "double  spaces\t\ttab", "line\nbreak\r\n\r\nmore", "punct!? ... --- (a) [b] {c} \"q\" 'q'",
    "it's they're I'VE we'll he'd I'm",
    "&amp; &lt;b&gt; &quot;", "12 345 6.78 ½ ²  Ⅳ", "", "   ", "!", "!!", "hello! world!!!", "a !b! c", "<|endoftext|>",
    "<|STARTOFTEXT|> x", "a<|startoftext|>b <|ENDOFTEXT|> c", "\u00a0nbsp\u3000ideo\u200bzw", "foo_bar-baz/qux",
    "ﬁ ligature Å \u212b",
    "a\x00b\x7f", "the " * 100, "  <|endoftext|>  !  x", "<pad> </s> [CLS]",
]  # fmt: skip


VAE = dict(block_out_channels=(32, 64), layers_per_block=1, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609)
VAE_STYLES = {
    "two-stages": VAE,
    "one-stage": VAE | dict(block_out_channels=(32,), layers_per_block=2),
    "four-stages": VAE | dict(block_out_channels=(32, 64, 96, 96), layers_per_block=2),
    "few-groups": VAE | dict(block_out_channels=(8, 12, 12), norm_num_groups=4, latent_channels=3, shift_factor=None),
    "no-attention": VAE | dict(mid_block_add_attention=False),
}


def vae_config(sizes):
    """The config.json that diffusers' AutoencoderKL writes for these sizes of an SD3 autoencoder."""
    stages = len(sizes["block_out_channels"])
    config = dict(_class_name="AutoencoderKL", act_fn="silu", use_quant_conv=False, use_post_quant_conv=False)
    config |= dict(down_block_types=["DownEncoderBlock2D"] * stages, up_block_types=["UpDecoderBlock2D"] * stages)
    return config | sizes


def images(height=16, width=24, count=2):
    return 2 * torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(7)) - 1


def vae_latents(channels=16, height=3, width=5, count=2):
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(8))


def ldm_vae_shapes(widths=(128, 256, 512, 512), layers=2, latent=16):
    """Key -> shape of Stability's autoencoder file, spelt out from latent diffusion's Encoder and Decoder modules."""
    shapes, top = {}, len(widths) - 1

    def conv(name, dim_in, dim, kernel=3):
        shapes.update({f"{name}.weight": (dim, dim_in, kernel, kernel), f"{name}.bias": (dim,)})

    def norm(name, dim):
        shapes.update({f"{name}.weight": (dim,), f"{name}.bias": (dim,)})

    def block(name, dim_in, dim):
        norm(f"{name}.norm1", dim_in)
        conv(f"{name}.conv1", dim_in, dim)
        norm(f"{name}.norm2", dim)
        conv(f"{name}.conv2", dim, dim)
        if dim_in != dim:
            conv(f"{name}.nin_shortcut", dim_in, dim, 1)

    for side, first, out in (("encoder", 3, 2 * latent), ("decoder", latent, 3)):
        wide, last = widths[top], widths[top] if side == "encoder" else widths[0]
        conv(f"{side}.conv_in", first, widths[0] if side == "encoder" else wide)
        block(f"{side}.mid.block_1", wide, wide)
        norm(f"{side}.mid.attn_1.norm", wide)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{part}", wide, wide, 1)
        block(f"{side}.mid.block_2", wide, wide)
        norm(f"{side}.norm_out", last)
        conv(f"{side}.conv_out", last, out)
    for i in range(top + 1):
        for j in range(layers):
            block(f"encoder.down.{i}.block.{j}", widths[max(i - 1, 0)] if j == 0 else widths[i], widths[i])
        for j in range(layers + 1):
            block(f"decoder.up.{i}.block.{j}", widths[min(i + 1, top)] if j == 0 else widths[i], widths[i])
        if i < top:
            conv(f"encoder.down.{i}.downsample.conv", widths[i], widths[i])
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", widths[i], widths[i])
    return shapes


def ldm_vae(widths=(32, 64), layers=1, seed=0, linear=False):
    """A tiny file in that layout; attention as 1 × 1 convolutions, or as the linear layers that some tools write."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in ldm_vae_shapes(widths, layers).items():
        values = 0.15 * torch.randn(shape, generator=generator)
        tensors[name] = values + 1 if "norm" in name and name.endswith("weight") else values
        if linear and ".attn_1." in name and values.dim() == 4:
            tensors[name] = values[:, :, 0, 0].contiguous()
    return tensors


# BLIP. Heads are 64 wide in ImageReward's ViT, whose file does not tell their number.
BLIP_TEXT = dict(
    vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=14,
)  # fmt: skip
BLIP_VISION = dict(
    hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=5, image_size=15, patch_size=5
)
IMAGE_REWARD_VISION = dict(
    hidden_size=128, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2, image_size=15, patch_size=5,
    layer_norm_eps=1e-6,
)  # fmt: skip
WORD_PIECES = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] ! \" # ' ( ) , - . / : ; ? [ ] _ a an cat cafe dog in paris the two un ##able ##s ##break "
    "run ##ning 3 ##d 4 ##k naive 中 文 字 日 prompt mask sep i istanbul strasse x ##y"
).split()


def blip_fill(model, seed=0):
    """`fill`, and layer norms about 1: BERT spells them LayerNorm."""
    for name, parameter in fill(model, seed).named_parameters():
        if name.endswith("LayerNorm.weight"):
            parameter.data += 1
    return model


def blip_inputs(side=15):
    """pixels [3, 3, side, side], ids [3, 9], and a mask that leaves 9, 5 and 2 of the tokens."""
    generator = torch.Generator().manual_seed(7)
    pixels, ids = torch.randn(3, 3, side, side, generator=generator), torch.randint(3, 60, (3, 9), generator=generator)
    return pixels, ids, (torch.arange(9) < torch.tensor([[9], [5], [2]])).long()


def to_image_reward(vision, text, mlp):
    """transformers' BlipVisionModel and BlipTextModel tensors and a head's -> ImageReward's keys, spelt out."""
    out = {f"blip.text_encoder.{name}": tensor for name, tensor in text.items()}
    out |= {f"mlp.layers.{name}": tensor for name, tensor in mlp.items()}
    vit, blocks = "blip.visual_encoder", 1 + max(int(name.split(".")[2]) for name in vision if "layers" in name)
    out[f"{vit}.cls_token"] = vision["embeddings.class_embedding"]
    out[f"{vit}.pos_embed"] = vision["embeddings.position_embedding"]
    for kind in ("weight", "bias"):
        out[f"{vit}.patch_embed.proj.{kind}"] = vision[f"embeddings.patch_embedding.{kind}"]
        out[f"{vit}.norm.{kind}"] = vision[f"post_layernorm.{kind}"]
        for i in range(blocks):
            old, new = f"encoder.layers.{i}", f"{vit}.blocks.{i}"
            out[f"{new}.norm1.{kind}"] = vision[f"{old}.layer_norm1.{kind}"]
            out[f"{new}.norm2.{kind}"] = vision[f"{old}.layer_norm2.{kind}"]
            out[f"{new}.attn.qkv.{kind}"] = vision[f"{old}.self_attn.qkv.{kind}"]
            out[f"{new}.attn.proj.{kind}"] = vision[f"{old}.self_attn.projection.{kind}"]
            out[f"{new}.mlp.fc1.{kind}"] = vision[f"{old}.mlp.fc1.{kind}"]
            out[f"{new}.mlp.fc2.{kind}"] = vision[f"{old}.mlp.fc2.{kind}"]
    return out
