"""Writes tests/golden.json: outputs of diffusers' and transformers' models on the tiny checkpoints of tests/tiny.py, so that
the suite without those libraries still checks ours against them. Run from the repository: python tests/parity/make_golden.py
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import tiny_flux
import tiny_sana
import torch
from diffusers import (
    AutoencoderDC,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from transformers import CLIPConfig, CLIPModel, Gemma2Config, Gemma2ForCausalLM


def flux(model, latents, sigma, context, pooled, guidance=3.5):
    """diffusers' FLUX on latents [B, C, H, W], packed and unpacked as its pipeline does."""
    count, channels, height, width = latents.shape
    output = model(
        hidden_states=FluxPipeline._pack_latents(latents, count, channels, height, width), timestep=sigma,
        guidance=torch.full_like(sigma, guidance) if model.config.guidance_embeds else None,
        encoder_hidden_states=context, pooled_projections=pooled, txt_ids=torch.zeros(context.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32),
    ).sample  # fmt: skip
    return FluxPipeline._unpack_latents(output, 8 * height, 8 * width, 8)


@torch.no_grad()
def golden():
    values = {}
    for style, sizes in tiny.MMDIT_STYLES.items():
        model = tiny.fill(SD3Transformer2DModel(**sizes))
        latents, sigma, context, pooled = tiny.mmdit_inputs()
        values[style] = model(latents, context, pooled, 1000 * sigma).sample[:, ::3, ::4, ::5].flatten().tolist()
    for style, sizes in tiny_flux.STYLES.items():
        output = flux(tiny.fill(FluxTransformer2DModel(**sizes), std=0.05), *tiny_flux.inputs())
        values[style] = output[:, ::3, ::2, ::3].flatten().tolist()
    for style, extra in tiny.CLIP_STYLES.items():
        config = CLIPConfig(text_config=tiny.CLIP_TEXT | extra, vision_config=tiny.CLIP_VISION | extra, projection_dim=24)
        model = tiny.fill(CLIPModel(config))
        ids, pixels = tiny.clip_inputs()
        values[f"clip-{style}"] = {
            "text": model.get_text_features(ids).pooler_output[:, ::5].flatten().tolist(),
            "image": model.get_image_features(pixels).pooler_output[:, ::5].flatten().tolist(),
            "hidden": model.text_model(ids, output_hidden_states=True).hidden_states[-2][:, ::4, ::8].flatten().tolist(),
        }
    return values | sana()


def sana():
    latents, sigma, context, mask = tiny_sana.inputs()
    transformer = tiny.fill(SanaTransformer2DModel(qk_norm="rms_norm_across_heads", **tiny_sana.TRANSFORMER))
    output = transformer(latents, context, 1000 * sigma, encoder_attention_mask=mask).sample
    vae = AutoencoderDC(upsample_block_type="interpolate", downsample_block_type="Conv", **tiny_sana.VAE)
    vae, images, scale = tiny.fill(vae), tiny.images(24, 32), tiny_sana.VAE["scaling_factor"]
    gemma = Gemma2ForCausalLM(Gemma2Config(**tiny_sana.GEMMA2)).eval()
    tiny.fill(gemma.model)
    return {
        "sana": output[:, ::3, ::2, ::3].flatten().tolist(),
        "dc-ae": {
            "latents": (scale * vae.encode(images).latent)[:, ::3, ::4, ::5].flatten().tolist(),
            "images": vae.decode(tiny.vae_latents(4) / scale).sample[:, ::2, ::5, ::7].flatten().tolist(),
        },
        "gemma2": {
            "hidden": gemma.model(tiny_sana.ids())[0][:, :, ::5].flatten().tolist(),
            "logits": gemma(tiny_sana.ids()).logits[:, :, ::7].flatten().tolist(),
        },
    }


if __name__ == "__main__":
    (Path(__file__).parents[1] / "golden.json").write_text(json.dumps(golden(), indent=1) + "\n")
