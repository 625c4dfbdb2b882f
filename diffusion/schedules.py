"""Noise schedules by name: betas, the share of noise that each step adds; and which of the steps are kept."""

import math
import operator
from functools import partial

import numpy as np

# Where a schedule ends in a cliff, sampling starts below this noise level sigma / alpha; see noisiest_step:
START_LEVEL = 80.0  # the highest one of Karras et al., arXiv 2206.00364
STEEP = 20.0  # a cliff: ln(alpha) falls this fast, over all steps as one; the linear schedule's end by 10


def _warmup(share):
    def betas(start, end, steps):
        betas, rising = np.full(steps, end, dtype=np.float64), int(steps * share)
        betas[:rising] = np.linspace(start, end, rising, dtype=np.float64)
        return betas

    return betas


# DDPM's schedules between two values: functions of (start, end, steps) to betas, float64 (steps,)
SCHEDULES_BETWEEN = {
    "linear": lambda start, end, steps: np.linspace(start, end, steps, dtype=np.float64),
    "quad": lambda start, end, steps: np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2,
    "const": lambda start, end, steps: np.full(steps, end, dtype=np.float64),
    "warmup10": _warmup(0.1),
    "warmup50": _warmup(0.5),
    "jsd": lambda start, end, steps: 1.0 / np.linspace(steps, 1, steps, dtype=np.float64),
}


def get_beta_schedule(beta_schedule, *, beta_start, beta_end, num_diffusion_timesteps):
    """Betas, float64 (num_diffusion_timesteps,), of one of SCHEDULES_BETWEEN."""
    if beta_schedule not in SCHEDULES_BETWEEN:
        raise ValueError(f"noise schedule {beta_schedule!r}: choose one of {', '.join(SCHEDULES_BETWEEN)}")
    return SCHEDULES_BETWEEN[beta_schedule](beta_start, beta_end, num_diffusion_timesteps)


def betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta=0.999):
    """Betas that give a_bar(u), a function of u in [0, 1], none above max_beta."""
    steps = num_diffusion_timesteps
    ratios = [alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
    return np.array([min(1 - ratio, max_beta) for ratio in ratios], dtype=np.float64)


def cosine(steps):
    """Betas of improved DDPM's schedule (arXiv 2102.09672, eq. 17)."""
    return betas_for_alpha_bar(steps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)


def _scaled(name, steps):
    scale = 1000 / steps
    return get_beta_schedule(
        name, beta_start=scale * 0.0001, beta_end=scale * 0.02, num_diffusion_timesteps=steps
    )


# The choices of --noise-schedule: functions of the number of steps to betas (steps,) in (0, 1]. DDPM's keep
# their shape, scaled from 1000 steps.
NOISE_SCHEDULES = {
    **{name: partial(_scaled, name) for name in SCHEDULES_BETWEEN},
    "squaredcos_cap_v2": cosine,
}


def get_named_beta_schedule(schedule_name, num_diffusion_timesteps):
    """Betas, float64 (num_diffusion_timesteps,), of one of NOISE_SCHEDULES; "cosine" is squaredcos_cap_v2."""
    name = "squaredcos_cap_v2" if schedule_name == "cosine" else schedule_name
    if name not in NOISE_SCHEDULES:
        raise ValueError(f"noise schedule {name!r}: choose one of {', '.join(NOISE_SCHEDULES)}")
    betas = np.asarray(NOISE_SCHEDULES[name](num_diffusion_timesteps), dtype=np.float64)
    if betas.shape != (num_diffusion_timesteps,) or not (betas > 0).all():
        raise ValueError(
            f"noise schedule {name!r}: must give {num_diffusion_timesteps} betas above 0, and gave"
            f" {betas.shape} from {betas.min(initial=1)}"
        )
    return betas


def space_timesteps(num_timesteps, section_counts):
    """The set of steps, out of range(num_timesteps), that a spacing keeps.

    section_counts   "ddimN"   N steps a whole-number stride apart, starting at 0 (DDIM's spacing)
                     "a,b,c"   cut the steps into equal sections and keep a, b, c of them, evenly; also [a, b,
                               c]
                     "N", N    N steps, evenly from the first to the last
    Raises ValueError, naming the value, where that cannot be done.
    """
    spec = section_counts
    if isinstance(spec, str) and spec.startswith("ddim"):
        return _stride_steps(num_timesteps, spec)
    if isinstance(spec, str):
        try:
            counts = [int(count) for count in spec.split(",")]
        except ValueError:
            raise ValueError(
                f"{spec!r} is not a number of steps: give a number as 250, numbers as 10,15,20, or ddim50"
            ) from None
    else:
        try:
            counts = [operator.index(count) for count in ([spec] if np.isscalar(spec) else spec)]
        except TypeError:
            raise ValueError(f"{spec!r} is not a whole number of steps") from None
    if any(count < 0 for count in counts) or sum(counts) < 1:
        raise ValueError(f"{spec!r} steps: there must be at least 1")

    steps, start = [], 0
    size, remainder = divmod(num_timesteps, len(counts))
    for section, count in enumerate(counts):
        length = size + (section < remainder)
        if count > length:
            raise ValueError(f"{spec!r}: {count} steps cannot be taken out of {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        # A float grown by repeated addition, then rounded half to even: for some counts (21, 23, 31 …) this
        # differs from rounding a linspace, and the published weights are sampled with it.
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += length
    return set(steps)


def _stride_steps(num_timesteps, spec):
    try:
        wanted = int(spec.removeprefix("ddim"))
    except ValueError:
        raise ValueError(f"{spec!r} is not a number of steps: ddim takes a whole number, as ddim50") from None
    feasible = {len(range(0, num_timesteps, stride)): stride for stride in range(num_timesteps, 0, -1)}
    if wanted not in feasible:  # the dict keeps the smallest stride of each count
        nearest = sorted(sorted(feasible), key=lambda count: abs(count - wanted))[:2]
        raise ValueError(
            f"{spec!r}: no whole-number stride gives {wanted} of {num_timesteps} steps;"
            f" the nearest that exist are {' and '.join(f'ddim{count}' for count in sorted(nearest))}"
        )
    return set(range(0, num_timesteps, feasible[wanted]))


def respaced_betas(betas, kept):
    """The betas, float64 (len(kept),), of the process over the kept steps (ascending) of the one with these
    betas (T,): the marginals q(x_t | x_start) stay what they are."""
    alphas_cumprod = np.cumprod(1.0 - betas)[kept]
    return 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


def noisiest_step(betas):
    """The step that sampling starts from, of the process with these betas (T,): the last one, unless the
    schedule ends in a cliff.

    The last steps of the cosine schedule hold a signal of 1/80 to 1/20000, and that of "jsd" none at all, but
    one or two steps of sampling later it is a tenth. Predicted noise gives x_start with the error of the
    prediction times sigma / alpha, so a sampler that started there would multiply that error by hundreds. The
    steps that are skipped are pure noise but for 1/START_LEVEL.
    """
    signal, step = np.sqrt(np.cumprod(1 - betas)), len(betas) - 1
    steep = math.exp(-STEEP / len(betas))
    while step > 1 and signal[step] < 1 / START_LEVEL and signal[step] < steep * signal[step - 1]:
        step -= 1
    return step
