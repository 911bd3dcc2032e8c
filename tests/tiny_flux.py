"""A whole FLUX.1 in small, with random weights: diffusers' folder, and Black Forest Labs' single file of the same tensors."""

from pathlib import Path

import tiny
import tiny_sd3
import torch
from safetensors.torch import load_file, save_file

from nano_adrpo.models.clip import CLIPText, TextConfig
from nano_adrpo.models.flux import Config, Flux
from nano_adrpo.models.vae import Autoencoder

# Heads of 128, as the single file presumes. Packed, 16 channels of latents are 64.
FLUX = dict(
    in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=224,
    pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
)  # fmt: skip
STYLES = {
    "flux-dev": FLUX,
    "flux-schnell": FLUX | dict(guidance_embeds=False),
    "flux-heads": FLUX | dict(attention_head_dim=16, num_attention_heads=3, axes_dims_rope=(4, 4, 8), num_single_layers=1),
}
CLIP = tiny.SD3_CLIPS["text_encoder"]
VAE = tiny.SD3_VAE | dict(scaling_factor=0.3611, shift_factor=0.1159)
DEV = dict(
    _class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True,
    base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
)  # fmt: skip


def inputs(height=6, width=10, count=3):
    """latents, sigma, context, pooled."""
    generator = torch.Generator().manual_seed(7)
    latents, context, pooled = (
        torch.randn(count, *shape, generator=generator) for shape in ((16, height, width), (5, 224), (64,))
    )
    return latents, torch.tensor([0.0, 0.3, 1.0])[:count], context, pooled


def folder(path, style="flux-dev"):
    """transformer/, vae/, both text encoders with their tokenizers, scheduler/ and model_index.json."""
    path, sizes = Path(path), STYLES[style]
    tiny.fill(Flux(Config(**sizes)), seed=4, std=0.05).save_pretrained(path / "transformer")
    save_file(tiny.ldm_vae(**tiny_sd3.VAE), path / "ae.safetensors")
    Autoencoder.from_pretrained(path / "ae.safetensors").save_pretrained(path / "vae")
    (path / "ae.safetensors").unlink()
    config = TextConfig(**{key: value for key, value in CLIP.items() if key != "bos_token_id"})
    tiny.fill(CLIPText(config, projected=False), seed=1).save_pretrained(path / "text_encoder")
    tiny.clip_tokenizer(path / "tokenizer", "<|endoftext|>")
    tiny.t5_tokenizer(path / "tokenizer_2")
    for part in ("text_encoder_2", "scheduler"):
        (path / part).mkdir()
    save_file(tiny_sd3.t5_tensors(), path / "text_encoder_2" / "model.safetensors")
    tiny.write_json(path / "text_encoder_2" / "config.json", {"model_type": "t5", **tiny.SD3_T5})
    schnell = {"_class_name": DEV["_class_name"], "num_train_timesteps": 1000, "shift": 1.0}
    tiny.write_json(path / "scheduler" / "scheduler_config.json", DEV if sizes["guidance_embeds"] else schnell)
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", DEV["_class_name"]]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer_2": ["transformers", "T5TokenizerFast"]}
    tiny.write_json(path / "model_index.json", index)
    return path


def to_bfl(tensors):
    """diffusers' keys -> Black Forest Labs', spelt out: the reverse of what the loader does, written without it."""
    out, t = {}, tensors
    embedders = {"timestep": "time_in", "guidance": "guidance_in", "text": "vector_in"}
    norms = {"norm_q": "img_attn.norm.query_norm", "norm_k": "img_attn.norm.key_norm"}
    norms |= {"norm_added_q": "txt_attn.norm.query_norm", "norm_added_k": "txt_attn.norm.key_norm"}
    doubles, singles = (
        1 + max(int(name.split(".")[1]) for name in t if name.startswith(f"{stem}."))
        for stem in ("transformer_blocks", "single_transformer_blocks")
    )
    for kind in ("weight", "bias"):
        out[f"img_in.{kind}"], out[f"txt_in.{kind}"] = t[f"x_embedder.{kind}"], t[f"context_embedder.{kind}"]
        for old, new in embedders.items():
            for layer, place in ((1, "in_layer"), (2, "out_layer")):
                if (name := f"time_text_embed.{old}_embedder.linear_{layer}.{kind}") in t:
                    out[f"{new}.{place}.{kind}"] = t[name]
        out[f"final_layer.linear.{kind}"] = t[f"proj_out.{kind}"]
        out[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat(t[f"norm_out.linear.{kind}"].chunk(2)[::-1])
        for i in range(doubles):
            old, new = f"transformer_blocks.{i}", f"double_blocks.{i}"
            for theirs, norm, projections, end, mlp in (
                ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
                ("txt", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
            ):
                out[f"{new}.{theirs}_mod.lin.{kind}"] = t[f"{old}.{norm}.linear.{kind}"]
                out[f"{new}.{theirs}_attn.qkv.{kind}"] = torch.cat([t[f"{old}.attn.{name}.{kind}"] for name in projections])
                out[f"{new}.{theirs}_attn.proj.{kind}"] = t[f"{old}.attn.{end}.{kind}"]
                out[f"{new}.{theirs}_mlp.0.{kind}"] = t[f"{old}.{mlp}.net.0.proj.{kind}"]
                out[f"{new}.{theirs}_mlp.2.{kind}"] = t[f"{old}.{mlp}.net.2.{kind}"]
        for i in range(singles):
            old, new = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
            parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            out[f"{new}.modulation.lin.{kind}"] = t[f"{old}.norm.linear.{kind}"]
            out[f"{new}.linear1.{kind}"] = torch.cat([t[f"{old}.{name}.{kind}"] for name in parts])
            out[f"{new}.linear2.{kind}"] = t[f"{old}.proj_out.{kind}"]
    for i in range(doubles):
        for old, new in norms.items():
            out[f"double_blocks.{i}.{new}.scale"] = t[f"transformer_blocks.{i}.attn.{old}.weight"]
    for i in range(singles):
        for old, new in (("norm_q", "query_norm"), ("norm_k", "key_norm")):
            out[f"single_blocks.{i}.norm.{new}.scale"] = t[f"single_transformer_blocks.{i}.attn.{old}.weight"]
    return {name: tensor.contiguous().clone() for name, tensor in out.items()}


PREFIXES = {
    "vae": "vae.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
}


def single_file(file, source, parts=()):
    """Black Forest Labs' flux1-dev.safetensors of the tensors of `folder`; with `parts` a bundle as communities make them."""
    tensors = to_bfl(load_file(source / "transformer" / "diffusion_pytorch_model.safetensors"))
    tensors = {("model.diffusion_model." if parts else "") + name: tensor for name, tensor in tensors.items()}
    for part in parts:
        own = tiny.ldm_vae(**tiny_sd3.VAE) if part == "vae" else load_file(source / part / "model.safetensors")
        tensors |= {PREFIXES[part] + name: tensor for name, tensor in own.items()}
    save_file(tensors, file)
    return file
