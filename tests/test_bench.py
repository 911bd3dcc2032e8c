"""The memory budgets of bench/ on paper: the weights are counted, and SD3-medium fits the GPUs that the README says."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import flux_memory
import sd3_memory


@pytest.mark.parametrize("resolution, gigabytes", [(512, 24), (1024, 48)])
def test_sd3_medium_with_adapters_fits(resolution, gigabytes):
    parts = sd3_memory.paper(resolution, micro_batch=8, rollout_batch=16)
    assert parts["transformer, bfloat16"] == 2 * (2_028_328_000 + 192 * 192 * 1536)  # parameters and the table of positions
    assert parts["adapters, gradients, Adam's moments, float32"] == 16 * 18_776_064
    assert parts["autoencoder, bfloat16"] == 2 * 83_819_683
    assert sd3_memory.budget(parts) < (gigabytes - 2) * 1e9  # two for the CUDA context and fragmentation


def test_flux_with_adapters_is_counted():
    parts = list(flux_memory.paper(512).values())
    assert parts[1] == 2 * 11_901_408_320 and parts[2] == 16 * (19 * 8 + 38 * 3) * 2 * 32 * 3072


def test_what_is_kept_is_counted_once():
    weight = torch.ones(4, 3, requires_grad=True)
    x = torch.ones(5, 4, requires_grad=True)
    assert sd3_memory.kept(lambda: (x @ weight).relu().sum(), [weight]) == 4 * (5 * 4 + 5 * 3)  # x, and relu's output
