"""What the tables report. Pure functions of tensors, each a mean over samples or groups, in float32 or better."""

import math

import torch
import torch.nn.functional as F

from nano_adrpo.adrpo import kl_divergence


def group_diversity(features, group_size):
    """Mean Euclidean distance between two samples of one prompt, over all such pairs; not a number where there is no pair.

    features     [N, D], samples of one prompt contiguous. Of pixels divided by √D it is the root mean square difference of two
                 images of one prompt.
    group_size   the samples of each prompt: a number, or a list of one for each prompt
    """
    if isinstance(group_size, int) and (group_size < 1 or len(features) % group_size):
        raise ValueError(f"{len(features)} samples do not form groups of {group_size}")
    sums, pairs = [], []
    for group in features.split(group_size):  # one at a time, since pixels of large images are many
        group = group.double()
        sums.append(torch.stack([(sample - group).norm(dim=-1) for sample in group]).sum())
        pairs.append(len(group) * (len(group) - 1))
    return torch.stack(sums).mean().item() / (sum(pairs) / len(pairs)) if sum(pairs) else math.nan


def clip_diversity(embeddings, group_size, normalize=True):
    """ClipDiversity, which the paper does not define: group_diversity of CLIP's image embeddings [N, P], as projected.

    normalize   True: of embeddings of length 1, at most 2. False: of the embeddings as they are. The paper reports about 5,
                which is the latter's scale if CLIP L/14's image embeddings are about 10 long and two images of one prompt have
                a cosine of about 0.87 (10·√(2 − 2·0.87) = 5.1): an argument, not a measurement
    """
    return group_diversity(F.normalize(embeddings.float()) if normalize else embeddings, group_size)


def clip_frechet(embeddings, real, normalize=True):
    """frechet_distance of CLIP's image embeddings [N, P] to those of real images [M, P], normalised as in `clip_diversity`.

    It needs many images. The covariance of N images has a rank of at most N − 1, so with N ≤ P it is singular. The number is
    then still defined, and too high: two samples of one law, far fewer than P, are almost as far apart as the sum of their
    variances tr Σ, not 0. The excess falls as N and M grow. So compare models with equally many images, and the same real ones.
    """
    pair = (F.normalize(x.float()) if normalize else x for x in (embeddings, real))
    return frechet_distance(*pair)


def kl_from_reference(logp, ref_logp):
    """KL(π ‖ π_ref) in nats per token, estimated from tokens that π sampled: {"kl_k1": mean, "kl_k3": mean} (see
    adrpo.kl_divergence). k1 varies more, k3 is never negative. logp, ref_logp: of the same tokens, any one shape."""
    return {f"kl_{kind}": kl_divergence(logp, ref_logp, kind).mean().item() for kind in ("k1", "k3")}


def clipped_tokens(logp, old_logp, mask, clip_eps):
    """How many tokens' ratio π_θ / π_θold is beyond 1 ± ε, a 0-dimensional tensor. logp, old_logp, mask [N, T]."""
    outside = ((logp.detach() - old_logp).exp() - 1).abs() > clip_eps
    return (outside & mask.bool()).sum()


def frechet_distance(a, b):
    """|μa − μb|² + tr(Σa + Σb − 2·(Σa·Σb)^½), the squared Fréchet distance of the Gaussians fitted to features a [N, D] and
    b [M, D] (Heusel et al. 2017, arXiv 1706.08500, Eq. 6), with unbiased covariances, in float64. N and M are at least 2."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features have shapes {list(a.shape)} and {list(b.shape)}; expected [N, D] and [M, D], N and M > 1")
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


def clustered_error(values, counts):
    """The standard error of the mean of numbers that come in clusters, such as the samples of one problem: these are not
    independent of each other, problems are, so the error comes from the spread between problems (the ratio estimator, Cochran
    1977, chapter 6). For clusters of one size it is the deviation of their means / √P.

    values   [N], those of one cluster contiguous
    counts   how many each of the P clusters has, a list. The error of one cluster is not a number
    """
    sums, sizes = torch.stack([some.double().sum() for some in values.cpu().split(counts)]), torch.tensor(counts).double()
    rest = sums - sizes * sums.sum() / sizes.sum()
    return rest.std().item() * len(counts) ** 0.5 / sizes.sum().item() if len(counts) > 1 else math.nan


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
