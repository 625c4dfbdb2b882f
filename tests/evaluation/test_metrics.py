"""metrics.py: ADM's own numbers, closed forms, and brute force."""

import numpy as np
import pytest
import torch
from conftest import rule

from evaluation.metrics import (
    Moments,
    exact_fp32,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_and_covariance,
    precision_recall,
)
from runtime.distributed import Distributed


def moments(rows):
    return np.mean(rows, 0), np.cov(rows, rowvar=False)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def golden_features(tag, n, d, shift, scale, rank):
    z, e = rule(f"{tag}:z", (n, rank)), rule(f"{tag}:e", (n, d))
    w = rule("mix", (rank, d)) / np.sqrt(rank)
    return np.maximum(z @ w * scale + shift + 0.2 * e, 0).astype(np.float32)


@pytest.fixture(params="ab")
def adm(request, golden):
    """What ADM's suite gave for two sets of features, and the sets."""
    tag, file = request.param, golden("adm_metrics.npz")
    expected = {key.split("/")[1]: file[key].item() for key in file if key.startswith(f"{tag}/")}
    d = expected["dim"]
    reference = golden_features(tag + "ref", expected["n_ref"], d, 0.3, 1.0, 32)
    return expected, reference, golden_features(tag + "smp", expected["n_sample"], d, 0.35, 0.9, 24)


# ---------------------------------------------------------------------------------------------
# Fréchet distance


def test_adm_frechet_distance(adm):
    expected, reference, samples = adm
    distance = frechet_distance(*moments(reference), *moments(samples))
    assert distance == pytest.approx(expected["fid"], abs=1e-3)


@pytest.mark.parametrize("n, d", [(500, 20), (10, 60)])
def test_distance_closed_forms(n, d):
    """Of full and of deficient rank."""
    mu, sigma = moments(random(n, d))
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-9)
    shift = random(d, seed=1)
    assert frechet_distance(mu, sigma, mu + shift, sigma) == pytest.approx((shift**2).sum(), abs=1e-9)
    scaled = frechet_distance(mu, sigma, mu, 9 * sigma)  # standard deviations 1 and 3
    assert scaled == pytest.approx(4 * np.trace(sigma), rel=1e-9)


def test_distance_of_commuting_covariances():
    axes = np.linalg.qr(random(30, 30))[0]
    a, b = (random(30, seed=seed) ** 2 for seed in (1, 2))
    mu = np.zeros(30)
    distance = frechet_distance(mu, axes * a @ axes.T, mu, axes * b @ axes.T)
    assert distance == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-9)


def test_distance_against_scipy():
    from scipy.linalg import sqrtm

    (mu1, sigma1), (mu2, sigma2) = (moments(random(400, 50, seed=s) @ random(50, 50, seed=9)) for s in (1, 2))
    root = np.trace(sqrtm(sigma1 @ sigma2)).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)


def test_distance_of_deficient_rank():
    """Of 40 samples in 300 dimensions the trace of the root is the nuclear norm of a 40 x 40 matrix."""
    a, b = random(40, 300, seed=1), random(40, 300, seed=2) + 0.3
    roots = [(rows - rows.mean(0)) / np.sqrt(39) for rows in (a, b)]
    trace = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((root**2).sum() for root in roots) - 2 * trace
    assert frechet_distance(*moments(a), *moments(b)) == pytest.approx(expected, rel=1e-11)


def test_distance_takes_tensors_and_refuses_nonsense():
    a, b = moments(random(50, 4)), moments(random(50, 4, seed=1))
    tensors = [torch.from_numpy(values) for values in (*a, *b)]
    assert frechet_distance(*tensors) == frechet_distance(*a, *b) > 0
    with pytest.raises(ValueError, match=r"mu2 has shape \(3,\), expected \(4,\)"):
        frechet_distance(*a, b[0][:3], b[1])
    with pytest.raises(ValueError, match="sigma1 has values that are not finite"):
        frechet_distance(a[0], a[1] * np.nan, *b)


def test_streamed_moments():
    """Ragged batches, far from the origin, against NumPy on all rows at once."""
    rows = random(1001, 30) @ random(30, 30, seed=1) + 100
    found = Moments(30)
    for batch in np.split(rows, [1, 8, 64, 65, 500]):
        found.add(torch.from_numpy(batch))
    found.merge(Distributed(0, 1, torch.device("cpu")))
    mean, covariance = moments(rows)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------
# Kernel distance


def pair_by_pair(x, y):
    """The unbiased estimate of the squared maximum mean discrepancy by its definition, a pair at a time."""

    def mean(u, v, same):
        pairs = [(i, j) for i in range(len(u)) for j in range(len(v)) if not (same and i == j)]
        kernels = [(sum(a * b for a, b in zip(u[i], v[j])) / len(u[i]) + 1) ** 3 for i, j in pairs]
        return sum(kernels) / len(pairs)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def test_kernel_distance_pair_by_pair():
    """Of all rows, whose order does not count; and over subsets, drawn again here."""
    x, y = random(20, 5), random(20, 5, seed=1) + 0.5
    mean, deviation = kernel_distance(x, y, subsets=3, subset_size=20)
    assert mean == pytest.approx(pair_by_pair(x.tolist(), y.tolist()), rel=1e-10)
    assert deviation == pytest.approx(0, abs=1e-10)

    x, y = random(30, 4), torch.from_numpy(random(25, 4, seed=1)).float()
    mean, deviation = kernel_distance(x, y, subsets=4, subset_size=6, seed=5)
    rng, found = np.random.default_rng(5), []
    for _ in range(4):
        chosen = [rows[rng.choice(len(rows), 6, replace=False)].tolist() for rows in (x, y)]
        found.append(pair_by_pair(*chosen))
    assert (mean, deviation) == pytest.approx((np.mean(found), np.std(found)), rel=1e-9)
    assert kernel_distance(x, y, subsets=4, subset_size=6) != (mean, deviation)  # of another seed


def test_kernel_distance_has_no_bias():
    """Of two samples of one distribution it is 0 on average, however small; the biased one would be above."""
    pairs = [[random(20, 3, seed=seed) for seed in (i, 1000 + i)] for i in range(400)]
    found = [kernel_distance(*pair, subsets=1, subset_size=20)[0] for pair in pairs]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20 and min(found) < 0


def test_kernel_distance_refuses_nonsense():
    rows = random(10, 3)
    with pytest.raises(ValueError, match="has 10 rows; subsets have 2 up to that, not 1000"):
        kernel_distance(rows, rows)
    with pytest.raises(ValueError, match=r"sample_features has shape \(10, 2\)"):
        kernel_distance(rows, rows[:, :2], subset_size=5)
    with pytest.raises(ValueError, match="sample_features has values that are not finite"):
        kernel_distance(rows, rows * np.inf, subset_size=5)


def test_mean_and_covariance():
    rows = random(50, 4)
    for found, expected in zip(mean_and_covariance(torch.from_numpy(rows)), moments(rows)):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------
# Precision and recall


def brute_force(reference, samples, k=3):
    """Both shares by the definition, in float64."""
    from scipy.spatial.distance import cdist

    radii = [np.sort(cdist(rows, rows, "sqeuclidean"), 1)[:, k] for rows in (reference, samples)]
    between = cdist(reference, samples, "sqeuclidean")
    return (between <= radii[0][:, None]).any(0).mean(), (between <= radii[1]).any(1).mean()


def test_adm_precision_and_recall(adm):
    """ADM's suite computes distances in float16, by which it finds up to 0.004 more recall than there is: its
    numbers are met with its rounding, and the definition without."""
    expected, reference, samples = adm
    rounded = precision_recall(reference, samples)
    assert rounded == pytest.approx((expected["precision"], expected["recall"]), abs=2e-3)
    exact = precision_recall(reference, samples, half=False)
    assert exact == brute_force(reference, samples)
    assert exact[0] == pytest.approx(expected["precision"], abs=2e-3)


@pytest.mark.parametrize("block", [1, 7, 4096])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_whole_numbers_against_brute_force(block, k):
    """Whole numbers, whose distances are exact, and have many ties and doubles."""
    rng = np.random.default_rng(k)
    reference, samples = rng.integers(0, 4, (50, 5)), rng.integers(1, 5, (70, 5))
    reference[:6] = reference[6]
    expected = brute_force(reference, samples, k)
    assert precision_recall(reference, samples, k, block=block) == expected
    assert 0.1 < expected[0] < 0.99 and 0.1 < expected[1] < 0.99
    exchanged = precision_recall(torch.from_numpy(samples), torch.from_numpy(reference), k, block=block)
    assert exchanged == expected[::-1]


@pytest.mark.parametrize("half", [False, True])
def test_precision_and_recall_at_the_ends(half):
    rows = random(100, 8).astype(np.float32)
    assert precision_recall(rows, rows, half=half) == (1, 1)
    assert precision_recall(rows, rows + 100, half=half) == (0, 0)
    few = rows[:10] * 0.01  # samples of one mode: precise, without variety
    precision, recall = precision_recall(rows, few, half=half)
    assert precision == 1 and recall < 0.1
    assert precision_recall(rows * 1e4, rows * 1e4, half=half) == (1, 1)  # more than float16 can hold


def test_precision_and_recall_refuse_nonsense():
    rows = random(10, 3)
    with pytest.raises(ValueError, match="sample_features has 3 rows; 3 neighbours of each need at least 4"):
        precision_recall(rows, rows[:3])
    with pytest.raises(ValueError, match=r"sample_features has shape \(10, 2\)"):
        precision_recall(rows, rows[:, :2])
    with pytest.raises(ValueError, match="reference_features has values that are not finite"):
        precision_recall(rows * np.inf, rows)


def test_full_precision_is_for_the_inside_only():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = True
        with exact_fp32():
            assert not any(backend.allow_tf32 for backend in backends)
        assert all(backend.allow_tf32 for backend in backends)
        with torch.autocast("cpu", torch.bfloat16), exact_fp32():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed


# ---------------------------------------------------------------------------------------------
# Inception Score


def one_hot(n, classes, width=20, scale=1.0):
    """Logits of n rows that are surely of each of some classes in turn."""
    logits = np.zeros((n, width), np.float32)
    logits[np.arange(n), np.arange(n) % classes] = scale
    return logits


def test_inception_score_closed_forms():
    assert inception_score(one_hot(4000, 8, scale=1e4)) == pytest.approx(8, rel=1e-9)  # underflows in float32
    assert inception_score(one_hot(4000, 1, scale=1e4)) == pytest.approx(1, rel=1e-9)
    assert inception_score(one_hot(4000, 8)) == pytest.approx(8, rel=1e-9)  # probabilities, by their sums
    uniform = np.full((100, 20), 1 / 20)
    assert inception_score(uniform) == inception_score(torch.zeros(100, 20)) == pytest.approx(1, rel=1e-9)
    p = np.array([[0.9, 0.1], [0.1, 0.9]])  # the marginal is uniform
    expected = 2 * np.exp(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    assert inception_score(p) == pytest.approx(expected, rel=1e-12)
    assert inception_score(np.log(p), are_logits=True) == pytest.approx(expected, rel=1e-12)


def test_inception_score_of_one_hot_logits():
    """A logit s among C: p = e^s / (e^s + C - 1); every class the same number of times."""
    s, c = 3.0, 20
    p, q = np.exp(s) / (np.exp(s) + c - 1), 1 / (np.exp(s) + c - 1)
    expected = c * np.exp(p * np.log(p) + (c - 1) * q * np.log(q))
    assert inception_score(one_hot(c * 50, c, scale=s)) == pytest.approx(expected, rel=1e-9)


def test_inception_score_is_of_chunks_in_order():
    """12,000 rows: 5,000, 5,000 and 2,000, which count alike."""
    logits = np.concatenate([one_hot(n, c, scale=100) for n, c in ((5000, 2), (5000, 4), (2000, 10))])
    assert inception_score(logits) == pytest.approx((2 + 4 + 10) / 3, rel=1e-9)
    assert inception_score(logits[::-1].copy()) != pytest.approx((2 + 4 + 10) / 3, rel=1e-2)


def test_inception_score_refuses_nonsense():
    for values, words in ((np.zeros(5), "rows of classes"), (np.full((2, 2), np.nan), "not finite")):
        with pytest.raises(ValueError, match=words):
            inception_score(values)
