"""Diffusion over a subset of the steps (improved DDPM, arXiv 2102.09672, section 4)."""

import operator

import numpy as np

from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps, section_counts):
    """The set of steps, out of range(num_timesteps), that a spacing keeps.

    section_counts   "ddimN"   N steps a whole-number stride apart, starting at 0 (DDIM's spacing)
                     "a,b,c"   cut the steps into equal sections and keep a, b, c of them, evenly; also [a, b,
                               c]
                     "N", N    N steps, evenly from the first to the last
    Raises ValueError, naming the value, where that cannot be done.
    """
    spec = section_counts
    if isinstance(spec, str) and spec.startswith("ddim"):
        return _stride_steps(num_timesteps, spec)
    if isinstance(spec, str):
        try:
            counts = [int(count) for count in spec.split(",")]
        except ValueError:
            raise ValueError(
                f"{spec!r} is not a number of steps: give a number as 250, numbers as 10,15,20, or ddim50"
            ) from None
    else:
        try:
            counts = [operator.index(count) for count in ([spec] if np.isscalar(spec) else spec)]
        except TypeError:
            raise ValueError(f"{spec!r} is not a whole number of steps") from None
    if any(count < 0 for count in counts) or sum(counts) < 1:
        raise ValueError(f"{spec!r} steps: there must be at least 1")

    steps, start = [], 0
    size, remainder = divmod(num_timesteps, len(counts))
    for section, count in enumerate(counts):
        length = size + (section < remainder)
        if count > length:
            raise ValueError(f"{spec!r}: {count} steps cannot be taken out of {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        # A float grown by repeated addition, then rounded half to even: for some counts (21, 23, 31 …) this
        # differs from rounding a linspace, and the published weights are sampled with it.
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += length
    return set(steps)


def _stride_steps(num_timesteps, spec):
    try:
        wanted = int(spec.removeprefix("ddim"))
    except ValueError:
        raise ValueError(f"{spec!r} is not a number of steps: ddim takes a whole number, as ddim50") from None
    feasible = {len(range(0, num_timesteps, stride)): stride for stride in range(num_timesteps, 0, -1)}
    if wanted not in feasible:  # the dict keeps the smallest stride of each count
        nearest = sorted(sorted(feasible), key=lambda count: abs(count - wanted))[:2]
        raise ValueError(
            f"{spec!r}: no whole-number stride gives {wanted} of {num_timesteps} steps;"
            f" the nearest that exist are {' and '.join(f'ddim{count}' for count in sorted(nearest))}"
        )
    return set(range(0, num_timesteps, feasible[wanted]))


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion over the steps `use_timesteps` of the one with these betas.

    The kept steps have the same marginals q(x_t | x_start); every table follows from their new betas, and the
    model is given the original step numbers, `timestep_map`. Other arguments as GaussianDiffusion.
    """

    def __init__(self, use_timesteps, *, betas, **kwargs):
        betas = np.asarray(betas, dtype=np.float64)
        kept = sorted(use_timesteps)
        if not kept or kept[0] < 0 or kept[-1] >= len(betas):
            raise ValueError(f"use_timesteps: must be steps between 0 and {len(betas) - 1}")
        alphas_cumprod = np.cumprod(1.0 - betas)[kept]
        new_betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        super().__init__(betas=new_betas, timestep_map=kept, **kwargs)
        self.use_timesteps, self.original_num_steps, self.original_betas = set(kept), len(betas), betas
