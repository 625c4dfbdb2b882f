"""A solver, a noise schedule, a flow path and timestep samplers, added from outside in the few lines shown:
they train, resume and sample; and what a row lacks is refused by name."""

import numpy as np
import pytest
import torch
from in_process import run
from seams import ARGV, assert_samples, lines_of, train_and_resume

from diffusion import create_flow, create_process
from diffusion.flow_matching import PATHS
from diffusion.schedules import NOISE_SCHEDULES
from diffusion.solvers import SOLVERS, Solver
from diffusion.timestep_sampler import (
    SCHEDULE_SAMPLERS,
    LogitNormalSampler,
    ScheduleSampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from sampler import Sampler

# ---------------------------------------------------------------------------------------------
# A solver


def churned(predict, x, points, randn_like):
    """DDIM with a half of each level's noise drawn anew."""
    for here, there in zip(points, points[1:]):
        x_start, noise = predict(x, here)
        noise = 0.75**0.5 * noise + 0.5 * randn_like(x)
        x = there.alpha * x_start + there.sigma * noise
        yield x, x_start


@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_a_solver(tmp_path, monkeypatch, objective):
    assert lines_of(churned) <= 25
    monkeypatch.setitem(SOLVERS, "churned", Solver(churned, steps=6, stochastic=True))
    argv = [word for word in ARGV if word not in ("--num-sampling-steps", "3")]
    argv += ["--objective", objective, "--max-steps", 2, "--results-dir", tmp_path]
    run(*argv, "--sampler", "churned")
    path = str(tmp_path / "000-DiT-S-2" / "checkpoints" / "0000002.pt")
    sampler, images = assert_samples(path)
    assert sampler.settle()["sampler"] == "churned" and sampler.settle()["steps"] == "6"
    assert not torch.equal(sampler.sample(3, steps=3), images)
    # The run's own choice of another sampler still gives way to this one, with its steps:
    assert sampler.settle(sampler="heun")["steps"] == "25"
    other = Sampler(sampler.model, sampler.process, device="cpu")
    assert other.settle(sampler="churned")["steps"] == "6"


def takes_no_noise(predict, x, points):
    yield x, x


def gives_a_list(predict, x, points):
    return [(x, x)]


def ends_early(predict, x, points):
    yield x, x


@pytest.mark.parametrize(
    "row, message",
    [
        (
            lambda: Solver(takes_no_noise, 9, stochastic=True),
            "takes_no_noise: is stochastic, so it must take",
        ),
        (lambda: Solver(churned, 9), "solver churned: is deterministic, so it must take"),
        (lambda: Solver(gives_a_list, 9), "solver gives_a_list: must yield"),
        (lambda: Solver(ends_early, 0), "solver ends_early: steps 0 must be a whole number"),
        (lambda: Solver(ends_early, 9, objectives=("ode",)), "solver ends_early: objectives"),
    ],
)
def test_a_solver_is_checked_when_its_row_is_written(row, message):
    with pytest.raises(ValueError, match=message):
        row()


def test_a_solver_is_checked_when_it_is_chosen(monkeypatch, capsys):
    process, x = create_process(dict(learn_sigma=False)), torch.zeros(1, 1, 2, 2)
    monkeypatch.setitem(SOLVERS, "early", Solver(ends_early, 9))
    with pytest.raises(ValueError, match="the solver ended after 1 of 4 steps"):
        process.sample(lambda x, t: x, x, sampler="early", steps=4)
    monkeypatch.setitem(SOLVERS, "early", Solver(ends_early, 9, objectives=("flow",)))
    with pytest.raises(ValueError, match="sampler 'early': a diffusion has ddpm, ddim"):
        process.sample(lambda x, t: x, x, sampler="early")
    with pytest.raises(SystemExit):
        run(*ARGV, "--sampler", "early")
    assert "--sampler early: this model has ddpm, ddim" in capsys.readouterr().err
    monkeypatch.setitem(SOLVERS, "early", ends_early)
    with pytest.raises(ValueError, match=r"solver early: its row must be a Solver\(function, steps\)"):
        run(*ARGV)


# ---------------------------------------------------------------------------------------------
# A noise schedule, a flow path, a timestep sampler


def sigmoid_schedule(steps):
    """Betas that rise as a sigmoid."""
    rising = 1 / (1 + np.exp(-np.linspace(-6, 6, steps)))
    return rising * 20 / steps + 1e-5


def test_a_noise_schedule(tmp_path, monkeypatch):
    assert lines_of(sigmoid_schedule) <= 15
    monkeypatch.setitem(NOISE_SCHEDULES, "sigmoid", sigmoid_schedule)
    path = train_and_resume(tmp_path, "--noise-schedule", "sigmoid")
    sampler, _ = assert_samples(path, sampler="dpm++")
    assert np.array_equal(sampler.process.original_betas, sigmoid_schedule(1000))


@pytest.mark.parametrize(
    "betas, message",
    [
        (lambda steps: [0.1] * (steps - 1), r"must give 1000 betas above 0, and gave \(999,\) from 0.1"),
        (
            lambda steps: np.linspace(0, 0.1, steps),
            r"must give 1000 betas above 0, and gave \(1000,\) from 0.0",
        ),
        (lambda steps: np.full(steps, np.nan), r"must give 1000 betas above 0, and gave \(1000,\) from nan"),
    ],
)
def test_a_noise_schedule_of_no_betas(monkeypatch, betas, message):
    monkeypatch.setitem(NOISE_SCHEDULES, "toy", betas)
    with pytest.raises(ValueError, match=f"noise schedule 'toy': {message}"):
        create_process(dict(noise_schedule="toy"))


class QuadraticPath:
    """Straight lines, slow near the data."""

    start, end = 1.0, 0.0

    def alpha(self, t):
        return 1 - t**2, -2 * t

    def sigma(self, t):
        return t**2, 2 * t


def test_a_flow_path(tmp_path, monkeypatch):
    assert lines_of(QuadraticPath) <= 15
    monkeypatch.setitem(PATHS, "quadratic", QuadraticPath)
    path = train_and_resume(tmp_path, "--objective", "flow", "--flow-path", "quadratic")
    sampler, _ = assert_samples(path)
    assert isinstance(sampler.process.path, QuadraticPath)


class WithoutSigma:
    start, end, alpha = 1.0, 0.0, QuadraticPath.alpha


class WithoutDerivative(QuadraticPath):
    def sigma(self, t):
        return t**2


@pytest.mark.parametrize(
    "row, message",
    [
        (WithoutSigma, "path 'toy': WithoutSigma lacks sigma"),
        (WithoutDerivative, r"path 'toy': sigma\(t\) must give its value and its derivative"),
    ],
)
def test_a_flow_path_that_lacks_something(monkeypatch, row, message):
    monkeypatch.setitem(PATHS, "toy", row)
    with pytest.raises(ValueError, match=message):
        create_flow(path="toy")


class EarlyStepsSampler(ScheduleSampler):
    """The clean half of the steps three times as often as the other."""

    def weights(self):
        half = self.diffusion.num_timesteps // 2
        return torch.cat([torch.full((half,), 3.0), torch.ones(half)]).double()


class ModeSampler(UniformSampler):
    """Stable Diffusion 3's times with heavy tails (arXiv 2403.03206, eq. 20), of scale 1."""

    objectives = ("flow",)

    def sample(self, batch_size, device, generator=None):
        u = torch.rand(batch_size, device=device, generator=generator)
        t = 1 - u - (torch.cos(torch.pi / 2 * u) ** 2 - 1 + u)
        return t, torch.ones_like(t)


@pytest.mark.parametrize("row, objective", [(EarlyStepsSampler, "diffusion"), (ModeSampler, "flow")])
def test_a_timestep_sampler(tmp_path, monkeypatch, row, objective):
    assert lines_of(row) <= 15
    monkeypatch.setitem(SCHEDULE_SAMPLERS, "toy", row)
    path = train_and_resume(tmp_path, "--objective", objective, "--timestep-sampler", "toy")
    sampler, _ = assert_samples(path)
    t, weights = create_named_schedule_sampler("toy", sampler.process).sample(20_000, "cpu")
    span = sampler.process.num_timesteps
    if row is EarlyStepsSampler:  # 3 of 4, reweighed; five standard deviations
        assert (t < span // 2).float().mean().item() == pytest.approx(0.75, abs=0.016)
        assert weights.mean().item() == pytest.approx(1, abs=0.025)
    else:
        assert 0 <= t.min() < 0.01 and 0.99 < t.max() <= 1 and (weights == 1).all()
    with pytest.raises(SystemExit):
        other = "flow" if objective == "diffusion" else "diffusion"
        run(*ARGV, "--objective", other, "--timestep-sampler", "toy")


class NoSampler:
    objectives = ("diffusion",)


class WithoutWeights(ScheduleSampler):
    pass


class WholeStepsOfAFlow(EarlyStepsSampler):
    objectives = ("flow",)


@pytest.mark.parametrize(
    "row, message",
    [
        (NoSampler, "NoSampler lacks sample, update_with_local_losses, state_dict, load_state_dict"),
        (WithoutWeights, "WithoutWeights lacks weights"),
        (WholeStepsOfAFlow, "draws whole steps; for a flow, extend UniformSampler"),
        (LogitNormalSampler, "a diffusion takes uniform or loss-second-moment"),
    ],
)
def test_a_timestep_sampler_that_lacks_something(monkeypatch, row, message):
    monkeypatch.setitem(SCHEDULE_SAMPLERS, "toy", row)
    with pytest.raises(ValueError, match=f"timestep sampler 'toy': {message}"):
        create_named_schedule_sampler("toy", create_process(dict(objective="diffusion")))
