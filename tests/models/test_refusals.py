"""What no model opens: configs, tensors and missing files, one table each for all models and layouts. Every message is one line
that names the file and the key as the file spells it, with device="meta" too."""

import json
import os
import time

import pytest
import tiny
import tiny_sana
import torch
from safetensors.torch import load_file, save_file

from nano_adrpo.models import blip, clip, dc_ae, decoder, mmdit, sana, t5, vae

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
STYLE = "sd3.5-medium"
CLIP_L = dict(vocab_size=99, num_hidden_layers=2, hidden_size=64, num_attention_heads=1, projection_dim=64)
T5 = dict(vocab_size=50, d_model=12, d_kv=5, d_ff=20, num_layers=3, num_heads=2)
DECODER = decoder.Config("qwen3", 13, 16, 24, 2, 4, 128, num_key_value_heads=2)
GEMMA2 = decoder.Config("gemma2", 13, 16, 24, 2, 4, 128, sliding_window=64, tie_word_embeddings=True)


def build(kind):
    if kind == "mmdit":
        return mmdit.MMDiT(mmdit.Config(**tiny.MMDIT_STYLES[STYLE]))
    if kind == "vae":
        return vae.Autoencoder(vae.Config(**tiny.VAE))
    if kind == "sana":
        return sana.Sana(sana.Config(**tiny_sana.TRANSFORMER))
    if kind == "dc-ae":
        return dc_ae.DeepAutoencoder(dc_ae.Config(**tiny_sana.VAE))
    if kind == "text encoder":
        return decoder.TextEncoder(GEMMA2)
    if kind == "clip":
        return clip.CLIP(clip.Config(clip.TextConfig(**tiny.CLIP_TEXT), clip.VisionConfig(**tiny.CLIP_VISION), 24))
    if kind == "clip text":
        return clip.CLIPText(clip.TextConfig(**CLIP_L))
    if kind == "t5":
        return t5.T5Encoder(t5.Config(**T5))
    if kind == "blip":
        return blip.BLIP(blip.Config(blip.TextConfig(**tiny.BLIP_TEXT), blip.VisionConfig(**tiny.BLIP_VISION), 10))
    if kind == "image reward":
        return blip.ImageReward(blip.Config(blip.TextConfig(**tiny.BLIP_TEXT), blip.VisionConfig(**tiny.IMAGE_REWARD_VISION)))
    return (decoder.Decoder if kind == "decoder" else decoder.RewardModel)(DECODER)


FOLDERS = ["mmdit", "vae", "clip", "clip text", "t5", "blip", "image reward", "decoder", "reward model"]
FOLDERS += ["sana", "dc-ae", "text encoder"]


def refused(message, cls, *args, error=ValueError, **options):
    for more in ({}, {"device": "meta"}):
        with pytest.raises(error) as caught:
            cls.from_pretrained(*args, **options, **more)
        assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- configs

CONFIGS = {
    "mmdit": [
        ({"_class_name": "FluxTransformer2DModel"}, "key '_class_name' is 'FluxTransformer2DModel'; expected 'SD3Tr"),
        ({"num_layers": "three"}, "key 'num_layers' is 'three'; expected a positive int"),
        ({"dual_attention_layers": None}, "key 'dual_attention_layers' is None; expected a list, each an int from 0 up"),
        ({"out_channels": 0}, "key 'out_channels' is 0; expected a positive int or null"),
        ({"qk_norm": "layer_norm"}, "key 'qk_norm' is 'layer_norm'; expected 'rms_norm' or null"),
        ({"caption_projection_dim": 64}, "caption_projection_dim is 64; expected heads × head dim = 128"),
        ({"patch_size": 3}, "sample_size 8 and patch_size 3; expected a multiple of 4, and whole patches"),
        ({"sample_size": 1}, "sample_size 1 and patch_size 2; expected"),
        ({"num_layers": 10**12}, "key 'num_layers' is 1000000000000; expected a positive int below 2^31"),
        ({"pooled_projection_dim": 10**400}, "expected a positive int below 2^31"),
    ],
    "vae": [
        ({"_class_name": "AutoencoderTiny"}, "key '_class_name' is 'AutoencoderTiny'; expected 'AutoencoderKL'"),
        ({"use_quant_conv": True}, "key 'use_quant_conv' is True; expected False"),
        ({"use_post_quant_conv": "absent"}, "key 'use_post_quant_conv' is missing; expected False"),  # absent is true there
        ({"act_fn": "gelu"}, "key 'act_fn' is 'gelu'; expected 'silu'"),
        ({"latents_mean": [0.1]}, "key 'latents_mean' is [0.1]; expected None"),
        ({"latents_std": [0.1]}, "key 'latents_std' is [0.1]; expected None"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "expected ['DownEncoderBlock2D', 'DownEncoderBlock2D']"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "expected ['UpDecoderBlock2D', 'UpDecoderBlock2D']"),
        ({"block_out_channels": [32, 50]}, "block_out_channels is (32, 50); expected multiples of norm_num_groups = 32"),
        ({"block_out_channels": []}, "block_out_channels is (); expected multiples"),
        ({"block_out_channels": 64}, "key 'block_out_channels' is 64; expected a list, each a positive int"),
        ({"scaling_factor": "1.5"}, "key 'scaling_factor' is '1.5'; expected a positive float"),
        ({"shift_factor": "0.06"}, "key 'shift_factor' is '0.06'; expected a number or null"),
        ({"mid_block_add_attention": 1}, "key 'mid_block_add_attention' is 1; expected true or false"),
    ],
    "sana": [
        ({"_class_name": "SD3Transformer2DModel"}, "key '_class_name' is 'SD3Transformer2DModel'; expected 'SanaTransfor"),
        ({"qk_norm": None}, "key 'qk_norm' is None; expected 'rms_norm_across_heads'"),  # Sana 1.0
        ({"qk_norm": "absent"}, "key 'qk_norm' is missing; expected 'rms_norm_across_heads'"),
        ({"interpolation_scale": 1.0}, "key 'interpolation_scale' is 1.0; expected None"),  # 2K
        ({"guidance_embeds": True}, "key 'guidance_embeds' is True; expected False"),  # Sprint
        ({"timestep_scale": 0.001}, "key 'timestep_scale' is 0.001; expected 1.0"),
        ({"patch_size": 2}, "key 'patch_size' is 2; expected 1"),
        ({"attention_bias": True}, "key 'attention_bias' is True; expected False"),
        ({"norm_elementwise_affine": True}, "key 'norm_elementwise_affine' is True; expected False"),
        ({"cross_attention_dim": 50}, "cross_attention_dim is 50; expected heads × head dim = 48"),
        ({"mlp_ratio": "2.5"}, "key 'mlp_ratio' is '2.5'; expected a positive float"),
    ],
    "dc-ae": [
        ({"_class_name": "AutoencoderKL"}, "key '_class_name' is 'AutoencoderKL'; expected 'AutoencoderDC'"),
        ({"upsample_block_type": "pixel_shuffle"}, "key 'upsample_block_type' is 'pixel_shuffle'; expected 'interpolate'"),
        ({"upsample_block_type": "absent"}, "key 'upsample_block_type' is missing; expected 'interpolate'"),
        ({"downsample_block_type": "absent"}, "key 'downsample_block_type' is missing; expected 'Conv' or 'conv'"),
        ({"encoder_out_shortcut": False}, "key 'encoder_out_shortcut' is False; expected True"),
        ({"decoder_norm_types": ["rms_norm", "batch_norm", "rms_norm"]}, "key 'decoder_norm_types' is ['rms_norm', 'batch"),
        ({"decoder_act_fns": "relu"}, "key 'decoder_act_fns' is 'relu'; expected 'silu' or ['silu', 'silu', 'silu']"),
        ({"encoder_block_types": "DownBlock"}, "key 'encoder_block_types' is 'DownBlock'; expected 'ResBlock' or 'Effic"),
        ({"encoder_layers_per_block": [1, 1]}, "encoder_layers_per_block has 2 entries; expected 3, as there are widths"),
        ({"decoder_block_out_channels": [8, 16]}, "encoder_block_out_channels has 3 widths, decoder_block_out_channels 2"),
        ({"latent_channels": 5}, "encoder_block_out_channels is (8, 16, 16); expected widths whose shortcuts divide evenly"),
        ({"attention_head_dim": 5}, "attention_head_dim is 5; expected a divisor of 16"),
    ],
    "text encoder": [
        ({"sliding_window": "64"}, "key 'sliding_window' is '64'; expected a positive int or null"),
        ({"attn_logit_softcapping": -1.0}, "key 'attn_logit_softcapping' is -1.0; expected a positive float or null"),
        ({"hidden_activation": "relu"}, "key 'hidden_activation' is 'relu'"),
        ({"model_type": "gemma3_text"}, "key 'model_type' is 'gemma3_text'; expected 'qwen2' or 'qwen3' or 'llama' or 'gemma'"),
    ],
    "clip": [
        ({"model_type": "siglip"}, "key 'model_type' is 'siglip'; expected 'clip'"),
        ({"vision_config": "large"}, "key 'vision_config' is 'large'; expected a JSON object"),
        ({"text_config": {"hidden_act": "relu"}}, "key 'hidden_act' is 'relu'; expected 'quick_gelu' or 'gelu'"),
        ({"text_config_dict": {"hidden_act": "relu"}}, "key 'hidden_act' is 'relu'"),  # of older files, the last word
        ({"vision_config": {"num_attention_heads": 7}}, "hidden_size 768 does not divide into 7 heads"),
    ],
    "clip text": [({"model_type": "clip"}, "key 'model_type' is 'clip'; expected 'clip_text_model'")],
    "t5": [
        ({"model_type": "umt5"}, "key 'model_type' is 'umt5'; expected 't5'"),
        ({"model_type": "absent"}, "key 'model_type' is missing; expected 't5'"),
        ({"feed_forward_proj": "relu"}, "key 'feed_forward_proj' is 'relu'; expected 'gated-gelu'"),
        ({"feed_forward_proj": "absent"}, "key 'feed_forward_proj' is missing; expected 'gated-gelu'"),
        ({"dense_act_fn": "gelu"}, "key 'dense_act_fn' is 'gelu'; expected 'gelu_new'"),
        ({"is_decoder": True}, "key 'is_decoder' is True; expected False"),
        ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets is 3 and relative_attention_max_"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance 8; expected"),
    ],
    "blip": [
        ({"model_type": "clip"}, "key 'model_type' is 'clip'; expected 'blip'"),
        ({"image_text_hidden_size": 0}, "key 'image_text_hidden_size' is 0; expected a positive int"),
        ({"text_config": {"hidden_act": "relu"}}, "key 'hidden_act' is 'relu'; expected 'gelu'"),
        ({"vision_config": {"num_attention_heads": 7}}, "hidden_size 768 does not divide into 7 heads"),
    ],
    "image reward": [({"num_attention_heads": 5}, "hidden_size 24 does not divide into 5 heads")],
    "decoder": [
        ({"model_type": "mistral"}, "key 'model_type' is 'mistral'; expected 'qwen2' or 'qwen3' or 'llama' or 'gemma'"),
        ({"model_type": ["qwen3"]}, "key 'model_type' is ['qwen3']; expected 'qwen2' or"),
        ({"model_type": "absent"}, "key 'model_type' is missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'quantization_config': weights quantised by 'gptq' are not"),
        ({"quantization_config": {"load_in_4bit": True}}, "weights quantised by 'bitsandbytes' are not read; expected plain"),
        ({"attention_dropout": 0.1}, "key 'attention_dropout' is 0.1; expected 0 or None"),
        ({"mlp_bias": True}, "key 'mlp_bias' is True; expected False"),
        ({"is_causal": False}, "key 'is_causal' is False; expected True"),
        ({"use_bidirectional_attention": True}, "key 'use_bidirectional_attention' is True; expected False"),
        ({"partial_rotary_factor": 0.5}, "key 'partial_rotary_factor' is 0.5; expected 1"),
        ({"hidden_activation": "relu"}, "key 'hidden_activation' is 'relu'"),
        ({"hidden_act": "gelu"}, "key 'hidden_act' is 'gelu'; expected 'silu' or"),  # exact; only Gemma's files mean tanh by it
        *(
            ({"sliding_window": window, **more}, f"'sliding_window' is {window}; expected at least the model's 128 positions")
            for window in (127, 4.5)
            for more in (
                {"use_sliding_window": True, "max_window_layers": 1},
                {"use_sliding_window": True, "max_window_layers": "2"},
                {"layer_types": ["full_attention", "sliding_attention"]},
            )
        ),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "; expected ['full_attention', 'full_attention']"),
        ({"layer_types": 2}, "key 'layer_types' is 2; expected ['full_attention', 'full_attention']"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'rope_scaling': key 'rope_type' is 'longrope'; expected 'def"),
        ({"rope_scaling": {"type": "linear"}}, "'rope_scaling': key 'factor' is missing; expected a positive float"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": "2"}}, "'rope_parameters': key 'factor' is '2'; expected a"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "mscale": []}}, "'rope_parameters': key 'mscale' is []"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "temperature": 2}}, "key 'temperature' is 2; expected None"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "'rope_parameters': key 'full_attention' is "),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'rope_parameters': key 'partial_rotary_factor' is 0.5"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "'rope_scaling': key 'factor' is None; expected a positive float"),
        ({"rope_scaling": {"type": "llama3"}}, "'rope_scaling': key 'factor' is missing; expected a positive float"),
        ({"rope_scaling": "llama3"}, "key 'rope_scaling' is 'llama3'; expected a JSON object"),
        ({"rope_theta": -1.0}, "key 'rope_theta' is -1.0; expected a positive float"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide 4 heads"),
        ({"head_dim": 5}, "head_dim is 5; expected an even number"),
        ({"head_dim": 0}, "key 'head_dim' is 0; expected a positive int or null"),
        ({"tie_word_embeddings": "no"}, "key 'tie_word_embeddings' is 'no'; expected true or false"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_that_are_not_implemented(tmp_path, kind):
    model = build(kind)
    model.save_pretrained(tmp_path)
    where = tmp_path / ("med_config.json" if kind == "image reward" else "config.json")
    config = json.loads(where.read_text())
    for change, message in CONFIGS[kind]:
        tiny.write_json(where, {key: value for key, value in (config | change).items() if value != "absent"})
        refused(message, type(model), tmp_path)
        with pytest.raises(ValueError, match=f"^{where}: "):
            type(model).from_pretrained(tmp_path)


COUNTS = {"t5": "num_layers", "mmdit": "num_layers", "sana": "num_layers", "vae": "layers_per_block"}


@pytest.mark.parametrize("kind", [kind for kind in FOLDERS if kind != "image reward"])
def test_a_config_of_more_layers_than_the_file_holds_builds_none(tmp_path, kind):
    model = build(kind)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    large = {COUNTS.get(kind, "num_hidden_layers"): 10**8}
    large = {"decoder_layers_per_block": [1, 10**8, 1]} if kind == "dc-ae" else large
    towers = [name for name in ("text_config", "vision_config") if name in config]
    start = time.process_time()
    for change in [{name: config[name] | large} for name in towers] or [large]:
        tiny.write_json(tmp_path / "config.json", config | change)
        refused(f"{tmp_path}: its config asks for more layers than it holds; expected those of its ", type(model), tmp_path)
    assert time.process_time() - start < 5


# ---------------------------------------------------------------------------------------------------------------- tensors


def single_files(kind):
    """(a prefix of its keys or none, the tensors) of every single file that a model is public in."""
    if kind == "mmdit":
        sizes = tiny.MMDIT_STYLES[STYLE]
        tensors = tiny.to_stability(build(kind).state_dict(), sizes["num_layers"], sizes["dual_attention_layers"])
        return [("", tensors), ("model.diffusion_model.", tensors)]
    if kind == "vae":
        return [("", tiny.ldm_vae()), ("first_stage_model.", tiny.ldm_vae())]
    tensors = build(kind).state_dict()
    return [("", tensors), ({"clip text": "text_encoders.clip_g.transformer.", "t5": t5.PREFIX}[kind], tensors)]


def check_tensors(cls, path, file, tensors, before="", **options):
    """Leaves out, misshapes and adds a tensor, for about six of the keys; `before` is the prefix of all."""
    tensors = {before + key: tensor for key, tensor in sorted(tensors.items())}
    for key in [*tensors][:: len(tensors) // 5]:
        save_file({name: tensor for name, tensor in tensors.items() if name != key}, file)
        refused(f": key '{key}' is missing", cls, path, **options)
        for shape in ((7,), (2, 3, 1, 1, 1)):
            save_file(tensors | {key: torch.ones(shape)}, file)
            refused(f"{file}: key '{key}' has shape {list(shape)}; expected ", cls, path, **options)
    for key in ("lora.weight", "scaled_fp8"):
        save_file(tensors | {before + key: torch.ones(1)}, file)
        refused(f"{file}: key '{before}{key}' is not part of {cls.__name__}", cls, path, **options)


@pytest.mark.parametrize("kind", FOLDERS)
def test_tensors_of_a_folder_that_do_not_fit(tmp_path, kind):
    model = build(kind)
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    check_tensors(type(model), tmp_path, file, load_file(file))


@pytest.mark.parametrize("kind", ["mmdit", "vae", "clip text", "t5"])
def test_tensors_of_a_single_file_that_do_not_fit(tmp_path, kind):
    file = tmp_path / "single.safetensors"
    for prefix, tensors in single_files(kind):
        options = {"prefix": prefix} if kind == "clip text" else {}
        check_tensors(type(build(kind)), file, file, tensors, prefix, **options)


SINGLE = {
    "mmdit": [
        ({"pos_embed": torch.ones(1, 100, 7)}, "key '{}pos_embed' has shape [1, 100, 7]; expected [1, 100, 128]"),
        ({"joint_blocks.0.x_block.attn.qkv.bias": torch.ones(385)}, "attn.qkv.bias' has shape [385]; expected [384]"),
        ({"x_embedder.proj.weight": torch.ones(32, 4, 2, 2)}, "the width 32 does not divide into heads of 64"),
        ({"x_embedder.proj.weight": None}, "'{}x_embedder.proj.weight' is missing; expected Stability's layout of SD"),
    ],
    "vae": [
        ({"quant_conv.weight": torch.zeros(32, 32, 1, 1)}, "key '{}quant_conv.weight' is not part of Autoencoder"),  # SD1, SDXL
        ({"decoder.conv_in.weight": torch.zeros(64, 4, 3, 3)}, "has shape [64, 4, 3, 3]; expected [64, 16, 3, 3]"),
        ({"encoder.down.1.block.0.conv1.weight": torch.zeros(48, 32, 3, 3)}, "block_out_channels is (32, 48); expected mul"),
        ({"encoder.mid.attn_1.k.weight": torch.zeros(64, 64, 3, 3)}, "'{}encoder.mid.attn_1.k.weight' has shape [64, 64, 3, 3"),
        ({"encoder.mid_block.resnets.0.norm1.bias": torch.zeros(64)}, "'{}encoder.mid_block.resnets.0.norm1.bias' is not part"),
    ],
    "clip text": [
        ({"text_model.embeddings.token_embedding.weight": torch.ones(99)}, "has shape [99]; expected a CLIP text encoder"),
        ({"text_model.embeddings.token_embedding.weight": torch.ones(99, 32)}, "the width 32 does not divide into heads of 64"),
    ],
    "t5": [
        ({f"{t5.TABLE}.weight": torch.ones(32, 3)}, f"key '{{}}{t5.TABLE}.weight' has shape [32, 3]; expected a column"),
        ({f"{t5.TABLE}.weight": None}, f"key '{{}}{t5.TABLE}.weight' is missing; expected the encoder of T5 version 1.1"),
        # T5 1.0 has no wi_0, umT5 a table in every block.
        ({"encoder.block.0.layer.1.DenseReluDense.wi_0.weight": None}, "wi_0.weight' is missing; expected the encoder of T5"),
        ({t5.TABLE.replace("0", "1", 1) + ".weight": torch.ones(32, 2)}, "attention_bias.weight' is not part of T5Enc"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", SINGLE)
def test_single_files_of_other_models(tmp_path, kind):
    file, cls = tmp_path / "single.safetensors", type(build(kind))
    for prefix, tensors in single_files(kind):
        for change, message in SINGLE[kind]:
            changed = {prefix + key: tensor for key, tensor in (tensors | change).items() if tensor is not None}
            save_file(changed, file)
            refused(message.format(prefix), cls, file, **({"prefix": prefix} if kind == "clip text" else {}))
    for other in ("double_blocks.0.img_attn.qkv.weight", "input_blocks.0.0.weight", "transformer_blocks.0.attn.to_q.weight"):
        save_file({other: torch.ones(2)}, file)
        with pytest.raises(ValueError, match=f"^{file}: key '.*' is missing; expected .*$"):
            cls.from_pretrained(file)


def test_fluxs_autoencoder_has_the_same_keys_and_another_scale(tmp_path):
    tensors, other = tiny.ldm_vae(), {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "ae.safetensors")
    for prefix in ("first_stage_model.", "vae."):
        save_file({prefix + key: tensor for key, tensor in tensors.items()} | other, tmp_path / f"{prefix}safetensors")
    save_file(tensors, tmp_path / "sd3.safetensors")
    for name, scale in (("ae", vae.FLUX), ("first_stage_model", vae.FLUX), ("vae", vae.FLUX), ("sd3", vae.SD3)):
        config = vae.Autoencoder.from_pretrained(tmp_path / f"{name}.safetensors", device="meta").config
        assert (config.scaling_factor, config.shift_factor) == scale
    assert vae.FLUX == (0.3611, 0.1159) and vae.SD3 == (1.5305, 0.0609)


def test_image_rewards_single_file_tells_no_heads_of_another_width(tmp_path):
    model = build("image reward")
    model.save_pretrained(tmp_path)
    file = tmp_path / "ImageReward.safetensors"
    refused("the width 24 does not divide into heads of 64", blip.ImageReward, file)  # of BERT, without med_config.json
    for tensors, message in (
        ({"blip.visual_encoder.patch_embed.proj.weight": torch.ones(9)}, "has shape [9]; expected ImageReward's layout"),
        ({"blip.visual_encoder.pos_embed": torch.ones(1, 12, 128)}, "has shape [1, 12, 128]; expected [1, 10, 128]"),
        ({"blip.visual_encoder.embeddings.class_embedding": torch.ones(1)}, "class_embedding' is not part of ImageReward"),
    ):
        whole = load_file(file)
        save_file(whole | tensors, tmp_path / "other.safetensors")
        os.replace(tmp_path / "other.safetensors", file)
        refused(message, blip.ImageReward, tmp_path)
        save_file(whole, file)


# ------------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("kind", FOLDERS)
def test_missing_files(tmp_path, kind):
    model, folder = build(kind), tmp_path / "model"
    cls = type(model)
    refused("nowhere", cls, tmp_path / "nowhere", error=FileNotFoundError)
    model.save_pretrained(folder)
    (config,), (file,) = folder.glob("*config.json"), folder.glob("*.safetensors")
    values = config.read_text()
    config.unlink()
    refused(f"{config}: no such file", cls, folder, error=FileNotFoundError)
    config.write_text(values[:20])
    refused(f"{config}: not valid JSON", cls, folder)
    config.write_text(values)
    file.unlink()
    refused(f"{folder}: no {file.name}", cls, folder, error=FileNotFoundError)
