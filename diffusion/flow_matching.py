"""Flow matching and interpolants: the same models, trained and sampled along continuous paths.

Flow matching (Lipman et al., arXiv 2210.02747), SiT (Ma et al., arXiv 2401.08740), Stable Diffusion 3 (Esser
et al., arXiv 2403.03206).

Time t runs from 0, data, to 1, noise, as in diffusion: x_t = alpha(t) data + sigma(t) noise, and the velocity
is its derivative, alpha'(t) data + sigma'(t) noise.
"""

import math

import torch

from runtime.cli import require_parts

from .diffusion_utils import mean_flat
from .solvers import SOLVERS, Point, check_sampler, default_steps, run_solver, samplers_of, whole_steps


class LinearPath:
    """Straight lines from data to noise (rectified flow)."""

    start, end = 1.0, 0.0  # of sampling; it stops short of neither

    def alpha(self, t):
        return 1 - t, -torch.ones_like(t)

    def sigma(self, t):
        return t, torch.ones_like(t)


class GVPPath:
    """A quarter of a circle, on which unit variance stays unit: generalised variance preserving."""

    start, end = 1.0, 0.0

    def alpha(self, t):
        return torch.cos(math.pi / 2 * t), -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def sigma(self, t):
        return torch.sin(math.pi / 2 * t), math.pi / 2 * torch.cos(math.pi / 2 * t)


class VPPath:
    """Diffusion's linear schedule in continuous time, beta from 0.1 to 20 (Song et al., arXiv 2011.13456).

    Its sigma rises from data with infinite slope, so that sampling stops just before.
    """

    start, end = 1.0, 1e-5

    def alpha(self, t):
        alpha = torch.exp(-0.25 * t**2 * 19.9 - 0.5 * t * 0.1)
        return alpha, alpha * (-0.5 * t * 19.9 - 0.05)

    def sigma(self, t):
        alpha, slope = self.alpha(t)
        sigma = torch.sqrt(1 - alpha**2)
        return sigma, -alpha * slope / sigma


# The choices of --flow-path: start and end, the times between which sampling goes, and alpha(t) and sigma(t),
# each with its derivative, of tensors of any shape:
PATHS = {"linear": LinearPath, "gvp": GVPPath, "vp": VPPath}


def check_path(name):
    """Raise ValueError for a row of PATHS that is not such a class."""
    require_parts(f"path {name!r}", PATHS[name], "start", "end", "alpha", "sigma")
    for part in ("alpha", "sigma"):
        values = getattr(PATHS[name](), part)(torch.full((2,), 0.5, dtype=torch.float64, device="cpu"))
        if not isinstance(values, tuple) or [value.shape for value in values] != [(2,)] * 2:
            raise ValueError(f"path {name!r}: {part}(t) must give its value and its derivative, as t")


# How training times are drawn:
TIME_SAMPLINGS = ("uniform", "logit-normal")
# Where a prediction says nothing of the data at pure noise, sampling begins this much after: the first step
# multiplies an error of predicted noise by about (alpha at its end) / (alpha at its start). Where it says
# nothing of the noise at clean data, it is not asked there.
T_EPS = 1 / 80


def velocity(output, x, a, s):
    """(x_start, noise) of a predicted velocity; a and s: alpha and sigma with their derivatives."""
    (alpha, dalpha), (sigma, dsigma) = a, s
    determinant = alpha * dsigma - dalpha * sigma
    return (dsigma * x - sigma * output) / determinant, (alpha * output - dalpha * x) / determinant


def noise(output, x, a, s):
    """(x_start, noise) of predicted noise."""
    return (x - s[0] * output) / a[0], output


def score(output, x, a, s):
    """(x_start, noise) of a predicted score, the gradient of log p_t, which is -noise / sigma on average."""
    return noise(-s[0] * output, x, a, s)


def data(output, x, a, s):
    """(x_start, noise) of predicted data."""
    return output, (x - a[0] * output) / s[0]


PREDICTIONS = {"velocity": velocity, "noise": noise, "score": score, "data": data}


class FlowMatching:
    """A flow along a path, and how a model is trained for it and sampled with it.

    path           one of PATHS: "linear", "gvp", "vp"
    prediction     what the model gives, one of PREDICTIONS: "velocity", "noise", "score", "data"
    time_sampling  of sample_t: "uniform", or "logit-normal", sigmoid(mean + std · normal)
    shift          a: times t become a t / (1 + (a - 1) t), in training and sampling; above 1, noisier ones
    time_scale     what the model is told is t times this: 1000, the range its time embedding is made for
    published_sit  the model is one of SiT's, in which t runs the other way, velocities point at data, and a
                   second half of channels is left unused; their time_scale is 1
    Raises ValueError for what is none of these.
    """

    num_timesteps = 1  # times lie in [0, num_timesteps]
    objective = "flow"
    sampling = dict(sampler="euler", steps=default_steps("euler"))  # unless told otherwise

    def __init__(
        self, path="linear", prediction="velocity", time_sampling="uniform", time_mean=0.0, time_std=1.0,
        shift=1.0, time_scale=1000.0, published_sit=False,
    ):  # fmt: skip
        for name, value, known in (
            ("path", path, PATHS),
            ("prediction", prediction, PREDICTIONS),
            ("time_sampling", time_sampling, TIME_SAMPLINGS),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r}: choose one of {', '.join(known)}")
        check_path(path)
        if not shift > 0 or not time_std > 0 or not time_scale > 0:
            raise ValueError("shift, time_std and time_scale: must be more than 0")
        self.config = dict(
            objective="flow", path=path, prediction=prediction, time_sampling=time_sampling,
            time_mean=time_mean, time_std=time_std, shift=shift, time_scale=time_scale,
            published_sit=published_sit,
        )  # fmt: skip
        self.path, self.prediction, self.interpret = PATHS[path](), prediction, PREDICTIONS[prediction]
        self.time_sampling, self.time_mean, self.time_std = time_sampling, time_mean, time_std
        self.shift, self.time_scale, self.published_sit = shift, time_scale, published_sit

    def _call(self, model, x, t, model_kwargs):
        """The model's prediction at our times t (N,), float32, as this class understands it."""
        told = 1 - t if self.published_sit else t
        output = model(x, told * self.time_scale, **(model_kwargs or {})).float()
        if self.published_sit:
            output = output[:, : x.shape[1]]
            output = -output if self.prediction == "velocity" else output
        if output.shape != x.shape:
            raise ValueError(
                f"the model returned {tuple(output.shape)} for x {tuple(x.shape)}: a flow has no variance to"
                " learn; build the model with learn_sigma=False"
            )
        return output

    def _shifted(self, t):
        return self.shift * t / (1 + (self.shift - 1) * t)

    def _unshifted(self, t):
        return t / (self.shift - (self.shift - 1) * t)

    # -----------------------------------------------------------------------------------------
    # Training

    def sample_t(self, n, device, generator=None):
        """Training times (n,) in [0, 1]."""
        if self.time_sampling == "uniform":
            t = torch.rand(n, dtype=torch.float32, device=device, generator=generator)
        else:
            normal = torch.randn(n, dtype=torch.float32, device=device, generator=generator)
            t = torch.sigmoid(self.time_mean + self.time_std * normal)
        return self._shifted(t)

    def stratified_t(self, n, device):
        """Times (n,) for evaluation: uniform ones, whatever times the training draws, so that losses of runs
        with different time_sampling or shift can be compared."""
        return (torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n

    def interpolate(self, x_start, noise, t):
        """x_t and its velocity, each as x_start (N, C, …), at times t (N,)."""
        t = t.view(-1, *[1] * (x_start.ndim - 1)).clamp(min=self.path.end)
        (alpha, dalpha), (sigma, dsigma) = self.path.alpha(t), self.path.sigma(t)
        return alpha * x_start + sigma * noise, dalpha * x_start + dsigma * noise

    def training_losses(self, model, x_start, t=None, model_kwargs=None, noise=None):
        """The loss of every row of x_start (N, C, …) at times t (N,): a dict of (N,) tensors, "loss" and
        "mse", which are the same.

        The squared error of what is predicted; a score is weighed by sigma², as noise is. t and noise are
        drawn where they are None.
        """
        t = self.sample_t(len(x_start), x_start.device) if t is None else t
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t, v = self.interpolate(x_start, noise, t)
        output = self._call(model, x_t, t, model_kwargs)
        if self.prediction == "score":
            sigma, _ = self.path.sigma(t.view(-1, *[1] * (x_start.ndim - 1)).clamp(min=self.path.end))
            output = -sigma * output
        target = dict(velocity=v, noise=noise, score=noise, data=x_start)[self.prediction]
        loss = mean_flat((output - target) ** 2)
        return dict(loss=loss, mse=loss)

    # -----------------------------------------------------------------------------------------
    # Sampling

    def count_steps(self, sampler, steps=None):
        """How many steps `sample` takes, and how often it calls back. Raises ValueError for what it cannot
        do."""
        check_sampler(sampler, self.objective)
        return whole_steps(self.sampling["steps"] if steps is None else steps, sampler)

    @property
    def samplers(self):
        """The names that `sample` takes."""
        return samplers_of(self.objective)

    def points(self, steps):
        """The points of a solver, from noise to data; their times are evenly apart, before the shift."""
        exact = dict(dtype=torch.float64, device="cpu")
        alpha, _ = self.path.alpha(torch.ones((), **exact))
        vanishes = self.prediction in ("noise", "score") and alpha < 1e-6
        start = 1 - T_EPS if vanishes else self.path.start
        known_at_end = self.prediction == "velocity" and self.path.end == 0
        times = torch.linspace(self._unshifted(start), self._unshifted(self.path.end), steps + 1, **exact)
        points = []
        for i, t in enumerate(self._shifted(times)):
            (alpha, dalpha), (sigma, dsigma) = self.path.alpha(t), self.path.sigma(t)
            known = known_at_end or i < steps
            points.append(
                Point(
                    t.item() if known else None, alpha.item(), sigma.item(), scale=1.0, clock=t.item(),
                    slope=(dalpha.item(), dsigma.item()),
                )
            )  # fmt: skip
        return points

    def _predictor(self, model, guidance, model_kwargs, clip_denoised):
        """A model as solvers ask it: (x, point) to (x_start, noise)."""

        def predict(x, point):
            guided = model
            if guidance is not None:
                level = point.sigma / point.alpha if point.alpha > 0 else math.inf
                guided = guidance.wrap(model, level, point.time)
            t = torch.full((len(x),), point.time, device=x.device, dtype=torch.float32)
            output = self._call(guided, x, t, model_kwargs)
            a, s = (point.alpha, point.slope[0]), (point.sigma, point.slope[1])
            x_start, noise = self.interpret(output, x, a, s)
            if clip_denoised and point.sigma > 0:
                x_start = x_start.clamp(-1, 1)
                noise = (x - point.alpha * x_start) / point.sigma
            return x_start, noise

        return predict

    def sample(
        self, model, noise, *, sampler="euler", steps=None, model_kwargs=None, guidance=None, randn_like=None,
        callback=None, clip_denoised=False,
    ):  # fmt: skip
        """Flow from noise (N, C, …) to x (N, C, …).

        sampler      one of `samplers`
        steps        how many; 50 by default
        guidance, randn_like, callback   as GaussianDiffusion.sample's
        """
        count = self.count_steps(sampler, steps)
        points = self.points(count)
        predict = self._predictor(model, guidance, model_kwargs, clip_denoised)
        x = noise * points[0].sigma  # the signal there, 1/80 at most, is left out
        states = SOLVERS[sampler](predict, x, points, randn_like)
        return run_solver(states, x, [point.clock for point in points[:-1]], callback)

    def invert(self, model, x_start, *, steps=None, model_kwargs=None, callback=None, clip_denoised=False):
        """The noise (N, C, …) that flows to about x_start: the same straight steps, the other way."""
        points = self.points(self.count_steps("ddim", steps))[::-1]
        if points[0].time is None:  # where the model knows nothing, it is asked next to it
            points = points[1:]
        states = SOLVERS["ddim"](self._predictor(model, None, model_kwargs, clip_denoised), x_start, points)
        x = run_solver(states, x_start, [point.clock for point in points[:-1]], callback)
        return x / points[-1].sigma
