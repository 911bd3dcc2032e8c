"""The memory budgets of bench/ on paper: the weights are counted, and SD3-medium fits the GPUs that the README says."""

import pytest
import torch

from bench import flux_memory, measure, sd3_memory


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


def test_the_rulers_measure():
    x = torch.ones(64, 32)
    with measure.Operations() as seen:
        y = x.T @ x
        if y.sum() > 0:
            y[y > 1].sum().item()
    assert seen.names == [
        "mm",
        "sum",
        "gt",
        "_local_scalar_dense",
        "gt",
        "index",
        "sum",
        "_local_scalar_dense",
    ]  # x.T is a view
    assert seen.waits == 3  # two numbers, and how many of y exceed 1
    with measure.Operations() as seen:
        torch.ones(4, device="meta")[torch.tensor([0, 1])]
    assert seen.waits == 1  # an index that is on another device
    assert measure.flops(lambda: x.T @ x) == 2 * 64 * 32 * 32

    def held():
        a = torch.ones(1000)
        b = a + 1  # two of 4,000 bytes
        del a
        return b + 1

    assert measure.peak(held) == 8000
    assert measure.exponent([1, 10, 100], [3, 300, 30000]) == pytest.approx(2)
    assert measure.ratio([1.0, 2.0, 1.0], [2.0, 6.0, 4.0])[1] == 3.0


def test_a_ratio_is_refused_where_outputs_differ():
    from bench.__main__ import compare, row  # needs the extra `parity`

    def case(differ):
        return measure.Case("this", "that", lambda: 3, lambda: 3, lambda: differ, 0.1, "of it", 2, 1)

    assert "ratio" in (found := compare(case(0.1), "cpu")) and "**" in row(found)
    assert "ratio" not in (found := compare(case(0.2), "cpu")) and "outputs differ: none" in row(found)
