"""Variants end to end: trained, resumed, sampled, by one process and two; guides and SiT's weights."""

import sys

import forked
import numpy as np
import pytest
import torch
from conftest import build_tiny, load_rule_weights
from images import write_image
from in_process import SMALL, run
from PIL import Image

import checkpoint
import sample
from checkpointing import files as checkpoints
from diffusion import Guidance, create_diffusion, create_flow
from models import BLOCKS, DiT_models
from runtime.cli import UserError, launch
from sampler import Sampler

VARIANTS = {
    **{name: ["--block", name] for name in BLOCKS if name != "adaln-zero"},
    "flow": "--objective flow --registers 2 --timestep-sampler logit-normal --cfg-scale 2".split(),
    "conv": "--ffn conv --pos-embed learned --qk-norm --num-classes 0 --no-learn-sigma --sigma-small".split(),
    "gvp": "--objective flow --flow-path gvp --flow-prediction noise --time-shift 2 --sampler heun".split(),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_trained_by_one_or_two(name, tmp_path):
    """Two processes give one's losses, a continued run the same bits, and it samples."""
    argv = [*SMALL, "--max-steps", 6, *VARIANTS[name], "--eval-every", 3, "--ckpt-every", 3]
    if name == "conv":
        argv = [word for word in argv if word not in ("--cfg-scale", "1.5")]
    runs = [
        forked.start([*argv, "--results-dir", tmp_path / "one"], tmp_path / "out"),
        *forked.start_two([*argv, "--results-dir", tmp_path / "two"], tmp_path / "out"),
    ]
    assert forked.finish(*runs) == [0, 0, 0]
    one, two = (tmp_path / which / "000-DiT-S-2" for which in ("one", "two"))
    for column in ("loss", "grad_norm", "eval_loss"):
        expected, found = ([row[column] for row in forked.rows(run) if column in row] for run in (one, two))
        assert len(expected) == (2 if column == "eval_loss" else 6)
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)

    straight = checkpoints.load(str(one / "checkpoints" / "0000006.pt")).contents["ema"]
    straight = {key: value.clone() for key, value in straight.items()}
    middle = one / "checkpoints" / "0000003.pt"
    again = [*argv, "--results-dir", tmp_path / "one", "--resume", middle]
    assert forked.finish(forked.start(again, tmp_path / "out")) == [0]
    continued = checkpoints.load(str(one / "checkpoints" / "0000006.pt"))
    assert all(torch.equal(continued.contents["ema"][key], value) for key, value in straight.items())

    images = Sampler.from_checkpoint(continued.path, device="cpu").sample(2)
    assert images.shape == (2, 1, 8, 8) and torch.isfinite(images).all()
    with Image.open(one / "samples" / "0000006.png") as picture:
        assert len(set(picture.tobytes())) > 5


def test_several_pictures_at_once(tmp_path):
    run(*SMALL, "--max-steps", 2, "--sample-cfg-scales", 1, 2.5, "--sample-gif", "--results-dir", tmp_path)
    folder = tmp_path / "000-DiT-S-2" / "samples"
    names = ["0000002-cfg-1.0.gif", "0000002-cfg-1.0.png", "0000002-cfg-2.5.gif", "0000002-cfg-2.5.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    with Image.open(folder / names[0]) as animation:
        assert animation.n_frames == 4


def test_unconditional_conv_from_a_flat_folder(tmp_path, monkeypatch):
    """The preset, made small, from a folder of images to a picture of samples."""
    for i in range(8):
        write_image(tmp_path / "images" / f"{i}.png", seed=i)
    run(
        "--preset", "unconditional-conv", "--data-path", tmp_path / "images", "--image-size", 8,
        "--vae", "none", "--depth", 1, "--hidden-size", 32, "--num-heads", 2, "--global-batch-size", 4,
        "--max-steps", 3,
        "--num-sampling-steps", 2, "--num-workers", 0, "--results-dir", tmp_path / "results",
    )  # fmt: skip
    (path,) = (tmp_path / "results").glob("*/checkpoints/*.pt")
    config = checkpoints.load(str(path)).config
    assert config["model"]["ffn"] == "conv" and config["model"]["num_classes"] == 0
    assert config["process"]["sigma_small"] and config["process"]["noise_schedule"] == "squaredcos_cap_v2"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(path), "--num-samples", "3"])
    launch(sample.main, sample.build_parser())
    with Image.open("sample.png") as picture:
        assert picture.size == (3 * 66 + 2, 68)


@pytest.mark.parametrize("classes", [["cat", "dog", "hen"], [""]])
def test_photos_from_a_folder(tmp_path, monkeypatch, classes):
    """The preset, made small, from photographs with and without classes to pictures of samples."""
    for i, name in enumerate(classes * 4):
        write_image(tmp_path / "photos" / name / f"{i}.jpg", size=(90, 70), seed=i)
    run(
        "--preset", "photos", "--data-path", tmp_path / "photos", "--depth", 1, "--hidden-size", 32,
        "--num-heads", 2, "--global-batch-size", 4, "--max-steps", 4, "--sample-every", 2,
        "--num-sampling-steps", 2, "--results-dir", tmp_path / "results",
    )  # fmt: skip
    folder = tmp_path / "results" / "000-DiT-S-8-photos"
    (path,) = (folder / "checkpoints").glob("*.pt")
    config = checkpoints.load(str(path)).config
    assert config["model"]["input_size"] == [64, 64] and config["model"]["in_channels"] == 3
    assert config["data"]["classes"] == [name for name in classes if name]
    assert config["process"]["prediction"] == "data" and config["autoencoder"]["vae"] == "none"
    pictures = sorted(picture.name for picture in (folder / "samples").iterdir())
    assert pictures == ["0000002.png", "0000004.png"]
    monkeypatch.chdir(tmp_path)
    labels = ["--class-labels", *classes] if len(classes) > 1 else ["--num-samples", "3"]
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(path), *labels])
    launch(sample.main, sample.build_parser())
    with Image.open("sample.png") as picture:
        assert picture.size == (3 * 66 + 2, 68)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--objective", "flow", "--learn-sigma"], "--learn-sigma: has no meaning with --objective flow"),
        (["--objective", "flow", "--noise-schedule", "linear"], "--noise-schedule: has no meaning with"),
        (["--flow-path", "gvp"], "--flow-path: has no meaning with --objective diffusion"),
        (
            ["--timestep-sampler", "logit-normal"],
            "--timestep-sampler logit-normal: --objective diffusion takes",
        ),
        (["--objective", "flow", "--time-shift", "0"], "--time-shift 0.0: must be more than 0"),
        (["--objective", "flow", "--sampler", "ddpm"], "--sampler ddpm: this model has ddim, dpm++"),
        (["--sampler", "sde"], "--sampler sde: this model has ddpm, ddim"),
        (["--registers", "-1"], "registers -1: must be 0 or more"),
        (["--sample-cfg-scales", "1", "-1"], "--sample-cfg-scales -1.0: must be 0 or more"),
    ],
)
def test_refused_options(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*SMALL, "--results-dir", tmp_path / "results", *argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "results").exists()


# ---------------------------------------------------------------------------------------------
# A second model as the guide


def save_run(path, seed, **overrides):
    torch.manual_seed(seed)
    model = build_tiny(in_channels=1, learn_sigma=False, **overrides)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    process = create_diffusion(None, learn_sigma=False)
    config = dict(model=model.config, process=process.config, autoencoder=dict(vae="none"))
    checkpoints.save(str(path), dict(ema=model.state_dict(), config=dict(config, sampling=dict(steps="5"))))
    return model.eval()


@pytest.mark.parametrize("classes", [10, 0])
def test_autoguidance(tmp_path, classes):
    """The guide's prediction u takes the place of the unlabelled one in u + w (c - u), in equal rows."""
    model = save_run(tmp_path / "model.pt", 0, num_classes=classes)
    weak = save_run(tmp_path / "weak.pt", 1, num_classes=classes, depth=1)
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 300)
    y = [torch.tensor([1, 2, 3])] if classes else []
    null = 10 if classes else None
    guided = Guidance(2.0, null, guide=weak).wrap(model)(x, t, *y)
    torch.testing.assert_close(guided, 2 * model(x, t, *y) - weak(x, t, *y), atol=1e-5, rtol=1e-5)
    sampler = Sampler.from_checkpoint(
        str(tmp_path / "model.pt"), guide=str(tmp_path / "weak.pt"), device="cpu"
    )
    plain = Sampler.from_checkpoint(str(tmp_path / "model.pt"), device="cpu")
    assert torch.equal(sampler.sample(2, cfg_scale=1), plain.sample(2, cfg_scale=1))
    assert not torch.allclose(sampler.sample(2, cfg_scale=2), plain.sample(2, cfg_scale=1), atol=1e-2)


def test_guides_that_do_not_fit(tmp_path):
    save_run(tmp_path / "model.pt", 0)
    save_run(tmp_path / "other.pt", 0, num_classes=3)
    with pytest.raises(UserError, match=r"--guide .*other.pt: its num_classes is 3, and 10 in .*model.pt"):
        Sampler.from_checkpoint(str(tmp_path / "model.pt"), guide=str(tmp_path / "other.pt"))


# ---------------------------------------------------------------------------------------------
# SiT's weights


@pytest.mark.parametrize("suffix", ["sit.safetensors", "out.pt"])
def test_sit_s_weights_become_a_flow(tmp_path, monkeypatch, golden, suffix):
    """Exported with --sit, a bare state dict is sampled as the flow that SiT published."""
    model = load_rule_weights(DiT_models["DiT-S/8"](input_size=16, num_classes=10), 0.1)
    torch.save(model.state_dict(), tmp_path / "sit.pt")
    out = tmp_path / suffix
    argv = ["checkpoint.py", "export", "--ckpt", tmp_path / "sit.pt", "--sit", "--vae", "none", "--out", out]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    launch(checkpoint.main, checkpoint.build_parser())
    sampler = Sampler.from_checkpoint(str(out), device="cpu")
    assert sampler.process.config == create_flow(time_scale=1.0, published_sit=True).config
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 4, 16, 16), dtype=np.float32))
    options = dict(sampler="euler", steps=10, model_kwargs=dict(y=torch.tensor([0, 3, 9, 5])))
    expected = create_flow(time_scale=1.0, published_sit=True).sample(model.eval(), z, **options)
    assert torch.equal(sampler.process.sample(sampler.model, z, **options), expected)
