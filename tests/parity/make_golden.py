"""Writes tests/golden.json: outputs of diffusers' and transformers' models on the tiny checkpoints of tests/tiny.py, so that
the suite without those libraries still checks ours against them. Run from the repository: python tests/parity/make_golden.py
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
from diffusers import SD3Transformer2DModel
from transformers import CLIPConfig, CLIPModel


@torch.no_grad()
def golden():
    values = {}
    for style, sizes in tiny.MMDIT_STYLES.items():
        model = tiny.fill(SD3Transformer2DModel(**sizes))
        latents, sigma, context, pooled = tiny.mmdit_inputs()
        values[style] = model(latents, context, pooled, 1000 * sigma).sample[:, ::3, ::4, ::5].flatten().tolist()
    for style, extra in tiny.CLIP_STYLES.items():
        config = CLIPConfig(text_config=tiny.CLIP_TEXT | extra, vision_config=tiny.CLIP_VISION | extra, projection_dim=24)
        model = tiny.fill(CLIPModel(config))
        ids, pixels = tiny.clip_inputs()
        values[f"clip-{style}"] = {
            "text": model.get_text_features(ids).pooler_output[:, ::5].flatten().tolist(),
            "image": model.get_image_features(pixels).pooler_output[:, ::5].flatten().tolist(),
            "hidden": model.text_model(ids, output_hidden_states=True).hidden_states[-2][:, ::4, ::8].flatten().tolist(),
        }
    return values


if __name__ == "__main__":
    (Path(__file__).parents[1] / "golden.json").write_text(json.dumps(golden(), indent=1) + "\n")
