"""Few-step solvers, one page each, for any process x = alpha x_start + sigma noise.

Each is a generator `solver(predict, x, points)` over points from noise to data, with a fourth argument,
randn_like, where it draws noise: it yields (x, pred_xstart) at every point after the first.

    predict(x, point)   the predicted (x_start, noise) at a point, each as x (N, C, …)
    points              N + 1 of them for N steps
    randn_like          takes the place of torch.randn_like

Scalars are Python floats, so float64, whatever the type of x. A new one needs a row of SOLVERS, from which
the choices of --sampler, the default number of steps and the draws of noise follow.
"""

import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Point:
    """A time on the way from noise to data.

    time          what the model is told; None where the model knows nothing, at the end of a diffusion
    alpha, sigma  of x = alpha x_start + sigma noise
    The ODE that Euler and Heun follow is that of x / scale over `clock`, whose derivative is
    slope[0] x_start + slope[1] noise. A flow runs over its own time and leaves x as it is; a diffusion
    runs over sigma / alpha with x / alpha (Karras et al., arXiv 2206.00364, section 4), where Euler is DDIM.
    """

    time: float | None
    alpha: float
    sigma: float
    scale: float
    clock: float
    slope: tuple[float, float]

    @property
    def log_snr(self):
        """lambda = ln(alpha / sigma), infinite at either end."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf

    def derivative(self, x_start, noise):
        return self.slope[0] * x_start + self.slope[1] * noise


def ddim(predict, x, points):
    """DDIM (Song et al., arXiv 2010.02502, eq. 12): the prediction, noised again to the next level."""
    for here, there in zip(points, points[1:]):
        x_start, noise = predict(x, here)
        x = there.alpha * x_start + there.sigma * noise
        yield x, x_start


def euler(predict, x, points):
    """Euler's method, of first order."""
    for here, there in zip(points, points[1:]):
        x_start, noise = predict(x, here)
        x = _advance(x, here, there, here.derivative(x_start, noise))
        yield x, x_start


def heun(predict, x, points):
    """Heun's method (the explicit trapezoid), of second order, with two evaluations a step.

    The last step is Euler's where the model knows nothing of its end."""
    for here, there in zip(points, points[1:]):
        x_start, noise = predict(x, here)
        start, end = _well_conditioned(here, there)
        slope = start.derivative(x_start, noise)
        trial = _advance(x, start, end, slope)
        if there.time is not None:
            slope = (slope + end.derivative(*predict(trial, there))) / 2
            trial = _advance(x, start, end, slope)
        x = trial
        yield x, x_start


def _advance(x, here, there, slope):
    return (there.scale / here.scale) * x + (there.scale * (there.clock - here.clock)) * slope


def dpm_solver_pp(predict, x, points):
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2), of second order, one evaluation a step.

    The first step is of first order, and so is the last, whose lambda is infinitely, or on some paths many
    times, as far from the one before as those are from each other."""
    previous, h_previous = None, None
    for here, there in zip(points, points[1:]):
        x_start, _ = predict(x, here)
        h = there.log_snr - here.log_snr
        target = x_start
        if previous is not None and there is not points[-1]:
            target = x_start + (x_start - previous) * (h / (2 * h_previous))  # h / h_previous = 1 / r
        x = (there.sigma / here.sigma) * x - (there.alpha * math.expm1(-h)) * target
        previous, h_previous = x_start, h
        yield x, x_start


def sde(predict, x, points, randn_like):
    """Euler-Maruyama for the SDE of the same marginals with diffusion coefficient sigma (SiT, section 2.3).

    One draw a step; the last step is its mean alone.
    """
    for here, there in zip(points, points[1:]):
        x_start, noise = predict(x, here)
        z = randn_like(x)
        step = here.clock - there.clock
        # Half of sigma times the score, which is -noise / sigma:
        x = _advance(x, here, there, here.derivative(x_start, noise)) - (step / 2) * noise
        if there is not points[-1]:
            x = x + math.sqrt(here.sigma * step) * z
        yield x, x_start


def _well_conditioned(here, there):
    """The two points, as they are or for the ODE of x / sigma over alpha / sigma, with x_start as derivative.

    From nearly pure noise, a step over sigma / alpha multiplies the prediction at its end by about
    (alpha there) / (2 alpha here), 6 from a noise level of 80 in 10 steps of the cosine schedule. Over
    alpha / sigma, a trapezoid multiplies the x_start predicted at its end by 1/2 at most."""
    weight = there.scale * abs(there.clock - here.clock) / 2 * max(map(abs, there.slope))
    if weight <= 1 or there.time is None or there.sigma == 0:
        return here, there
    return tuple(
        replace(point, scale=point.sigma, clock=point.alpha / point.sigma, slope=(1.0, 0.0))
        for point in (here, there)
    )


OBJECTIVES = ("diffusion", "flow")


@dataclass(frozen=True)
class Solver:
    """A row of SOLVERS.

    function    the generator; None for GaussianDiffusion's ancestral walk over its own spaced steps
    steps       how many, where this sampler is asked for in place of a run's own
    stochastic  whether it draws noise, and so takes randn_like
    objectives  of the processes that it solves
    Raises ValueError, naming the function, where it is not as the row says.
    """

    function: Callable | None
    steps: int
    stochastic: bool = False
    objectives: tuple[str, ...] = OBJECTIVES

    def __post_init__(self):
        name = getattr(self.function, "__name__", self.function)
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"solver {name}: steps {self.steps!r} must be a whole number, at least 1")
        if not self.objectives or not set(self.objectives) <= set(OBJECTIVES):
            raise ValueError(
                f"solver {name}: objectives {self.objectives} must be of {', '.join(OBJECTIVES)}"
            )
        if self.function is None:
            return
        known = ["predict", "x", "points", "randn_like"]
        wanted = known if self.stochastic else known[:3]
        if [taken for taken in inspect.signature(self.function).parameters if taken in known] != wanted:
            kind = "stochastic" if self.stochastic else "deterministic"
            raise ValueError(f"solver {name}: is {kind}, so it must take ({', '.join(wanted)})")
        if not inspect.isgeneratorfunction(self.function):
            raise ValueError(f"solver {name}: must yield (x, pred_xstart) at every point after the first")

    def __call__(self, predict, x, points, randn_like=None):
        """The generator of states; randn_like reaches it only where the row says that it draws."""
        if self.stochastic:
            return self.function(predict, x, points, randn_like or torch.randn_like)
        return self.function(predict, x, points)


SOLVERS = {
    "ddpm": Solver(None, steps=250, stochastic=True, objectives=("diffusion",)),
    "ddim": Solver(ddim, steps=50),
    "dpm++": Solver(dpm_solver_pp, steps=25),
    "euler": Solver(euler, steps=50),
    "heun": Solver(heun, steps=25),
    "sde": Solver(sde, steps=250, stochastic=True, objectives=("flow",)),
}


def samplers_of(objective):
    """The names of the solvers that serve "diffusion" or "flow". Raises ValueError for a row that is no
    Solver."""
    for name, solver in SOLVERS.items():
        if not isinstance(solver, Solver):
            raise ValueError(f"solver {name}: its row must be a Solver(function, steps), and is {solver!r}")
    return tuple(name for name, solver in SOLVERS.items() if objective in solver.objectives)


def default_steps(sampler):
    """Steps, as --num-sampling-steps takes them, of a sampler that is asked for without; None where there is
    no such sampler."""
    return str(SOLVERS[sampler].steps) if sampler in SOLVERS else None


def check_sampler(sampler, objective):
    """Raise ValueError for a sampler that a process of this objective does not have."""
    if sampler not in samplers_of(objective):
        raise ValueError(f"sampler {sampler!r}: a {objective} has {', '.join(samplers_of(objective))}")


def whole_steps(steps, sampler, most=math.inf):
    """Steps, an int or its str, as an int of 1 … most; ValueError for anything else."""
    try:
        count = int(steps) if isinstance(steps, str) else operator.index(steps)
    except (ValueError, TypeError):
        raise ValueError(f"{steps!r} is not a number of steps, and {sampler} takes no other") from None
    if not 1 <= count <= most:
        raise ValueError(f"{count} steps: there must be at least 1" + (count > 0) * f", at most {most}")
    return count


def run_solver(states, x, times, callback=None):
    """The last x of a solver's states, without gradients; callback as in GaussianDiffusion.sample.

    x: where it starts; times: of its steps, what is told of them to the callback, in order."""
    for i, time in enumerate(times):
        with torch.no_grad():  # not around the callback
            state = next(states, None)
        if state is None:
            raise ValueError(f"the solver ended after {i} of {len(times)} steps")
        x, pred_xstart = state
        if callback is not None:
            callback(dict(i=i + 1, t=time, x=x, pred_xstart=pred_xstart))
    return x
