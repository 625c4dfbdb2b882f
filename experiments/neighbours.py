"""How near a model's samples are to the images it was trained on: whether it copies them.

    python experiments/neighbours.py --ckpt results/000-DiT-S-8-photos/checkpoints/0004000.pt \\
        --data-path FOLDER

Samples, of every class in turn, are compared with all training images, also mirrored where training mirrors
them, by the root of the mean squared difference of pixels. Real images, compared with all others, show which
distances are to be expected. Ten samples are drawn over their two nearest images.
"""

import json
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from runtime.cli import (
    Parser,
    UserError,
    atomic_write,
    float_at_least,
    int_at_least,
    launch,
    seed_number,
)
from runtime.image_io import save_grid, to_float
from sampler import Sampler
from training.dataset import DATASETS, open_dataset

SHOWN = 10


def main(args):
    """Sample, compare, print, and write FILE.png and FILE.json."""
    sampler = Sampler.from_checkpoint(args.ckpt)
    classes = sampler.model.num_classes
    samples = sampler.sample(
        [i % classes for i in range(args.num_samples)] if classes else args.num_samples,
        seeds=args.seed, cfg_scale=args.cfg_scale, progress=True,
    )  # fmt: skip
    dataset = open_dataset(args.dataset, args.data_path, samples.shape[-1])
    if len(dataset) < 3 or dataset.channels != samples.shape[1]:
        raise UserError(
            f"--data-path {args.data_path}: {len(dataset)} images of {dataset.channels} channels; at least 3"
            f" of {samples.shape[1]} are needed"
        )
    real = to_float(torch.stack([dataset[i, False][0] for i in range(len(dataset))])) / 2 + 0.5
    some = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[: args.num_samples]
    distances, indices = nearest(samples, real, dataset.flips)
    others, _ = nearest(real[some], real, dataset.flips, itself=some)
    numbers = {
        name: dict(
            count=len(values), median=values.median().item(), first_percentile=values.quantile(0.01).item()
        )
        for name, values in (("samples", distances[:, 0]), ("real", others[:, 0]))
    }
    for name, found in numbers.items():
        print(
            f"{found['count']:,} {name}: to the nearest image {found['median']:.1f} grey levels in the"
            f" median, {found['first_percentile']:.1f} at the first percentile"
        )
    shown = range(min(SHOWN, len(samples)))
    rows = [samples[: len(shown)], *(real[indices[: len(shown), k]] for k in range(2))]
    save_grid(torch.cat(rows), f"{args.out}.png", nrow=len(shown))
    with atomic_write(f"{args.out}.json") as file:
        json.dump(dict(numbers, shown=distances[: len(shown)].tolist()), file, indent=1)
    print(f"Saved {args.out}.png and {args.out}.json")


def nearest(images, real, flips, itself=None, chunk=250):
    """Distances (N, 2) of images (N, C, H, W) in [0, 1] to the two nearest of `real`, in grey levels, and
    their indices (N, 2).

    flips: whether mirrored ones count too. itself: indices (N,) of the images in `real`, which do not count.
    """
    found, flat = [], real.flatten(1)
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk]
        distances = torch.cdist(part.flatten(1), flat)
        if flips:
            distances = torch.minimum(distances, torch.cdist(part.flip(-1).flatten(1), flat))
        if itself is not None:
            distances.scatter_(1, itself[start : start + chunk, None], torch.inf)
        found.append(distances.topk(2, largest=False))
    values, indices = (torch.cat(parts) for parts in zip(*found))
    return values * 255 / flat.shape[1] ** 0.5, indices


def build_parser():
    """The command-line options."""
    # fmt: off
    parser = Parser(description=__doc__)
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint of a run of train.py")
    parser.add_argument("--dataset", choices=list(DATASETS), default="folder",
                        help="what it was trained on, as for train.py (default: folder)")
    parser.add_argument("--data-path", default=None, metavar="FOLDER",
                        help="where that is, as for train.py (default: none)")
    parser.add_argument("--num-samples", type=int_at_least(2), default=1000, metavar="N",
                        help="samples to compare, and real images at most (default: 1000)")
    parser.add_argument("--cfg-scale", type=float_at_least(0), default=None, metavar="SCALE",
                        help="guidance (default: the run's)")
    parser.add_argument("--seed", type=seed_number, default=0, metavar="SEED",
                        help="of the first sample, the next ones count on (default: 0)")
    parser.add_argument("--out", default="neighbours", metavar="FILE",
                        help="what to write, less .png and .json (default: neighbours)")
    # fmt: on
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
