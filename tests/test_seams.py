"""What can be added from outside: of each kind a small one, in the few lines shown, that trains, resumes and
samples; and what a row lacks is refused by name."""

import inspect
import textwrap

import pytest
import torch
from test_train import SMALL, run

from checkpointing import files as checkpoints
from diffusion import create_process
from diffusion.solvers import SOLVERS, Solver
from sampler import Sampler

ARGV = [*SMALL, "--sample-every", "0", "--ckpt-every", 2]


def lines_of(*parts):
    """Lines of code and documentation that an addition takes, and one for its row."""
    return 1 + sum(len(textwrap.dedent(inspect.getsource(part)).splitlines()) for part in parts)


def train_and_resume(folder, *argv):
    """Train four steps at once, and two and again two; both end in the same bits. Returns the checkpoint's
    path."""
    argv = [*ARGV, *argv, "--max-steps", 4]
    weights = []
    for results in ("straight", "resumed"):
        run(*argv, "--results-dir", folder / results)
        path = folder / results / "000-DiT-S-2" / "checkpoints" / "0000004.pt"
        if results == "resumed":
            path.unlink()
            run(*argv, "--results-dir", folder / results, "--resume", folder / results / "000-DiT-S-2")
        contents = checkpoints.load(str(path)).contents
        weights.append({**contents["model"], **{f"ema.{key}": v for key, v in contents["ema"].items()}})
    assert all(torch.equal(weights[0][key], value) for key, value in weights[1].items())
    return str(path)


def assert_samples(path, *, of=3, **options):
    """Sample a checkpoint; an image depends on its own seed alone."""
    sampler = Sampler.from_checkpoint(path, device="cpu")
    images = sampler.sample(of, **options)
    assert torch.isfinite(images).all() and images.std() > 0.01
    alone = sampler.sample(of if isinstance(of, int) else of[:1], seeds=0, batch_size=1, **options)
    torch.testing.assert_close(alone[:1], images[:1], atol=1e-4, rtol=0)  # another batch's rounding
    return sampler, images


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
