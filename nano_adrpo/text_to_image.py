"""SD3 as one object: prompts in, velocities in the paper's time, images out.

A release (see release.py) has a transformer, text encoders (see prompts.py), and an autoencoder between images and the latents
that flow. A folder without `vae` works in pixel space: its latents are the images.

This is the one place where time is turned round. The paper: t = 0 noise, t = 1 data, velocity dx/dt = x1 − x0 = data − noise.
SD3's network: sigma = 1 − t, output noise − data. Hence velocity(x, t) = −network(x, 1 − t).
"""

import math
from pathlib import Path

import torch

from nano_adrpo import ode, weights
from nano_adrpo.models.mmdit import MMDiT
from nano_adrpo.models.vae import Autoencoder
from nano_adrpo.prompts import PromptEncoder
from nano_adrpo.release import Release

SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}  # SD3's and SD3.5's

# What makes diffusers' sampler another one, key by key of scheduler_config.json: its default, which alone is implemented.
ONLY = {"_class_name": SCHEDULER["_class_name"], "use_dynamic_shifting": False, "shift_terminal": None, "invert_sigmas": False}
ONLY |= {f"use_{kind}_sigmas": False for kind in ("karras", "exponential", "beta")} | {"stochastic_sampling": False}


def read_scheduler(file):
    """scheduler_config.json's values; ValueError for a sampler that is not SD3's."""
    values = weights.read_json(file)
    for key, known in ONLY.items():
        if (value := values.get(key, known)) != known:
            raise ValueError(f"{file}: key '{key}' is {value!r}; expected {known!r}, as in SD3's scheduler")
    for key in ("shift", "num_train_timesteps"):
        if type(value := values.get(key, 1)) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{file}: key '{key}' is {value!r}; expected a positive number")
    return values


class TextToImage:
    def __init__(self, transformer, prompt_encoder=None, vae=None, scheduler=None):
        """prompt_encoder None: prompts come encoded. vae None: pixel space. scheduler: diffusers' configuration of its sampler,
        of which `shift` and `num_train_timesteps` are used here; None for a model that has none."""
        self.transformer, self.prompt_encoder, self.vae, self.scheduler = transformer, prompt_encoder, vae, scheduler

    @property
    def device(self):
        return self.transformer.proj_out.weight.device

    @property
    def shift(self):
        """The time-grid shift the model is to be sampled with (see ode.time_grid)."""
        return float((self.scheduler or {}).get("shift", 1.0))

    @property
    def train_timesteps(self):
        """What the network is told of pure noise: sigma times this."""
        return (self.scheduler or {}).get("num_train_timesteps", 1000)

    @property
    def factor(self):
        """Pixels a latent's side stands for: 8 in SD3, 1 in pixel space."""
        return self.vae.factor if self.vae else 1

    @property
    def latent_shape(self):
        """[C, H, W] of one sample at the size the model was trained at."""
        return self.latent_shape_at(self.transformer.config.sample_size * self.factor)

    def latent_shape_at(self, resolution):
        """[C, H, W] of one sample of `resolution` pixels: a number, or (height, width). ValueError if it does not fit."""
        config, unit = self.transformer.config, self.transformer.config.patch_size * self.factor
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        for side in (height, width):
            if side % unit or not 0 < side <= config.pos_embed_max_size * unit:
                raise ValueError(
                    f"resolution {side}: expected a multiple of {unit} (patches of {config.patch_size} × latents of "
                    f"{self.factor} pixels), at most {config.pos_embed_max_size * unit}"
                )
        return config.in_channels, height // self.factor, width // self.factor

    def encode(self, prompts):
        """A list of B strings -> Condition, on the transformer's device."""
        if self.prompt_encoder is None:
            raise ValueError("this model was opened without its text encoders; expected encoded prompts (see prompts.cached)")
        return self.prompt_encoder.encode(prompts).to(self.device)

    def velocity(self, x, t, condition):
        """dx/dt at time t of the paper. x [B, C, H, W]; t a number or [B], in [0, 1]; -> like x, in x's dtype."""
        dtype = self.transformer.proj_out.weight.dtype
        sigma = 1 - torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        sigma = sigma * (self.train_timesteps / 1000)  # 1 in all of SD3's releases, whose 1000 is in MMDiT
        condition = condition.to(x.device, dtype)
        return -self.transformer(x.to(dtype), sigma, condition.context, condition.pooled).to(x.dtype)

    def times(self, steps, shift=None):
        """The steps + 1 times at which the model is to be sampled: SD3's own grid, or in pixel space `ode.time_grid`. shift None
        is the model's own."""
        shift = self.shift if shift is None else shift
        if self.vae:
            return ode.sd3_time_grid(steps, shift, device=self.device, train_timesteps=self.train_timesteps)
        return ode.time_grid(steps, shift, device=self.device)

    @torch.no_grad()
    def sample(self, x0, condition, times, negative=None, guidance=1.0, method="euler"):
        """Noise x0 [B, C, H, W] -> latents like x0, along the model's ODE.

        condition, negative   Conditions of B prompts each: what to draw and, for a guidance other than 1, what to lead away from
        times, method         see ode.sample; guidance: see ode.guide
        """
        if guidance != 1 and negative is None:
            raise ValueError(f'guidance is {guidance} without a negative condition; expected one, such as encode([""] * B)')
        velocity = ode.guide(lambda x, t: self.velocity(x, t, condition), lambda x, t: self.velocity(x, t, negative), guidance)
        return ode.sample(velocity, x0, times, method)

    @torch.no_grad()
    def decode(self, latents, tile=None):
        """Latents [B, C, H, W] -> images [B, 3, factor·H, factor·W], nominally in [−1, 1] and not clamped; in pixel space the
        latents. tile: None, or the side in latent pixels of the squares that large images are decoded in."""
        if self.vae is None:
            return latents
        inputs = latents.to(next(self.vae.parameters()).dtype).split(1)  # one by one: at 1024 px each takes gigabytes
        return torch.cat([self.vae.decode(latent, tile) for latent in inputs]).to(latents.dtype)

    @classmethod
    def from_pretrained(cls, path, dtype=None, device=None, base=None, encoders=True, t5="load", t5_tokens=256):
        """Opens a folder in diffusers' SD3 pipeline layout or Stability's single file.

        dtype     None keeps each part's own; device: None is the CPU
        base      folder in diffusers' layout for the parts that path lacks, such as a single file's tokenizers
        encoders  False: no text encoder, for prompts that are encoded already
        t5, t5_tokens   see PromptEncoder.from_pretrained

        Raises FileNotFoundError for a missing part, ValueError for one that does not fit; both in one line.
        """
        release = Release(path, base)
        config = release.transformer_config()  # from the headers: what is missing is told before anything is read
        # Images have 1 or 3 channels: a model of more has latents, whatever its folder lists.
        vae = release.need("vae") if release.expects("vae") or config.in_channels not in (1, 3) else None
        scheduler = dict(SCHEDULER) if vae else None
        if folder := release.find("scheduler"):
            scheduler = read_scheduler(folder / "scheduler_config.json")
        prompts = PromptEncoder.from_pretrained(path, dtype, device, base, t5, t5_tokens) if encoders else None
        autoencoder = Autoencoder.from_pretrained(vae, dtype, device) if vae else None
        if vae and autoencoder.config.latent_channels != config.in_channels:
            channels = f"{autoencoder.config.latent_channels} channels; the transformer expects {config.in_channels}"
            raise ValueError(f"{vae}: the autoencoder's latents have {channels}")
        return cls(MMDiT.from_pretrained(release.need("transformer"), dtype, device), prompts, autoencoder, scheduler)

    def save_pretrained(self, path):
        """Writes the parts that are loaded as a folder in diffusers' layout; with all of them, StableDiffusion3Pipeline opens
        it, and without, TextToImage.from_pretrained(path, base=…) does."""
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
            weights.write_json(path / "scheduler" / "scheduler_config.json", self.scheduler)
            index["scheduler"] = ["diffusers", self.scheduler.get("_class_name", SCHEDULER["_class_name"])]
        weights.write_json(path / "model_index.json", index)
