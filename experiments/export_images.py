"""Write Fashion-MNIST's images and labels as an .npz in ADM's format, for evaluate.py and classifier.py.

python experiments/export_images.py --part t10k --out fashion-test.npz
python evaluate.py fashion-test.npz samples.npz --features pixels
"""

import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from runtime.cli import Parser, atomic_write, launch
from training.dataset import FashionMNIST


def main(args):
    """Write a part of the data set."""
    dataset = FashionMNIST(args.data_path, part=args.part)
    write_npz(args.out, dataset)
    print(f"Saved {len(dataset):,} images to {args.out}")


def write_npz(path, dataset):
    """Write uint8 ArrayImages as arr_0 (N, H, W, 3), grey repeated, and arr_1, labels (N,)."""
    images = np.broadcast_to(dataset.images, (*dataset.images.shape[:3], 3))
    with atomic_write(path, "wb") as file:
        np.savez(file, arr_0=images, arr_1=dataset.labels.astype(np.int64))


def build_parser():
    """The command-line options."""
    parser = Parser(description=__doc__)
    parser.add_argument("--data-path", default=None, metavar="FOLDER",
                        help="where the data set is, as for train.py (default: none)")  # fmt: skip
    parser.add_argument("--part", choices=("train", "t10k"), default="t10k",
                        help="to train on, or to test on (default: t10k)")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE", help="the .npz to write")
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
