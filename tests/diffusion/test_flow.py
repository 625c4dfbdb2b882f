"""Flow matching: SiT's numbers, closed forms, identities between predictions, a peer."""

import math

import numpy as np
import pytest
import torch
from closed_forms import MEAN, STD, assert_errors_stay_small, slope_and_offset
from conftest import assert_golden, rule_input

from diffusion import Guidance, create_flow, create_process
from diffusion.flow_matching import PATHS, PREDICTIONS
from diffusion.solvers import SOLVERS

Y = torch.tensor([0, 3, 9, 5])


@pytest.fixture(scope="module")
def sit(golden):
    return golden("sit.npz")


def published(**options):
    return create_flow(time_scale=1.0, published_sit=True, **options)


def in_our_time(t):
    """SiT counts from noise at 0 to data at 1."""
    return 1 - torch.tensor(t)


# ---------------------------------------------------------------------------------------------
# Numbers of the published SiT


def test_sit_velocity(sit, tiny):
    z = rule_input("z", 4, 4, 8, 8)
    with torch.no_grad():
        ours = published()._call(tiny, z, in_our_time([0, 0.1, 0.5, 0.99]), dict(y=Y))
    assert_golden(-ours, sit["velocity"])


@pytest.mark.parametrize("path", ["Linear", "GVP"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_sit_sampling(sit, tiny, path, sampler):
    flow = published(path=path.lower())
    out = flow.sample(tiny, rule_input("z", 4, 4, 8, 8), sampler=sampler, steps=10, model_kwargs=dict(y=Y))
    assert_golden(out, sit[f"{sampler}10/{path}"])


def test_sit_guided(sit, tiny):
    out = published().sample(
        tiny, rule_input("z", 4, 4, 8, 8), sampler="euler", steps=10, model_kwargs=dict(y=Y),
        guidance=Guidance(1.5, 10, channels=3),
    )  # fmt: skip
    assert_golden(out, sit["euler10_cfg1.5/Linear"])


@pytest.mark.parametrize("path", ["Linear", "GVP", "VP"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_sit_losses(sit, tiny, path, prediction):
    flow = published(path=path.lower(), prediction=prediction)
    with torch.no_grad():
        terms = flow.training_losses(
            tiny, rule_input("x0", 4, 4, 8, 8) * 0.5, in_our_time([0.05, 0.3, 0.6, 0.95]), dict(y=Y),
            noise=rule_input("noise", 4, 4, 8, 8),
        )  # fmt: skip
    assert_golden(terms["loss"], sit[f"loss/{path}/{prediction}"])


# ---------------------------------------------------------------------------------------------
# Closed forms on Gaussian data


def ideal(flow, dtype=torch.float64):
    """What is best predicted for data N(MEAN, STD²), whatever the path and the prediction."""

    def model(x, t):
        t = (t.to(dtype) / flow.time_scale).clamp(flow.path.end, 1).view(-1, *[1] * (x.ndim - 1))
        (alpha, dalpha), (sigma, dsigma) = flow.path.alpha(t), flow.path.sigma(t)
        deviation = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        x_start, noise = MEAN + alpha * STD**2 * deviation, sigma * deviation
        if flow.prediction == "velocity":
            return dalpha * x_start + dsigma * noise
        return dict(noise=noise, data=x_start, score=-deviation)[flow.prediction]

    return model


def final(flow, sampler, steps):
    return slope_and_offset(lambda x: flow.sample(ideal(flow), x, sampler=sampler, steps=steps))


@pytest.mark.parametrize(
    "sampler, order, expected",
    [
        ("euler", 1, {10: 0.430783, 20: 0.464248, 40: 0.481811, 80: 0.490824}),
        ("heun", 2, {10: 0.50172, 20: 0.500508}),
    ],
)
def test_linear_flow_on_gaussian_data(sampler, order, expected):
    flow = create_flow()
    for steps, std in expected.items():
        assert final(flow, sampler, steps)[0] == pytest.approx(std, abs=1e-5)
    error = [abs(final(flow, sampler, steps)[0] - STD) for steps in (20, 40)]
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim", "dpm++"])
def test_every_path_and_prediction_finds_the_data(path, prediction, sampler):
    slope, offset = final(create_flow(path=path, prediction=prediction), sampler, 200)
    assert slope == pytest.approx(STD, abs=0.02) and offset == pytest.approx(MEAN, abs=0.02)


@pytest.mark.parametrize("path", PATHS)
def test_few_steps_of_dpm_solver(path):
    """Also where the last step, in the logarithm of the noise, is many times as long as the one before."""
    slope, offset = final(create_flow(path=path), "dpm++", 25)
    assert slope == pytest.approx(STD, abs=0.03) and offset == pytest.approx(MEAN, abs=0.03)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_errors_of_a_flow_stay_small(path, prediction):
    flow = create_flow(path=path, prediction=prediction)
    assert_errors_stay_small(flow, lambda x, t: ideal(flow)(x.double(), t).float(), 0.05)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_errors_of_shifted_noise_stay_small(path, shift):
    """The signal that sampling starts from does not depend on the shift of its times."""
    flow = create_flow(path=path, prediction="noise", shift=shift)
    # The first of 10 steps of shift 0.5 is to 15 times the signal:
    assert_errors_stay_small(flow, lambda x, t: ideal(flow)(x.double(), t).float(), 0.1, alike=0.09)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shifted_times(shift):
    flow = create_flow(shift=shift)
    assert final(flow, "heun", 40)[0] == pytest.approx(STD, abs=2e-3)
    times = [point.clock for point in flow.points(4)]
    assert times[0] == 1 and times[-1] == 0
    assert times[2] == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))
    t = flow.sample_t(100_000, "cpu", torch.Generator().manual_seed(0))
    assert t.median().item() == pytest.approx(times[2], abs=0.01)


def test_sde_keeps_the_marginals():
    """Its samples are the data's, in mean and deviation, though noise is added all along."""
    flow, generator = create_flow(), torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 1, 1, 1, generator=generator)
    draws = []

    def randn_like(x):
        draws.append(x)
        return torch.randn(x.shape, generator=generator)

    out = flow.sample(ideal(flow, torch.float32), z, sampler="sde", steps=100, randn_like=randn_like)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert out.std().item() == pytest.approx(STD, abs=0.02)
    assert len(draws) == 100
    correlation = torch.corrcoef(torch.stack([z.flatten(), out.flatten()]))[0, 1]
    assert correlation < 0.9  # of the ODE it is 1
    ode = flow.sample(ideal(flow, torch.float32), z, sampler="euler", steps=100)
    assert torch.corrcoef(torch.stack([z.flatten(), ode.flatten()]))[0, 1] > 0.999


# ---------------------------------------------------------------------------------------------
# Identities


@pytest.mark.parametrize("path", PATHS)
def test_predictions_say_the_same(path):
    """Data and noise, recovered from each form of prediction, to 1e-10 in float64."""
    flow, generator = create_flow(path=path), torch.Generator().manual_seed(0)
    x_start, noise = torch.randn(2, 64, 1, 1, 1, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.02, 0.98, 64, dtype=torch.float64)
    x, v = flow.interpolate(x_start, noise, t)
    a, s = flow.path.alpha(t.view(-1, 1, 1, 1)), flow.path.sigma(t.view(-1, 1, 1, 1))
    for name, output in (("velocity", v), ("noise", noise), ("data", x_start), ("score", -noise / s[0])):
        for found, expected in zip(PREDICTIONS[name](output, x, a, s), (x_start, noise)):
            assert (found - expected).abs().max() < 1e-10, name


@pytest.mark.parametrize("path", PATHS)
def test_slopes_are_derivatives(path):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    for coefficient in (PATHS[path]().alpha, PATHS[path]().sigma):
        value, slope = coefficient(t)
        (expected,) = torch.autograd.grad(value.sum(), t)
        torch.testing.assert_close(slope.detach(), expected, atol=1e-10, rtol=1e-10)


def test_ddim_is_euler_on_straight_lines(tiny):
    flow, z = published(), rule_input("z", 4, 4, 8, 8)
    options = dict(steps=10, model_kwargs=dict(y=Y))
    ddim, euler = (flow.sample(tiny, z, sampler=sampler, **options) for sampler in ("ddim", "euler"))
    torch.testing.assert_close(ddim, euler, atol=1e-4, rtol=1e-4)


def test_diffusers_flow_scheduler_is_euler(tiny):
    from diffusers import FlowMatchEulerDiscreteScheduler

    for shift in (1.0, 3.0):
        flow = create_flow(shift=shift)
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
        sigmas = [point.sigma for point in flow.points(12)[:-1]]
        scheduler.set_timesteps(sigmas=sigmas)
        x = z = rule_input("z", 4, 4, 8, 8)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(tiny(x, t.repeat(4), Y)[:, :4], t, x).prev_sample
        ours = flow.sample(
            lambda x, t, y: tiny(x, t, y)[:, :4], z, sampler="euler", steps=12, model_kwargs=dict(y=Y)
        )
        torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_inversion_and_back():
    torch.manual_seed(0)
    flow, x_start = create_flow(), MEAN + STD * torch.randn(4, 1, 8, 8)
    noise = flow.invert(ideal(flow, torch.float32), x_start, steps=200)
    assert noise.std().item() == pytest.approx(1, abs=0.2)
    back = flow.sample(ideal(flow, torch.float32), noise, sampler="ddim", steps=200)
    assert (back - x_start).abs().max() < 0.05


# ---------------------------------------------------------------------------------------------
# The interface


def test_training_times():
    generator = torch.Generator().manual_seed(0)
    uniform = create_flow().sample_t(100_000, "cpu", generator)
    assert uniform.min() >= 0 and uniform.max() <= 1 and uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    flow = create_flow(time_sampling="logit-normal", time_mean=-0.5, time_std=2.0)
    logit = torch.logit(flow.sample_t(100_000, "cpu", generator).double())
    assert logit.mean().item() == pytest.approx(-0.5, abs=0.03)
    assert logit.std().item() == pytest.approx(2, abs=0.03)


def test_even_times_give_the_expected_loss():
    """Over uniform times, whatever the training draws."""
    torch.manual_seed(0)
    for options in ({}, dict(time_sampling="logit-normal"), dict(shift=3.0), dict(prediction="noise")):
        flow, uniform = create_flow(**options), torch.rand(2000)
        losses = [
            flow.training_losses(ideal(flow, torch.float32), MEAN + STD * torch.randn(len(t), 1, 32, 32), t)
            for t in (flow.stratified_t(36, "cpu"), flow.stratified_t(75, "cpu"), uniform)
        ]
        few, more, expected = (terms["loss"].mean().item() for terms in losses)
        assert few == pytest.approx(expected, rel=0.05) and more == pytest.approx(expected, rel=0.05)


def test_what_the_model_is_told():
    seen = []

    def model(x, t):
        seen.append(t[0].item())
        return torch.zeros_like(x)

    steps = []
    create_flow().sample(model, torch.zeros(2, 1, 2, 2), steps=4, callback=steps.append)
    assert seen == [1000, 750, 500, 250]
    assert [step["i"] for step in steps] == [1, 2, 3, 4] and [s["t"] for s in steps] == [1, 0.75, 0.5, 0.25]
    seen.clear()
    published().sample(model, torch.zeros(2, 1, 2, 2), steps=4)
    assert seen == [0, 0.25, 0.5, 0.75]


def test_a_zero_network_s_loss():
    torch.manual_seed(0)
    x_start = torch.randn(256, 4, 16, 16) * STD
    for prediction, expected in (("velocity", 1 + STD**2), ("noise", 1), ("data", STD**2)):
        flow = create_flow(prediction=prediction)
        terms = flow.training_losses(lambda x, t: torch.zeros_like(x), x_start)
        assert terms["loss"].shape == (256,)
        assert terms["loss"].mean().item() == pytest.approx(expected, rel=0.02)


def test_config_round_trip():
    flow = create_flow(path="gvp", prediction="noise", time_sampling="logit-normal", shift=2.0)
    again = create_process(flow.config)
    assert again.config == flow.config and again.count_steps("euler", "7") == 7
    assert np.allclose([p.alpha for p in again.points(5)], [p.alpha for p in flow.points(5)])
    assert set(again.samplers) == set(SOLVERS) - {"ddpm"}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: create_flow(path="curved"), "path 'curved': choose one of linear, gvp, vp"),
        (lambda: create_flow(prediction="x"), "prediction 'x': choose one of velocity, noise, score, data"),
        (lambda: create_flow(time_sampling="x"), "time_sampling 'x': choose one of uniform, logit-normal"),
        (lambda: create_flow(shift=0), "must be more than 0"),
        (lambda: create_flow().count_steps("ddpm", 5), "sampler 'ddpm': a flow has ddim, dpm"),
        (lambda: create_flow().count_steps("euler", "ddim50"), "'ddim50' is not a number of steps"),
        (lambda: create_flow().count_steps("euler", 0), "0 steps: there must be at least 1"),
        (
            lambda: create_flow().sample(lambda x, t: torch.cat([x, x], 1), torch.zeros(1, 2, 4, 4)),
            "a flow has no variance to learn",
        ),
    ],
)
def test_impossible_flows(call, message):
    with pytest.raises(ValueError, match=message):
        call()
