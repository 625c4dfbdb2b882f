"""latent_statistics.py, and what follows an autoencoder: caches of deterministic ones; channels normalised
in training, on a cache or on images, and back in sampling."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import finish, losses, start_two
from images import stack, write_image
from in_process import command, run
from networks import save_tiny, save_vae

import checkpoint
import extract_features
import sample
import sample_ddp
from checkpointing import files as checkpoints
from runtime.autoencoder import AUTOENCODERS, Architecture, load_autoencoder
from runtime.cli import UserError
from runtime.distributed import ALONE
from runtime.image_io import to_float
from sampler import Sampler
from training import latent_statistics
from training.dataset import ReadableDataset, open_dataset
from training.latent_cache import MANIFEST, LatentCache
from training.latent_statistics import measure

COUNT = 70  # images, in shards of two
SAVE = dict(kl=save_vae, tiny=save_tiny)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Images of two classes, a VAE and a deterministic autoencoder, and the cache of each."""
    root = tmp_path_factory.mktemp("source")
    for i in range(COUNT):
        write_image(root / "images" / "ab"[i % 2] / f"{i:03d}.png", size=(16, 16), seed=i)
    for name, save in SAVE.items():
        save(root / name, scaling_factor=0.5, shift_factor=0.25)
        command(extract_features, *extraction(root, name, root / f"{name}-features"))
    return root


def extraction(source, name, folder):
    return ["--data-path", source / "images", "--vae", source / name, "--image-size", 16, "--num-workers", 0,
            "--features-path", folder]  # fmt: skip


def training(tmp_path, *argv):
    return [
        "--model", "DiT-S/2", "--depth", 1, "--hidden-size", 32, "--num-heads", 2, "--image-size", 16,
        "--num-workers", 0, "--global-batch-size", 10, "--max-steps", 3, "--log-every", 1, "--cfg-scale", 2,
        "--num-sampling-steps", 2, "--sample-every", 0, "--results-dir", tmp_path / "results", *argv,
    ]  # fmt: skip


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def config_of(tmp_path, step=3, number=0):
    path = tmp_path / "results" / f"{number:03d}-DiT-S-2" / "checkpoints" / f"{step:07d}.pt"
    return checkpoints.load(str(path)).config["autoencoder"], path


def read_statistics(folder):
    return json.loads((folder / MANIFEST).read_text())["latents"]


def all_latents(source, name, draws=40):
    """Latents of a cache as the model sees them without statistics: (N, 4, h, w), several draws of each."""
    dataset, vae = LatentCache(str(source / f"{name}-features")), load_autoencoder(str(source / name), "cpu")
    rows = [dataset[(i, mirrored)][0] for i in range(COUNT) for mirrored in (False, True)]
    rows = to_float(torch.stack(rows))
    rows = rows.repeat(1 if vae.is_deterministic else draws, 1, 1, 1)
    return vae.sample_posterior(rows, torch.randn(len(rows), 4, 4, 4))


def test_the_cache_of_a_deterministic_encoder(source):
    """Latents themselves, without a variance, in half the space."""
    dataset, images = (
        LatentCache(str(source / "tiny-features")),
        open_dataset("folder", str(source / "images"), 16),
    )
    tiny = load_autoencoder(str(source / "tiny"), "cpu")
    for key in [(0, False), (41, True)]:
        (latents, label), expected = dataset[key], images[key][1]
        assert label == expected and latents.shape == (4, 4, 4)
        moments = tiny.moments(stack(images, [key[0]]).flip(-1) if key[1] else stack(images, [key[0]]))
        torch.testing.assert_close(latents.float(), moments[0], atol=1e-3, rtol=1e-3)
    shards = {name: np.load(source / f"{name}-features" / f"{kind}-00000.npy")
              for name, kind in (("kl", "moments"), ("tiny", "latents"))}  # fmt: skip
    assert shards["tiny"].shape == (2, 2, 4, 4, 4) and 2 * shards["tiny"].nbytes == shards["kl"].nbytes


@pytest.mark.parametrize("name, tolerance", [("kl", 0.02), ("tiny", 1e-4)])
def test_statistics_are_those_of_the_latents(source, name, tolerance):
    latents, found = all_latents(source, name).double(), read_statistics(source / f"{name}-features")
    by_channel = latents.transpose(0, 1).flatten(1)
    expected = dict(
        mean=latents.mean(), std=latents.std(unbiased=False), channel_mean=by_channel.mean(1),
        channel_std=by_channel.std(1, unbiased=False),
    )  # fmt: skip
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, atol=tolerance * found["std"], rtol=tolerance)
    assert max(found["channel_std"]) > 1.2 * min(found["channel_std"])  # or else there is nothing to see here


@pytest.mark.parametrize("processes", [1, 2])
def test_channels_are_normalised_in_training_and_back_in_sampling(source, tmp_path, processes, capfd):
    """Both commands know the statistics from the cache, then from the checkpoint."""
    argv = training(tmp_path, "--feature-path", source / "tiny-features", "--latent-normalization", "channel")
    if processes == 1:
        run(*argv)
    else:
        assert finish(*start_two(argv, tmp_path / "out")) == [0, 0]
    kept, path = config_of(tmp_path)
    statistics = read_statistics(source / "tiny-features")
    assert kept["channel_std"] == statistics["channel_std"] and kept["deterministic"]
    assert kept["channel_mean"] == statistics["channel_mean"]

    sampler = Sampler.from_checkpoint(path, device="cpu")
    tiny = load_autoencoder(str(source / "tiny"), "cpu")
    mean, std = (torch.tensor(statistics[f"channel_{name}"])[:, None, None] for name in ("mean", "std"))
    x = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(sampler.autoencoder.decode(x), tiny.decode(x * std + mean))
    shutil.copytree(source / "tiny", tmp_path / "another")
    other = Sampler.from_checkpoint(path, vae=str(tmp_path / "another"), device="cpu").autoencoder
    torch.testing.assert_close(other.decode(x), sampler.autoencoder.decode(x))
    latents = (all_latents(source, "tiny") - mean) / std
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    # Before anything is learned the loss does not depend on the latents:
    run(*training(tmp_path, "--feature-path", source / "tiny-features"))
    plain = losses(tmp_path / "results" / "001-DiT-S-2")
    assert losses(tmp_path / "results" / "000-DiT-S-2")[2] != plain[2]
    assert "channel_std" not in config_of(tmp_path, number=1)[0]

    # Every command samples by them, and they leave with an export:
    os.chdir(tmp_path)
    command(sample, "--ckpt", path, "--class-labels", 0, 1, "--seed", 5)
    command(sample_ddp, "--ckpt", path, "--num-fid-samples", 2, "--sample-dir", tmp_path / "samples")
    command(checkpoint, "export", "--ckpt", path, "--out", "a.safetensors", "--vae", source / "tiny")
    assert checkpoints.load("a.safetensors").config["autoencoder"]["channel_mean"] == kept["channel_mean"]
    images = sampler.sample([0, 1], seeds=5)
    torch.testing.assert_close(
        Sampler.from_checkpoint("a.safetensors", device="cpu").sample([0, 1], seeds=5), images
    )
    with pytest.raises(UserError, match="DiTPipeline has no latents normalised by channel; give --out FILE"):
        checkpoints.export(checkpoints.load(str(path)), "pipeline", any_classes=True)


@pytest.mark.parametrize("name", ["kl", "tiny"])
def test_images_give_the_losses_of_the_cache(source, tmp_path, name):
    run(*training(tmp_path, "--feature-path", source / f"{name}-features"))
    run(*training(tmp_path, "--data-path", source / "images", "--vae", source / name))
    cached, online = (losses(tmp_path / "results" / f"{i:03d}-DiT-S-2") for i in range(2))
    np.testing.assert_allclose(online, cached, rtol=2e-3)  # half precision


def test_statistics_measured_on_images(source, tmp_path, monkeypatch, capsys):
    """Without a cache: the same on any number of processes; a resumed run keeps those it began with."""
    images = open_dataset("folder", str(source / "images"), 16)
    vae = load_autoencoder(str(source / "kl"), "cpu")
    found = measure(ReadableDataset(images, skip=False), vae, 0, ALONE)
    moments = vae.moments(stack(images, range(COUNT))).double()
    mean, logvar = moments.chunk(2, dim=1)
    mean, variance = (mean - vae.shift) * vae.scale, logvar.exp() * vae.scale**2
    np.testing.assert_allclose(found["channel_mean"], mean.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    expected = (mean.var((0, 2, 3), correction=0) + variance.mean((0, 2, 3))).sqrt()
    np.testing.assert_allclose(found["channel_std"], expected, rtol=1e-4)

    online = ["--data-path", source / "images", "--vae", source / "kl"]
    argv = training(tmp_path, *online, "--latent-normalization", "channel")
    assert finish(*start_two(argv, tmp_path / "out")) == [0, 0]
    kept, _ = config_of(tmp_path)
    np.testing.assert_allclose(kept["channel_std"], found["channel_std"], rtol=1e-5)
    monkeypatch.setattr(latent_statistics, "MEASURED", 8)  # others, should they be measured again
    resumed = [*argv, "--max-steps", 4, "--resume", tmp_path / "results" / "000-DiT-S-2"]
    run(*resumed)
    assert config_of(tmp_path, 4)[0] == kept
    capsys.readouterr()
    message = refusal(capsys, *resumed, "--max-steps", 5, "--latent-normalization", "scale")
    assert "--latent-normalization scale: " in message and "was trained with channel; give that" in message


def test_an_unreadable_image_is_named(source, tmp_path, capsys):
    shutil.copytree(source / "images", tmp_path / "images")
    (tmp_path / "images" / "a" / "002.png").write_bytes(b"junk")
    argv = training(tmp_path, "--data-path", tmp_path / "images", "--vae", source / "tiny",
                    "--latent-normalization", "channel")  # fmt: skip
    assert "002.png: cannot be read as an image" in refusal(capsys, *argv)
    run(*argv, "--skip-bad-images")


def test_a_run_keeps_its_statistics_on_other_data(source, tmp_path):
    shutil.copytree(source / "tiny-features", tmp_path / "cache")
    argv = training(tmp_path, "--feature-path", tmp_path / "cache", "--latent-normalization", "channel")
    run(*argv)
    kept, _ = config_of(tmp_path)
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    manifest["latents"]["channel_std"] = [2 * std for std in manifest["latents"]["channel_std"]]
    manifest["shards"][0]["sha256"] = "another"
    (tmp_path / "cache" / MANIFEST).write_text(json.dumps(manifest))
    run(*argv, "--max-steps", 4, "--resume", tmp_path / "results" / "000-DiT-S-2", "--allow-changed-data")
    assert config_of(tmp_path, 4)[0] == kept


def test_what_cannot_be_normalised(source, tmp_path, capsys):
    channel = ["--latent-normalization", "channel"]
    pixels = ["--dataset", "digits", "--image-size", 8, "--vae", "none"]
    assert "channel: pixels have no latents; leave it out" in refusal(
        capsys, *training(tmp_path, *pixels, *channel)
    )
    shutil.copytree(source / "tiny-features", tmp_path / "cache")
    argv = training(tmp_path, "--feature-path", tmp_path / "cache", *channel)
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    manifest["latents"]["channel_std"][2] = 0.0
    (tmp_path / "cache" / MANIFEST).write_text(json.dumps(manifest))
    assert "cache, channel 2 of the latents has standard deviation 0.0; give scale" in refusal(capsys, *argv)
    assert not (tmp_path / "results").exists()


def test_caches_of_earlier_versions_get_the_statistics(source, tmp_path, capsys):
    """Of a complete one they are added; shards of an unfinished one that lack them are encoded again."""
    for name in SAVE:
        shutil.copytree(source / f"{name}-features", tmp_path / name)
        complete = (tmp_path / name / MANIFEST).read_bytes()
        manifest = json.loads(complete)
        del manifest["latents"]["channel_mean"], manifest["latents"]["channel_std"]
        (tmp_path / name / MANIFEST).write_text(json.dumps(manifest, indent=1))
        argv = training(tmp_path, "--feature-path", tmp_path / name, "--latent-normalization", "channel")
        message = refusal(capsys, *argv)
        assert "extracted before statistics of the channels were kept; run the same extract" in message
        command(extract_features, *extraction(source, name, tmp_path / name))
        assert (tmp_path / name / MANIFEST).read_bytes() == complete
    manifest = dict(json.loads(complete), complete=False)
    shard = manifest.pop("shards")[0]
    (tmp_path / "tiny" / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "tiny" / "shard-00000.json").write_text(
        json.dumps(dict(shard, values=1, sum=1.0, square=1.0))
    )
    command(extract_features, *extraction(source, "tiny", tmp_path / "tiny"))
    assert (tmp_path / "tiny" / MANIFEST).read_bytes() == complete


def test_a_cache_whose_vae_has_moved(source, tmp_path, capsys):
    shutil.copytree(source / "tiny", tmp_path / "before")
    command(extract_features, *extraction(source, "tiny", tmp_path / "cache"), "--vae", tmp_path / "before")
    argv = training(tmp_path, "--feature-path", tmp_path / "cache")
    assert "was extracted with" in refusal(capsys, *argv, "--vae", source / "tiny")
    os.rename(tmp_path / "before", tmp_path / "after")
    assert "was extracted with" in refusal(capsys, *argv, "--vae", source / "kl")  # another
    run(*argv, "--vae", tmp_path / "after", "--sample-every", 3)
    assert config_of(tmp_path)[0]["vae"] == str(tmp_path / "after")
    assert (tmp_path / "results" / "000-DiT-S-2" / "samples" / "0000003.png").exists()


def test_a_guide_of_other_statistics(source, tmp_path):
    argv = training(tmp_path, "--feature-path", source / "tiny-features", "--max-steps", 1)
    run(*argv)
    run(*argv, "--latent-normalization", "channel")
    plain, normalised = (config_of(tmp_path, 1, number)[1] for number in range(2))
    with pytest.raises(UserError, match="--guide .*: its latents are normalised otherwise than those of"):
        Sampler.from_checkpoint(normalised, guide=plain, device="cpu")
    Sampler.from_checkpoint(normalised, guide=normalised, device="cpu")


def test_dry_run_tells(source, tmp_path, capsys):
    argv = training(tmp_path, "--vae", source / "tiny", "--data-path", source / "images", "--dry-run")
    run(*argv, "--latent-normalization", "channel")
    said = capsys.readouterr().out
    assert f"4x4x4 by {source / 'tiny'}, of 16 pixels, normalised by channel" in said
    assert not (tmp_path / "results").exists()


class Shuffle(torch.nn.Module):
    """An autoencoder from outside, which loses nothing: 2x2 pixels become the channels of one."""

    config = dict(in_channels=3, latent_channels=12)

    def encode(self, images):
        return SimpleNamespace(shuffled=torch.nn.functional.pixel_unshuffle(images, 2))

    def decode(self, latents):
        return SimpleNamespace(sample=torch.nn.functional.pixel_shuffle(latents, 2))


def test_seams_autoencoder(source, tmp_path, monkeypatch):
    """A row of AUTOENCODERS is trained on, online and cached, continued and sampled."""
    row = Architecture("shuffled", factor=lambda config: 2, load=lambda name: Shuffle())
    monkeypatch.setitem(AUTOENCODERS, "Shuffle", row)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(dict(Shuffle.config, _class_name="Shuffle")))
    images = ["--data-path", source / "images", "--vae", tmp_path / "vae"]
    command(extract_features, *extraction(source, "kl", tmp_path / "cache"), "--vae", tmp_path / "vae")
    for number, data in enumerate((images, ["--feature-path", tmp_path / "cache"])):
        argv = training(tmp_path, *data, "--latent-normalization", "channel", "--sample-every", 3)
        run(*argv)
        run(*argv, "--max-steps", 4, "--resume", tmp_path / "results" / f"{number:03d}-DiT-S-2")
        kept, path = config_of(tmp_path, 4, number)
        assert len(kept["channel_std"]) == 12 and kept["factor"] == 2
        sampler = Sampler.from_checkpoint(path, device="cpu")
        assert sampler.sample([0, 1]).shape == (2, 3, 16, 16)
        pixels = torch.rand(2, 3, 16, 16) * 2 - 1
        again = sampler.autoencoder.decode(sampler.autoencoder.encode(pixels, None))
        torch.testing.assert_close(again, pixels)
        assert sampler.settle()["cfg_channels"] == "all"
