"""ADM's five numbers of generated images: Inception Score, FID, sFID, precision and recall.

    python evaluate.py VIRTUAL_imagenet256_labeled.npz samples.npz
    torchrun --nproc_per_node=8 evaluate.py VIRTUAL_imagenet256_labeled.npz samples.npz

REF and SAMPLES are .npz files in ADM's format (arr_0, uint8, N x H x W x 3), or folders of images. Statistics
of a larger set in REF (mu, sigma, mu_s, sigma_s) are used, as ADM's suite does; without precision and recall
they are all that REF needs:

    python evaluate.py VIRTUAL_imagenet256_labeled.npz samples --metrics is fid sfid

A reference file of your own, of images cropped as for training:

    python evaluate.py /path/to/images --image-size 256 --save-stats reference.npz

The numbers are printed as ADM's suite prints them, and written with every setting to samples.evaluation.json.
From Python: frechet_distance, inception_score and precision_recall take arrays or tensors.
"""

import argparse
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass, field

import numpy as np
import torch

from evaluation.image_reader import ImageFolderReader, Images, NpzReader, names_in, write_reference
from evaluation.inception import (
    STATISTICS,
    Features,
    Inception,
    add_inception_arguments,
    check_same_weights,
    compute_features,
    load_inception,
    name_of_count,
    read_statistics,
    read_weights,
    share_of,
)
from evaluation.metrics import NEIGHBOUR, SCORE_CHUNK, frechet_distance, inception_score, precision_recall
from runtime.cli import Parser, UserError, atomic_write, int_at_least, launch, user_errors
from runtime.distributed import init_distributed

__all__ = ["frechet_distance", "inception_score", "precision_recall"]

# By the names of --metrics, in ADM's order:
METRICS = {
    "is": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision", "recall": "Recall",
}  # fmt: skip
FRECHET = dict(fid="pooled", sfid="spatial")  # and the features whose moments they compare
UNWRITTEN = "could not be written"
PACKAGES = ("torch", "torchvision", "torch-fidelity", "numpy", "pillow")


def main(args):
    """Print and save the metrics of samples against a reference, or save a reference's statistics."""
    # Check the options, and open the images:
    check_options(args)
    if args.num_workers is None:
        args.num_workers = min(4, os.cpu_count() or 1)
    metrics = [name for name in METRICS if not args.metrics or name in args.metrics]
    if args.save_stats:
        reference, samples = (
            open_side("REF", args.reference, ["fid", "sfid"], args.image_size, fresh=True),
            None,
        )
    else:
        reference = open_side("REF", args.reference, [m for m in metrics if m != "is"], args.image_size)
        samples = open_side("SAMPLES", args.samples, metrics, images_needed=True)
    if args.inception_weights is not None:
        read_weights(args.inception_weights, args.any_weights)
    if args.dry_run:
        for side in filter(None, (reference, samples)):
            print(side.describe())
        print("Options are sound; nothing was written.")
        return

    # Load the network:
    dist = init_distributed()
    network = load_inception(args.inception_weights, dist.device, args.any_weights)
    for side in filter(None, (reference, samples)):
        if side.statistics:
            check_same_weights(side.path, network.sha256, side.flag)

    # Compute the features of both sides, every process of its share:
    for side in filter(None, (reference, samples)):
        compute_side(side, network, args, dist)
    if not dist.is_main:
        return

    # Compare, and report:
    if args.save_stats:
        save_statistics(args, reference, network)
        return
    numbers = compare(metrics, reference, samples, network, args.half_distances)
    report(numbers, reference, samples, network, args, dist)


# ---------------------------------------------------------------------------------------------
# The two sides


@dataclass
class MetricInput:
    """The reference or the samples: what their file holds, and what is computed of it.

    wanted      the kinds of features to compute, see Features
    statistics  kind: (mean, covariance), as stored in the file
    """

    flag: str
    path: str
    images: Images | None
    wanted: set
    statistics: dict
    features: Features = field(default_factory=Features)

    def moments(self, kind):
        """The mean and covariance of "pooled" or "spatial" features: the stored ones before the computed."""
        if kind in self.statistics:
            return self.statistics[kind]
        moments = getattr(self.features, kind)
        return moments.mean, moments.covariance

    def describe(self):
        """The side in a line."""
        stored = ", ".join(name for kind in self.statistics for name in STATISTICS[kind])
        parts = [f"N = {self.images.count:,}, {self.images.size[1]}x{self.images.size[0]} pixels"
                 if self.images else "", f"stored {stored}" if stored else ""]  # fmt: skip
        return f"{self.flag} {self.path}: {'; '.join(filter(None, parts))}"


def open_side(flag, path, metrics, crop=None, *, images_needed=False, fresh=False):
    """The Side of a folder or file, with all that these metrics need of it; UserError where it lacks any.

    images_needed: whether statistics alone are not enough. fresh: leave stored statistics aside.
    """
    is_folder = os.path.isdir(path)
    if crop is not None and not is_folder:
        raise UserError(f"--image-size {crop}: crops the images of a folder, {path} is none; leave it out")
    names, statistics = set() if is_folder else names_in(path, flag), {}
    for metric, kind in FRECHET.items():
        if metric in metrics and not fresh and set(STATISTICS[kind]) <= names:
            statistics[kind] = read_statistics(path, kind, Inception.sizes, flag)
    served = [metric for metric, kind in FRECHET.items() if kind in statistics]
    left = [metric for metric in metrics if metric not in served]
    wanted = {FRECHET.get(metric, "rows") for metric in left}
    if is_folder:
        images = ImageFolderReader(path, flag, crop)
    elif "arr_0" in names or images_needed or not served:
        images = NpzReader(path, flag)
    elif left:
        raise UserError(
            f"{flag} {path}: no arr_0 in it, and its statistics do not give {' and '.join(left)}; give REF"
            f" images too, or --metrics is {' '.join(served)}"
        )
    else:
        images = None
    least = NEIGHBOUR + 1 if {"precision", "recall"} & set(metrics) else 2
    if wanted and images.count < least:
        raise UserError(f"{flag} {path}: {images.count} images; these metrics need at least {least}")
    return MetricInput(flag, path, images, wanted, statistics)


def compute_side(side, network, args, dist):
    """Compute the features that a side needs, every process of its share of the images."""
    if side.wanted:
        share = share_of(side.images.count, args.batch_size, dist)
        batches = side.images.batches(*share, args.batch_size, args.num_workers)
        side.features = compute_features(batches, share, network, dist, side.wanted, side.flag)


# ---------------------------------------------------------------------------------------------
# Numbers


def compare(metrics, reference, samples, network, half=True):
    """The metrics asked for by name, in ADM's order, of sides whose features are computed."""
    numbers = {}
    for metric in metrics:
        if metric == "is":
            # In parts, since the logits of all are not needed at once:
            chunks = samples.features.rows.split(SCORE_CHUNK)
            scores = [inception_score(network.logits(rows), are_logits=True) for rows in chunks]
            numbers[metric] = float(np.mean(scores))
        elif metric in FRECHET:
            kind = FRECHET[metric]
            with user_errors(f"{reference.path} against {samples.path}"):
                numbers[metric] = frechet_distance(*reference.moments(kind), *samples.moments(kind))
    if {"precision", "recall"} & set(metrics):
        both = precision_recall(
            reference.features.rows, samples.features.rows, half=half, device=network.device, progress=True
        )
        numbers |= {name: value for name, value in zip(("precision", "recall"), both) if name in metrics}
    return numbers


def find_warnings(numbers, reference, samples, network):
    """What the reader of the numbers should know, a line each."""
    doubts = []
    if not network.is_published:
        doubts.append(
            f"not comparable to published numbers: other Inception weights, of sha256 {network.sha256[:16]}…"
        )
    if "is" in numbers and samples.images.is_sorted_by_class:
        doubts.append(
            f"SAMPLES {samples.path}: sorted by class; the Inception Score is the mean over chunks of"
            f" {SCORE_CHUNK:,} in this order, and too low where they hold few classes each; shuffle them"
        )
    for side in (reference, samples):
        few = [kind for kind in FRECHET.values()
               if kind in side.wanted and side.images.count <= network.sizes[kind]]  # fmt: skip
        if few:
            doubts.append(
                f"{side.flag} {side.path}: {side.images.count:,} images are no more than the"
                f" {network.sizes[few[0]]:,} dimensions of their features, which raises Fréchet distances;"
                " compare them at the same number of images only"
            )
    if samples.statistics:
        doubts.append(f"SAMPLES {samples.path}: the statistics stored in it were used, as ADM's suite does")
    if reference.images and reference.images.size != samples.images.size:
        sizes = [f"{side.images.size[1]}x{side.images.size[0]}" for side in (reference, samples)]
        doubts.append(f"REF has images of {sizes[0]} pixels, SAMPLES of {sizes[1]}")
    return doubts


def report(numbers, reference, samples, network, args, dist):
    """Print the numbers as ADM's suite does, and write them with every setting to a JSON file."""
    doubts = find_warnings(numbers, reference, samples, network)
    name = f"FID-{name_of_count(samples.images.count)}"
    print(reference.describe())
    print(f"{samples.describe()}" + (f"; FID is {name}" if "fid" in numbers else ""))
    for doubt in doubts:
        print(f"Warning: {doubt}")
    for metric, value in numbers.items():
        print(f"{METRICS[metric]}: {value}")
    path = args.out or out_path(args.samples)
    record = dict(
        name=name, comparable_to_published=network.is_published,
        metrics={METRICS[metric]: value for metric, value in numbers.items()}, warnings=doubts,
        reference=describe_side(reference), samples=describe_side(samples),
        settings=describe_settings(args, network, dist),
    )  # fmt: skip
    with user_errors(f"--out {path}", UNWRITTEN, OSError), atomic_write(path) as file:
        json.dump(record, file, indent=1)
    print(f"Saved {path}")


def describe_side(side):
    """A side as plain data."""
    return dict(
        path=os.path.abspath(side.path),
        bytes=os.path.getsize(side.path) if os.path.isfile(side.path) else None,
        N=side.images.count if side.images else None,
        size=list(side.images.size) if side.images else None,
        dtype="uint8",
        statistics={kind: "stored" if kind in side.statistics else "computed"
                    for kind in FRECHET.values() if kind in side.wanted or kind in side.statistics},
    )  # fmt: skip


def describe_settings(args, network, dist):
    """How the numbers were computed, as plain data."""
    device = dist.device
    return dict(
        inception_weights=dict(
            file=args.inception_weights, sha256=network.sha256, published=network.is_published
        ),
        resize="TensorFlow 1 bilinear to 299x299, no antialiasing",
        features="float32, tf32 off", statistics="float64", fid="eigh and singular values, float64",
        distances="float16" if args.half_distances else "float32", k=NEIGHBOUR,
        inception_score=f"mean over chunks of {SCORE_CHUNK} in file order",
        image_size=args.image_size, batch_size=args.batch_size, processes=dist.world_size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        versions={name: importlib.metadata.version(name) for name in PACKAGES}
        | dict(python=platform.python_version()),
    )  # fmt: skip


def save_statistics(args, reference, network):
    """Write the reference's statistics, and some of its images, in ADM's format."""
    images = reference.images
    count = min(args.stats_images, images.count)
    chosen = np.sort(np.random.default_rng(0).choice(images.count, count, replace=False)).tolist()
    arrays = {
        name: value.numpy()
        for kind, names in STATISTICS.items()
        for name, value in zip(names, reference.moments(kind))
    }
    with user_errors(f"--save-stats {args.save_stats}", UNWRITTEN, OSError):
        write_reference(
            args.save_stats, images, chosen, **arrays, count=images.count, inception_sha256=network.sha256
        )
    if not network.is_published:
        print("Warning: of other Inception weights; good only for numbers computed with the same")
    print(f"Saved {args.save_stats}: statistics of {images.count:,} images, and {count:,} of them")


# ---------------------------------------------------------------------------------------------
# Options


def out_path(samples):
    """Where the JSON goes: beside the samples."""
    return f"{os.path.normpath(samples).removesuffix('.npz')}.evaluation.json"


def check_options(args):
    """Raise UserError for options that cannot be, or not together, before any work."""
    for side, path in (("REF", args.reference), ("SAMPLES", args.samples)):
        if path is not None and not os.path.exists(path):
            raise UserError(f"{side} {path}: no such file or folder")
    if not args.save_stats:
        if args.samples is None:
            raise UserError("SAMPLES: required, unless --save-stats is given")
        check_place("--out", args.out or out_path(args.samples))
        return
    for name in ("samples", "out", "metrics"):
        if getattr(args, name):
            flag = "SAMPLES" if name == "samples" else f"--{name}"
            raise UserError(f"{flag}: --save-stats is of REF alone; leave it out")
    if os.path.isdir(args.reference) and args.image_size is None:
        raise UserError("--save-stats: of a folder needs --image-size, the side its images are cropped to")
    if os.path.exists(args.save_stats):
        raise UserError(f"--save-stats {args.save_stats}: exists; remove it, or give another name")
    check_place("--save-stats", args.save_stats)


def check_place(flag, path):
    """Raise UserError where a file's folder does not exist, or cannot be written to."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {path}: cannot be written there; give a file in a folder that exists")


def build_parser():
    """The command-line options."""
    # fmt: off
    parser = Parser(description=__doc__)
    parser.add_argument("reference", metavar="REF",
                        help="real images: an .npz in ADM's format, or a folder of images")
    parser.add_argument("samples", nargs="?", default=None, metavar="SAMPLES",
                        help="generated images: the same; left out with --save-stats")
    parser.add_argument("--metrics", nargs="+", choices=list(METRICS), default=None,
                        help="which to compute (default: all five)")
    parser.add_argument("--out", default=None, metavar="FILE",
                        help="where the numbers and settings are written"
                        " (default: SAMPLES.evaluation.json)")
    parser.add_argument("--save-stats", default=None, metavar="FILE",
                        help="write REF's statistics there, an .npz in ADM's format, instead (default: none)")
    parser.add_argument("--stats-images", type=int_at_least(0), default=10_000, metavar="N",
                        help="images of REF, drawn at random, that --save-stats writes too, for precision"
                        " and recall (default: 10000)")
    parser.add_argument("--image-size", type=int_at_least(1), default=None, metavar="PIXELS",
                        help="side of the square that the images of REF, a folder, are cropped to"
                        " (default: as they are)")
    parser.add_argument("--half-distances", action=argparse.BooleanOptionalAction, default=True,
                        help="round the distances of precision and recall to float16, as ADM does; off"
                        " for the definition, in float32 (default: on)")
    parser.add_argument("--batch-size", type=int_at_least(1), default=64, metavar="IMAGES",
                        help="images at a time in each process (default: 64)")
    parser.add_argument("--num-workers", type=int_at_least(0), default=None, metavar="N",
                        help="processes that read a folder, for each process (default: 4, or the number of"
                        " CPU cores if that is less)")
    add_inception_arguments(parser)
    parser.add_argument("--dry-run", action="store_true",
                        help="check options and files, write nothing (default: off)")
    # fmt: on
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
