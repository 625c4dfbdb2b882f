"""Closed forms for Gaussians, in nats."""

import math

import torch


def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL divergence of N(mean1, e^logvar1) from N(mean2, e^logvar2), element by element, in nats.

    Arguments broadcast; at least one is a tensor, the others may be numbers.
    """
    example = next((arg for arg in (mean1, logvar1, mean2, logvar2) if isinstance(arg, torch.Tensor)), None)
    if example is None:
        raise TypeError("normal_kl: at least one argument must be a tensor")
    logvar1, logvar2 = (
        torch.as_tensor(v, dtype=example.dtype, device=example.device) for v in (logvar1, logvar2)
    )
    ratio = torch.exp(logvar1 - logvar2)
    return 0.5 * (logvar2 - logvar1 - 1.0 + ratio + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def approx_standard_normal_cdf(x):
    """Cumulative distribution of N(0, 1) by the tanh approximation (Page 1977), within 2e-4."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x, *, means, log_scales):
    """Log-probability, in nats, of 8-bit images x in [-1, 1] under N(means, e^(2 log_scales)).

    Every value stands for a bin of width 2/255; the outermost bins reach to infinity (DDPM, arXiv 2006.11239,
    eq. 13). Same shapes in and out.
    """
    centered, inverse_scale = x - means, torch.exp(-log_scales)
    cdf_above = approx_standard_normal_cdf(inverse_scale * (centered + 1.0 / 255.0))
    cdf_below = approx_standard_normal_cdf(inverse_scale * (centered - 1.0 / 255.0))
    # Probabilities are floored before the logarithm, as the published loss does:
    log_lowest = cdf_above.clamp(min=1e-12).log()
    log_highest = (1.0 - cdf_below).clamp(min=1e-12).log()
    log_between = (cdf_above - cdf_below).clamp(min=1e-12).log()
    return torch.where(x < -0.999, log_lowest, torch.where(x > 0.999, log_highest, log_between))


def mean_flat(x):
    """Mean over every dimension but the first: (N, …) to (N,)."""
    return x.mean(dim=list(range(1, x.ndim)))
