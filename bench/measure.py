"""Rulers: time of two sides that take turns, bytes that tensors hold at most, operations, waits for the GPU, FLOPs.

All but time is counted from what torch dispatches, the same way for both sides: on a CPU, on CUDA, and on meta, where nothing
is computed. Operations that only make a view are none.
"""

import statistics
import time
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Case(NamedTuple):
    """Two sides that do the same, and what tells that they do."""

    name: str
    peer: str
    ours: Callable  # a run; may return how many tokens it made, and is then timed per token
    theirs: Callable
    differ: Callable  # -> how far apart their outputs are
    tolerance: float  # above it there is no ratio
    of_what: str  # what `differ` measures
    repeats: int = 7
    warm: int = 4  # at most so many pairs come first, which do not count


WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}
NOTHING = {"detach", "alias", "empty", "empty_like", "empty_strided", "new_empty"}


class Operations(TorchDispatchMode):
    """`names` of the operations that compute, in order, and how often the CPU waits for numbers of the device: reads them, or
    needs to know how many there are. A copy from the CPU is a wait, too, as that of an index that lies there."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes, self.waits = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        indices = tree_leaves(args[1]) if name in ("index", "index_put", "index_put_") else []
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        from_cpu = {t.device.type for t in tensors if t.dim()} > {"cpu"}
        out = func(*args, **(kwargs or {}))
        moved = name == "_to_copy" and tensors[0].dim() > 0 and out.device != tensors[0].device
        self.waits += name in WAITS or by_mask or from_cpu or moved
        if not func.is_view and name not in NOTHING:
            self.names.append(name)
            self.shapes.append((name, *(tuple(t.shape) for t in tensors)))
        return out


class Memory(TorchDispatchMode):
    """`peak` is the most bytes that tensors made inside held at one time; what a kernel holds for itself is not seen."""

    def __init__(self):
        super().__init__()
        self.held, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):  # from before: not counted
                self.known.add(leaf.untyped_storage()._cdata)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and (key := leaf.untyped_storage()._cdata) not in self.known:
                storage, size = leaf.untyped_storage(), leaf.untyped_storage().nbytes()
                self.known.add(key)
                self.held += size
                weakref.finalize(storage, self.drop, key, size)
        self.peak = max(self.peak, self.held)
        return out

    def drop(self, key, size):
        self.held -= size
        self.known.discard(key)


def peak(run, device="cpu"):
    """Bytes that a call holds beyond what was there before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Memory() as memory:
        run()
    return memory.peak


def operations(run):
    """-> how many operations a call computes, and how often the CPU waits for the device in it."""
    with Operations() as seen:
        run()
    return len(seen.names), seen.waits


def flops(run):
    """Floating-point operations of a call's products, convolutions and attentions; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def clock(run, device):
    """-> seconds, and what the call gives"""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = run()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, out


def turns(case, device):
    """Times both sides in turn, so that what else the machine does falls on both, after warm-up: until a pair is no longer
    more than a tenth faster than the one before, at most case.warm of them. A side that returns a number of tokens or the like
    is timed per unit. -> seconds of ours, of theirs, [case.repeats]
    each"""
    sides, pairs = (case.ours, case.theirs), []
    while len(pairs) < case.warm and (len(pairs) < 2 or sum(pairs[-1]) < 0.9 * sum(pairs[-2])):
        pairs.append([clock(side, device)[0] for side in sides])
    pairs = []
    for _ in range(case.repeats):
        timed = [clock(side, device) for side in sides]
        pairs.append([seconds / (units if isinstance(units, int) else 1) for seconds, units in timed])
    return [list(side) for side in zip(*pairs)]


def ratio(ours, theirs):
    """Theirs / ours, pair by pair: lower quartile, median, upper quartile."""
    return statistics.quantiles([b / a for a, b in zip(ours, theirs)], n=4) if len(ours) > 1 else [theirs[0] / ours[0]] * 3


def exponent(sizes, values):
    """The slope of log(value) over log(size), by least squares: how a cost grows with a size."""
    x, y = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (sizes, values))
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
