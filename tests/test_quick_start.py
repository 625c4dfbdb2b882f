"""The README's first command as a whole: time, legibility to a classifier, no copying. Slow."""

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


@pytest.mark.parametrize("seed", range(3))
def test_quick_start(tmp_path, seed):
    from sklearn.svm import SVC

    digits = load_digits()
    real, labels = ((digits.images + 1) * 8).reshape(len(digits), 64), digits.labels
    judge = SVC(gamma=0.001, C=10).fit(real[::2], labels[::2])
    assert judge.score(real[1::2], labels[1::2]) > 0.97  # a judge that knows digits it has not seen
    judge = SVC(gamma=0.001, C=10).fit(real, labels)

    start = time.monotonic()
    command = [sys.executable, str(ROOT / "train.py"), "--preset", "digits", "--global-seed", str(seed)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr[-2000:]
    (picture,) = tmp_path.glob("results/000-DiT-S-2-digits/samples/*.png")
    assert str(picture.relative_to(tmp_path)) in done.stdout

    (path,) = tmp_path.glob("results/000-DiT-S-2-digits/checkpoints/*.pt")
    images = Sampler.from_checkpoint(str(path), device="cpu").sample_each_class(
        50, seeds=10_000, batch_size=500
    )
    generated = (images * 16).round().numpy().reshape(500, 64)
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
    assert (
        np.median(nearest) > 0.9 * np.median(within) and nearest.min() > 0
    )  # as far from them as they are apart
