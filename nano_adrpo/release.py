"""Where the parts of an SD3 release lie: transformer, VAE, three text encoders and their tokenizers.

Two public layouts: diffusers' pipeline folder, with a folder for each part and model_index.json to list them; and Stability's
single file, which tells its parts apart by how their keys begin and never has the tokenizers.
"""

from pathlib import Path

import torch

from nano_adrpo import weights
from nano_adrpo.models.mmdit import MMDiT

# What each part is for, as messages say it, and how its keys begin in Stability's single file.
PARTS = {
    "transformer": ("expected a folder in diffusers' SD3 pipeline layout or a single file", "model.diffusion_model."),
    "vae": ("it turns latents into images", "first_stage_model."),
    "text_encoder": ("it encodes the prompts (CLIP-L)", "text_encoders.clip_l.transformer."),
    "text_encoder_2": ("it encodes the prompts (CLIP-bigG)", "text_encoders.clip_g.transformer."),
    "text_encoder_3": ("it encodes the prompts (T5; t5='zeros' does without)", "text_encoders.t5xxl.transformer."),
    "tokenizer": ("it splits the prompts for text_encoder", None),
    "tokenizer_2": ("it splits the prompts for text_encoder_2", None),
    "tokenizer_3": ("it splits the prompts for text_encoder_3", None),
}


class Release:
    """Where the parts of an SD3 release lie: in a folder in diffusers' pipeline layout or in Stability's single file, and what
    is not there, in a second such folder, `base`."""

    def __init__(self, path, base=None):
        self.path, self.base = Path(path), base and Path(base)
        if not self.path.exists():  # asked here, since a mistyped path is not to be completed by base
            raise FileNotFoundError(f"{path}: no such file or folder; {PARTS['transformer'][0]}")
        if base and not self.base.is_dir():
            raise FileNotFoundError(f"{base}: no such folder; expected one in diffusers' SD3 pipeline layout")
        self.keys = weights.Checkpoint(path).home if self.path.is_file() else None  # None: a folder
        self.folders = [folder for folder in (self.path, self.base) if folder and folder.is_dir()]
        self.index = {}  # model_index.json: part -> [library, class], [null, null] for a part that the model does without
        for folder in self.folders[::-1]:
            if (file := folder / "model_index.json").is_file():
                self.index |= weights.read_json(file)
                if not str(name := self.index.get("_class_name", "StableDiffusion3")).startswith("StableDiffusion3"):
                    raise ValueError(f"{file}: '_class_name' is {name!r}; expected 'StableDiffusion3Pipeline'")

    def find(self, part):
        """-> the folder or the single file that has `part`; None where none has."""
        prefix = PARTS[part][1] if part in PARTS else None
        if self.keys is not None and (part == "transformer" or prefix and any(key.startswith(prefix) for key in self.keys)):
            return self.path
        return next((folder / part for folder in self.folders if (folder / part).is_dir()), None)

    def expects(self, part):
        """Whether the model has `part`, here or missing. A single file is SD3's, which has all, whatever its base lists."""
        if self.keys is not None and self.find(part) == self.path:
            return True
        if part in self.index:
            return self.index[part] not in (None, [None, None])
        return self.keys is not None or self.find(part) is not None

    def need(self, part):
        """As find, but FileNotFoundError where none has it."""
        if found := self.find(part):
            return found
        nor = f", nor in {self.base}" if self.base else ""
        if self.keys is not None:
            raise FileNotFoundError(f"{self.path}: no {part} in this file{nor}; {PARTS[part][0]}; base=FOLDER can bring it")
        missing = f"{self.path}: no transformer/ in it" if part == "transformer" else f"{self.path / part}: no such folder"
        raise FileNotFoundError(f"{missing}{nor}; {PARTS[part][0]}")

    def transformer_config(self):
        # Of a dtype, since a float8 file has none to compute in; from the headers alone.
        return MMDiT.from_pretrained(self.need("transformer"), torch.float32, "meta").config
