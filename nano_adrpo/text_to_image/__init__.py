"""Text to image as one object: prompts in, velocities in the paper's time, images out.

A release (see family.py) has a transformer, text encoders, and an autoencoder between images and the latents that flow. A
folder without `vae` works in pixel space: its latents are the images. What differs from family to family stands in sd3.py and
its neighbours, as a record; nothing else asks which family a model is of.

Only `TextToImage.velocity` turns time round. The paper: t = 0 is noise, t = 1 is data, velocity dx/dt = x1 − x0 = data − noise.
The networks: sigma = 1 − t, output noise − data. Hence velocity(x, t) = −network(x, 1 − t).
"""

from pathlib import Path

import torch

from nano_adrpo import files, ode
from nano_adrpo.errors import InputError
from nano_adrpo.text_to_image.condition import Condition
from nano_adrpo.text_to_image.family import Release, family_of
from nano_adrpo.text_to_image.flux import FLUX
from nano_adrpo.text_to_image.sana import SANA
from nano_adrpo.text_to_image.sd3 import SD3

__all__ = ["FAMILIES", "Condition", "TextToImage"]

FAMILIES = (SD3, FLUX, SANA)  # the first is assumed where nothing tells


class TextToImage:
    def __init__(self, transformer, prompt_encoder=None, vae=None, scheduler=None):
        """prompt_encoder None: prompts come encoded. vae None: pixel space. scheduler None: its defaults, and none is saved."""
        self.transformer, self.prompt_encoder, self.vae, self.scheduler = transformer, prompt_encoder, vae, scheduler
        self.family = next(family for family in FAMILIES if isinstance(transformer, family.transformer))
        self.latents = self.family.latents(transformer.config)
        self.sampler = scheduler or self.family.scheduler()

    @property
    def device(self):
        return self.transformer.proj_out.weight.device

    @property
    def factor(self):
        """Pixels on the side of one latent pixel: 8 in SD3 and FLUX, 32 in SANA, 1 in pixel space."""
        return self.vae.factor if self.vae else 1

    @property
    def latent_shape(self):
        """[C, H, W] of one sample at the resolution that the model was trained at."""
        return self.latent_shape_at(self.latents.side * self.factor)

    def latent_shape_at(self, resolution):
        """[C, H, W] of one sample of `resolution` pixels: a number, or (height, width). InputError if it does not fit."""
        unit, most = self.latents.patch * self.factor, self.latents.most
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        for side in (height, width):
            if side % unit or side <= 0 or most and side > most * unit:
                raise InputError(
                    f"resolution {side}: expected a multiple of {unit} (patches of {self.latents.patch} × latents of "
                    f"{self.factor} pixels), {f'at most {most * unit}' if most else 'above 0'}"
                )
        return self.latents.channels, height // self.factor, width // self.factor

    def encode(self, prompts, negative=False):
        """A list of B strings -> Condition, on the transformer's device.

        negative   whether guidance leads away from them: some families encode these otherwise"""
        if self.prompt_encoder is None:
            raise InputError("this model was opened without its text encoders; expected encoded prompts (see prompts.cached)")
        return self.prompt_encoder.encode(prompts, negative).to(self.device)

    def velocity(self, x, t, condition, transformer=None):
        """dx/dt at time t of the paper. x [B, C, H, W]; t a number or [B], in [0, 1]; -> like x, in x's dtype.

        transformer   the network to ask, such as the reference's frozen copy; None is the model's own"""
        transformer = transformer or self.transformer
        sigma = 1 - torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        sigma = sigma * (self.sampler.num_train_timesteps / 1000)  # 1 in all releases; the networks multiply by their 1000
        dtype = transformer.proj_out.weight.dtype
        condition = condition.to(x.device, dtype)
        return -transformer(x.to(dtype), sigma, *condition.tensors().values()).to(x.dtype)

    def times(self, steps, shift=None, shape=None):
        """The steps + 1 times to sample at: the family's own grid, in pixel space `ode.time_grid`.

        shift   None is the model's own
        shape   [C, H, W] of the latents, on which FLUX's grid depends; None is the one that the model was trained at"""
        if self.vae:
            return self.sampler.times(steps, shift, shape or self.latent_shape, self.device)
        return ode.time_grid(steps, shift or self.sampler.shift, device=self.device)

    @torch.no_grad()
    def sample(self, x0, condition, times, negative=None, guidance=1.0, method="euler", transformer=None):
        """Integrates the model's ODE from noise x0 [B, C, H, W] -> latents like x0.

        condition        what to draw: B prompts
        negative         what guidance leads away from: B prompts, or one for all; needed where there is guidance
        guidance         the scale of ode.guide; up to 1 there is none, as in diffusers
        times, method    see ode.sample
        transformer      see `velocity`
        """
        guidance, condition = max(guidance, 1.0), condition.to(x0.device)  # once, and not at every step
        if guidance > 1:
            if negative is None:
                raise InputError(f'guidance is {guidance} without a negative condition; expected one, such as encode([""])')
            negative = negative.to(x0.device)
            if len(negative) == 1:
                negative = negative[[0] * len(x0)]

        def toward(condition):
            return lambda x, t: self.velocity(x, t, condition, transformer)

        velocity = ode.guide(toward(condition), toward(negative), guidance)
        return ode.sample(velocity, x0, times, method)

    def draw(
        self, x0, condition, times, negative=None, guidance=1.0, method="euler", batch=None, tile=None, transformer=None
    ):  # fmt: skip
        """Samples and decodes, `batch` samples at a time (None: all at once). The arguments of `sample` and `decode`.

        -> (latents x1 [N, C, H, W] on x0's device, images [N, 3, H', W'] on the CPU; both in x0's dtype)
        """
        latents, images = [], []
        for rows in torch.arange(len(x0), device=x0.device).split(batch or len(x0)):
            away = negative if negative is None or len(negative) == 1 else negative[rows]
            latents.append(self.sample(x0[rows], condition[rows], times, away, guidance, method, transformer))
            images.append(self.decode(latents[-1], tile).cpu())
        return torch.cat(latents), torch.cat(images)

    @torch.no_grad()
    def decode(self, latents, tile=None):
        """Latents [B, C, H, W] -> images [B, 3, factor·H, factor·W], nominally in [−1, 1] and not clamped; in pixel space the
        latents. tile: None, or the side in latent pixels of the squares that large images are decoded in."""
        if self.vae is None:
            return latents
        inputs = latents.to(next(self.vae.parameters()).dtype).split(1)  # one by one: at 1024 px each takes gigabytes
        with torch.autocast(latents.device.type, enabled=False):  # the autoencoder computes in its own dtype
            return torch.cat([self.vae.decode(latent, tile) for latent in inputs]).to(latents.dtype)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None, base=None, encoders=True, lower=None, meta=False, **options):
        """Opens a folder in diffusers' pipeline layout or the single file of a public release.

        dtype     None keeps each part's own; device: None is the CPU
        base      folder in diffusers' layout for the parts that path lacks, such as a single file's tokenizers
        encoders  False: no text encoder, for prompts that are encoded already
        meta      True: the transformer alone stays on the meta device, where it has no weights yet
        lower     whether prompts are lower-cased before they are encoded; None: as diffusers does it, which is for SANA alone
        options   of the text encoders, such as t5="stream": see from_pretrained of the family's PromptEncoder

        Raises MissingFile for a missing part, InputError for one that does not fit; both in one line.
        """
        family = family_of(path, base, FAMILIES)
        release = Release(path, base, family)
        config = release.transformer_config()  # from the headers, so that a missing part is told before anything is read
        channels = family.latents(config).channels
        # Images have 1 or 3 channels: a transformer of more works on latents, whatever its folder lists.
        vae = release.need("vae") if release.expects("vae") or channels not in (1, 3) else None
        scheduler = family.scheduler.of(config) if vae else None
        if folder := release.find("scheduler"):
            scheduler = family.scheduler.read(folder / "scheduler_config.json")
        prompts = family.open_encoder(path, dtype, device, base, lower, **options) if encoders else None
        autoencoder = family.autoencoder.from_pretrained(vae, dtype, device) if vae else None
        if vae and autoencoder.config.latent_channels != channels:
            found = f"{autoencoder.config.latent_channels} channels; the transformer expects {channels}"
            raise InputError(f"{vae}: the autoencoder's latents have {found}")
        where = "meta" if meta else device
        transformer = family.transformer.from_pretrained(release.need("transformer"), dtype, where)
        return cls(transformer, prompts, autoencoder, scheduler)

    def save_pretrained(self, path):
        """Writes the parts that are loaded as a folder in diffusers' layout. With all parts, diffusers' pipeline opens it; with
        less, TextToImage.from_pretrained(path, base=…) does."""
        path, parts = Path(path), self.family.parts
        index = {"_class_name": self.family.pipelines[0], "transformer": [*parts["transformer"][2:]]}
        self.transformer.save_pretrained(path / "transformer")
        if self.prompt_encoder:
            index |= self.prompt_encoder.save_pretrained(path)
        if self.vae:
            self.vae.save_pretrained(path / "vae")
            index["vae"] = [*parts["vae"][2:]]
        if self.scheduler:
            (path / "scheduler").mkdir(exist_ok=True)
            values = self.scheduler.values()
            files.write_json(path / "scheduler" / "scheduler_config.json", values)
            index["scheduler"] = ["diffusers", values["_class_name"]]
        files.write_json(path / "model_index.json", index)
