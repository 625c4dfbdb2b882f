"""Noise schedules by name: betas, the share of noise that each step adds."""

import math

import numpy as np


def get_beta_schedule(beta_schedule, *, beta_start, beta_end, num_diffusion_timesteps):
    """Betas, float64 (num_diffusion_timesteps,), of DDPM's schedules between two values."""
    steps = num_diffusion_timesteps

    def warmup(share):
        betas, rising = np.full(steps, beta_end, dtype=np.float64), int(steps * share)
        betas[:rising] = np.linspace(beta_start, beta_end, rising, dtype=np.float64)
        return betas

    schedules = {
        "linear": lambda: np.linspace(beta_start, beta_end, steps, dtype=np.float64),
        "quad": lambda: np.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=np.float64) ** 2,
        "const": lambda: np.full(steps, beta_end, dtype=np.float64),
        "warmup10": lambda: warmup(0.1),
        "warmup50": lambda: warmup(0.5),
        "jsd": lambda: 1.0 / np.linspace(steps, 1, steps, dtype=np.float64),
    }
    if beta_schedule not in schedules:
        raise ValueError(f"noise schedule {beta_schedule!r}: choose one of {', '.join(schedules)}")
    return schedules[beta_schedule]()


def get_named_beta_schedule(schedule_name, num_diffusion_timesteps):
    """Betas of a schedule by name, which keeps its shape whatever the number of steps.

    "linear" (DDPM's, scaled from 1000 steps), "squaredcos_cap_v2" or "cosine" (improved DDPM, eq. 17), or one
    of get_beta_schedule's, between the same ends as linear."""
    if schedule_name in ("squaredcos_cap_v2", "cosine"):
        return betas_for_alpha_bar(
            num_diffusion_timesteps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        )
    scale = 1000 / num_diffusion_timesteps
    return get_beta_schedule(
        schedule_name,
        beta_start=scale * 0.0001,
        beta_end=scale * 0.02,
        num_diffusion_timesteps=num_diffusion_timesteps,
    )


def betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta=0.999):
    """Betas that give a_bar(u), a function of u in [0, 1], none above max_beta."""
    steps = num_diffusion_timesteps
    ratios = [alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
    return np.array([min(1 - ratio, max_beta) for ratio in ratios], dtype=np.float64)
