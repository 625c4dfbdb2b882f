"""Gaussian data, whose best possible model is known, and what samplers make of it."""

import numpy as np
import torch

MEAN, STD = 0.7, 0.5  # of the Gaussian data whose best possible model is known


def ideal_model(diffusion, mean=MEAN, std=STD):
    """The noise that is best predicted for data N(mean, std²), as a function of x and the original step."""
    a_bar = torch.from_numpy(np.cumprod(1 - diffusion.original_betas))

    def model(x, t, **kwargs):
        a = a_bar[t].view(-1, *[1] * (x.ndim - 1))
        mu = kwargs["mean"] if "mean" in kwargs else mean
        return ((1 - a).sqrt() * (x - a.sqrt() * mu) / (a * std**2 + 1 - a)).float()

    return model


def final_std(diffusion, loop, **options):
    """The standard deviation of a sampler's output for the ideal model, exactly.

    The sampler is then linear in its starting point and in every noise: each row of the batch moves one of
    them by 1, and the squares of what comes out add up."""
    steps = diffusion.num_timesteps
    start, draws = torch.zeros(steps + 2, 1, 1, 1), []
    start[1] = 1

    def randn_like(x):
        noise = torch.zeros_like(x)
        noise[2 + len(draws)] = 1
        draws.append(x)
        return noise

    out = getattr(diffusion, loop)(
        ideal_model(diffusion), start.shape, start, clip_denoised=False, randn_like=randn_like, **options
    )
    assert len(draws) == steps  # one draw a step, also where it is not used
    return (out[1:] - out[0]).square().sum().sqrt().item()


def slope_and_offset(sample):
    """A deterministic sampler of the ideal model is x -> slope x + offset, known by what 0 and 1 become."""
    out = sample(torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)).flatten()
    return (out[1] - out[0]).item(), out[0].item()


ROWS = 2000  # of each kind


def sample_with_errors(process, ideal, sampler, steps, **options):
    """Mean and deviation of one-pixel samples by a perfect predictor, by one with noise of 1 % added, and by
    one that is 1 % too large and too small in turn, from the same noise: a list of three pairs."""
    generator, calls = torch.Generator().manual_seed(0), 0

    def randn_like(x):
        return torch.randn(ROWS, 1, 1, 1, generator=generator).repeat(3, 1, 1, 1)

    def model(x, t):
        nonlocal calls
        calls += 1
        out = ideal(x, t)
        perfect, noisy, scaled = out.chunk(3)
        error = 0.01 * noisy.square().mean().sqrt() * torch.randn(noisy.shape, generator=generator)
        return torch.cat([perfect, noisy + error, scaled * (1.01 if calls % 2 else 0.99)])

    z = torch.randn(ROWS, 1, 1, 1, generator=generator)
    z = ((z - z.mean()) / z.std()).repeat(3, 1, 1, 1)
    out = process.sample(model, z, sampler=sampler, steps=steps, randn_like=randn_like, **options)
    return [(rows.mean().item(), rows.std().item()) for rows in out.chunk(3)]


def assert_errors_stay_small(process, ideal, far, alike=0.06):
    """By every sampler, with 10, 25 and 50 steps, clipped or not, independent errors of 1 % change the mean
    and the deviation of samples by at most 0.01, 2 % of the data's deviation. Where all rows are off alike,
    the deviation may change by `alike`: a first step to ten times the signal multiplies errors of predicted
    noise by ten. At 50 steps the deviation is the data's within `far`, the error of the slowest sampler."""
    for sampler in process.samplers:
        for steps, clip in ((10, False), (25, False), (25, True), (50, False)):
            perfect, noisy, scaled = sample_with_errors(process, ideal, sampler, steps, clip_denoised=clip)
            where = f"{process.config}, {sampler}, {steps} steps, clip {clip}: {perfect} {noisy} {scaled}"
            assert abs(noisy[0] - perfect[0]) < 0.01 and abs(noisy[1] - perfect[1]) < 0.01, where
            assert abs(scaled[0] - perfect[0]) < 0.01 and abs(scaled[1] - perfect[1]) < alike, where
            if steps == 50:
                assert abs(noisy[0] - MEAN) < 0.03 and abs(noisy[1] - STD) < far, where


SCHEDULE = dict(
    num_train_timesteps=1000,
    beta_start=1e-4,
    beta_end=0.02,
    beta_schedule="linear",
    prediction_type="epsilon",
)
