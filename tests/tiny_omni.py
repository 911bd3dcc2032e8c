"""A tiny folder in the layout of Qwen2.5-Omni's release, written without this project's code: weights that a seed fixes,
byte-level tokens, the chat template in short. `shapes` are those of any size."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|IMAGE|>", "<|VIDEO|>",
         "<|vision_bos|>", "<|vision_eos|>", "<think>", "</think>", "<answer>", "</answer>"]  # fmt: skip
IDS = {word: 256 + index for index, word in enumerate(WORDS)}  # behind the 256 bytes
END, AUDIO = IDS["<|im_end|>"], IDS["<|AUDIO|>"]

TEXT_SIZES = dict(
    vocab_size=272, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=4096,
)  # fmt: skip
AUDIO_SIZES = dict(d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, output_dim=64)
# What the release has, and its smaller sister.
TEXT_7B = dict(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, max_position_embeddings=32768,
)  # fmt: skip
TEXT_3B = TEXT_7B | dict(
    vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
    num_key_value_heads=2,
)  # fmt: skip
AUDIO_7B = dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, output_dim=3584)


def config(text=None, audio=None, ids=None, mrope=(2, 3, 3)):
    """A release's config.json; ids: names of the thinker's ids and their values."""
    rope = {"mrope_section": list(mrope), "rope_type": "default", "type": "default"}
    text = dict(
        model_type="qwen2_5_omni_text", hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000.0, rope_scaling=rope,
        use_sliding_window=False, sliding_window=32768, max_window_layers=28, tie_word_embeddings=False,
        attention_dropout=0.0, **TEXT_SIZES | (text or {}),
    )  # fmt: skip
    audio = dict(
        model_type="qwen2_5_omni_audio_encoder", num_mel_bins=128, max_source_positions=1500, n_window=100,
        activation_function="gelu", scale_embedding=False, dropout=0, attention_dropout=0, activation_dropout=0,
        **AUDIO_SIZES | (audio or {}),
    )  # fmt: skip
    vision = dict(
        model_type="qwen2_5_omni_vision_encoder", depth=1, hidden_size=16, intermediate_size=16, num_heads=2,
        out_hidden_size=text["hidden_size"], fullatt_block_indexes=[0],
    )  # fmt: skip
    named = dict(
        audio_token_index=AUDIO, audio_start_token_id=IDS["<|audio_bos|>"], audio_end_token_id=IDS["<|audio_eos|>"],
        image_token_index=IDS["<|IMAGE|>"], video_token_index=IDS["<|VIDEO|>"], pad_token_id=IDS["<|endoftext|>"],
        vision_start_token_id=IDS["<|vision_bos|>"], vision_end_token_id=IDS["<|vision_eos|>"], eos_token_id=END,
    )  # fmt: skip
    thinker = dict(
        model_type="qwen2_5_omni_thinker", position_id_per_seconds=25, seconds_per_chunk=2, user_token_id=872,
        audio_config=audio, text_config=text, vision_config=vision, **named | (ids or {}),
    )  # fmt: skip
    kind = dict(architectures=["Qwen2_5OmniForConditionalGeneration"], model_type="qwen2_5_omni", enable_audio_output=True)
    return kind | dict(thinker_config=thinker, talker_config={}, token2wav_config={}, torch_dtype="bfloat16")


def shapes(text=TEXT_SIZES, audio=AUDIO_SIZES):
    """Key -> shape of what audio and text need of the thinker, under the release's names."""
    wide, mlp, words = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    shared = wide // text["num_attention_heads"] * text["num_key_value_heads"]
    out = {"thinker.lm_head.weight": (words, wide), "thinker.model.embed_tokens.weight": (words, wide),
           "thinker.model.norm.weight": (wide,)}  # fmt: skip
    for i in range(text["num_hidden_layers"]):
        at = f"thinker.model.layers.{i}"
        for name, rows in (("q", wide), ("k", shared), ("v", shared)):
            out |= {f"{at}.self_attn.{name}_proj.weight": (rows, wide), f"{at}.self_attn.{name}_proj.bias": (rows,)}
        out[f"{at}.self_attn.o_proj.weight"] = (wide, wide)
        out |= {f"{at}.mlp.{name}_proj.weight": (mlp, wide) for name in ("gate", "up")}
        out[f"{at}.mlp.down_proj.weight"] = (wide, mlp)
        out |= {f"{at}.{name}_layernorm.weight": (wide,) for name in ("input", "post_attention")}

    def layer(name, *shape, bias=True):
        out[f"{name}.weight"] = shape
        out.update({f"{name}.bias": shape[:1]} if bias else {})

    tower, dim, inner, end = "thinker.audio_tower", audio["d_model"], audio["encoder_ffn_dim"], audio["output_dim"]
    layer(f"{tower}.conv1", dim, 128, 3)
    layer(f"{tower}.conv2", dim, dim, 3)
    layer(f"{tower}.ln_post", dim)
    layer(f"{tower}.proj", end, dim)
    layer(f"{tower}.audio_bos_eos_token", 2, end, bias=False)
    for i in range(audio["encoder_layers"]):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer(f"{tower}.layers.{i}.self_attn.{name}", dim, dim, bias=name != "k_proj")
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            layer(f"{tower}.layers.{i}.{name}", dim)
        layer(f"{tower}.layers.{i}.fc1", inner, dim)
        layer(f"{tower}.layers.{i}.fc2", dim, inner)
    return out


def tensors(seed=0, **sizes):
    """Key -> random tensor, no norm left at 1."""
    generator, out = torch.Generator().manual_seed(seed), {}
    for key, shape in shapes(**sizes).items():
        values = (0.3 if len(shape) == 1 else 0.15) * torch.randn(shape, generator=generator)
        out[key] = values + 0.5 if "norm" in key or "ln_post.weight" in key else values
    return out


def folder(path, seed=0, **changes):
    """Writes config.json, model.safetensors, the tokenizer's files, the template and the front end's; -> path. changes: text,
    audio and ids of `config`."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    values = config(**changes)
    thinker = values["thinker_config"]
    save_file(tensors(seed, text=thinker["text_config"], audio=thinker["audio_config"]), path / "model.safetensors")
    small = {"config": values, "tokenizer": tokenizer(), "chat_template": {"chat_template": TEMPLATE}}
    small["generation_config"] = dict(eos_token_id=END, pad_token_id=IDS["<|endoftext|>"])
    special = dict(zip(("image_token", "audio_token", "video_token"), ("<|IMAGE|>", "<|AUDIO|>", "<|VIDEO|>")))
    special |= dict(vision_bos_token="<|vision_bos|>", vision_eos_token="<|vision_eos|>")
    special |= dict(audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>")
    small["tokenizer_config"] = dict(
        tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096,
        extra_special_tokens=special, **special,
    )  # fmt: skip
    small["preprocessor_config"] = dict(
        feature_extractor_type="WhisperFeatureExtractor", processor_class="Qwen2_5OmniProcessor", feature_size=128, n_fft=400,
        sampling_rate=16000, hop_length=160, chunk_length=300, n_samples=4800000, nb_max_frames=30000, padding_value=0.0,
        padding_side="right", return_attention_mask=True, dither=0.0,
    )  # fmt: skip
    for name, value in small.items():
        (path / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return path


def tokenizer():
    """A tokenizer.json: a token for each byte, and WORDS."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    by_bytes = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    added = [dict(id=i, content=word, **flags, special=word.startswith("<|")) for word, i in IDS.items()]
    return dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer={"type": "NFC"}, pre_tokenizer=by_bytes,
        post_processor=None, decoder=by_bytes,
        model=dict(type="BPE", vocab={letter: i for i, letter in enumerate(letters)}, merges=[]),
    )  # fmt: skip


# What the release's writes of text and audio.
TEMPLATE = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def clip(seconds, seed=0):
    """A waveform of so many seconds."""
    return 0.1 * torch.randn(int(16000 * seconds), generator=torch.Generator().manual_seed(seed))


def prompt(*counts, words=b"hear"):
    """The ids of a prompt with clips of so many tokens each, a list."""
    ids = [IDS["<|im_start|>"], *words]
    for count in counts:
        ids += [IDS["<|audio_bos|>"], *[AUDIO] * count, IDS["<|audio_eos|>"], *words]
    return ids


def padded(*rows):
    """Rows of ids -> ids and mask [B, T], padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
