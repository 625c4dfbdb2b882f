"""A data set added from outside: a class and a row, nothing else changed."""

import numpy as np
import pytest
import torch

import sample
import train
from runtime.cli import UserError
from training.dataset import DATASETS, ImageDataset, open_dataset


class Stripes(ImageDataset):
    """Grey images whose brightness is their class."""

    channels, image_size, classes, flips, fingerprint = 1, 8, ["dark", "bright"], False, "stripes-1"

    def __init__(self, data_path, image_size, dry_run):
        pass

    def __len__(self):
        return 16

    def __getitem__(self, key):
        index, mirrored = key
        return torch.full((1, 8, 8), index % 2 * 2.0 - 1), index % 2


def run_train(folder, *words):
    train.main(
        train.build_parser().parse_args(
            [
                *("--dataset", "stripes", "--image-size", "8", "--vae", "none", "--num-workers", "0"),
                *("--model", "DiT-S/8", "--depth", "1", "--hidden-size", "16", "--num-heads", "2"),
                *("--global-batch-size", "4", "--results-dir", str(folder), "--sample-every", "0", *words),
            ]
        )
    )


def test_a_data_set_from_outside_trains_continues_and_samples(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "stripes", Stripes)
    run_train(tmp_path, "--max-steps", "2")
    (run,) = tmp_path.glob("*/")
    run_train(tmp_path, "--max-steps", "4", "--resume", str(run))
    words = ["--ckpt", str(run / "checkpoints" / "0000004.pt"), "--class-labels", "bright", "dark"]
    words += ["--num-sampling-steps", "2", "--out", str(tmp_path / "pictures")]
    sample.main(sample.build_parser().parse_args(words))
    assert any((tmp_path / "pictures").iterdir())
    monkeypatch.setattr(Stripes, "fingerprint", "stripes-2")
    with pytest.raises(UserError, match="--dataset stripes: holds other images than"):
        run_train(tmp_path, "--max-steps", "6", "--resume", str(run))


def test_what_a_data_set_lacks_is_named(monkeypatch):
    class Half(ImageDataset):
        channels, image_size, classes = 1, 8, []

        def __init__(self, data_path, image_size, dry_run):
            self.flips = False

    monkeypatch.setitem(DATASETS, "half", Half)
    with pytest.raises(UserError, match="--dataset half: Half lacks __len__, __getitem__, fingerprint;"):
        open_dataset("half", None, 8)
    with pytest.raises(UserError, match="--image-size 9: the images of --dataset half have 8 pixels"):
        full = {"__len__": lambda self: 2, "__getitem__": lambda self, key: np.zeros(1), "fingerprint": "f"}
        monkeypatch.setitem(DATASETS, "half", type("Full", (Half,), full))
        open_dataset("half", None, 9)
