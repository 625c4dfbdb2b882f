"""The network and the diffusion against numbers measured from the reference implementations
(tests/golden)."""

import numpy as np
import pytest
import torch
from conftest import (
    TOLERANCE,
    assert_golden,
    assert_golden_by_range,
    build_tiny,
    load_rule_weights,
    rule_input,
)

from diffusion import create_diffusion, space_timesteps
from diffusion.gaussian_diffusion import get_beta_schedule
from models import DiT_models

LABELS = [0, 3, 9, 5]


@pytest.fixture(scope="module")
def reference(golden):
    return golden("reference.npz")


@pytest.fixture(scope="module")
def tables(golden):
    return golden("tables.npz")


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-S/8", "DiT-B/4"])
def test_forward(reference, name):
    model = load_rule_weights(DiT_models[name](), 0.05).eval()
    t, y = torch.from_numpy(reference[f"t/{name}"]), torch.from_numpy(reference[f"y/{name}"])
    with torch.no_grad():
        assert_golden(model(rule_input("x", 2, 4, 32, 32), t, y), reference[f"forward/{name}"])


def test_tiny_forward(reference, tiny):
    with torch.no_grad():
        out = tiny(rule_input("x8", 4, 4, 8, 8), torch.tensor([0, 1, 500, 999]), torch.tensor([0, 3, 9, 10]))
    assert_golden(out, reference["tiny/forward"])


def test_tiny_forward_with_cfg(reference, tiny):
    x = rule_input("x8", 4, 4, 8, 8)
    y = torch.tensor(LABELS + [10] * 4)
    with torch.no_grad():
        out = tiny.forward_with_cfg(torch.cat([x, x]), torch.full((8,), 333), y, 4.0)
    assert_golden(out, reference["tiny/forward_with_cfg_4.0"])


@pytest.mark.parametrize("spacing", ["10", "25", "ddim10", "10,5,3"])
def test_p_sample_loop(reference, tiny, spacing):
    z = rule_input("z", 4, 4, 8, 8)
    z = torch.cat([z, z])
    kwargs = dict(y=torch.tensor(LABELS + [10] * 4), cfg_scale=1.5)
    diffusion = create_diffusion(spacing)
    torch.manual_seed(0)
    out = diffusion.p_sample_loop(tiny.forward_with_cfg, z.shape, z, clip_denoised=False, model_kwargs=kwargs)
    assert_golden_by_range(out, reference[f"tiny/p_sample_loop/{spacing}/cfg1.5"])


@pytest.mark.parametrize("spacing", ["10", "25", "ddim10", "10,5,3"])
def test_ddim_sample_loop(reference, tiny, spacing):
    z = rule_input("z", 4, 4, 8, 8)
    diffusion = create_diffusion(spacing)
    torch.manual_seed(0)
    out = diffusion.ddim_sample_loop(
        tiny, z.shape, z, clip_denoised=True, model_kwargs=dict(y=torch.tensor(LABELS)), eta=0.3
    )
    assert_golden(out, reference[f"tiny/ddim_sample_loop/{spacing}/eta0.3"])


def test_ddim_reverse_step(reference, tiny):
    with torch.no_grad():
        out = create_diffusion("ddim10").ddim_reverse_sample(
            tiny, rule_input("x0", 4, 4, 8, 8), torch.full((4,), 3), clip_denoised=False,
            model_kwargs=dict(y=torch.tensor(LABELS)),
        )  # fmt: skip
    assert_golden(out["sample"], reference["tiny/ddim_reverse_step_t3"])


@pytest.mark.parametrize(
    "tag, options",
    [
        ("mse", {}),
        ("rescaled_mse", dict(rescale_learned_sigmas=True, diffusion_steps=500)),
        ("kl", dict(use_kl=True)),
        ("xstart", dict(predict_xstart=True)),
        ("cosine", dict(noise_schedule="squaredcos_cap_v2")),
    ],
)
def test_training_losses(reference, tiny, tag, options):
    diffusion = create_diffusion("", **options)
    x_start, noise = rule_input("x0", 6, 4, 8, 8) * 0.5, rule_input("noise", 6, 4, 8, 8)
    t = torch.tensor([0, 1, 10, 250, 700, 999]).clamp(max=diffusion.num_timesteps - 1)
    with torch.no_grad():
        terms = diffusion.training_losses(
            tiny, x_start, t, dict(y=torch.tensor([0, 1, 2, 3, 9, 10])), noise=noise
        )
    expected = [
        key.split("/")[-1] for key in reference.files if key.startswith(f"tiny/training_losses/{tag}/")
    ]
    assert set(terms) == set(expected)
    for term in expected:
        assert_golden(terms[term], reference[f"tiny/training_losses/{tag}/{term}"])


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_fixed_variance(reference, variance):
    model = load_rule_weights(build_tiny(learn_sigma=False), 0.1).eval()
    diffusion = create_diffusion("10", learn_sigma=False, sigma_small=variance == "fixed_small")
    z = rule_input("z", 4, 4, 8, 8)
    torch.manual_seed(0)
    out = diffusion.p_sample_loop(
        model, z.shape, z, clip_denoised=True, model_kwargs=dict(y=torch.tensor(LABELS))
    )
    assert_golden_by_range(out, reference[f"tiny/p_sample_loop/10/{variance}"])


def test_bits_per_dim(reference, tiny):
    x_start = (rule_input("x0", 6, 4, 8, 8) * 0.5)[:2].clamp(-1, 1)
    torch.manual_seed(0)
    terms = create_diffusion("8").calc_bpd_loop(tiny, x_start, model_kwargs=dict(y=torch.tensor([0, 1])))
    for term in ("total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"):
        assert_golden(terms[term], reference[f"tiny/bpd/8/{term}"])


@pytest.mark.parametrize("key, build", [("tiny", build_tiny), ("S8", DiT_models["DiT-S/8"])])
def test_seeded_initialisation(reference, key, build):
    torch.manual_seed(0)
    parameters = dict(build().named_parameters())
    sums = [parameters[name].detach().double().abs().sum().item() for name in sorted(parameters)]
    np.testing.assert_allclose(sums, reference[f"{key}/init_abs_sums"], **TOLERANCE)


def test_twenty_training_steps(reference):
    """The whole chain under one seed: initialisation, then in every step timestep, noise and label drop."""
    torch.manual_seed(0)
    model, diffusion = build_tiny().train(), create_diffusion("")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    data, labels = rule_input("data", 64, 4, 8, 8), torch.arange(64) % 10
    losses = []
    for step in range(20):
        rows = slice(8 * (step % 8), 8 * (step % 8) + 8)
        t = torch.randint(0, diffusion.num_timesteps, (8,))
        loss = diffusion.training_losses(model, data[rows], t, dict(y=labels[rows]))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, reference["tiny/train_20_steps_loss"], **TOLERANCE)
    with torch.no_grad():
        out = model.eval()(
            rule_input("x8", 4, 4, 8, 8), torch.tensor([0, 1, 500, 999]), torch.tensor([0, 3, 9, 10])
        )
    assert_golden(out, reference["tiny/train_20_steps_out"])


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_tables(tables, schedule):
    diffusion = create_diffusion("", noise_schedule=schedule)
    names = [key.split("/")[1] for key in tables.files if key.startswith(schedule + "/")]
    assert len(names) == 6
    for name in names:
        np.testing.assert_allclose(getattr(diffusion, name), tables[f"{schedule}/{name}"], rtol=1e-12)


@pytest.mark.parametrize("schedule", ["quad", "const", "warmup10", "warmup50", "jsd"])
def test_older_schedules(tables, schedule):
    betas = get_beta_schedule(schedule, beta_start=1e-4, beta_end=0.02, num_diffusion_timesteps=1000)
    np.testing.assert_allclose(betas, tables[f"schedule/{schedule}"], rtol=1e-12)


@pytest.mark.parametrize("spec", ["250", "50", "21", "10,15,20", "ddim50", "ddim25", "7,11", "5,0,5"])
def test_kept_steps(tables, spec):
    assert sorted(space_timesteps(1000, spec)) == tables[f"respace/{spec}"].tolist()


def test_respaced_tables(tables):
    diffusion = create_diffusion("250")
    np.testing.assert_array_equal(diffusion.timestep_map, tables["respaced250/timestep_map"])
    np.testing.assert_allclose(diffusion.betas, tables["respaced250/betas"], rtol=1e-12)


# ---------------------------------------------------------------------------------------------
# scripts.npz


class Latents:
    """No decoder: what the published script had before its VAE."""

    clip_denoised = False

    def to(self, device):
        return self

    def decode(self, x):
        return x


def test_published_sample_script(golden):
    """sample.py --seed 3 of the published repository on the CPU, from the seed to the latents."""
    from sample import PUBLISHED_LABELS
    from sampler import Sampler
    from sampling.noise import PublishedNoise

    model = load_rule_weights(DiT_models["DiT-S/8"](), 0.05)
    sampler = Sampler(model, autoencoder=Latents(), device="cpu")
    options = sampler.settle(cfg_scale=4.0, steps="5")
    latents, labels = sampler.generate([3] * 8, PUBLISHED_LABELS, options, published_draws=True)
    assert_golden_by_range(latents[:2], golden("scripts.npz")["sample_py/latents"])
    state = torch.get_rng_state()
    assert labels == PUBLISHED_LABELS and PublishedNoise(3, 8, torch.device("cpu"), model.config)
    assert torch.equal(state, torch.get_rng_state())  # the caller's own draws are left alone
