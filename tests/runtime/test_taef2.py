"""A real autoencoder, of a class added from outside (taef2.py), and real photographs: of ../shared/data, or
of the folder that DIT_TEST_DATA names, where they are."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import taef2
import torch
from conftest import ROOT
from forked import losses
from images import stack
from in_process import command, run

import extract_features
import sample
import sample_ddp
from evaluate import frechet_distance
from runtime.autoencoder import load_autoencoder
from runtime.image_io import to_float
from sampler import Sampler
from training.dataset import open_dataset
from training.latent_cache import MANIFEST, LatentCache

FOLDERS = [ROOT / "shared" / "data", ROOT.parent / "shared" / "data"]
if "DIT_TEST_DATA" in os.environ:
    FOLDERS = [Path(os.environ["DIT_TEST_DATA"])]
DATA = next((folder for folder in FOLDERS if (folder / "taef2").is_dir()), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        DATA is None, reason="neither ../shared/data nor DIT_TEST_DATA has taef2 and clothing"
    ),
]

# Of 500 photographs at 256 pixels, measured with the authors' own network (the data's README), by channel:
MEAN = """
0.204 -0.208 0.091 0.116 -0.171 0.147 -0.189 -0.184 -0.037 0.111 0.073 -0.023 -0.048 0.068 0.062 -0.170
0.187 0.294 -0.106 0.013 0.064 0.198 -0.015 -0.244 -0.126 0.113 0.451 0.096 0.425 0.124 0.001 -0.227"""
STD = """
0.705 0.960 0.832 0.882 0.729 0.897 0.901 0.767 0.945 0.564 0.574 0.911 0.654 0.605 0.852 1.069
0.768 0.617 0.702 0.975 0.727 0.648 0.692 0.610 0.980 0.674 0.936 0.746 0.697 0.955 0.733 0.944"""
SIZE = 64  # pixels that are trained on; each image takes a sixteenth of the time it takes at 256
COUNT = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """TAEF2 as a folder for --vae, and links to every nineteenth photograph."""
    root = tmp_path_factory.mktemp("taef2")
    taef2.save(DATA / "taef2" / "taef2.safetensors", root / "vae")
    paths = sorted((DATA / "clothing").glob("*/*.jpg"))
    for path in paths[:: len(paths) // COUNT][:COUNT]:
        link = root / "images" / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return root


def psnr(images, others):
    """In decibels, of each image (N, C, H, W) in [-1, 1]."""
    return -10 * torch.log10(((images - others.clamp(-1, 1)) ** 2).mean((1, 2, 3)) / 4)


@pytest.mark.parametrize("size, expected", [(256, 32.3), (128, 29.7), (64, 26.4)])
def test_reconstruction(folder, size, expected):
    """PSNR as the authors' network has it on 20 other photographs. Without its branch it would be 16 dB."""
    vae, images = (
        load_autoencoder(str(folder / "vae"), "cpu"),
        open_dataset("folder", str(folder / "images"), size),
    )
    x = stack(images, range(0, COUNT, 8))
    found = psnr(x, vae.decode(vae.encode(x, None)))
    # The photographs are others, and differ from one another by 4 dB: their mean by 4 / sqrt(20), or sqrt(25)
    assert found.mean() == pytest.approx(expected, abs=2.5) and found.min() > 17


@pytest.fixture(scope="module")
def cache(folder):
    command(extract_features, "--data-path", folder / "images", "--vae", folder / "vae", "--image-size", SIZE,
            "--features-path", folder / "features", "--num-workers", 0)  # fmt: skip
    return folder / "features"


def test_statistics_of_its_channels(folder, cache):
    vae, images = (
        load_autoencoder(str(folder / "vae"), "cpu"),
        open_dataset("folder", str(folder / "images"), 256),
    )
    x = stack(images, range(0, COUNT, 5))
    latents = vae.encode(x, None).double().transpose(0, 1).flatten(1)
    # Means of 40 images, where the images' own means differ by a third of the standard deviation:
    mean, std = (np.array(values.split(), float) for values in (MEAN, STD))
    np.testing.assert_allclose(latents.mean(1), mean, atol=4 * 0.33 / 40**0.5)
    np.testing.assert_allclose(latents.std(1), std, rtol=0.1)
    found = json.loads((cache / MANIFEST).read_text())["latents"]
    normalised = load_autoencoder(str(folder / "vae"), "cpu")
    normalised.normalize_channels(found["channel_mean"], found["channel_std"])
    dataset = LatentCache(str(cache))
    rows = [dataset[(i, mirrored)][0] for i in range(COUNT) for mirrored in (False, True)]
    rows = to_float(torch.stack(rows))
    z = normalised.sample_posterior(rows, None).transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std(1), torch.ones(32), atol=1e-3, rtol=0)


def test_training_and_sampling(folder, cache, tmp_path, monkeypatch):
    """A small model learns; its samples are nearer to the photographs than what noise decodes to."""
    monkeypatch.chdir(tmp_path)
    size = ["--image-size", SIZE, "--model", "DiT-S/2", "--depth", 3, "--hidden-size", 96, "--num-heads", 3]
    run("--feature-path", cache, "--latent-normalization", "channel", *size, "--objective", "flow",
        "--global-batch-size", 32, "--max-steps", 500, "--lr", 2e-3, "--ema-decay", 0.99, "--num-workers", 0,
        "--num-sampling-steps", 15, "--cfg-scale", 1)  # fmt: skip
    # Of a flow to independent Gaussians of mean 0 and variance 1, which knowing no more than that of every
    # channel comes to, the best velocity misses by the mean of 1 / (t^2 + (1 - t)^2), pi / 2:
    assert losses(Path("results/000-DiT-S-2"))[-1] < math.pi / 2 - 0.05
    ckpt = "results/000-DiT-S-2/checkpoints/0000500.pt"
    command(sample, "--ckpt", ckpt, "--class-labels", "dress", "pants")
    command(sample_ddp, "--ckpt", ckpt, "--num-fid-samples", 20, "--sample-dir", "samples")
    sampler = Sampler.from_checkpoint(ckpt, device="cpu")
    pictures, images = sampler.sample(100), open_dataset("folder", str(folder / "images"), SIZE)
    assert pictures.shape == (100, 3, SIZE, SIZE)
    real = stack(images, range(COUNT)) / 2 + 0.5
    noise = sampler.autoencoder.decode(torch.randn(100, 32, SIZE // 8, SIZE // 8)) / 2 + 0.5

    def statistics(some):
        """Mean and covariance of the colours of sixteen fields."""
        fields = torch.nn.functional.avg_pool2d(some.clamp(0, 1), SIZE // 4).flatten(1).double()
        return fields.mean(0), fields.T.cov()

    distances = [frechet_distance(*statistics(some), *statistics(real)) for some in (pictures, noise)]
    assert distances[0] < 0.75 * distances[1]
