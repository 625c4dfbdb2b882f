"""The README's first command as a whole: time, legibility to a classifier, no copying. Slow."""

import functools
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

from evaluation.metrics import Moments, frechet_distance
from sampler import Sampler
from training.dataset import Digits

pytestmark = pytest.mark.slow


def distances(a, b):
    return torch.cdist(torch.from_numpy(a).double(), torch.from_numpy(b).double()).numpy()


@pytest.fixture(scope="module")
def digits():
    """The real digits, 64 values of 0 … 16 each, and their labels."""
    found = Digits()
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


def distance(digits, others):
    """The Fréchet distance of two sets of digits (N, 64) of 0 … 16, as pixels of -1 … 1."""
    moments = []
    for rows in (digits, others):
        found = Moments(64)
        found.add(torch.from_numpy(rows / 8 - 1))
        moments += [found.mean, found.covariance]
    return frechet_distance(*moments)


def real_distance(real):
    """What 500 perfect samples would have: 500 real digits to the others, the mean of ten draws."""
    generator, found = np.random.default_rng(0), []
    for _ in range(10):
        order = generator.permutation(len(real))
        found.append(distance(real[order[:500]], real[order[500:]]))
    return np.mean(found)


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of the README's first command with these options and seed 0, trained once."""
    return functools.cache(lambda *options: train(tmp_path_factory.mktemp("trained"), 0, *options)[2])


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


# The README's table of samplers. Guidance costs twice the time, in an interval less.
SAMPLED = [
    ("ddpm", 250), ("ddim", 50), ("ddim", 20), ("ddim", 5), ("dpm++", 20), ("dpm++", 10), ("euler", 20),
    ("heun", 10),
]  # fmt: skip


def test_samplers_and_guidance(trained, digits, judge):
    """What sampler, steps and guidance do to the distance to real digits, to legibility and to time."""
    sampler, (real, _) = Sampler.from_checkpoint(trained(), device="cpu"), digits
    torch.set_num_threads(os.cpu_count())
    sampler.sample(500, batch_size=500, steps=2)  # warm up
    rows, reference = {}, real_distance(real)
    for name, steps in SAMPLED:
        for interval in (None, (0.38, 3.22)) if (name, steps) == ("dpm++", 20) else (None,):
            cells = {}
            for scale in (1.0, 1.5, 2.0, 4.0) if interval is None else (1.5, 2.0, 4.0):
                start = time.monotonic()
                images = sampler.sample_each_class(
                    50, seeds=10_000, batch_size=500, sampler=name, steps=steps, cfg_scale=scale,
                    cfg_interval=interval,
                )  # fmt: skip
                seconds, generated = time.monotonic() - start, as_digits(images)
                read = (judge.predict(generated) == np.arange(10).repeat(50)).mean()
                cells[scale] = distance(generated, real), read, seconds
                print(f"{name}, {steps}, {interval}, {scale}: {cells[scale]}", flush=True)
            rows[name, steps, interval] = cells
    print("\n| sampler, steps | guidance 1.0 | 1.5 | 2.0 | 4.0 | seconds for 500 at 1.5 |")
    print("|---|---:|---:|---:|---:|---:|")
    for (name, steps, interval), cells in sorted(rows.items(), key=lambda row: row[1][1.5][0]):
        shown = [f"{cells[s][0]:.2f}, {cells[s][1]:.1%}" if s in cells else "" for s in (1.0, 1.5, 2.0, 4.0)]
        where = "" if interval is None else ", in an interval"
        print(f"| `{name}`, {steps}{where} | {' | '.join(shown)} | {cells[1.5][2]:.1f} |")
    print(f"500 real digits to the others: {reference:.2f}")

    far = {key: {scale: cell[0] for scale, cell in cells.items()} for key, cells in rows.items()}
    for (name, steps, interval), cells in rows.items():
        assert all(cells[scale][1] >= 0.97 for scale in (1.5, 2.0, 4.0))
        # Guidance makes digits legible, and more alike than the real ones:
        assert far[name, steps, interval][4.0] > far[name, steps, interval][1.5]
        if steps >= 10 and interval is None:
            assert far[name, steps, interval][1.0] < 2 * reference
    # What accuracy does not see:
    assert far["ddim", 5, None][1.0] > 1.5 * far["ddim", 20, None][1.0]


# Steps of every solver on a model of its own: noise schedules of a diffusion, and a flow.
SOLVED = {
    "cosine": [],
    "linear": ["--noise-schedule", "linear"],
    "flow": ["--objective", "flow"],
}


@pytest.mark.parametrize("name", SOLVED)
def test_every_solver_comes_close_to_real_digits(trained, digits, judge, name):
    """All come about as close with 25 and 50 steps, and nearly so with 10, as the best of them with 50."""
    sampler, (real, _) = Sampler.from_checkpoint(trained(*SOLVED[name]), device="cpu"), digits
    torch.set_num_threads(os.cpu_count())
    print(f"\n500 real digits to the others: {real_distance(real):.2f}")
    print("| schedule | sampler | 10 steps | 25 | 50 |\n|---|---|---:|---:|---:|")
    found = {}
    for solver in sampler.process.samplers:
        for steps in (10, 25, 50):
            images = sampler.sample_each_class(
                50, seeds=10_000, batch_size=500, sampler=solver, steps=steps, cfg_scale=1.0
            )
            generated = as_digits(images)
            read = (judge.predict(generated) == np.arange(10).repeat(50)).mean()
            found[solver, steps] = distance(generated, real), read
        shown = [f"{found[solver, steps][0]:.2f}, {found[solver, steps][1]:.1%}" for steps in (10, 25, 50)]
        print(f"| {name} | {solver} | {' | '.join(shown)} |", flush=True)
    best = min(found[solver, 50][0] for solver in sampler.process.samplers)
    assert best < 2.5 * real_distance(real)
    for (solver, steps), (far, _) in found.items():
        assert far < (2.5 if steps == 10 else 1.5) * best, (solver, steps)


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
