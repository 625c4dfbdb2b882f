"""Processes that turn noise into images: how they are trained and sampled."""

from .flow_matching import PATHS, FlowMatching
from .gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from .guidance import SCHEDULES, Guidance
from .respace import SpacedDiffusion, space_timesteps
from .solvers import SOLVERS

__all__ = [
    "PATHS", "SCHEDULES", "SOLVERS", "FlowMatching", "Guidance", "SpacedDiffusion", "create_diffusion",
    "create_flow", "create_process", "space_timesteps",
]  # fmt: skip


def create_diffusion(
    timestep_respacing,
    noise_schedule="linear",
    use_kl=False,
    sigma_small=False,
    predict_xstart=False,
    learn_sigma=True,
    rescale_learned_sigmas=False,
    diffusion_steps=1000,
):
    """A Gaussian diffusion; the defaults are those of the paper, for training.

    timestep_respacing   which steps to keep: None or "" for all, 250 or "250", "10,15,20", "ddim50"
    noise_schedule       one of schedules.NOISE_SCHEDULES: "linear", "squaredcos_cap_v2" and others
    use_kl               train by the variational bound alone, rather than by the squared error
    sigma_small          without learned variance: the posterior variance rather than beta
    predict_xstart       the model predicts x_start rather than the noise
    learn_sigma          the model predicts the variance too, in a second half of channels
    rescale_learned_sigmas  weigh the bound, which trains the variance, by diffusion_steps / 1000
    diffusion_steps      steps of the full process
    Raises ValueError where the schedule or the spacing is impossible.
    """
    betas = get_named_beta_schedule(noise_schedule, diffusion_steps)
    if betas.max() > 1:
        raise ValueError(
            f"diffusion_steps {diffusion_steps}: the {noise_schedule} schedule needs at least 20"
            f" (its largest beta would be {betas.max():.3g}, above 1)"
        )
    if use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    if learn_sigma:
        model_var_type = ModelVarType.LEARNED_RANGE
    else:
        model_var_type = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    spacing = (
        diffusion_steps if timestep_respacing is None or timestep_respacing == "" else timestep_respacing
    )
    return SpacedDiffusion(
        space_timesteps(diffusion_steps, spacing),
        betas=betas,
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=model_var_type,
        loss_type=loss_type,
        config=dict(
            objective="diffusion", noise_schedule=noise_schedule, use_kl=use_kl, sigma_small=sigma_small,
            predict_xstart=predict_xstart, learn_sigma=learn_sigma,
            rescale_learned_sigmas=rescale_learned_sigmas, diffusion_steps=diffusion_steps,
        ),
    )  # fmt: skip


def create_flow(**options):
    """A flow; the defaults are straight lines, velocities and uniform times. Options: see FlowMatching."""
    return FlowMatching(**options)


OBJECTIVES = {"diffusion": lambda **options: create_diffusion(None, **options), "flow": create_flow}


def create_process(config):
    """The training process of a plain dict: its "objective" and that constructor's options; see
    process.config."""
    options = dict(config)
    objective = options.pop("objective", "diffusion")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective](**options)
