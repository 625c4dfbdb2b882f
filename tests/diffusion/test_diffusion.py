"""The Gaussian diffusion: closed forms, a peer implementation, and the promises beyond the published
package."""

import re

import numpy as np
import pytest
import torch
from closed_forms import MEAN, SCHEDULE, STD, final_std, ideal_model
from conftest import OTHER_DEFAULTS, build_tiny, load_rule_weights, other_defaults, rule_input

from diffusion import Guidance, create_diffusion, create_flow, create_process
from diffusion.diffusion_utils import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    normal_kl,
)
from diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from diffusion.timestep_sampler import LossSecondMomentResampler, create_named_schedule_sampler


@pytest.mark.parametrize("dtype, device", OTHER_DEFAULTS)
def test_default_dtype_and_device_change_nothing(dtype, device):
    """Times, losses, a dropped label and a published loop are those of float32 on the CPU."""
    model = load_rule_weights(build_tiny(learn_sigma=False, class_dropout_prob=0.5), 0.1).train()
    x_start, kwargs = rule_input("x0", 6, 4, 8, 8), dict(y=torch.arange(6))

    def everything():
        torch.manual_seed(0)
        found, diffusion = [], create_diffusion("10", learn_sigma=False)
        for process, names in (
            (diffusion, ["uniform", "loss-second-moment"]), (create_flow(), ["uniform"]),
            (create_flow(time_sampling="logit-normal"), ["logit-normal"]),
        ):  # fmt: skip
            found += [
                process.training_losses(model, x_start, None, kwargs)["loss"],
                process.stratified_t(7, "cpu"),
            ]
            for name in names:
                sampler = create_named_schedule_sampler(name, process)
                sampler.update_with_local_losses(*[torch.ones(2, device="cpu", dtype=torch.int64)] * 2)
                found += sampler.sample(5, "cpu")
        return [*found, diffusion.p_sample_loop(model, x_start.shape, model_kwargs=kwargs)]

    expected = everything()
    with other_defaults(dtype, device):
        found = everything()
    assert all(one.dtype == other.dtype for one, other in zip(found, expected, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


# ---------------------------------------------------------------------------------------------
# Closed forms


@pytest.mark.parametrize(
    "value, expected", [(-1, (0, 0)), (0, (0.0493116, 0.00188512)), (1, (0.1751248, 0.00736202))]
)
def test_bound_of_a_perfect_prediction(value, expected):
    """With the noise known, the bound measures the variance alone: none at the posterior's, more beside
    it."""
    diffusion, noise = create_diffusion(""), torch.randn(2, 1, 64, 64)
    terms = diffusion.training_losses(
        lambda x, t: torch.cat([noise, torch.full_like(noise, value)], dim=1),
        torch.randn(2, 1, 64, 64), torch.tensor([1, 10]), noise=noise,
    )  # fmt: skip
    assert terms["mse"].abs().max() == 0
    assert terms["vb"].tolist() == pytest.approx(expected, abs=1e-6)


def test_loss_of_a_zero_network():
    torch.manual_seed(0)
    diffusion = create_diffusion("", learn_sigma=False)
    terms = diffusion.training_losses(lambda x, t: torch.zeros_like(x), torch.randn(64, 4, 32, 32))
    assert set(terms) == {"loss", "mse"}
    assert terms["mse"].mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("steps, expected", [(5, 0.22504), (10, 0.36161), (20, 0.43045), (50, 0.47192)])
def test_ddim_on_gaussian_data(steps, expected):
    assert final_std(create_diffusion(str(steps), learn_sigma=False), "ddim_sample_loop") == pytest.approx(
        expected, abs=2e-5
    )


@pytest.mark.parametrize("steps, small, large", [(10, 0.10422, 0.35852), (250, 0.23602, 0.25335)])
def test_ancestral_sampling_on_gaussian_data(steps, small, large):
    """The variance of the output, for data of variance 0.25."""
    for sigma_small, expected in ((True, small), (False, large)):
        diffusion = create_diffusion(str(steps), learn_sigma=False, sigma_small=sigma_small)
        assert final_std(diffusion, "p_sample_loop") ** 2 == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_even_times_give_the_expected_loss(schedule):
    """A few images, each at one of the even times, have the mean loss of all steps."""
    torch.manual_seed(0)
    diffusion = create_diffusion(None, schedule, learn_sigma=False)
    losses = [  # the noise of 4,096 pixels is known to 2 %, the mean of 36 or more losses to 0.4 %
        diffusion.training_losses(ideal_model(diffusion), MEAN + STD * torch.randn(n, 1, 64, 64), t)["loss"]
        for n in (36, 75, 300, 1000, 1024)
        for t in [diffusion.stratified_t(n, "cpu")]
    ]
    expected = losses[3].mean().item()  # every step once
    for found in losses:
        assert found.mean().item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("n", [1, 2, 7, 999, 1000, 1001, 2500])
def test_even_times(n):
    """Their mean is that of all steps, fewer or more than there are; each is found as often as any other."""
    for diffusion in (create_diffusion(None), create_diffusion("100")):
        t, steps = diffusion.stratified_t(n, "cpu"), diffusion.num_timesteps
        assert t.dtype == torch.int64 and len(t) == n and t.min() >= 0 and t.max() < steps
        assert t.double().mean().item() == pytest.approx((steps - 1) / 2, abs=0.5)
        counts = torch.bincount(t, minlength=steps)
        assert counts.max() - counts.min() <= 1 and torch.equal(t, t.sort().values)


def test_reverse_ddim_and_back():
    diffusion = create_diffusion("250", learn_sigma=False)
    model, x_start = ideal_model(diffusion), MEAN + STD * torch.randn(4, 1, 8, 8)
    x = x_start
    for i in range(diffusion.num_timesteps - 1):
        x = diffusion.ddim_reverse_sample(model, x, torch.full((4,), i), clip_denoised=False)["sample"]
    assert x.std().item() == pytest.approx(1, abs=0.2)
    back = diffusion.ddim_sample_loop(model, x.shape, x, clip_denoised=False)
    assert (back - x_start).abs().max() < 0.05
    with pytest.raises(ValueError, match="eta 0.5"):
        diffusion.ddim_reverse_sample(model, x, torch.full((4,), 3), eta=0.5)


@pytest.mark.parametrize("channels", [3, None])
def test_guidance_moves_the_mean_alone(channels):
    """With equal covariances, guidance samples the Gaussian of mean u + w (c - u)."""
    diffusion, c, u, w = create_diffusion("20", learn_sigma=False), 0.5, -0.25, 3.0

    def model(x, t, y):
        mean = torch.where(y == 10, u, c).view(-1, 1, 1, 1)
        return ideal_model(diffusion)(x, t, mean=mean)

    z, y = torch.randn(4, 4, 8, 8), torch.zeros(4, dtype=torch.long)
    out = diffusion.sample(
        model,
        z,
        sampler="ddim",
        model_kwargs=dict(y=y),
        guidance=Guidance(w, null_label=10, channels=channels),
    )
    moved = diffusion.ddim_sample_loop(
        ideal_model(diffusion, u + w * (c - u)), z.shape, z, clip_denoised=False
    )
    plain = diffusion.ddim_sample_loop(ideal_model(diffusion, c), z.shape, z, clip_denoised=False)
    torch.testing.assert_close(out[:, :3], moved[:, :3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out[:, 3:], (plain if channels == 3 else moved)[:, 3:], atol=1e-4, rtol=1e-4)


def test_guidance_is_forward_with_cfg(tiny):
    """The guided function on N rows gives the bits of the published method on 2N."""
    x, t, y = rule_input("z", 4, 4, 8, 8), torch.full((4,), 333), torch.tensor([0, 3, 9, 5])
    published = tiny.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y * 0 + 10]), 1.5)
    assert torch.equal(Guidance(1.5, 10, channels=3).wrap(tiny)(x, t, y), published[:4])


def test_guidance_of_one_channel_leaves_its_variance():
    model = load_rule_weights(build_tiny(in_channels=1), 0.1).eval()
    x, t, y = torch.randn(2, 1, 8, 8), torch.full((2,), 333), torch.tensor([3, 5])
    published = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y * 0 + 10]), 4.0)
    assert torch.equal(Guidance(4.0, 10).wrap(model)(x, t, y), published[:2])
    torch.testing.assert_close(published[:2, 1:], model(x, t, y)[:, 1:], atol=1e-5, rtol=1e-5)


def test_condition_functions_shift_the_mean():
    """A constant gradient g moves the ancestral mean by variance · g, and DDIM's noise by -sqrt(1 - a_bar)
    g."""
    diffusion = create_diffusion("10", learn_sigma=False, sigma_small=True)
    model, x, t = ideal_model(diffusion), torch.randn(2, 1, 4, 4), torch.tensor([5, 5])
    seen = []

    def cond_fn(x, t):
        seen.append(t.tolist())
        return torch.full_like(x, 2.0)

    def no_noise(x):
        return torch.zeros_like(x)

    options = dict(clip_denoised=False, randn_like=no_noise)
    moved = diffusion.p_sample(model, x, t, cond_fn=cond_fn, **options)["sample"]
    plain = diffusion.p_sample(model, x, t, **options)["sample"]
    torch.testing.assert_close(moved - plain, torch.full_like(x, 2 * diffusion.posterior_variance[5]))
    assert seen == [[diffusion.timestep_map[5]] * 2]  # the condition, too, is asked at the original step
    moved = diffusion.ddim_sample(model, x, t, cond_fn=cond_fn, **options)
    plain = diffusion.ddim_sample(model, x, t, **options)
    a, b = diffusion.alphas_cumprod[5], diffusion.alphas_cumprod[4]
    shift = 2 * (1 - a) / np.sqrt(a)  # of pred_xstart
    torch.testing.assert_close(moved["pred_xstart"] - plain["pred_xstart"], torch.full_like(x, shift))
    expected = shift * np.sqrt(b) - 2 * np.sqrt(1 - a) * np.sqrt(1 - b)
    torch.testing.assert_close(
        moved["sample"] - plain["sample"], torch.full_like(x, expected), atol=1e-5, rtol=1e-4
    )


def test_utils():
    grid = torch.linspace(-4, 4, 101, dtype=torch.float64)
    exact = torch.special.ndtr(grid)
    assert (approx_standard_normal_cdf(grid) - exact).abs().max() < 2e-4
    kl = normal_kl(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.0), torch.tensor(np.log(4.0)))
    assert kl.item() == pytest.approx(0.5 * (np.log(4) - 1 + 2 / 4), abs=1e-6)
    with pytest.raises(TypeError):
        normal_kl(0.0, 0.0, 0.0, 0.0)
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(-1, 1)
    mean, scale = torch.full_like(levels, 0.3), torch.full_like(levels, np.log(0.2))
    total = discretized_gaussian_log_likelihood(levels, means=mean, log_scales=scale).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-6)  # the 256 bins cover the line


# ---------------------------------------------------------------------------------------------
# diffusers' schedulers as peers


@pytest.mark.parametrize("steps", [10, 50])
def test_ddpm_matches_diffusers(tiny, steps):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        variance_type="learned_range", timestep_spacing="linspace", clip_sample=False, **SCHEDULE
    )
    scheduler.set_timesteps(steps)
    y, x = torch.tensor([0, 3, 9, 5]), rule_input("z", 4, 4, 8, 8)
    generator = torch.Generator().manual_seed(0)
    ours = create_diffusion(str(steps)).p_sample_loop(
        tiny, x.shape, x, clip_denoised=False, model_kwargs=dict(y=y),
        randn_like=lambda x: torch.randn(x.shape, generator=generator),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(tiny(x, t.repeat(4), y), t, x, generator=generator).prev_sample
    torch.testing.assert_close(ours, x, atol=2e-3, rtol=2e-3)  # diffusers' tables are float32


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_matches_diffusers(tiny, steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        clip_sample=False, set_alpha_to_one=True, steps_offset=0, timestep_spacing="leading", **SCHEDULE
    )
    scheduler.set_timesteps(steps)
    y, x = torch.tensor([0, 3, 9, 5]), rule_input("z", 4, 4, 8, 8)
    ours = create_diffusion(f"ddim{steps}").ddim_sample_loop(
        tiny, x.shape, x, clip_denoised=False, model_kwargs=dict(y=y)
    )
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(tiny(x, t.repeat(4), y)[:, :4], t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=2e-3, rtol=2e-3)


# ---------------------------------------------------------------------------------------------
# Schedules and spacings


@pytest.mark.parametrize(
    "spec, message",
    [
        ("0", "'0' steps: there must be at least 1"),
        (0, "0 steps: there must be at least 1"),
        ("-5", "'-5' steps: there must be at least 1"),
        ("abc", "'abc' is not a number of steps"),
        ("ddim13.5", "'ddim13.5' is not a number of steps: ddim takes a whole number"),
        ("5000", "'5000': 5000 steps cannot be taken out of 1000"),
        ("10,400,10", "'10,400,10': 400 steps cannot be taken out of 333"),
        (
            "ddim98",
            "no whole-number stride gives 98 of 1000 steps; the nearest that exist are ddim91 and ddim100",
        ),
        ("ddim0", "no whole-number stride gives 0 of 1000 steps"),
    ],
)
def test_impossible_spacings(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_diffusion(spec)


@pytest.mark.parametrize("spec", [None, "", 1000, "1000"])
def test_all_steps(spec):
    np.testing.assert_array_equal(create_diffusion(spec).timestep_map, np.arange(1000))


def test_too_few_steps_for_the_schedule():
    with pytest.raises(ValueError, match="diffusion_steps 10: the linear schedule needs at least 20"):
        create_diffusion("", diffusion_steps=10)
    assert create_diffusion("", diffusion_steps=20).num_timesteps == 20
    assert create_diffusion("", "cosine", diffusion_steps=10).num_timesteps == 10
    with pytest.raises(ValueError, match="noise schedule 'wobbly': choose one of linear"):
        create_diffusion("", "wobbly")


@pytest.mark.parametrize("options", [{}, dict(learn_sigma=False), dict(learn_sigma=False, sigma_small=True)])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_one_step(options, loop):
    diffusion = create_diffusion("1", **options)
    channels = 2 if diffusion.learns_variance else 1
    out = getattr(diffusion, loop)(lambda x, t: torch.zeros(2, channels, 4, 4), (2, 1, 4, 4))
    assert torch.isfinite(out).all()
    losses = diffusion.training_losses(lambda x, t: torch.zeros(2, channels, 4, 4), torch.zeros(2, 1, 4, 4))
    assert torch.isfinite(losses["loss"]).all()


def test_respacing_keeps_the_marginals():
    full, spaced = create_diffusion(""), create_diffusion("10,15,20")
    np.testing.assert_allclose(spaced.alphas_cumprod, full.alphas_cumprod[spaced.timestep_map], rtol=1e-10)
    again = spaced.respaced(1000)
    np.testing.assert_allclose(again.betas, full.betas, rtol=1e-9)


# ---------------------------------------------------------------------------------------------
# Losses and variances


def test_four_losses():
    torch.manual_seed(0)
    x, noise, t = torch.rand(3, 1, 8, 8) - 0.5, torch.randn(3, 1, 8, 8), torch.tensor([0, 3, 40])
    weight = torch.randn(2, 1, 1, 1)

    def model(x, t):
        return torch.nn.functional.conv2d(x, weight)

    betas = create_diffusion("50").betas
    losses = {}
    for loss_type in LossType:
        diffusion = GaussianDiffusion(
            betas=betas, model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.LEARNED_RANGE,
            loss_type=loss_type,
        )  # fmt: skip
        losses[loss_type] = diffusion.training_losses(model, x, t, noise=noise)
    mse, rescaled = losses[LossType.MSE], losses[LossType.RESCALED_MSE]
    torch.testing.assert_close(mse["loss"], mse["mse"] + mse["vb"])
    torch.testing.assert_close(rescaled["vb"], mse["vb"] * 50 / 1000)
    torch.testing.assert_close(losses[LossType.KL]["loss"], mse["vb"])  # the same number; other gradients
    torch.testing.assert_close(losses[LossType.RESCALED_KL]["loss"], mse["vb"] * 50)


def test_bound_trains_the_variance_alone():
    diffusion = create_diffusion("")
    out = torch.randn(4, 2, 8, 8, requires_grad=True)
    terms = diffusion.training_losses(
        lambda x, t: out, torch.randn(4, 1, 8, 8), torch.tensor([0, 5, 50, 500])
    )
    (gradient,) = torch.autograd.grad(terms["vb"].sum(), out)
    assert (gradient[:, 0] == 0).all() and (gradient[:, 1] != 0).any(dim=(1, 2)).all()


def test_four_variances():
    diffusion = create_diffusion("")
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([1, 500])
    expected = dict(
        FIXED_SMALL=diffusion.posterior_variance[[1, 500]], FIXED_LARGE=diffusion.betas[[1, 500]],
        LEARNED=np.exp([0.3, 0.3]),
        LEARNED_RANGE=np.sqrt(
            diffusion.posterior_variance[[1, 500]] ** 0.7 * diffusion.betas[[1, 500]] ** 1.3
        ),
    )  # fmt: skip
    for kind in ModelVarType:
        process = GaussianDiffusion(
            betas=diffusion.betas,
            model_mean_type=ModelMeanType.EPSILON,
            model_var_type=kind,
            loss_type=LossType.MSE,
        )
        prediction = torch.full((2, 2 if process.learns_variance else 1, 4, 4), 0.3)
        out = process.p_mean_variance(lambda x, t, p=prediction: p, x, t)
        np.testing.assert_allclose(out["variance"][:, 0, 0, 0], expected[kind.name], rtol=1e-5)
        np.testing.assert_allclose(out["log_variance"].exp(), out["variance"], rtol=1e-5)


def test_model_and_process_disagree_on_sigma(tiny):
    with pytest.raises(ValueError, match="FIXED_LARGE.*takes 4 channels; learn_sigma"):
        create_diffusion("10", learn_sigma=False).p_sample(
            tiny, torch.randn(1, 4, 8, 8), torch.tensor([1]), model_kwargs=dict(y=torch.tensor([1]))
        )


def test_bfloat16_predictions_are_read_in_float32():
    diffusion, x, t = create_diffusion(""), torch.randn(2, 1, 4, 4), torch.tensor([10, 900])
    low = torch.randn(2, 2, 4, 4).bfloat16()
    for key, value in diffusion.p_mean_variance(lambda x, t: low, x, t).items():
        assert torch.equal(value, diffusion.p_mean_variance(lambda x, t: low.float(), x, t)[key])


# ---------------------------------------------------------------------------------------------
# Loops


@pytest.mark.parametrize("loop", ["p_sample_loop_progressive", "ddim_sample_loop_progressive"])
def test_gradients_stay_on_in_the_caller(tiny, loop):
    steps = getattr(create_diffusion("3"), loop)(
        tiny, (2, 4, 8, 8), model_kwargs=dict(y=torch.tensor([1, 2]))
    )
    for out in steps:
        assert torch.is_grad_enabled() and not out["sample"].requires_grad


def test_bound_method_without_device(tiny):
    y = torch.tensor([1, 2, 10, 10])
    out = create_diffusion("2").p_sample_loop(
        tiny.forward_with_cfg, (4, 4, 8, 8), model_kwargs=dict(y=y, cfg_scale=2.0), progress=True
    )
    assert out.shape == (4, 4, 8, 8)


def test_published_draw_of_2n_rows(tiny):
    """One global generator: N rows of a draw for 2N are the published first half, bit for bit."""
    z, y = rule_input("z", 4, 4, 8, 8), torch.tensor([0, 3, 9, 5])
    diffusion = create_diffusion("5")
    torch.manual_seed(0)
    published = diffusion.p_sample_loop(
        tiny.forward_with_cfg, (8, 4, 8, 8), torch.cat([z, z]), clip_denoised=False,
        model_kwargs=dict(y=torch.cat([y, y * 0 + 10]), cfg_scale=1.5),
    )  # fmt: skip
    torch.manual_seed(0)
    ours = diffusion.sample(
        tiny, z, model_kwargs=dict(y=y), guidance=Guidance(1.5, 10, channels=3),
        randn_like=lambda x: torch.randn(8, 4, 8, 8)[:4],
    )  # fmt: skip
    assert torch.equal(ours, published[:4])


def test_sample_reports_every_step(tiny):
    seen = []
    diffusion, z = create_diffusion(None), torch.randn(2, 4, 8, 8)
    x = diffusion.sample(
        tiny, z, steps="ddim5", model_kwargs=dict(y=torch.tensor([1, 2])), callback=seen.append
    )
    assert [(s["i"], s["t"]) for s in seen] == [(1, 800), (2, 600), (3, 400), (4, 200), (5, 0)]
    assert torch.equal(seen[-1]["x"], x) and seen[0]["pred_xstart"].shape == x.shape
    with pytest.raises(ValueError, match="2.9 is not a whole number of steps"):
        diffusion.respaced(2.9)
    with pytest.raises(ValueError, match="sampler 'magic': a diffusion has ddpm, ddim"):
        diffusion.sample(tiny, z, sampler="magic")


def test_config_round_trip():
    diffusion = create_diffusion("7", "cosine", sigma_small=True, learn_sigma=False, diffusion_steps=500)
    again = create_process(diffusion.config).respaced("7")
    assert again.config == diffusion.config and again.model_var_type is ModelVarType.FIXED_SMALL
    np.testing.assert_array_equal(again.betas, diffusion.betas)
    with pytest.raises(ValueError, match="objective 'poetry'"):
        create_process(dict(objective="poetry"))


# ---------------------------------------------------------------------------------------------
# Timestep samplers


def test_uniform_sampler():
    sampler = create_named_schedule_sampler("uniform", create_diffusion("100"))
    torch.manual_seed(0)
    t, weights = sampler.sample(100_000, "cpu")
    assert torch.bincount(t, minlength=100).min() > 800 and t.max() == 99 and (weights == 1).all()
    with pytest.raises(
        ValueError, match="timestep sampler 'greedy': a diffusion takes uniform or loss-second-moment"
    ):
        create_named_schedule_sampler("greedy", create_diffusion("100"))


def test_loss_second_moment_sampler():
    """Uniform until it has seen enough; then steps in proportion to their losses, weighted to stay
    unbiased."""
    sampler = LossSecondMomentResampler(create_diffusion("4", learn_sigma=False), history_per_term=3)
    assert sampler.weights().tolist() == [1, 1, 1, 1]
    for loss in (9.0, 1.0, 1.0, 1.0):  # the first is forgotten
        sampler.update_with_local_losses(torch.arange(4), loss * torch.tensor([1.0, 2.0, 3.0, 4.0]))
    sampler.update_with_local_losses(torch.arange(4), torch.tensor([1.0, torch.nan, torch.inf, 4.0]))
    expected = np.array([1, 2, 3, 4]) / 10 * 0.999 + 0.001 / 4
    np.testing.assert_allclose(sampler.weights(), expected)
    t, weights = sampler.sample(200_000, "cpu", torch.Generator().manual_seed(0))
    np.testing.assert_allclose(torch.bincount(t) / len(t), expected, atol=0.005)
    for step in range(4):  # sum of probability x weight is uniform
        assert weights[t == step].sum().item() / len(t) == pytest.approx(0.25, abs=0.005)
    again = LossSecondMomentResampler(create_diffusion("4", learn_sigma=False), history_per_term=3)
    again.load_state_dict(sampler.state_dict())
    np.testing.assert_array_equal(again.weights(), sampler.weights())
