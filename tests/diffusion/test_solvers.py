"""Few-step solvers and guidance over time: closed forms, orders of convergence, diffusers as a peer, rows
counted."""

import math

import numpy as np
import pytest
import torch
from closed_forms import (
    MEAN,
    SCHEDULE,
    STD,
    assert_errors_stay_small,
    final_std,
    ideal_model,
    slope_and_offset,
)
from conftest import rule_input

from diffusion import Guidance, create_diffusion
from diffusion.solvers import SOLVERS, Point

SAMPLERS = create_diffusion(None).samplers
SOLVED = [name for name in SAMPLERS if name not in ("ddpm", "ddim")]
ODES = [name for name, solver in SOLVERS.items() if not solver.stochastic]


def exact_prediction(x, point):
    """What is best predicted at a point for data N(MEAN, STD²)."""
    variance = point.alpha**2 * STD**2 + point.sigma**2
    deviation = (x - point.alpha * MEAN) / variance
    return MEAN + point.alpha * STD**2 * deviation, point.sigma * deviation


def linear_path(steps):
    """A flow along straight lines, from noise at 1 to data at 0."""
    times = np.linspace(1, 0, steps + 1).tolist()
    return [Point(t, 1 - t, t, scale=1.0, clock=t, slope=(-1.0, 1.0)) for t in times]


def solve(solver, x, points):
    *_, (x, _) = SOLVERS[solver](exact_prediction, x, points)
    return x


# ---------------------------------------------------------------------------------------------
# Closed forms


@pytest.mark.parametrize("steps, expected", [(10, 0.40347), (20, 0.47693), (50, 0.49978)])
def test_dpm_solver_on_gaussian_data(steps, expected):
    diffusion = create_diffusion(None, learn_sigma=False)
    slope, _ = slope_and_offset(
        lambda x: diffusion.sample(ideal_model(diffusion), x, sampler="dpm++", steps=steps)
    )
    assert slope == pytest.approx(expected, abs=2e-5)


def test_few_steps_are_better_than_ddim_s():
    """At equal cost, the second-order solvers come closer to the data's own deviation."""
    diffusion = create_diffusion(None, learn_sigma=False)
    error = {}
    for name, steps in (("ddim", 20), ("dpm++", 20), ("heun", 10)):
        slope, offset = slope_and_offset(
            lambda x, name=name, steps=steps: diffusion.sample(
                ideal_model(diffusion), x, sampler=name, steps=steps
            )
        )
        error[name] = abs(slope - STD) + abs(offset - MEAN)
    assert error["dpm++"] < 0.5 * error["ddim"] and error["heun"] < error["ddim"]


@pytest.mark.parametrize(
    "solver, order, expected",
    [
        ("euler", 1, {10: 0.430783, 20: 0.464248, 40: 0.481811, 80: 0.490824}),
        ("heun", 2, {10: 0.50172, 20: 0.500508}),
    ],
)
def test_order_of_convergence_on_a_linear_path(solver, order, expected):
    error = {}
    for steps in (10, 20, 40, 80, 160):
        slope, _ = slope_and_offset(lambda x, steps=steps: solve(solver, x, linear_path(steps)))
        if steps in expected:
            assert slope == pytest.approx(expected[steps], abs=1e-5)
        error[steps] = abs(slope - STD)
    assert math.log2(error[80] / error[160]) == pytest.approx(order, abs=0.1)


def test_dpm_solver_is_of_second_order():
    error = {}
    for steps in (80, 160, 320):
        slope, _ = slope_and_offset(lambda x, steps=steps: solve("dpm++", x, linear_path(steps)))
        error[steps] = abs(slope - STD)
    assert math.log2(error[160] / error[320]) > 1.7 and error[320] < 1e-4


def test_euler_is_ddim():
    """On straight lines, and on the steps of a diffusion."""
    diffusion, x = create_diffusion(None, learn_sigma=False), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    for points in (linear_path(7), diffusion.points(7)):
        torch.testing.assert_close(
            solve("euler", x, points), solve("ddim", x, points), atol=1e-12, rtol=1e-12
        )


def test_a_first_order_dpm_step_is_ddim_s():
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    for points in (linear_path(9), create_diffusion(None).points(9)):
        for here, there in zip(points, points[1:]):
            pair = [here, there]
            torch.testing.assert_close(
                solve("dpm++", x, pair), solve("ddim", x, pair), atol=1e-12, rtol=1e-12
            )


@pytest.mark.parametrize("solver", ODES)
def test_the_mean_is_found(solver):
    """Shifting all data shifts all samples: the middle of the noise goes to about the middle of the data."""
    _, offset = slope_and_offset(lambda x: solve(solver, x, linear_path(100)))
    assert offset == pytest.approx(MEAN, abs=0.01)


# ---------------------------------------------------------------------------------------------
# Predictions that are off by one per cent, as all trained ones are


@pytest.mark.parametrize("predict_xstart", [False, True])
@pytest.mark.parametrize(
    # The others stay in pure noise for a part of their steps, so that few are left:
    "schedule, far",
    [("linear", 0.08), ("squaredcos_cap_v2", 0.05), ("quad", 0.05), ("jsd", 0.06)]
    + [("warmup50", 0.08), ("warmup10", 0.15), ("const", 0.25)],
)
def test_errors_of_a_diffusion_stay_small(schedule, far, predict_xstart):
    diffusion = create_diffusion(
        None, schedule, learn_sigma=False, sigma_small=True, predict_xstart=predict_xstart
    )
    a_bar = torch.from_numpy(np.cumprod(1 - diffusion.original_betas))

    def ideal(x, t):
        a = a_bar[t].view(-1, 1, 1, 1)
        deviation = (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)
        out = MEAN + a.sqrt() * STD**2 * deviation if predict_xstart else (1 - a).sqrt() * deviation
        return out.float()

    assert_errors_stay_small(diffusion, ideal, far)


def test_heun_on_the_cosine_schedule():
    """Of second order there too, though its first step multiplies the signal by ten or more."""
    diffusion = create_diffusion(None, "squaredcos_cap_v2", learn_sigma=False)
    for steps, error in ((10, 0.02), (20, 0.006), (40, 0.002)):
        slope, _ = slope_and_offset(
            lambda x, steps=steps: diffusion.sample(ideal_model(diffusion), x, sampler="heun", steps=steps)
        )
        assert abs(slope - STD) < error


# ---------------------------------------------------------------------------------------------
# diffusers' schedulers as peers


def peer_schedulers():
    from diffusers import (
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
    )

    dpm = DPMSolverMultistepScheduler(
        solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=True,
        final_sigmas_type="zero", timestep_spacing="linspace", **SCHEDULE,
    )  # fmt: skip
    euler = EulerDiscreteScheduler(timestep_spacing="linspace", **SCHEDULE)
    return {"dpm++": dpm, "euler": euler, "heun": HeunDiscreteScheduler(**SCHEDULE)}


@pytest.mark.parametrize("name, steps", [("dpm++", 10), ("dpm++", 25), ("euler", 10), ("heun", 10)])
def test_solvers_match_diffusers(tiny, name, steps):
    scheduler, diffusion = peer_schedulers()[name], create_diffusion(None)
    y, z = torch.tensor([0, 3, 9, 5]), rule_input("z", 4, 4, 8, 8)
    ours = diffusion.sample(tiny, z, sampler=name, steps=steps, model_kwargs=dict(y=y))
    times = [point.time for point in diffusion.points(steps)[:-1]]
    if name == "dpm++":
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == times
    else:
        scheduler.set_timesteps(timesteps=times)
    x = z
    if name != "dpm++":  # their state is x / alpha
        x = z / math.sqrt(np.cumprod(1 - diffusion.original_betas)[times[0]])
    with torch.no_grad():
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(x, t)
            x = scheduler.step(tiny(inputs, t.repeat(4), y)[:, :4], t, x).prev_sample
    scale = x.abs().max()
    torch.testing.assert_close(ours / scale, x / scale, atol=2e-4, rtol=0)  # diffusers' tables are float32


# ---------------------------------------------------------------------------------------------
# The interface


@pytest.mark.parametrize("sampler", SOLVED)
@pytest.mark.parametrize("options", [{}, dict(predict_xstart=True), dict(learn_sigma=False)])
def test_every_solver_serves_every_prediction(sampler, options):
    """Noise or x_start predicted, with a variance beside it or not, clipped or not."""
    diffusion = create_diffusion(None, **options)
    ideal, calls, seen = ideal_model(diffusion), [], []

    def model(x, t):
        calls.append(t[0].item())
        a = float(np.cumprod(1 - diffusion.original_betas)[calls[-1]])
        noise = ideal(x, t)
        out = (x - math.sqrt(1 - a) * noise) / math.sqrt(a) if options.get("predict_xstart") else noise
        return torch.cat([out, out], dim=1) if diffusion.learns_variance else out

    z = torch.randn(6, 1, 4, 4)
    out = diffusion.sample(model, z, sampler=sampler, steps=12, callback=seen.append)
    fine = diffusion.sample(model, z, sampler=sampler, steps=100)
    expected = diffusion.sample(model, z, sampler="ddim", steps=1000)
    torch.testing.assert_close(fine, expected, atol=0.06, rtol=0)
    assert [step["i"] for step in seen] == list(range(1, 13)) and torch.equal(seen[-1]["x"], out)
    assert [step["t"] for step in seen] == sorted({step["t"] for step in seen}, reverse=True)
    clipped = diffusion.sample(model, z, sampler=sampler, steps=12, clip_denoised=True)
    assert clipped.abs().max() <= 1 + 1e-5 < out.abs().max()


def test_one_step_of_every_sampler():
    for sampler in SAMPLERS:
        diffusion = create_diffusion(None, learn_sigma=False)
        out = diffusion.sample(ideal_model(diffusion), torch.randn(2, 1, 4, 4), sampler=sampler, steps=1)
        assert torch.isfinite(out).all()


def test_deterministic_samplers_draw_nothing():
    diffusion = create_diffusion(None, learn_sigma=False)
    for sampler in SAMPLERS:
        draws = []

        def randn_like(x, draws=draws):
            draws.append(x)
            return torch.randn_like(x)

        diffusion.sample(
            ideal_model(diffusion), torch.zeros(2, 1, 4, 4), sampler=sampler, steps=5, randn_like=randn_like
        )
        assert len(draws) == (5 if sampler == "ddpm" else 0)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "euler", "heun"])
def test_as_many_steps_as_there_are(sampler):
    process = create_diffusion(
        None, learn_sigma=False, noise_schedule="squaredcos_cap_v2", diffusion_steps=20
    )
    x = process.sample(lambda x, t: 0 * x, torch.ones(1, 1, 2, 2), sampler=sampler)
    assert torch.isfinite(x).all()
    # The last step, to whose betas' cap of 0.999 the signal falls 30 times, is not sampled:
    assert process.count_steps(sampler) == (19 if sampler in ("ddpm", "ddim") else 18)


@pytest.mark.parametrize("steps", ["ddim50", "10,20", 0, -3, 1000, "x", 2.9, [10]])
def test_impossible_steps_of_solvers(steps):
    with pytest.raises(ValueError, match="steps"):
        create_diffusion(None).sample(lambda x, t: x, torch.zeros(1, 1, 2, 2), sampler="dpm++", steps=steps)


def test_inversion_and_back():
    diffusion = create_diffusion(None, learn_sigma=False)
    x_start = MEAN + STD * torch.randn(4, 1, 8, 8)
    noise = diffusion.invert(ideal_model(diffusion), x_start, steps=250)
    assert noise.std().item() == pytest.approx(1, abs=0.2) and abs(noise.mean().item()) < 0.3
    back = diffusion.sample(ideal_model(diffusion), noise, sampler="ddim", steps=250)
    assert (back - x_start).abs().max() < 0.05


# ---------------------------------------------------------------------------------------------
# Guidance over time


def count_rows(sampler, steps, guidance):
    """Rows that the model sees while two images are sampled, and at which times it sees twice as many."""
    diffusion, rows, guided = create_diffusion(None, learn_sigma=False), 0, []

    def model(x, t, y):
        nonlocal rows
        rows += len(x)
        if len(x) == 4:
            assert y.tolist() == [1, 2, 10, 10]
            guided.append(t[0].item())
        else:
            assert y.tolist() == [1, 2]
        return torch.zeros_like(x)

    diffusion.sample(
        model, torch.randn(2, 1, 2, 2), sampler=sampler, steps=steps, guidance=guidance,
        model_kwargs=dict(y=torch.tensor([1, 2])),
    )  # fmt: skip
    return rows, guided


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "euler"])
def test_interval_saves_rows(sampler):
    whole, _ = count_rows(sampler, 50, Guidance(2.0, 10))
    none, guided = count_rows(sampler, 50, Guidance(2.0, 10, interval=(500, 600)))
    assert (whole, none, guided) == (200, 100, [])
    rows, guided = count_rows(sampler, 50, Guidance(2.0, 10, interval=(0.38, 3.22)))
    assert rows == 100 + 2 * len(guided) and rows / whole == pytest.approx(0.69, abs=0.02)
    assert all(111 <= t < 489 for t in guided)


def test_heun_counts_its_two_evaluations():
    rows, _ = count_rows("heun", 10, Guidance(2.0, 10))
    assert rows == 4 * 19  # the last step is Euler's


def test_interval_over_all_and_nothing(tiny):
    diffusion, z, y = create_diffusion(None), rule_input("z", 4, 4, 8, 8), torch.tensor([0, 3, 9, 5])

    def sample(guidance):
        return diffusion.sample(tiny, z, sampler="dpm++", steps=8, model_kwargs=dict(y=y), guidance=guidance)

    plain = sample(Guidance(3.0, 10, channels=3))
    assert torch.equal(sample(Guidance(3.0, 10, channels=3, interval=(0, math.inf))), plain)
    assert torch.equal(sample(Guidance(3.0, 10, interval=(1e6, 2e6))), sample(None))
    assert not torch.allclose(plain, sample(None), atol=1e-2)


def test_power_cosine():
    guidance = Guidance(3.8, 10, schedule="power-cosine", power=4)
    assert guidance.scale_at(1.0, time=1.0) == 1
    assert guidance.scale_at(1.0, time=0.0) == pytest.approx(3.8)
    halfway = 1 + 2.8 * (1 - math.cos(math.pi / 16)) / 2
    assert guidance.scale_at(1.0, time=0.5) == pytest.approx(halfway)
    scales = [guidance.scale_at(1.0, time) for time in np.linspace(1, 0, 50)]
    assert scales == sorted(scales)
    assert count_rows("ddim", 10, guidance)[0] == 38  # at pure noise w is 1: no null rows
    both = Guidance(3.8, 10, schedule="power-cosine", interval=(0.1, 2.0))
    assert both.scale_at(5.0, 0.3) == 1 and both.scale_at(1.0, 0.3) == guidance.scale_at(1.0, 0.3)


@pytest.mark.parametrize("channels", [1, 2, 3, 16])
def test_any_number_of_channels(channels):
    z, y = torch.randn(2, channels, 4, 4), torch.tensor([1, 2])
    for guided in (None, 1, channels):
        model = Guidance(2.0, 10, channels=guided).wrap(lambda x, t, y: x * (1 + y.view(-1, 1, 1, 1)))
        out = model(z, torch.zeros(2), y)
        n = channels if guided is None else guided
        conditional, unconditional = z * (1 + y.view(-1, 1, 1, 1)), z * 11
        expected = unconditional + 2 * (conditional - unconditional)
        torch.testing.assert_close(out[:, :n], expected[:, :n])
        torch.testing.assert_close(out[:, n:], conditional[:, n:])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(interval=(3.0, 1.0)), "interval 3.0 1.0: must be two noise levels"),
        (dict(interval=(-1.0, 1.0)), "interval -1.0 1.0"),
        (dict(schedule="linear"), "schedule 'linear': choose one of constant, power-cosine"),
        (dict(channels=0), "channels 0: must be at least 1"),
    ],
)
def test_impossible_guidance(options, message):
    with pytest.raises(ValueError, match=message):
        Guidance(2.0, 10, **options)


def test_stochastic_sampling_keeps_its_closed_form():
    """Through the shared interface too, ancestral sampling is the published loop."""
    diffusion = create_diffusion("10", learn_sigma=False)
    assert final_std(diffusion, "p_sample_loop") ** 2 == pytest.approx(0.35852, abs=2e-5)
    z = torch.randn(3, 1, 4, 4)
    torch.manual_seed(1)
    loop = diffusion.p_sample_loop(ideal_model(diffusion), z.shape, z, clip_denoised=False)
    torch.manual_seed(1)
    assert torch.equal(create_diffusion(None, learn_sigma=False).sample(
        ideal_model(diffusion), z, sampler="ddpm", steps=10), loop)  # fmt: skip
