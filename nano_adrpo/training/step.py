"""What a gradient step needs besides the loss: precision, the reference, the learning rate, clipping, a moving average."""

import contextlib
import copy
import math

import torch
from torch.nn.utils import clip_grad_norm_

from nano_adrpo import lora
from nano_adrpo.errors import NotFinite
from nano_adrpo.training import distributed, sharding
from nano_adrpo.training.options import DTYPES, adapted


def autocast(args):
    """`with autocast(args):` runs forward passes in --dtype."""
    dtype = DTYPES[args.dtype]
    return torch.autocast(torch.device(args.device).type, dtype, enabled=dtype != torch.float32)


def weight_dtype(args):
    """The dtype that a policy is loaded in: float32 where its weights are trained; --dtype where adapters leave them frozen."""
    return DTYPES[args.dtype] if adapted(args) else torch.float32


def reference_of(network, adapters):
    """Keeps the network as it is now, as the reference. -> a function: inside `with reference() as frozen:`, frozen is that
    network and nothing gets a gradient.

    adapters   True: no second copy of the network; its adapters are off if they are new, else as they are now. False: a
               frozen copy
    """
    frozen = None if adapters else copy.deepcopy(network).requires_grad_(False)
    new = adapters and not any(layer.lora_B.weight.any() for layer in lora.adapted(network).values())
    parameters = trained(network) if adapters else []
    start = [parameter.detach().clone() for parameter in parameters]

    @contextlib.contextmanager
    def reference():
        with torch.no_grad():
            if not adapters:
                yield frozen
            else:
                with lora.disabled(network) if new else holding(parameters, start):
                    yield network

    return reference


@contextlib.contextmanager
def holding(parameters, values):
    """Inside, the parameters have these values, tensors of the same shapes."""
    current = [sharding.replace_data(parameter, value) for parameter, value in zip(parameters, values)]
    try:
        yield
    finally:
        for parameter, data in zip(parameters, current):
            sharding.replace_data(parameter, data)


def trained(network):
    """The parameters that get a gradient: all, or the adapters' alone."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def set_learning_rate(optimizer, args, round):
    """Gives the optimizer the learning rate of a round, counted from 1. -> it"""
    rate = learning_rate(args, round)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def learning_rate(args, round):
    """A rise over --warmup rounds to --lr, which holds for a share --lr-hold of the rounds; then a fall to
    --lr-end · --lr, which the round after the last would have."""
    done, start = round - 1, args.lr_hold * args.rounds
    progress = max(0.0, (done - start) / (args.rounds - start))  # of the fall, 0 … 1
    if args.lr_schedule == "linear":
        factor = 1 - (1 - args.lr_end) * progress
    elif args.lr_schedule == "cosine":
        factor = args.lr_end + (1 - args.lr_end) * (1 + math.cos(math.pi * progress)) / 2
    else:
        factor = 1.0
    return args.lr * factor * min(1.0, round / args.warmup if args.warmup else 1.0)


def optimizer_step(optimizer, loss, args, ema):
    """One AdamW step on the gradients that were summed up, here and over the ranks, clipped to --clip-grad; then zeroes them.
    -> the loss over all ranks and the gradients' norm before, as numbers: the one time in a step that the CPU waits for a GPU

    loss   this rank's part, a number or a tensor of one. Where the whole or the norm is not finite, raises NotFinite: no step,
           no gradients left
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    distributed.sum_gradients(parameters)
    norm = sharding.full(clip_grad_norm_(parameters, args.clip_grad)).double()
    loss = distributed.total(torch.as_tensor(loss, dtype=torch.float64, device=norm.device))
    loss, norm = torch.stack([loss, norm]).tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        raise NotFinite(f"loss {loss}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad()
    ema.update()
    return loss, norm


class MovingAverage:
    """The exponential moving average of parameters, in their own dtype: after each step, average = decay·average +
    (1 − decay)·parameter. Decay 0 keeps none, and costs nothing."""

    def __init__(self, parameters, decay):
        self.decay, self.parameters = decay, [p for p in parameters if p.requires_grad] if decay else []
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self):
        for average, parameter in zip(self.average, self.parameters):
            average.lerp_(parameter, 1 - self.decay)

    def applied(self):
        """Inside, the model has the average for its weights."""
        return holding(self.parameters, self.average)
