"""Diffusion over a subset of the steps (improved DDPM, arXiv 2102.09672, section 4)."""

import numpy as np

from .gaussian_diffusion import GaussianDiffusion
from .schedules import respaced_betas, space_timesteps

__all__ = ["SpacedDiffusion", "space_timesteps"]


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
        super().__init__(betas=respaced_betas(betas, kept), timestep_map=kept, original_betas=betas, **kwargs)
        self.use_timesteps = set(kept)
