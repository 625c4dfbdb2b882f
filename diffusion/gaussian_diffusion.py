"""Gaussian diffusion: noise schedules, training losses and samplers.

DDPM (Ho et al., arXiv 2006.11239), improved DDPM (Nichol & Dhariwal, arXiv 2102.09672), DDIM (Song et al.,
arXiv 2010.02502), guided diffusion (Dhariwal & Nichol, arXiv 2105.05233).

Notation: x_start clean, x_t noisy, t (N,) a step of this process, 0 the cleanest; a_bar = alphas_cumprod;
q(x_t | x_start) = N(sqrt(a_bar) x_start, 1 - a_bar).
Tables are float64 numpy arrays, computed once and read as float32 from a copy on the device of t.
"""

import enum
import functools
import itertools
import math
from collections import deque

import numpy as np
import torch
from tqdm.auto import tqdm

from .diffusion_utils import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from .schedules import (
    betas_for_alpha_bar,
    get_beta_schedule,
    get_named_beta_schedule,
    noisiest_step,
    respaced_betas,
    space_timesteps,
)
from .solvers import SOLVERS, Point, check_sampler, default_steps, run_solver, samplers_of, whole_steps

__all__ = [
    "GaussianDiffusion", "LossType", "ModelMeanType", "ModelVarType", "betas_for_alpha_bar",
    "get_beta_schedule", "get_named_beta_schedule",
]  # fmt: skip


class ModelMeanType(enum.Enum):
    """What the model predicts."""

    START_X = enum.auto()  # x_start
    EPSILON = enum.auto()  # the noise


class ModelVarType(enum.Enum):
    """Where the variance of a denoising step comes from; the learned forms double the model's channels."""

    LEARNED = enum.auto()  # the model predicts its logarithm
    FIXED_SMALL = enum.auto()  # the posterior variance
    FIXED_LARGE = enum.auto()  # beta
    LEARNED_RANGE = enum.auto()  # it interpolates, in the logarithm, between the two (-1 small, 1 large)


class LossType(enum.Enum):
    """What training minimises."""

    MSE = enum.auto()  # squared error of the prediction, plus the bound of the variance where that is learned
    RESCALED_MSE = enum.auto()  # the same with the bound scaled as if all T terms were summed, over 1000
    KL = enum.auto()  # one term of the variational bound, in bits per dimension
    RESCALED_KL = enum.auto()  # that, scaled to estimate the whole bound

    @property
    def is_vb(self):
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion:
    """A diffusion process with these betas (T,), and how a model is trained for it and sampled with it.

    A model is a function (x, t, **model_kwargs) -> prediction, (N, C, …) or, where the variance is learned,
    (N, 2C, …). timestep_map (T,) are the times the model is given, by default 0 … T-1, and original_betas
    those of the process that the steps were taken out of; see SpacedDiffusion.
    config: plain data from which create_process builds the process again.
    """

    objective = "diffusion"
    sampling = dict(sampler="ddpm", steps=default_steps("ddpm"))  # unless told otherwise

    def __init__(
        self, *, betas, model_mean_type, model_var_type, loss_type, timestep_map=None, original_betas=None,
        config=None,
    ):  # fmt: skip
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self.config = dict(config or {})
        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(
                f"betas must be 1-D, in (0, 1]: got {betas.shape} from {betas.min()} to {betas.max()}"
            )
        self.num_timesteps = len(betas)
        self.timestep_map = np.arange(len(betas)) if timestep_map is None else np.array(timestep_map)

        self.betas = betas
        self.original_betas = betas if original_betas is None else np.array(original_betas, dtype=np.float64)
        self.original_num_steps = len(self.original_betas)
        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)

        # q(x_t | x_start), and x_start from x_t and the noise:
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        with np.errstate(divide="ignore"):  # a schedule may end in pure noise, a_bar = 0
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_start), DDPM eq. 6 and 7:
        rest, rest_prev = 1.0 - self.alphas_cumprod, 1.0 - self.alphas_cumprod_prev
        self.posterior_variance = betas * rest_prev / rest
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / rest
        self.posterior_mean_coef2 = rest_prev * np.sqrt(alphas) / rest
        # The first variance is 0, and stands in the logarithm as the second one; with a single step, as its
        # beta.
        floor = self.posterior_variance[1:2] if len(betas) > 1 else betas
        self.posterior_log_variance_clipped = np.log(np.append(floor, self.posterior_variance[1:]))
        self.log_betas = np.log(betas)
        fixed_large = np.append(floor, betas[1:])
        self._fixed_variance = {
            ModelVarType.FIXED_LARGE: (fixed_large, np.log(fixed_large)),
            ModelVarType.FIXED_SMALL: (self.posterior_variance, self.posterior_log_variance_clipped),
        }
        self._on_device = {}

    def respaced(self, spec):
        """The same process over other steps of the original schedule: a spacing, see space_timesteps."""
        return self._over(space_timesteps(self.original_num_steps, spec))

    def _over(self, steps):
        """The same process over a set of the original steps."""
        kept = sorted(steps)
        return GaussianDiffusion(
            betas=respaced_betas(self.original_betas, kept),
            timestep_map=kept,
            original_betas=self.original_betas,
            model_mean_type=self.model_mean_type,
            model_var_type=self.model_var_type,
            loss_type=self.loss_type,
            config=self.config,
        )

    @property
    def learns_variance(self):
        """Whether the model gives two values a channel: the mean's and the variance's."""
        return self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

    def _at(self, table, t, x):
        """Entries t (N,) of a table (T,), by name or as (variance, which), as float32 that broadcasts over x
        (N, …).

        The device's copy is made on first use: a copy a call would stall a GPU at each step.
        """
        key = (table, t.device)
        if key not in self._on_device:
            values = (
                getattr(self, table) if isinstance(table, str) else self._fixed_variance[table[0]][table[1]]
            )
            dtype = torch.int64 if table == "timestep_map" else torch.float32
            self._on_device[key] = torch.from_numpy(values).to(t.device, dtype)
        return self._on_device[key][t].view(-1, *[1] * (x.ndim - 1))

    def _call(self, model, x, t, model_kwargs):
        """The model, or a cond_fn, at the original step numbers; float32, since the arithmetic on it needs
        that."""
        return model(x, self._at("timestep_map", t, t), **(model_kwargs or {})).float()

    # -----------------------------------------------------------------------------------------
    # The forward process q

    def q_mean_variance(self, x_start, t):
        """Mean, variance and log-variance of q(x_t | x_start); the latter two (N, 1, …)."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        log_variance = self._at("log_one_minus_alphas_cumprod", t, x_start)
        return mean, self._at("sqrt_one_minus_alphas_cumprod", t, x_start) ** 2, log_variance

    def q_sample(self, x_start, t, noise=None):
        """x_t drawn from q(x_t | x_start) with this noise, or a fresh one."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * x_start
            + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Mean, variance and (clipped) log-variance of q(x_{t-1} | x_t, x_start); the latter two (N, 1,
        …)."""
        mean = (
            self._at("posterior_mean_coef1", t, x_t) * x_start
            + self._at("posterior_mean_coef2", t, x_t) * x_t
        )
        variance = self._at("posterior_variance", t, x_t)
        return mean, variance, self._at("posterior_log_variance_clipped", t, x_t)

    # -----------------------------------------------------------------------------------------
    # The reverse process p

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """One denoising step p(x_{t-1} | x_t): a dict of mean, variance, log_variance and pred_xstart, as x.

        clip_denoised   clamp the predicted x_start to [-1, 1] (for pixels; latents are not so bounded)
        denoised_fn     applied to the predicted x_start before that
        """
        output = self._call(model, x, t, model_kwargs)
        return self._interpret(output, x, t, clip_denoised, denoised_fn)

    def _interpret(self, output, x, t, clip_denoised=True, denoised_fn=None):
        """p_mean_variance from a model's output, already at hand."""
        self._check_output(output, x)
        if self.learns_variance:
            output, values = output.chunk(2, dim=1)
            if self.model_var_type is ModelVarType.LEARNED:
                log_variance = values
            else:
                low, high = self._at("posterior_log_variance_clipped", t, x), self._at("log_betas", t, x)
                fraction = (values + 1) / 2
                log_variance = fraction * high + (1 - fraction) * low
            variance = torch.exp(log_variance)
        else:
            variance = self._at((self.model_var_type, 0), t, x).expand(x.shape)
            log_variance = self._at((self.model_var_type, 1), t, x).expand(x.shape)

        if self.model_mean_type is ModelMeanType.START_X:
            pred_xstart = output
        else:
            pred_xstart = self._predict_xstart_from_eps(x, t, output)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return dict(mean=mean, variance=variance, log_variance=log_variance, pred_xstart=pred_xstart)

    def _check_output(self, output, x):
        channels = 2 * x.shape[1] if self.learns_variance else x.shape[1]
        if output.shape != (x.shape[0], channels, *x.shape[2:]):
            raise ValueError(
                f"the model returned {tuple(output.shape)} for x {tuple(x.shape)}: this process"
                f" ({self.model_var_type.name}) takes {channels} channels; learn_sigma of the two must agree"
            )

    def _predict_xstart_from_eps(self, x_t, t, eps):
        return (
            self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
            - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        )

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        recip = self._at("sqrt_recip_alphas_cumprod", t, x_t)
        return (recip * x_t - pred_xstart) / self._at("sqrt_recipm1_alphas_cumprod", t, x_t)

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """The mean of p_mean_var moved along cond_fn's gradient (guided diffusion, algorithm 1).

        cond_fn(x, t, **model_kwargs) is the gradient of log p(condition | x) with respect to x.
        """
        gradient = self._call(cond_fn, x, t, model_kwargs)
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """p_mean_var with mean and pred_xstart for a score moved along cond_fn's gradient (algorithm 2)."""
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - self._at("sqrt_one_minus_alphas_cumprod", t, x) * self._call(cond_fn, x, t, model_kwargs)
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return dict(p_mean_var, pred_xstart=pred_xstart, mean=mean)

    def p_sample(
        self,
        model,
        x,
        t,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        randn_like=None,
    ):
        """One ancestral step: a dict of sample (x_{t-1}) and pred_xstart. One draw of randn_like(x), also at
        t = 0."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = (randn_like or torch.randn_like)(x)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs)
        sample = out["mean"] + _unless_last(t, x) * torch.exp(0.5 * out["log_variance"]) * noise
        return dict(sample=sample, pred_xstart=out["pred_xstart"])

    def ddim_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0,
        randn_like=None,
    ):  # fmt: skip
        """One DDIM step (eq. 12): a dict of sample and pred_xstart. eta 0 is deterministic, 1 is
        ancestral."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        a_bar, a_bar_prev = self._at("alphas_cumprod", t, x), self._at("alphas_cumprod_prev", t, x)
        sigma = eta * torch.sqrt((1 - a_bar_prev) / (1 - a_bar)) * torch.sqrt(1 - a_bar / a_bar_prev)
        noise = (randn_like or torch.randn_like)(x)
        mean = out["pred_xstart"] * torch.sqrt(a_bar_prev) + torch.sqrt(1 - a_bar_prev - sigma**2) * eps
        return dict(sample=mean + _unless_last(t, x) * sigma * noise, pred_xstart=out["pred_xstart"])

    def ddim_reverse_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0
    ):
        """One deterministic DDIM step towards noise: a dict of sample (x_{t+1}) and pred_xstart."""
        if eta != 0.0:
            raise ValueError(f"eta {eta}: the reverse of DDIM exists only for eta 0")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        a_bar_next = self._at("alphas_cumprod_next", t, x)
        sample = out["pred_xstart"] * torch.sqrt(a_bar_next) + torch.sqrt(1 - a_bar_next) * eps
        return dict(sample=sample, pred_xstart=out["pred_xstart"])

    # -----------------------------------------------------------------------------------------
    # Sampling loops

    def p_sample_loop(self, model, shape, noise=None, **options):
        """Images (N, C, …) by ancestral sampling. Options: see p_sample_loop_progressive."""
        return _last(self.p_sample_loop_progressive(model, shape, noise, **options))

    def p_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, randn_like=None,
    ):  # fmt: skip
        """Ancestral sampling, yielding p_sample's dict after every step.

        shape         of x, (N, C, …); noise: the x to start from, drawn where it is None
        device        where to draw it; by default the model's
        progress      whether to show a bar
        randn_like    takes the place of torch.randn_like, called once a step
        """
        yield from self._loop(
            self.p_sample, model, shape, noise, device, progress, clip_denoised=clip_denoised,
            denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs, randn_like=randn_like,
        )  # fmt: skip

    def ddim_sample_loop(self, model, shape, noise=None, **options):
        """Images (N, C, …) by DDIM. Options: see ddim_sample_loop_progressive."""
        return _last(self.ddim_sample_loop_progressive(model, shape, noise, **options))

    def ddim_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, eta=0.0, randn_like=None,
    ):  # fmt: skip
        """DDIM, yielding ddim_sample's dict after every step. Options as p_sample_loop_progressive's, and
        eta."""
        yield from self._loop(
            self.ddim_sample, model, shape, noise, device, progress, clip_denoised=clip_denoised,
            denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs, eta=eta,
            randn_like=randn_like,
        )  # fmt: skip

    def _loop(self, step, model, shape, x, device, progress, **options):
        if x is None:
            x = torch.randn(*shape, dtype=torch.float32, device=device or _device_of(model))
        elif tuple(x.shape) != tuple(shape):
            raise ValueError(f"noise {tuple(x.shape)}: shape says {tuple(shape)}")
        indices = reversed(range(self.num_timesteps))
        for i in tqdm(indices, total=self.num_timesteps, disable=not progress, leave=False):
            t = torch.full((shape[0],), i, device=x.device)
            with torch.no_grad():  # not around the yield, which would turn gradients off in the caller
                out = step(model, x, t, **options)
            yield out
            x = out["sample"]

    # -----------------------------------------------------------------------------------------
    # The interface shared with other processes

    def sample_t(self, n, device, generator=None):
        """Training times: (n,) steps, uniform."""
        return torch.randint(0, self.num_timesteps, (n,), device=device, generator=generator)

    def count_steps(self, sampler, steps=None):
        """How many steps `sample` takes, and how often it calls back. Raises ValueError for what it cannot
        do."""
        check_sampler(sampler, self.objective)
        if self._walks(sampler):
            return len(self._steps_to_walk(steps))
        if steps is None:
            return min(self.num_timesteps, self.noisiest_step)
        return whole_steps(steps, sampler, most=self.noisiest_step)

    @property
    def samplers(self):
        """The names that `sample` takes."""
        return samplers_of(self.objective)

    @staticmethod
    def _walks(sampler):
        """Whether a sampler walks the steps of a (re)spaced process, as published: ddpm and ddim. The others
        solve its ODE."""
        return sampler == "ddim" or SOLVERS[sampler].function is None

    @functools.cached_property
    def noisiest_step(self):
        """The original step that sampling starts from; see schedules.noisiest_step."""
        return noisiest_step(self.original_betas)

    def _steps_to_walk(self, steps):
        """The set of original steps that ddpm and ddim take: the spacing's, where those after noisiest_step
        are replaced by the noisiest ones left, as far as there are any."""
        if steps is None:
            kept = set(self.timestep_map.tolist())
        else:
            kept = space_timesteps(self.original_num_steps, steps)
        allowed = {step for step in kept if step <= self.noisiest_step}
        free = (step for step in range(self.noisiest_step, -1, -1) if step not in kept)
        return allowed | set(itertools.islice(free, len(kept) - len(allowed)))

    def _to_walk(self, steps):
        """This process over those steps."""
        kept = self._steps_to_walk(steps)
        return self if kept == set(self.timestep_map.tolist()) else self._over(kept)

    def stratified_t(self, n, device):
        """Times (n,) for evaluation: the middles of n equal intervals, so that a mean over them is that over
        all steps. (Their left ends have step 0, where the loss is highest, among them.)"""
        return (2 * torch.arange(n, device=device) + 1) * self.num_timesteps // (2 * n)

    def sample(
        self, model, noise, *, sampler="ddpm", steps=None, model_kwargs=None, guidance=None, randn_like=None,
        callback=None, clip_denoised=False,
    ):  # fmt: skip
        """Denoise: noise (N, C, …) to x (N, C, …).

        sampler      one of `samplers`: "ddpm" (ancestral), or a solver, good with fewer steps
        steps        how many; for ddpm and ddim also a spacing as "10,15,20" or "ddim50"; None for as many as
                     this process has
        guidance     turns the model into a guided one; see guidance.py
        randn_like   takes the place of torch.randn_like in a stochastic sampler; ddpm calls it once a step
        callback     called after every step with a dict of i (steps done so far), t (the model's time), x,
                     pred_xstart
        """
        count = self.count_steps(sampler, steps)
        options = dict(model_kwargs=model_kwargs, clip_denoised=clip_denoised)
        if self._walks(sampler):
            process = self._to_walk(steps)
            states = process._ancestral_or_ddim(model, noise, sampler, guidance, randn_like, **options)
            times = process.timestep_map[::-1].tolist()
        else:
            points = self.points(count)
            states = SOLVERS[sampler](self._predictor(model, guidance, **options), noise, points, randn_like)
            times = [point.time for point in points[:-1]]
        return run_solver(states, noise, times, callback)

    def _ancestral_or_ddim(self, model, x, sampler, guidance, randn_like, **options):
        """Yield (x, pred_xstart) for every step of this process, as the published loops do."""
        step, levels = self.p_sample, np.sqrt(1 / self.alphas_cumprod - 1)
        if sampler == "ddim":  # whose noise is weighed by 0
            step, randn_like = self.ddim_sample, torch.zeros_like
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((len(x),), i, device=x.device)
            time = self.timestep_map[i] / self.original_num_steps
            guided = model if guidance is None else guidance.wrap(model, levels[i], time)
            out = step(guided, x, t, randn_like=randn_like, **options)
            x = out["sample"]
            yield x, out["pred_xstart"]

    def invert(self, model, x_start, *, steps=None, model_kwargs=None, callback=None, clip_denoised=False):
        """DDIM in reverse: the noise (N, C, …) from which DDIM with these steps leads back to about
        x_start."""
        process, x = self._to_walk(steps), x_start
        for i in range(process.num_timesteps - 1):
            t = torch.full((len(x),), i, device=x.device)
            with torch.no_grad():
                out = process.ddim_reverse_sample(
                    model, x, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
                )
            x = out["sample"]
            if callback is not None:
                callback(dict(i=i + 1, t=int(process.timestep_map[i]), x=x, pred_xstart=out["pred_xstart"]))
        return x

    def points(self, steps):
        """The points of a solver, evenly over the original steps from the noisiest one, and clean data at the
        end."""
        a_bar, points = np.cumprod(1 - self.original_betas), []
        for i in np.linspace(0, self.noisiest_step, steps + 1).round().astype(int)[:0:-1].tolist():
            alpha, sigma = math.sqrt(a_bar[i]), math.sqrt(1 - a_bar[i])
            points.append(Point(i, alpha, sigma, scale=alpha, clock=sigma / alpha, slope=(0.0, 1.0)))
        return [*points, Point(None, 1.0, 0.0, scale=1.0, clock=0.0, slope=(0.0, 1.0))]

    def _predictor(self, model, guidance, model_kwargs, clip_denoised):
        """A model as solvers ask it: (x, point) to (x_start, noise)."""

        def predict(x, point):
            time, guided = point.time / self.original_num_steps, model
            if guidance is not None:
                guided = guidance.wrap(model, point.sigma / point.alpha, time)
            t = torch.full((len(x),), point.time, device=x.device)
            output = guided(x, t, **(model_kwargs or {})).float()
            self._check_output(output, x)
            output = output[:, : x.shape[1]]
            if self.model_mean_type is ModelMeanType.EPSILON:
                noise, x_start = output, (x - point.sigma * output) / point.alpha
                if not clip_denoised:
                    return x_start, noise
            else:
                x_start = output
            x_start = x_start.clamp(-1, 1) if clip_denoised else x_start
            return x_start, (x - point.alpha * x_start) / point.sigma

        return predict

    # -----------------------------------------------------------------------------------------
    # Training and evaluation

    def training_losses(self, model, x_start, t=None, model_kwargs=None, noise=None):
        """The loss of every row of x_start (N, C, …) at steps t (N,): a dict of (N,) tensors.

        "loss" is what to minimise; "mse" and "vb" (bits per dimension) are its parts, where it has them.
        t and noise are drawn where they are None.
        """
        t = self.sample_t(len(x_start), x_start.device) if t is None else t
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output = self._call(model, x_t, t, model_kwargs)

        if self.loss_type.is_vb:
            loss = self._vb_terms_bpd(output, x_start, x_t, t, clip_denoised=False)["output"]
            return dict(loss=loss * self.num_timesteps if self.loss_type is LossType.RESCALED_KL else loss)

        terms, prediction = {}, output
        if self.learns_variance:
            # The bound trains the variance alone: its gradient through the mean is stopped (improved DDPM,
            # 3.1).
            prediction, values = output.chunk(2, dim=1)
            frozen = torch.cat([prediction.detach(), values], dim=1)
            terms["vb"] = self._vb_terms_bpd(frozen, x_start, x_t, t, clip_denoised=False)["output"]
            if self.loss_type is LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
        target = x_start if self.model_mean_type is ModelMeanType.START_X else noise
        terms["mse"] = mean_flat((target - prediction) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _vb_terms_bpd(self, output, x_start, x_t, t, clip_denoised=True):
        """The term of the variational bound at t, in bits per dimension (N,): a dict of output and
        pred_xstart."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self._interpret(output, x_t, t, clip_denoised)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        bound = mean_flat(kl) / math.log(2.0)
        # At t = 0 the term is a likelihood instead. Where looking is free (a GPU would have to be waited
        # for), it is computed only if some row is there.
        if t.device.type != "cpu" or bool((t == 0).any()):
            likelihood = discretized_gaussian_log_likelihood(
                x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
            )
            bound = torch.where(t == 0, -mean_flat(likelihood) / math.log(2.0), bound)
        return dict(output=bound, pred_xstart=out["pred_xstart"])

    def _prior_bpd(self, x_start):
        """KL of q(x_T | x_start) from N(0, 1), in bits per dimension (N,): a constant of the process and
        data."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    @torch.no_grad()
    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None):
        """The whole variational bound of 8-bit images x_start in [-1, 1], in bits per dimension.

        A dict of total_bpd and prior_bpd (N,), and of vb, xstart_mse and mse (N, T), column 0 the noisiest
        step."""
        vb, xstart_mse, mse = [], [], []
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((len(x_start),), i, device=x_start.device)
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            output = self._call(model, x_t, t, model_kwargs)
            terms = self._vb_terms_bpd(output, x_start, x_t, t, clip_denoised)
            eps = self._predict_eps_from_xstart(x_t, t, terms["pred_xstart"])
            vb.append(terms["output"])
            xstart_mse.append(mean_flat((terms["pred_xstart"] - x_start) ** 2))
            mse.append(mean_flat((eps - noise) ** 2))
        vb, xstart_mse, mse = (torch.stack(columns, dim=1) for columns in (vb, xstart_mse, mse))
        prior = self._prior_bpd(x_start)
        return dict(total_bpd=vb.sum(dim=1) + prior, prior_bpd=prior, vb=vb, xstart_mse=xstart_mse, mse=mse)


def _unless_last(t, x):
    """1 where t is not the last step, 0, else 0; broadcasts over x."""
    return (t != 0).float().view(-1, *[1] * (x.ndim - 1))


def _last(steps):
    (out,) = deque(steps, maxlen=1)
    return out["sample"]


def _device_of(model):
    """Where a model, or a method of one, has its weights; the CPU for a plain function."""
    module = getattr(model, "__self__", model)
    parameter = next(module.parameters(), None) if isinstance(module, torch.nn.Module) else None
    return parameter.device if parameter is not None else torch.device("cpu")
