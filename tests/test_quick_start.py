"""The README's first command as a whole: time, legibility to a classifier, no copying. Slow."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

from data import load_digits
from sampler import Sampler

pytestmark = pytest.mark.slow


def distances(a, b):
    return torch.cdist(torch.from_numpy(a).double(), torch.from_numpy(b).double()).numpy()


@pytest.fixture(scope="module")
def digits():
    """The real digits, 64 values of 0 … 16 each, and their labels."""
    found = load_digits()
    return ((found.images + 1) * 8).reshape(len(found), 64), found.labels


@pytest.fixture(scope="module")
def judge(digits):
    """A classifier that knows digits, also those it has not seen."""
    from sklearn.svm import SVC

    real, labels = digits
    assert SVC(gamma=0.001, C=10).fit(real[::2], labels[::2]).score(real[1::2], labels[1::2]) > 0.97
    return SVC(gamma=0.001, C=10).fit(real, labels)


def as_digits(images):
    return (images * 16).round().numpy().reshape(len(images), 64)


def train(folder, seed, *options):
    """Run the README's first command; returns (its result, seconds, the checkpoint's path)."""
    start = time.monotonic()
    command = [sys.executable, str(ROOT / "train.py"), "--preset", "digits", "--global-seed", str(seed)]
    command += options
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = folder.glob("results/000-DiT-S-2-digits/checkpoints/*.pt")
    return done, seconds, str(path)


@pytest.mark.parametrize("seed", range(3))
def test_quick_start(tmp_path, digits, judge, seed):
    real, _ = digits
    done, seconds, path = train(tmp_path, seed)
    (picture,) = tmp_path.glob("results/000-DiT-S-2-digits/samples/*.png")
    assert str(picture.relative_to(tmp_path)) in done.stdout

    images = Sampler.from_checkpoint(path, device="cpu").sample_each_class(50, seeds=10_000, batch_size=500)
    generated = as_digits(images)
    accuracy = (judge.predict(generated) == np.arange(10).repeat(50)).mean()
    nearest = distances(generated, real).min(axis=1)
    within = distances(real, real)
    np.fill_diagonal(within, np.inf)
    within = within.min(axis=1)
    print(
        f"\nseed {seed}: {seconds:.0f} s, {accuracy:.1%} read as asked; to the nearest real digit: median"
        f" {np.median(nearest):.1f}, smallest {nearest.min():.1f}; within the real ones: median"
        f" {np.median(within):.1f}, smallest {within.min():.1f}"
    )
    assert seconds <= 180
    assert accuracy >= 0.95
    # As far from them as they are apart:
    assert np.median(nearest) > 0.9 * np.median(within) and nearest.min() > 0


def test_samplers_and_guidance(tmp_path, judge):
    """The README's table: what steps, guidance and its interval do to legibility and time."""
    sampler = Sampler.from_checkpoint(train(tmp_path, 0)[2], device="cpu")
    torch.set_num_threads(os.cpu_count())
    sampler.sample(500, batch_size=500, steps=2)  # warm up
    accuracy = {}
    print("\n| sampler | guidance | interval | read as asked | seconds for 500 |\n|---|---:|---|---:|---:|")
    for name, steps in (("ddpm", 250), ("ddim", 50), ("dpm++", 20), ("dpm++", 10)):
        for scale in (1.0, 1.5, 2.0, 4.0):
            for interval in (None, (0.38, 3.22)) if scale > 1 else (None,):
                start = time.monotonic()
                images = sampler.sample_each_class(
                    50, seeds=10_000, batch_size=500, sampler=name, steps=steps, cfg_scale=scale,
                    cfg_interval=interval,
                )  # fmt: skip
                seconds = time.monotonic() - start
                read = judge.predict(as_digits(images)) == np.arange(10).repeat(50)
                accuracy[name, steps, scale, interval] = read.mean()
                where = "all" if interval is None else f"{interval[0]} to {interval[1]}"
                print(
                    f"| {name}, {steps} | {scale} | {where} | {read.mean():.1%} | {seconds:.1f} |", flush=True
                )
    assert all(
        share >= 0.97 for (name, steps, scale, _), share in accuracy.items() if scale > 1 and steps >= 20
    )


# The README's table of variants: what is added to the first command, and the least share that is read as
# asked without guidance, below the lowest of three seeds.
VARIANTS = {
    "adaln-zero": ([], 0.92),
    "adaln": (["--block", "adaln"], 0.90),
    "in-context": (["--block", "in-context"], 0.91),
    "cross-attention": (["--block", "cross-attention"], 0.87),
    "registers": (["--registers", "4"], 0.92),
    "conv": (["--ffn", "conv"], 0.92),
    "learned": (["--pos-embed", "learned"], 0.92),
    "flow": (["--objective", "flow"], 0.94),
    "flow, logit-normal": (["--objective", "flow", "--timestep-sampler", "logit-normal"], 0.94),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(tmp_path, judge, name):
    """A row of that table, for one seed."""
    options, least = VARIANTS[name]
    _, seconds, path = train(tmp_path, 0, *options)
    sampler, read = Sampler.from_checkpoint(path, device="cpu"), {}
    for scale, count in ((1.0, 100), (2.0, 50)):
        images = sampler.sample_each_class(count, seeds=10_000, batch_size=250, cfg_scale=scale)
        read[scale] = (judge.predict(as_digits(images)) == np.arange(10).repeat(count)).mean()
    print(f"\n{name}: {seconds:.0f} s; read as asked: {read[1.0]:.1%}, with guidance {read[2.0]:.1%}")
    assert read[1.0] >= least and read[2.0] >= 0.99
