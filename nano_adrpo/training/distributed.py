"""Many processes, called ranks, that train one model: what `torchrun` starts, each on a GPU of its own.

    torchrun --nproc-per-node 4 train_flow.py …

All ranks have the same generators, so that each draws the prompts, noises, times and random numbers that one process draws. It
then takes its own rows (`mine`). What others need is put together again (`gather`): advantages, coefficients and metrics are
those of one process. Losses are divided by counts over all ranks, so that the ranks' gradients add up to those of one process.
The models know nothing of all this. Without torchrun there is one rank, and nothing here does anything.

`mine` and `gather` need every rank to call them in the same order. Only the first rank writes files and prints.
"""

import contextlib
import datetime
import functools
import json
import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from nano_adrpo.errors import InputError, NotFinite
from nano_adrpo.files import values

PATIENCE = datetime.timedelta(hours=12)  # how long ranks wait for each other; torchrun ends them sooner where one has died


def rank():
    return int(os.environ.get("RANK", 0))


def size():
    """How many ranks there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def together():
    """Inside, the ranks can talk to each other, and "cuda" is each one's own GPU. Only the first prints."""
    if size() == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # After a restart torchrun's store still has the addresses of the processes that were: each attempt needs names of its own.
    store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank(), world_size=size())
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null if rank() else sys.stdout):
        yield
    dist.destroy_process_group()  # not after an error: other ranks may still wait


def divided(args, *options, **counts):
    """Refuses options that count over all ranks, and other such counts, that the number of ranks does not divide; and --fsdp of
    one rank."""
    if args.fsdp and size() == 1:
        raise InputError("--fsdp: expected several processes, as torchrun --nproc-per-node starts them")
    given = {f"--{option.replace('_', '-')}": getattr(args, option) or 0 for option in options}
    for option, count in (given | counts).items():
        if count % size():
            raise InputError(f"{option} {count}: expected a multiple of the {size()} processes that share the work")


def each(count):
    """A rank's part of a count over all ranks, at least 1; None stays None."""
    return count and max(1, count // size())


# ------------------------------------------------------------------------------------------------------------ rows and values


def mine(rows):
    """This rank's part of N rows, a tensor, a list or a Condition: ⌈N / ranks⌉ contiguous ones. Where they do not divide, the
    last row is repeated, since FSDP needs as many forward passes on every rank; `gather` leaves the copies out."""
    if size() == 1:
        return rows
    part = -(-len(rows) // size())
    start, end = rank() * part, (rank() + 1) * part
    if part * size() == len(rows):
        return rows[start:end]
    which = [min(row, len(rows) - 1) for row in range(start, end)]
    return [rows[row] for row in which] if isinstance(rows, list) else rows[which]


def gather(value, count=None):
    """The rows of all ranks, one behind the other, the first `count` of them (None: all): of tensors and lists, of dicts and
    tuples of them, and of a class that has `cat`, such as Rollout. Raises NotFinite on all ranks where one has told it."""
    if size() == 1:
        return value
    if isinstance(value, dict):
        return {key: gather(item, count) for key, item in value.items()}
    if hasattr(value, "cat"):
        return type(value).cat([type(value)(**fields) for fields in exchange(value)])
    if isinstance(value, tuple):
        return tuple(gather(item, count) for item in value)
    parts = exchange(value)
    return (torch.cat(parts) if torch.is_tensor(value) else sum(parts, []))[:count]


def exchange(value):
    """-> [the first rank's value, …, the last one's], of dicts, lists, texts, numbers and tensors; these come on the device of
    the value's first tensor."""
    tensors = {}
    text = json.dumps(values.split(value, "value", tensors)).encode()
    device = next((tensor.device for tensor in tensors.values()), "cpu")
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    sent = torch.frombuffer(bytearray(save(tensors | {"text": torch.tensor(list(text), dtype=torch.uint8)})), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    dist.all_gather(sizes, torch.tensor([len(sent)]))
    parts = [torch.empty(int(max(sizes)), dtype=torch.uint8) for _ in sizes]
    dist.all_gather(parts, torch.nn.functional.pad(sent, (0, len(parts[0]) - len(sent))))
    received = [load(part[:length].numpy().tobytes()) for part, length in zip(parts, sizes)]
    texts = [json.loads(bytes(sent["text"].tolist())) for sent in received]
    found = [values.join(text, lambda name: sent[name].to(device)) for text, sent in zip(texts, received)]
    if errors := [each["not finite"] for each in found if isinstance(each, dict) and "not finite" in each]:
        error = NotFinite(errors[0])
        error.told = True
        raise error
    return found


def tell(error):
    """Makes the other ranks, which wait in `gather` or have the same error, raise this NotFinite, too."""
    if size() > 1 and not getattr(error, "told", False):
        with contextlib.suppress(NotFinite):
            exchange({"not finite": str(error)})


def first(function):
    """Calls the function on the first rank alone; -> what it returns (JSON and tensors), on all ranks. What it refuses ends
    all of them."""
    if size() == 1:
        return function()
    if rank() == 0:
        try:
            found = function()
        except InputError:
            exchange(None)
            raise
        exchange([found])
        return found
    told = exchange(None)[0]
    if told is None:
        sys.exit(2)  # the first rank says why
    return told[0]


def once(function):
    """function(…), which writes something, on the first rank alone; None on the others."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs) if rank() == 0 else None

    return call


@contextlib.contextmanager
def first_before_others():
    """The first rank does what is inside, then the others: they find the file that it has written."""
    if size() > 1 and rank():
        dist.barrier()
    yield
    if size() > 1 and not rank():
        dist.barrier()


def total(value):
    """The sum over the ranks of a number, or of tensors of one shape."""
    if size() == 1:
        return value
    summed = value.clone() if torch.is_tensor(value) else torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed if torch.is_tensor(value) else summed.item()


def sum_gradients(parameters):
    """Every rank's gradients become their sum over the ranks: with adapters, only the adapters' travel. FSDP has
    summed those of weights in parts already."""
    gradients = [parameter.grad for parameter in parameters if size() > 1 and parameter.grad is not None]
    works = [dist.all_reduce(gradient, async_op=True) for gradient in gradients if not isinstance(gradient, DTensor)]
    for work in works:
        work.wait()
