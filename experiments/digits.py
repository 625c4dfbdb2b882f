"""What the experiments on the quick start share: training it, and how real and how legible its digits are."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from evaluation.metrics import frechet_distance, mean_and_covariance
from runtime.cli import UserError, atomic_write, int_at_least
from training.dataset import Digits

ROOT = Path(__file__).resolve().parent.parent
SEEDS = 10_000  # of the first sample, far from those of training's pictures


class Judge:
    """The real digits, as values of 0 … 16, (N, 64), and a classifier that was fitted to them."""

    def __init__(self):
        try:
            from sklearn.svm import SVC
        except ImportError as error:
            raise UserError("scikit-learn: is not installed; run uv sync --group dev") from error
        found = Digits()
        self.real, labels = ((found.images + 1) * 8).reshape(len(found), 64), found.labels
        half = SVC(gamma=0.001, C=10).fit(self.real[::2], labels[::2])
        self.accuracy = half.score(self.real[1::2], labels[1::2])  # on digits it has not seen
        self.classifier = SVC(gamma=0.001, C=10).fit(self.real, labels)

    def read(self, digits, labels):
        """The share of digits (N, 64) that are read as their labels (N,)."""
        return float((self.classifier.predict(digits) == labels).mean())

    def distance(self, digits, others=None):
        """The Fréchet distance of digits (N, 64) to the real ones, or to others, as pixels of -1 … 1."""
        others = self.real if others is None else others
        return frechet_distance(*mean_and_covariance(digits / 8 - 1), *mean_and_covariance(others / 8 - 1))

    def real_distance(self, count=500, draws=10):
        """What perfect samples would have: of count real digits to the others, the mean of some draws."""
        generator, found = np.random.default_rng(0), []
        for _ in range(draws):
            order = generator.permutation(len(self.real))
            found.append(self.distance(self.real[order[:count]], self.real[order[count:]]))
        return float(np.mean(found))

    def measure(self, sampler, per_class=50, /, **options):
        """Sample each class; a dict of distance, the share that is read as asked, and seconds."""
        start = time.monotonic()
        images = sampler.sample_each_class(per_class, seeds=SEEDS, batch_size=500, **options)
        seconds, digits = time.monotonic() - start, as_digits(images)
        labels = np.arange(10).repeat(per_class)
        return dict(distance=self.distance(digits), read=self.read(digits, labels), seconds=seconds)


def as_digits(images):
    """Images (N, 1, 8, 8) of [0, 1] as the data's values 0 … 16, (N, 64)."""
    return (images * 16).round().numpy().reshape(len(images), 64)


def train(folder, *options, seed=0):
    """Train the quick start in a folder, with more options of train.py; returns what it printed, seconds, and
    the checkpoint's path. Raises UserError where it fails."""
    os.makedirs(folder, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), "--preset", "digits", "--global-seed", str(seed)]
    start = time.monotonic()
    done = subprocess.run([*command, *map(str, options)], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(map(str, options))}: training failed ({done.stderr.strip()[-2000:]})")
    paths = sorted(Path(folder).glob("results/000-DiT-S-2-digits/checkpoints/*.pt"))
    return done.stdout, time.monotonic() - start, str(paths[-1])


def add_output_arguments(parser, choices, per_class):
    """--only, --max-steps, --per-class and --out."""
    # fmt: off
    parser.add_argument("--only", choices=choices, nargs="+", default=list(choices), metavar="NAME",
                        help=f"parts, of {', '.join(choices)} (default: {' '.join(choices)})")
    parser.add_argument("--max-steps", type=int_at_least(1), default=2000, metavar="STEPS",
                        help="of each training; fewer to try the script out (default: 2000)")
    parser.add_argument("--per-class", type=int_at_least(2), default=per_class, metavar="N",
                        help=f"digits of each class that are sampled (default: {per_class})")
    parser.add_argument("--out", default="results/experiments", metavar="FOLDER",
                        help="where the trainings, the table (.md) and all its numbers (.json) are written"
                        " (default: results/experiments)")
    # fmt: on


def write(folder, name, table, numbers):
    """Write a table, lines of markdown, and the numbers behind it; print the table."""
    for suffix, text in ((".md", table), (".json", json.dumps(numbers, indent=1))):
        with atomic_write(os.path.join(folder, name + suffix)) as file:
            file.write(text + "\n")
    print(f"\n{table}\n\nSaved {name}.md and {name}.json to {folder}")
