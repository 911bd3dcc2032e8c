"""What the tables report. Pure functions of tensors, each a mean over samples or groups, in float32 or better."""

import math

import torch

from nano_adrpo.adrpo import squared_error


def group_diversity(features, group_size):
    """Mean Euclidean distance between two samples of one prompt, averaged over pairs, then over prompts.

    features   [N, D], samples of one prompt contiguous. Of CLIP image embeddings this is the paper's ClipDiversity; of
               pixels divided by √D it is the root mean square difference of two images of one prompt.
    """
    if group_size < 2 or len(features) % group_size:
        raise ValueError(f"{len(features)} samples do not form groups of {group_size}; expected groups of at least 2")
    groups = features.double().reshape(-1, group_size, features.shape[-1])  # [P, G, D]
    difference = groups[:, :, None] - groups[:, None]  # [P, G, G, D]
    return difference.norm(dim=-1).sum(dim=(1, 2)).mean().item() / (group_size * (group_size - 1))


def w2_divergence(v, v_ref):
    """E|v − v_ref|², squared velocity per element: the tractable upper bound on the squared Wasserstein-2 distance between
    policy and reference (ORW-CFM-W2, arXiv 2502.06061), up to its Lipschitz factor. v, v_ref [N, ...]."""
    return squared_error(v, v_ref).mean().item()


def frechet_distance(a, b):
    """|μa − μb|² + tr(Σa + Σb − 2·(Σa·Σb)^½), the squared Fréchet distance of the Gaussians fitted to features a [N, D] and
    b [M, D] (Heusel et al. 2017, arXiv 1706.08500, Eq. 6), with unbiased covariances, in float64."""
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    # tr (Σa·Σb)^½ = tr (Σa^½·Σb·Σa^½)^½, whose matrix is symmetric and positive semi-definite.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def mean_and_standard_error(values):
    """Of independent runs: the mean and the unbiased standard deviation / √n. The error of one run is not a number."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")


def pass_at_k(correct, k):
    """The chance that at least one of k attempts at a problem is right, estimated without bias from n ≥ k attempts of which c
    are: 1 − C(n − c, k) / C(n, k), the mean over problems (Chen et al. 2021, arXiv 2107.03374, Eq. 1).

    correct   [P, n], 1 where an attempt is right
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; expected 1 … {n}, the attempts per problem")
    right = (correct > 0).sum(dim=1).tolist()
    return sum(1 - math.comb(n - c, k) / math.comb(n, k) for c in right) / len(right)


def entropy(counts):
    """Entropy in nats of the distribution that counts [K] are proportional to; 0 where all are 0."""
    shares = counts.double() / counts.sum().clamp(min=1)
    return torch.special.entr(shares).sum().item()
