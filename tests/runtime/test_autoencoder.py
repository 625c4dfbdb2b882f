"""autoencoder.py, with random AutoencoderKLs saved by diffusers."""

import json

import pytest
import torch
from networks import save_dc, save_tiny, save_vae

import runtime.autoencoder
from runtime.autoencoder import SD_SCALE, VAE, Pixels, describe_vae, load_autoencoder, resolve_vae
from runtime.cli import UserError

CPU = torch.device("cpu")


def test_large_images_pass_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.autoencoder, "PIXELS_AT_ONCE", 4 * 64 * 64)
    vae, sizes = load_autoencoder(save_vae(tmp_path / "vae"), CPU), []
    vae.model.encoder.register_forward_hook(lambda *call: sizes.append(len(call[1][0])))
    vae.model.decoder.register_forward_hook(lambda *call: sizes.append(len(call[1][0])))
    x = torch.randn(5, 4, 16, 16)
    images = vae.decode(x)
    assert images.shape == (5, 3, 64, 64)
    moments = vae.moments(images)
    assert sizes == [4, 1, 4, 1]
    torch.testing.assert_close(images[4:], vae.decode(x[4:]))
    torch.testing.assert_close(moments[3:4], vae.moments(images[3:4]), atol=1e-4, rtol=1e-4)


def test_published_names():
    assert (
        resolve_vae("ema") == "stabilityai/sd-vae-ft-ema"
        and resolve_vae("mse") == "stabilityai/sd-vae-ft-mse"
    )
    assert describe_vae("mse", 3) == (4, 8, 3) and describe_vae("none", 1) == (1, 1, 1)


def test_everything_comes_from_the_config(tmp_path):
    folder = save_vae(tmp_path / "vae", latent_channels=6, scaling_factor=0.5, shift_factor=0.25)
    vae = load_autoencoder(folder, CPU)
    assert vae.config == dict(vae=folder, channels=6, factor=4, scale=0.5, shift=0.25)
    assert describe_vae(folder, 3) == (6, 4, 3)
    assert not any(p.requires_grad for p in vae.model.parameters()) and not vae.model.training


def test_scale_of_a_config_without_one(tmp_path):
    folder = save_vae(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    del config["scaling_factor"], config["shift_factor"]
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    vae = load_autoencoder(folder, CPU)
    assert (vae.scale, vae.shift) == (SD_SCALE, 0.0) == (0.18215, 0.0)


def test_encode_and_decode(tmp_path):
    vae = load_autoencoder(save_vae(tmp_path / "vae", scaling_factor=0.5, shift_factor=0.25), CPU)
    images, noise = torch.rand(2, 3, 16, 24) * 2 - 1, torch.randn(2, 4, 4, 6)
    posterior = vae.model.encode(images).latent_dist
    x = vae.encode(images, noise)
    torch.testing.assert_close(x, (posterior.mean + posterior.std * noise - 0.25) * 0.5)
    torch.testing.assert_close(vae.decode(x), vae.model.decode(x * 2 + 0.25).sample)
    assert not x.requires_grad and vae.decode(x).shape == images.shape


@pytest.mark.parametrize("save", [save_vae, save_tiny, save_dc])
def test_encoding_in_bfloat16(tmp_path, save):
    """For training; latents and pictures stay float32."""
    save(tmp_path)
    vae = load_autoencoder(str(tmp_path), "cpu")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    exact = vae.moments(images)
    vae.encode_in("bf16")
    found = vae.moments(images)
    assert found.dtype == torch.float32 and 1e-5 < (found - exact).norm() / exact.norm() < 0.03
    vae.encode_in("tf32")
    assert torch.equal(vae.moments(images), exact)


def test_pixels_are_left_alone():
    images = torch.rand(2, 1, 8, 8)
    pixels = load_autoencoder("none", CPU, image_channels=1)
    assert isinstance(pixels, Pixels) and pixels.channels == 1
    assert pixels.encode(images, None) is images and pixels.decode(images) is images


@pytest.mark.parametrize("break_it", ["empty", "weights", "config", "another model"])
def test_folders_that_are_no_vae(tmp_path, break_it):
    folder = tmp_path / "vae"
    if break_it == "empty":
        folder.mkdir()
    else:
        save_vae(folder)
        name = "diffusion_pytorch_model.safetensors" if break_it == "weights" else "config.json"
        (folder / name).write_text(json.dumps(dict(hidden=3)) if break_it == "another model" else "junk")
    calls = dict(
        load=lambda: load_autoencoder(str(folder), CPU), describe=lambda: describe_vae(str(folder), 3)
    )
    if break_it == "weights":
        del calls["describe"]  # which reads the config alone
    if break_it == "another model":
        del calls["load"]  # diffusers fills in what the config lacks
    for call in calls.values():
        with pytest.raises(UserError, match="--vae .*vae: ") as refused:
            call()
        assert "\n" not in str(refused.value)


def test_a_folder_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_vae("vae")
    config = load_autoencoder("vae", CPU).config
    monkeypatch.chdir("/")
    assert load_autoencoder(config["vae"], CPU).config == config


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for call in (lambda: load_autoencoder("ema", CPU), lambda: describe_vae("someone/some-vae", 3)):
        with pytest.raises(UserError, match="cannot be loaded; check the name and the network") as refused:
            call()
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="--vae ./nowhere: no such folder; give ema, mse"):
        load_autoencoder("./nowhere", CPU)


@pytest.mark.parametrize(
    "save, channels, factor, scale, attribute",
    [(save_tiny, 4, 4, 1.0, "latents"), (save_dc, 8, 8, 0.25, "latent")],
)
def test_deterministic_encoders(tmp_path, save, channels, factor, scale, attribute):
    """Their latents are what they are, whatever the noise; and come back by the decoder."""
    folder = save(tmp_path / "vae")
    assert describe_vae(folder, 3) == (channels, factor, 3)
    vae = load_autoencoder(folder, CPU)
    assert vae.config == dict(
        vae=folder, channels=channels, factor=factor, scale=scale, shift=0.0, deterministic=True
    )
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = getattr(vae.model.encode(images), attribute)
    assert latents.shape == (2, channels, 16 // factor, 24 // factor)
    torch.testing.assert_close(vae.moments(images), latents)
    x = vae.encode(images, torch.randn_like(latents))
    torch.testing.assert_close(x, latents * scale)
    torch.testing.assert_close(vae.decode(x), vae.model.decode(latents).sample)
    cached = VAE("not there", vae.config)  # as training on a cache has it, without weights
    torch.testing.assert_close(cached.sample_posterior(latents, torch.randn_like(latents)), x)


@pytest.mark.parametrize("name", ["AsymmetricAutoencoderKL", "AutoencoderKLFlux2"])
def test_others_with_a_posterior(tmp_path, name):
    import diffusers

    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    options = dict(
        AutoencoderKLFlux2=dict(
            block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=6, norm_num_groups=4,
        ),
        AsymmetricAutoencoderKL=dict(
            down_block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_out_channels=(8, 8, 16), up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=6,
            norm_num_groups=4, scaling_factor=0.5,
        ),
    )  # fmt: skip
    getattr(diffusers, name)(**options[name]).save_pretrained(tmp_path / "vae")
    vae = load_autoencoder(str(tmp_path / "vae"), CPU)
    assert describe_vae(vae.name, 3) == (vae.channels, vae.factor, vae.image_channels) == (6, 4, 3)
    assert (vae.scale, vae.shift) == (options[name].get("scaling_factor", 1.0), 0.0)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    x = vae.encode(images, torch.zeros(2, 6, 4, 6))
    mean = vae.model.encode(images).latent_dist.mean
    torch.testing.assert_close(x, mean * vae.scale)
    torch.testing.assert_close(vae.decode(x), vae.model.decode(mean).sample)


@pytest.mark.parametrize("save", [save_vae, save_tiny])
def test_channels_are_normalised(tmp_path, save):
    folder = save(tmp_path / "vae", scaling_factor=0.5, shift_factor=0.25)
    plain, vae = load_autoencoder(folder, CPU), load_autoencoder(folder, CPU)
    images, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 4, 4)
    x = plain.encode(images, noise)
    mean, std = [0.5, -1.0, 0.0, 2.0], [0.5, 1.0, 2.0, 4.0]
    vae.normalize_channels(mean, std)
    for channel in range(4):
        expected = (x[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(vae.encode(images, noise)[:, channel], expected)
    torch.testing.assert_close(vae.decode(vae.encode(images, noise)), plain.decode(x))
    # A checkpoint's config is enough, for this autoencoder and for another of the same latents:
    for rebuilt in (VAE(folder, vae.config), load_autoencoder(folder, CPU, kept=vae.config)):
        assert rebuilt.config == vae.config
        torch.testing.assert_close(rebuilt.encode(images, noise), vae.encode(images, noise))


def test_other_classes_are_refused_by_name(tmp_path):
    folder = save_vae(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(dict(config, _class_name="AutoencoderKLWan")))
    for call in (lambda: load_autoencoder(folder, CPU), lambda: describe_vae(folder, 3)):
        with pytest.raises(UserError, match="its class is AutoencoderKLWan; give one of AutoencoderKL, "):
            call()
