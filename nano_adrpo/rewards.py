"""Reward functions: (images [N, C, H, W] in [−1, 1], N prompts) -> rewards [N], float32. Higher is better."""

from pathlib import Path

import torch
import torch.nn.functional as F

from nano_adrpo import weights
from nano_adrpo.models.clip import CLIP
from nano_adrpo.prompts import PromptTokenizer


class ClipScore:
    """100 · cosine of CLIP's image and text embeddings (the paper's ClipScore). A transformers CLIPModel folder with
    tokenizer.json, tokenizer_config.json and preprocessor_config.json."""

    def __init__(self, path, device=None):
        self.model = CLIP.from_pretrained(path, torch.float32, device).requires_grad_(False)
        self.tokenizer = PromptTokenizer(path)
        where = Path(path) / "preprocessor_config.json"
        values = weights.read_json(where)
        if not {"image_mean", "image_std"} <= values.keys():
            raise ValueError(f"{where}: keys 'image_mean' and 'image_std' are missing; expected a number per channel each")
        self.mean = torch.tensor(values["image_mean"], device=device)[:, None, None]
        self.std = torch.tensor(values["image_std"], device=device)[:, None, None]

    @torch.no_grad()
    def __call__(self, images, prompts):
        text = F.normalize(self.embed_prompts(prompts), dim=1)
        return 100 * (F.normalize(self.embed_images(images), dim=1) * text).sum(dim=1)

    @torch.no_grad()
    def embed_images(self, images):
        """[N, C, H, W] -> [N, P], projected, not normalised."""
        size = self.model.config.vision_config.image_size
        if images.shape[-2:] != (size, size):  # the shorter side to `size`, then the centre
            scale = size / min(images.shape[-2:])
            height, width = (max(size, round(side * scale)) for side in images.shape[-2:])
            images = F.interpolate(images.float(), (height, width), mode="bicubic", antialias=True)
            top, left = (height - size) // 2, (width - size) // 2
            images = images[..., top : top + size, left : left + size]
        return self.model.encode_image(((images.float().clamp(-1, 1) + 1) / 2 - self.mean) / self.std)

    @torch.no_grad()
    def embed_prompts(self, prompts):
        """N strings -> [N, P], projected, not normalised; each distinct prompt is encoded once."""
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        ids = self.tokenizer(distinct, self.model.config.text_config.max_position_embeddings)
        return self.model.encode_text(ids.to(self.mean.device))[[distinct[prompt] for prompt in prompts]]
