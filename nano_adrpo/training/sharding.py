"""FSDP2: each rank keeps a part of every weight, and the whole of a block's weights only while the block computes.

`shard` applies it to a network from outside. What FSDP does in forward and backward passes is torch's own: it gathers a block's
weights in --dtype, and leaves every rank its part of the summed gradient, in float32. AdamW and the moving average work on the
parts. Files hold whole tensors (`full`), those of one process, and each rank takes its part of them (`part`).
"""

import contextlib

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nano_adrpo.training.distributed import size
from nano_adrpo.training.options import DTYPES

BLOCKS = ("transformer_blocks", "single_transformer_blocks", "model.layers")  # lists of what is sharded block by block
# In the names of what stays whole on every rank: adapters, which are small; the audio tower, which computes only where a rank
# meets a sound for the first time.
WHOLE = (".lora_A.", ".lora_B.", "audio_tower.")


def full(tensor):
    """The whole of a tensor of which each rank has a part; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(like, tensor):
    """This rank's part of a whole tensor where `like` is in parts, else the tensor. What has no rows, as a count, is whole."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def replace_data(parameter, value):
    """Gives a parameter the values of a tensor of its shape, by pointing to that; FSDP knows where the parts of its parameters
    are, so that they are copied there. -> its data before"""
    before = parameter.data
    if isinstance(parameter, DTensor):
        before = before.clone()
        parameter.data.copy_(value)
    else:
        parameter.data = value
    return before


def shard(args, network, reference):
    """--fsdp: each rank keeps a part of every weight of the network and, where it is a frozen copy, of the reference's. Both
    come without weights, on the meta device, but for adapters, which stay whole; each rank reads its parts from the files."""
    if not args.fsdp:
        return
    mesh, dtype = init_device_mesh(torch.device(args.device).type, (size(),)), DTYPES[args.dtype]
    narrow = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    with reference() as frozen:
        networks = [network] if frozen is network else [network, frozen]
    for one in networks:
        kept = {parameter for name, parameter in one.named_parameters() if any(mark in name for mark in WHOLE)}
        blocks = [block for name, some in one.named_modules() if name in BLOCKS for block in some]
        for part in (*blocks, one):
            fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=kept)
            part.set_gradient_divide_factor(1.0)  # a sum, not a mean: see the losses' `count`
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        for method in ("token_logprobs", "generate"):
            if hasattr(one, method):
                register_fsdp_forward_method(one, method)  # it computes as forward does
        fill(one, mesh)


def fill(network, mesh):
    """Reads what is on the meta device from the network's files: of weights in parts, this rank's rows alone."""
    state = {}
    for name, tensor in network.state_dict().items():
        if not tensor.is_meta:
            continue
        if isinstance(tensor, DTensor):
            shape, start = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
            rows = network.stored(name, slice(start[0], start[0] + shape[0])).to(mesh.device_type)
            size_of_all = {"shape": tensor.shape, "stride": tensor.stride()}
            state[name] = DTensor.from_local(rows, mesh, tensor.placements, run_check=False, **size_of_all)
        else:
            state[name] = network.stored(name).to(mesh.device_type)
    network.load_state_dict(state, strict=False, assign=True)


@contextlib.contextmanager
def whole(network):
    """Inside, for rollouts and evaluations, all weights are whole on every rank: they are gathered once, in --dtype. A layer at
    a time would send them for each token; and ranks whose completions end earlier would leave the others waiting."""
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not network, recurse=False)
            part.reshard()


@contextlib.contextmanager
def whole_on_first(network):
    """Inside, the first rank's network has a state_dict of whole tensors on the CPU, as one process's."""
    if isinstance(network, FSDPModule):
        state = {name: full(tensor).cpu() for name, tensor in network.state_dict().items()}
        network.state_dict = lambda: state
    yield
    vars(network).pop("state_dict", None)
