"""SD3 as one object: prompts in, velocities in the paper's time, images out.

A release (see sd3.py) has a transformer, text encoders, and an autoencoder between images and the latents that flow. A folder
without `vae` works in pixel space: its latents are the images.

Only `TextToImage.velocity` turns time round. The paper: t = 0 is noise, t = 1 is data, velocity dx/dt = x1 − x0 = data − noise.
SD3's network: sigma = 1 − t, output noise − data. Hence velocity(x, t) = −network(x, 1 − t).
"""

import dataclasses
from pathlib import Path

import torch

from nano_adrpo import files, ode
from nano_adrpo.errors import InputError
from nano_adrpo.models.mmdit import MMDiT
from nano_adrpo.models.vae import Autoencoder
from nano_adrpo.text_to_image.condition import Condition
from nano_adrpo.text_to_image.sd3 import SCHEDULER_CLASS, PromptEncoder, Release, Scheduler, read_scheduler

__all__ = ["Condition", "TextToImage"]


class TextToImage:
    def __init__(self, transformer, prompt_encoder=None, vae=None, scheduler=None):
        """prompt_encoder None: prompts come encoded. vae None: pixel space. scheduler None: its defaults, and none is saved."""
        self.transformer, self.prompt_encoder, self.vae, self.scheduler = transformer, prompt_encoder, vae, scheduler

    @property
    def device(self):
        return self.transformer.proj_out.weight.device

    @property
    def shift(self):
        """The model's own shift of the time grid (see ode.time_grid)."""
        return float((self.scheduler or Scheduler()).shift)

    @property
    def train_timesteps(self):
        """The network is told sigma times this."""
        return (self.scheduler or Scheduler()).num_train_timesteps

    @property
    def factor(self):
        """Pixels on the side of one latent pixel: 8 in SD3, 1 in pixel space."""
        return self.vae.factor if self.vae else 1

    @property
    def latent_shape(self):
        """[C, H, W] of one sample at the resolution that the model was trained at."""
        return self.latent_shape_at(self.transformer.config.sample_size * self.factor)

    def latent_shape_at(self, resolution):
        """[C, H, W] of one sample of `resolution` pixels: a number, or (height, width). InputError if it does not fit."""
        config, unit = self.transformer.config, self.transformer.config.patch_size * self.factor
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        for side in (height, width):
            if side % unit or not 0 < side <= config.pos_embed_max_size * unit:
                raise InputError(
                    f"resolution {side}: expected a multiple of {unit} (patches of {config.patch_size} × latents of "
                    f"{self.factor} pixels), at most {config.pos_embed_max_size * unit}"
                )
        return config.in_channels, height // self.factor, width // self.factor

    def encode(self, prompts, negative=False):
        """A list of B strings -> Condition, on the transformer's device. negative: whether guidance leads away from them; SD3
        encodes both alike."""
        if self.prompt_encoder is None:
            raise InputError("this model was opened without its text encoders; expected encoded prompts (see prompts.cached)")
        return self.prompt_encoder.encode(prompts).to(self.device)

    def velocity(self, x, t, condition, transformer=None):
        """dx/dt at time t of the paper. x [B, C, H, W]; t a number or [B], in [0, 1]; -> like x, in x's dtype.

        transformer   the network to ask, such as the reference's frozen copy; None is the model's own"""
        transformer = transformer or self.transformer
        sigma = 1 - torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        sigma = sigma * (self.train_timesteps / 1000)  # 1 in all releases of SD3; MMDiT multiplies by their 1000
        dtype = transformer.proj_out.weight.dtype
        condition = condition.to(x.device, dtype)
        return -transformer(x.to(dtype), sigma, condition.context, condition.pooled).to(x.dtype)

    def times(self, steps, shift=None):
        """The steps + 1 times to sample at: SD3's own grid, in pixel space `ode.time_grid`. shift None is the model's own."""
        shift = self.shift if shift is None else shift
        if self.vae:
            return ode.sd3_time_grid(steps, shift, device=self.device, train_timesteps=self.train_timesteps)
        return ode.time_grid(steps, shift, device=self.device)

    @torch.no_grad()
    def sample(self, x0, condition, times, negative=None, guidance=1.0, method="euler"):
        """Integrates the model's ODE from noise x0 [B, C, H, W] -> latents like x0.

        condition        what to draw: B prompts
        negative         what guidance leads away from: B prompts, or one for all; needed where there is guidance
        guidance         the scale of ode.guide; up to 1 there is none, as in diffusers
        times, method    see ode.sample
        """
        guidance = max(guidance, 1.0)
        if guidance > 1:
            if negative is None:
                raise InputError(f'guidance is {guidance} without a negative condition; expected one, such as encode([""])')
            if len(negative) == 1:
                negative = negative[[0] * len(x0)]
        velocity = ode.guide(lambda x, t: self.velocity(x, t, condition), lambda x, t: self.velocity(x, t, negative), guidance)
        return ode.sample(velocity, x0, times, method)

    def draw(self, x0, condition, times, negative=None, guidance=1.0, method="euler", batch=None, tile=None):
        """Samples and decodes, `batch` samples at a time (None: all at once). The arguments of `sample` and `decode`.

        -> (latents x1 [N, C, H, W] on x0's device, images [N, 3, H', W'] on the CPU; both in x0's dtype)
        """
        latents, images = [], []
        for rows in torch.arange(len(x0)).split(batch or len(x0)):
            away = negative if negative is None or len(negative) == 1 else negative[rows]
            latents.append(self.sample(x0[rows], condition[rows], times, away, guidance, method))
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
    def from_pretrained(cls, path, dtype=None, device=None, base=None, encoders=True, t5="load", t5_tokens=256):
        """Opens a folder in diffusers' SD3 pipeline layout or Stability's single file.

        dtype     None keeps each part's own; device: None is the CPU
        base      folder in diffusers' layout for the parts that path lacks, such as a single file's tokenizers
        encoders  False: no text encoder, for prompts that are encoded already
        t5, t5_tokens   see PromptEncoder.from_pretrained

        Raises MissingFile for a missing part, InputError for one that does not fit; both in one line.
        """
        release = Release(path, base)
        config = release.transformer_config()  # from the headers, so that a missing part is told before anything is read
        # Images have 1 or 3 channels: a transformer of more works on latents, whatever its folder lists.
        vae = release.need("vae") if release.expects("vae") or config.in_channels not in (1, 3) else None
        scheduler = Scheduler(shift=3.0) if vae else None  # of a release that has no file for it: SD3's and SD3.5's
        if folder := release.find("scheduler"):
            scheduler = read_scheduler(folder / "scheduler_config.json")
        prompts = PromptEncoder.from_pretrained(path, dtype, device, base, t5, t5_tokens) if encoders else None
        autoencoder = Autoencoder.from_pretrained(vae, dtype, device) if vae else None
        if vae and autoencoder.config.latent_channels != config.in_channels:
            channels = f"{autoencoder.config.latent_channels} channels; the transformer expects {config.in_channels}"
            raise InputError(f"{vae}: the autoencoder's latents have {channels}")
        return cls(MMDiT.from_pretrained(release.need("transformer"), dtype, device), prompts, autoencoder, scheduler)

    def save_pretrained(self, path):
        """Writes the parts that are loaded as a folder in diffusers' layout. With all parts, StableDiffusion3Pipeline opens it;
        with less, TextToImage.from_pretrained(path, base=…) does."""
        path = Path(path)
        index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
        self.transformer.save_pretrained(path / "transformer")
        if self.prompt_encoder:
            index |= self.prompt_encoder.save_pretrained(path)
        if self.vae:
            self.vae.save_pretrained(path / "vae")
            index["vae"] = ["diffusers", "AutoencoderKL"]
        if self.scheduler:
            (path / "scheduler").mkdir(exist_ok=True)
            values = {"_class_name": SCHEDULER_CLASS, **dataclasses.asdict(self.scheduler)}
            files.write_json(path / "scheduler" / "scheduler_config.json", values)
            index["scheduler"] = ["diffusers", SCHEDULER_CLASS]
        files.write_json(path / "model_index.json", index)
