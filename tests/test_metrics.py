"""Metrics against numbers by hand and closed forms."""

import itertools
import math

import pytest
import torch

from nano_adrpo import metrics


def test_group_diversity_by_hand():
    # first prompt: a 3-4-5 triangle, mean side 4; second: three equal points
    features = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0], [7.0, 7.0], [7.0, 7.0], [7.0, 7.0]])
    assert metrics.group_diversity(features, 3) == pytest.approx((4 + 0) / 2)
    with pytest.raises(ValueError, match="6 samples do not form groups of 4"):
        metrics.group_diversity(features, 4)
    assert math.isnan(metrics.group_diversity(features, 1))  # no pairs
    # Prompts of 2, 1 and 3 samples: one pair of distance 3, none, and three of distances √(3² + 3²) = √18, √18 and 0.
    features[2] = torch.tensor([4.0, 4.0])
    assert metrics.group_diversity(features[[0, 1, 3, 2, 4, 5]], [2, 1, 3]) == pytest.approx((3 + 2 * math.sqrt(18)) / 4)


def test_frechet_distance_between_gaussians():
    # Samples whose mean and unbiased covariance are exact: whiten a draw, then map it. For covariances that commute,
    # the distance is |μa − μb|² + Σ(√λa − √λb)².
    def sample(mean, scales, n=50):
        x = torch.randn(n, 3, generator=torch.Generator().manual_seed(int(sum(scales) * 10)), dtype=torch.float64)
        x = x - x.mean(dim=0)
        x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
        return x * torch.tensor(scales) + torch.tensor(mean)

    a, b = sample([1.0, 0.0, 2.0], [1.0, 2.0, 0.0]), sample([0.0, 0.0, 0.0], [3.0, 0.5, 1.0])
    assert metrics.frechet_distance(a, b) == pytest.approx(1 + 4 + (1 - 3) ** 2 + (2 - 0.5) ** 2 + 1, rel=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    # and a pair that does not commute, Σa = diag(4, 1), Σb = [[2, 1], [1, 2]]: tr (Σa·Σb)^½ from their product's eigenvalues
    p = sample([0.0, 0.0, 0.0], [2.0, 1.0, 1.0])[:, :2]
    q = (
        sample([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])[:, :2]
        @ torch.linalg.cholesky(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)).T
    )
    trace, determinant = 8 + 2, 4 * 3  # of Σa·Σb; (√λ1 + √λ2)² = trace + 2·√determinant
    assert metrics.frechet_distance(p, q) == pytest.approx(5 + 4 - 2 * math.sqrt(trace + 2 * math.sqrt(determinant)), rel=1e-9)

    for a, b in ((p[:1], q), (p, q[:, :1]), (p[0], q[0])):
        with pytest.raises(ValueError, match=r"features have shapes .*; expected \[N, D\] and \[M, D\], N and M > 1"):
            metrics.frechet_distance(a, b)


def test_the_frechet_distance_of_few_embeddings_is_too_high():
    """Two draws of one law in 40 dimensions. Of N ≪ 40 images the covariances hardly overlap, so that the distance is near
    tr Σa + tr Σb = 80 instead of 0; of 4,000 it is near 0."""
    generator = torch.Generator().manual_seed(0)
    excess = {n: metrics.clip_frechet(*torch.randn(2, n, 40, generator=generator), normalize=False) for n in (2, 20, 4000)}
    assert 60 < excess[2] < 150 and 10 < excess[20] < 60 and 0 < excess[4000] < 0.5
    a, b = torch.tensor([[3.0, 4.0], [6.0, 8.0]]), torch.tensor([[4.0, 3.0], [8.0, 6.0]])
    assert metrics.clip_frechet(a, b) == pytest.approx(2 / 25)  # directions (3, 4)/5 and (4, 3)/5, without spread


def test_clip_diversity_of_half_precision_embeddings_is_computed_in_float32():
    # Directions (3, 4)/5 and (4, 3)/5, (−1, 1)/5 apart; the squares are beyond float16.
    embeddings = torch.tensor([[3000.0, 4000.0], [4000.0, 3000.0]], dtype=torch.float16)
    assert metrics.clip_diversity(embeddings, 2) == pytest.approx(math.sqrt(2) / 5, rel=1e-6)


def test_clustered_error_by_hand():
    # Three problems of two samples: means 1, 2, 6, whose deviation is √7, over √3. The samples' own spread does not count.
    values = torch.tensor([0.0, 2.0, 2.0, 2.0, 5.0, 7.0])
    assert metrics.clustered_error(values, [2, 2, 2]) == pytest.approx(math.sqrt(7 / 3))
    # Two problems of one and three tokens: sums 4 and 0, the mean 1; what is left is 4 − 1 and 0 − 3.
    assert metrics.clustered_error(torch.tensor([4.0, 1.0, -1.0, 0.0]), [1, 3]) == pytest.approx(math.sqrt(2 * (9 + 9)) / 4)
    assert math.isnan(metrics.clustered_error(torch.ones(3), [3]))


def test_clustered_error_is_the_spread_of_the_mean_over_draws():
    # 400 draws of 50 problems with 4 samples each, which share a problem's level. The deviation of an estimate from 400 draws
    # is 3.5 % of it, and that of the mean estimate is less: 15 % is four of them.
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, 50, 1, generator=generator) + torch.randn(400, 50, 4, generator=generator)
    errors = [metrics.clustered_error(draw.flatten(), [4] * 50) for draw in values]
    assert sum(errors) / 400 == pytest.approx(values.mean(dim=(1, 2)).std().item(), rel=0.15)


def test_mean_and_standard_error_by_hand():
    mean, error = metrics.mean_and_standard_error([1.0, 2.0, 6.0])
    assert mean == 3 and error == pytest.approx(math.sqrt(7) / math.sqrt(3))  # variance 14/2
    assert math.isnan(metrics.mean_and_standard_error([1.0])[1])


def test_pass_at_k_is_the_enumerated_chance():
    correct = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    for k in range(1, 6):
        chances = [
            sum(any(row[i] for i in chosen) for chosen in itertools.combinations(range(5), k)) / math.comb(5, k)
            for row in correct
        ]
        assert metrics.pass_at_k(correct, k) == pytest.approx(sum(chances) / 3)
    with pytest.raises(ValueError, match="k is 6; expected 1 … 5"):
        metrics.pass_at_k(correct, 6)


def test_entropy_by_hand():
    assert metrics.entropy(torch.tensor([2, 1, 1])) == pytest.approx(1.5 * math.log(2))
    assert metrics.entropy(torch.tensor([5, 0])) == 0 and metrics.entropy(torch.tensor([0, 0])) == 0
