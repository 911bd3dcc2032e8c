"""scheduler_config.json: the sampler that a release asks for."""

import dataclasses

from nano_adrpo import files, ode
from nano_adrpo.files import config

CLASS = "FlowMatchEulerDiscreteScheduler"


@dataclasses.dataclass
class Scheduler:
    """SD3's sampler, Euler steps on its own grid. The defaults are diffusers' own; a family with another file or another grid
    has a subclass."""

    num_train_timesteps: int = 1000  # the network is told sigma times this
    shift: float = 1.0  # of the time grid, see ode.time_grid

    # Keys that turn diffusers' sampler into another one, and their defaults. Only the defaults are implemented.
    SAMPLER = {
        "_class_name": (CLASS,),
        "use_dynamic_shifting": (False,),
        "shift_terminal": (None,),
        "invert_sigmas": (False,),
        "use_karras_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "stochastic_sampling": (False,),
    }

    def times(self, steps, shift, shape, device):
        """The steps + 1 times to sample latents of `shape` [C, H, W] at. shift: None is the file's."""
        return ode.sd3_time_grid(steps, shift or self.shift, device=device, train_timesteps=self.num_train_timesteps)

    @classmethod
    def of(cls, transformer):
        """That of a release that has no file for it, such as a single file. transformer: its config."""
        return cls(shift=3.0)

    @classmethod
    def read(cls, file):
        """Raises InputError naming the key for a sampler that is not the family's."""
        values = files.read_json(file)
        config.only(values, cls.SAMPLER, file)
        return config.parse(cls, values, file)

    def values(self):
        """-> what to write as scheduler_config.json."""
        return {"_class_name": CLASS, **dataclasses.asdict(self)}
