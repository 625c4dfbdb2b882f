"""The arithmetic of evaluation: ADM's Fréchet distance, Inception Score, precision and recall, and the kernel
distance, of features.

Nothing here knows about images or networks. Arrays and tensors are taken alike; matrices with a row a sample.
"""

import contextlib

import numpy as np
import torch
from tqdm.auto import tqdm

SCORE_CHUNK = 5000  # samples of which ADM takes one Inception Score; the scores' mean is reported
NEIGHBOUR = 3  # k of precision and recall
SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance


@contextlib.contextmanager
def exact_fp32():
    """Float32 products and convolutions with all 24 bits inside, whatever --precision says outside."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed


class Moments:
    """Mean and covariance of rows that come in batches: n, Σx and Σxxᵀ in float64."""

    def __init__(self, dim, device="cpu"):
        self.n = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.products = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, rows):
        """Count rows (N, dim)."""
        rows = rows.to(self.sum)
        self.n += len(rows)
        self.sum += rows.sum(0)
        self.products.addmm_(rows.T, rows)

    def merge(self, dist):
        """Make these the moments of the rows of all processes; every process calls it."""
        for values in (self.n, self.sum, self.products):
            dist.sum_(values)

    @property
    def mean(self):
        """(dim,), float64, on the CPU."""
        return (self.sum / self.n).cpu()

    @property
    def covariance(self):
        """(dim, dim), float64, unbiased (divided by n - 1), on the CPU."""
        mean = self.sum / self.n
        return ((self.products - self.n * torch.outer(mean, mean)) / (self.n - 1)).cpu()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|μ₁ - μ₂|² + tr Σ₁ + tr Σ₂ - 2 tr √(Σ₁Σ₂) of two normal distributions, a float (Heusel et al.,
    1706.08500).

    mu: (D,); sigma: (D, D), symmetric and positive semi-definite. Raises ValueError for other shapes and for
    values that are not finite.

    With Σᵢ = VᵢWᵢVᵢᵀ the trace of the root is the sum of the singular values of √W₁V₁ᵀV₂√W₂, which stays
    exact where the covariances are singular, as they are of fewer samples than dimensions.
    """
    mu1, sigma1, mu2, sigma2 = (_float64(values) for values in (mu1, sigma1, mu2, sigma2))
    d = mu1.numel()
    for name, values, shape in (
        ("mu1", mu1, (d,)), ("sigma1", sigma1, (d, d)), ("mu2", mu2, (d,)), ("sigma2", sigma2, (d, d)),
    ):  # fmt: skip
        if tuple(values.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(values.shape)}, expected {shape}")
        if not torch.isfinite(values).all():
            raise ValueError(f"{name} has values that are not finite")
    roots = []
    for sigma in (sigma1, sigma2):
        values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
        roots.append(vectors * values.clamp(min=0).sqrt())
    trace_of_root = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_of_root
    return max(0.0, distance.item())  # rounding may leave it below


def mean_and_covariance(rows):
    """What frechet_distance takes, (D,) and (D, D) in float64, of features (N, D), an array or tensor."""
    rows = _float64(rows)
    moments = Moments(rows.shape[1])
    moments.add(rows)
    return moments.mean, moments.covariance


def kernel_distance(
    reference_features, sample_features, subsets=SUBSETS, subset_size=SUBSET_SIZE, *, seed=0, device=None
):
    """The unbiased squared maximum mean discrepancy by the kernel (x·y/D + 1)³, KID where the features are
    Inception's (Bińkowski et al., 1801.01401, eq. 4): its mean over subsets, and their standard deviation.

    reference_features, sample_features   (N, D) and (M, D), arrays or tensors
    subsets       how many pairs of subsets are drawn, without replacement inside each, from both sides
    subset_size   rows of a subset; at most N and M
    seed          of the draws
    device        where to compute, in float64; None for the CPU
    Its expectation does not depend on the number of samples, so it may be below 0. The standard deviation,
    with the divisor `subsets`, over its root is the standard error of the mean by the choice of subsets; it
    does not see what they have in common, since all are of the same samples.
    Raises ValueError for shapes that do not go together, values that are not finite, and too few rows.
    """
    sides = [_float64(side).to(device or "cpu") for side in (reference_features, sample_features)]
    for name, rows in zip(("reference_features", "sample_features"), sides):
        if rows.ndim != 2 or rows.shape[1] != sides[0].shape[1]:
            raise ValueError(f"{name} has shape {tuple(rows.shape)}; both need rows of the same length")
        if not 2 <= subset_size <= len(rows):
            raise ValueError(f"{name} has {len(rows)} rows; subsets have 2 up to that, not {subset_size}")
        if not torch.isfinite(rows).all():
            raise ValueError(f"{name} has values that are not finite")
    rng, found = np.random.default_rng(seed), []
    for _ in range(subsets):
        x, y = (rows[rng.choice(len(rows), subset_size, replace=False)] for rows in sides)
        within = [(kernel.sum() - kernel.trace()) / (subset_size * (subset_size - 1))
                  for kernel in (_cubic_kernel(x, x), _cubic_kernel(y, y))]  # fmt: skip
        found.append((sum(within) - 2 * _cubic_kernel(x, y).mean()).item())
    return float(np.mean(found)), float(np.std(found))


def _cubic_kernel(u, v):
    return (u @ v.T).div_(u.shape[1]).add_(1).pow_(3)


def inception_score(values, *, are_logits=None, chunk=SCORE_CHUNK):
    """exp of the mean Kullback-Leibler divergence of p(y|x) from p(y), a float (Salimans et al., 1606.03498).

    values       (N, classes): probabilities or logits
    are_logits   None to tell by the rows, which are probabilities where none is negative and each sums to 1
    chunk        the score is taken of consecutive chunks of this size, and averaged; a last, shorter one
                 counts as much as the others, as in ADM's suite
    Raises ValueError for values that are no matrix, empty or not finite.
    """
    values = torch.as_tensor(values)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"an Inception Score needs rows of classes, not the shape {tuple(values.shape)}")
    scores = []
    for rows in values.split(chunk):
        rows = rows.to(torch.float64)
        if not torch.isfinite(rows).all():
            raise ValueError("the Inception Score of values that are not finite is not defined")
        if are_logits is None:
            are_logits = bool((rows < 0).any() or ((rows.sum(1) - 1).abs() > 1e-3).any())
        # From logits in float64, where no probability underflows to 0 · -∞:
        p = rows.softmax(1) if are_logits else rows
        entropy = -(p * rows.log_softmax(1) if are_logits else torch.xlogy(p, p)).sum(1).mean()
        marginal = p.mean(0)
        scores.append((-torch.xlogy(marginal, marginal).sum() - entropy).exp().item())
    return float(np.mean(scores))


def precision_recall(
    reference_features,
    sample_features,
    k=NEIGHBOUR,
    *,
    half=True,
    device=None,
    block=4096,
    progress=False,
):
    """Improved precision and recall, two floats in [0, 1] (Kynkäänniemi et al., 1904.06991).

    A feature's ball reaches to its k-th nearest neighbour on its own side. Precision is the share of samples
    in any ball of the reference, recall the share of the reference in any ball of the samples.

    reference_features, sample_features   (N, D) and (M, D)
    half       round as ADM's suite does, which computes distances in float16 and so counts ties that are
               none: what published numbers have; False for the definition, in float32
    device     where to compute; None for the CPU
    block      rows of a square block of distances, all that is held of them at a time
    progress   show a bar
    Raises ValueError for shapes that do not go together, values that are not finite, and fewer than k + 1
    rows.
    """
    sides = [
        torch.as_tensor(side).to(device or "cpu", torch.float32)
        for side in (reference_features, sample_features)
    ]
    for name, rows in zip(("reference_features", "sample_features"), sides):
        if rows.ndim != 2 or rows.shape[1] != sides[0].shape[1]:
            raise ValueError(f"{name} has shape {tuple(rows.shape)}; both need rows of the same length")
        if len(rows) <= k:
            raise ValueError(f"{name} has {len(rows)} rows; {k} neighbours of each need at least {k + 1}")
        if not torch.isfinite(rows).all():
            raise ValueError(f"{name} has values that are not finite")
    parts = [-(-len(rows) // block) for rows in sides]
    total = parts[0] ** 2 + parts[1] ** 2 + parts[0] * parts[1]
    bar = tqdm(total=total, desc="Precision and recall", unit="block", disable=not progress)
    with exact_fp32(), bar:
        reference, samples = sides
        measure = _rounded_squared_distances if half else _squared_distances
        radii = [_squared_radii(rows, k, measure, block, bar) for rows in sides]
        precise, recalled = (torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
                             for rows in (samples, reference))  # fmt: skip
        for i in _slices(reference, block):
            for j in _slices(samples, block):
                distances = measure(reference[i], samples[j])
                precise[j] |= (distances <= radii[0][i, None]).any(0)
                recalled[i] |= (distances <= radii[1][j]).any(1)
                bar.update()
    return precise.double().mean().item(), recalled.double().mean().item()


def _squared_radii(rows, k, measure, block, bar):
    """The squared distance of each row to its k-th nearest neighbour, (N,): the row itself is number 0."""
    radii = torch.empty(len(rows), device=rows.device)
    for i in _slices(rows, block):
        nearest = torch.empty(len(rows[i]), 0, device=rows.device)  # at most k + 1 so far
        for j in _slices(rows, block):
            nearest = torch.cat([nearest, _smallest(measure(rows[i], rows[j]), k + 1)], 1)
            nearest = _smallest(nearest, k + 1)
            bar.update()
        radii[i] = nearest.max(1).values
    return radii


def _slices(rows, block):
    return [slice(start, start + block) for start in range(0, len(rows), block)]


def _squared_distances(u, v):
    """|u|² - 2uv + |v|², (N, M), not below 0, of rows (N, D) and (M, D)."""
    norms = u.square().sum(1, keepdim=True), v.square().sum(1)
    return (u @ v.T).mul_(-2).add_(norms[0]).add_(norms[1]).clamp_(min=0)


def _rounded_squared_distances(u, v):
    """The same with operands and every step rounded to float16, unless that overflows, as in ADM's suite."""
    u16, v16 = u.half().float(), v.half().float()
    norms = u16.square().sum(1, keepdim=True).half(), v16.square().sum(1).half()
    distances = (norms[0] - 2 * (u16 @ v16.T).half() + norms[1]).clamp_(min=0).float()
    return distances if torch.isfinite(distances).all() else _squared_distances(u, v)


def _smallest(values, count):
    """The smallest count values of each row, or all."""
    return values.topk(min(count, values.shape[1]), dim=1, largest=False, sorted=False).values


def _float64(values):
    return torch.as_tensor(values).detach().to("cpu", torch.float64)
