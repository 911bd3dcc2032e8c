"""What fine-tuning FLUX.1-dev with adapters takes: memory by phase, on paper from shapes. python -m bench.flux_memory

bfloat16 weights, rank-32 adapters, float32 Adam, gradient checkpointing per block, the autoencoder one image at a time, prompt
embeddings made before. 1 GB is 10⁹ bytes.
"""

import torch
import torch.nn.functional as F

from bench.sd3_memory import VAE, Attention, kept
from nano_adrpo import lora
from nano_adrpo.models import flux, vae

T5, CLIP = 4_762_310_656, 123_060_480  # parameters of the text encoders
TOKENS = 512


def inputs(batch, resolution):
    side, options = resolution // 8, {"device": "meta", "dtype": torch.bfloat16}
    latents, context = torch.empty(batch, 16, side, side, **options), torch.empty(batch, TOKENS, 4096, **options)
    return latents, torch.empty(batch, device="meta"), context, torch.empty(batch, 768, **options)


def paper(resolution, micro_batch=4, rollout_batch=8):
    """-> {what: bytes}."""
    with torch.device("meta"):
        model = flux.Flux(flux.Config(guidance_embeds=True)).to(torch.bfloat16)
        decoder = vae.Autoencoder(VAE).to(torch.bfloat16)
    base = 2 * sum(p.numel() for p in model.parameters())
    lora.add(model, lora.MMDIT_TARGETS, rank=32, alpha=32)
    trained, fused, sizes = sum(p.numel() for p in model.parameters() if p.requires_grad), F.scaled_dot_product_attention, {}
    F.scaled_dot_product_attention = lambda q, k, v, **_: Attention.apply(q, k, v)
    try:
        for model.gradient_checkpointing in (True, False):
            sizes[model.gradient_checkpointing] = kept(lambda: model(*inputs(1, resolution)), model.parameters())
    finally:
        F.scaled_dot_product_attention = fused
    block = (sizes[False] - sizes[True]) / (19 + 38)  # what one block keeps while it is computed again, on average
    return {
        "text encoders, bfloat16 (before the rest; --t5 stream: 0.7)": 2 * (T5 + CLIP),
        "transformer, bfloat16": base,
        f"adapters ({trained:,}), gradients, Adam's moments, float32": 16 * trained,
        "autoencoder, bfloat16": 2 * sum(p.numel() for p in decoder.parameters()),
        f"rollout of {rollout_batch}: activations of a block": rollout_batch * block,
        "decoding one image": 5 * 256 * resolution**2 * 2,
        f"update of {micro_batch}: block inputs kept": micro_batch * sizes[True],
        f"update of {micro_batch}: one block computed again, and its gradients": 2 * micro_batch * block,
    }


if __name__ == "__main__":
    columns = [paper(512), paper(1024)]
    print("| GB | 512 px | 1024 px |\n| --- | ---: | ---: |")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name] / 1e9:.2f}" for column in columns) + " |")
    totals = [sum(x[1:4]) + max(x[4], x[5], x[6] + x[7]) for x in (list(column.values()) for column in columns)]
    print("| **largest phase, with what is always held** | " + " | ".join(f"**{total / 1e9:.1f}**" for total in totals) + " |")
