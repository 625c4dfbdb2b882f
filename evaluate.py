"""ADM's five numbers of generated images, Inception Score, FID, sFID, precision and recall, and KID.

    python evaluate.py VIRTUAL_imagenet256_labeled.npz samples.npz
    torchrun --nproc_per_node=8 evaluate.py VIRTUAL_imagenet256_labeled.npz samples.npz

REF and SAMPLES are .npz files in ADM's format (arr_0, uint8, N x H x W x 3), or folders of images. Statistics
of a larger set in REF (mu, sigma, mu_s, sigma_s) are used, as ADM's suite does; without precision and recall
they are all that REF needs:

    python evaluate.py VIRTUAL_imagenet256_labeled.npz samples --metrics is fid sfid

A reference file of your own, of images cropped as for training:

    python evaluate.py /path/to/images --image-size 256 --save-stats reference.npz

Distances by other networks than Inception, which need no download; none of them is a FID:

    python evaluate.py reference.npz samples.npz --features pixels
    python evaluate.py reference.npz samples.npz --features classifier --feature-weights x.safetensors

The numbers are printed as ADM's suite prints them, and written with every setting to samples.evaluation.json.
From Python: frechet_distance, kernel_distance, inception_score and precision_recall take arrays or tensors.
"""

import argparse
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass, field

import numpy as np
import torch

from evaluation.features import FEATURES
from evaluation.image_reader import ImageFolderReader, Images, NpzReader, names_in, write_reference
from evaluation.inception import add_inception_arguments, name_of_count
from evaluation.metrics import (
    NEIGHBOUR,
    SCORE_CHUNK,
    SUBSET_SIZE,
    SUBSETS,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from evaluation.statistics import (
    STATISTICS,
    Features,
    check_same_weights,
    compute_features,
    describe_network,
    read_statistics,
    share_of,
)
from runtime.cli import Parser, UserError, atomic_write, int_at_least, launch, require_parts, user_errors
from runtime.distributed import init_distributed

__all__ = ["frechet_distance", "inception_score", "kernel_distance", "precision_recall"]

METRICS = ("is", "fid", "sfid", "kid", "precision", "recall")  # --metrics, in ADM's order
PUBLISHED = ("is", "fid", "sfid", "precision", "recall")  # the default of Inception
# What the numbers are called, of Inception's features and of any others':
NAMES = dict(
    {"is": "Inception Score"}, fid="FID", sfid="sFID", kid="KID", kid_error="KID's standard error",
    precision="Precision", recall="Recall",
)  # fmt: skip
OTHER_NAMES = dict(
    {"is": "Class score"}, fid="Fréchet distance", sfid="Spatial Fréchet distance", kid="Kernel distance",
    kid_error="Kernel distance's standard error",
)  # fmt: skip
FRECHET = dict(fid="pooled", sfid="spatial")  # and the features whose moments they compare
UNWRITTEN = "could not be written"
PACKAGES = ("torch", "torchvision", "torch-fidelity", "numpy", "pillow")


def main(args):
    """Print and save the metrics of samples against a reference, or save a reference's statistics."""
    # Check the options, and open the images:
    check_options(args)
    if args.num_workers is None:
        args.num_workers = min(4, os.cpu_count() or 1)
    network = open_network(args)
    metrics = choose_metrics(args, network)
    if args.save_stats:
        wanted = [metric for metric in FRECHET if metric in network.metrics]
        reference = open_side("REF", args.reference, wanted, network, args.image_size, fresh=True)
        samples = None
    else:
        compared = [metric for metric in metrics if metric != "is"]
        reference = open_side("REF", args.reference, compared, network, args.image_size)
        samples = open_side("SAMPLES", args.samples, metrics, network, images_needed=True)
    if args.dry_run:
        for side in filter(None, (reference, samples)):
            print(side.describe())
        print("Options are sound; nothing was written.")
        return

    # Load the network:
    dist = init_distributed()
    network = network.load(dist.device)
    for side in filter(None, (reference, samples)):
        if side.statistics:
            check_same_weights(side.path, network, side.flag)

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


def open_network(args):
    """The network of --features, checked, not on its device yet; UserError for options of another one."""
    if args.features == "inception":
        if args.feature_weights:
            raise UserError(f"--feature-weights {args.feature_weights}: Inception's are --inception-weights")
        return FEATURES["inception"](args.inception_weights, args.any_weights)
    for flag, value in (("--inception-weights", args.inception_weights), ("--any-weights", args.any_weights)):
        if value:
            raise UserError(f"{flag}: of --features inception, not {args.features}; leave it out")
    network = FEATURES[args.features](args.feature_weights)
    parts = ["name", "sizes", "sha256", "extract", *(["logits"] if "is" in network.metrics else [])]
    require_parts(f"--features {args.features}", network, *parts)
    if "sfid" in network.metrics and "spatial" not in network.sizes:
        name = type(network).__name__
        raise UserError(f"--features {args.features}: {name} lacks sizes of spatial features, for sfid")
    return network


def choose_metrics(args, network):
    """The metrics to compute, in order; UserError for one that the network does not serve."""
    for metric in args.metrics or ():
        if metric not in network.metrics:
            raise UserError(
                f"--metrics {metric}: --features {network.name} does not serve it, only"
                f" {', '.join(name for name in METRICS if name in network.metrics)}"
            )
    wanted = args.metrics or (PUBLISHED if network.name == "inception" else network.metrics)
    return [metric for metric in METRICS if metric in wanted]


def metric_name(metric, network):
    """What a metric is called in what is printed and written: FID is of Inception alone."""
    if network.name == "inception":
        return NAMES[metric]
    return f"{OTHER_NAMES.get(metric, NAMES[metric])} ({network.name})"


def open_side(flag, path, metrics, network, crop=None, *, images_needed=False, fresh=False):
    """The MetricInput of a folder or file, with all that these metrics need; UserError where it lacks any.

    images_needed: whether statistics alone are not enough. fresh: leave stored statistics aside.
    """
    is_folder = os.path.isdir(path)
    if crop is not None and not is_folder:
        raise UserError(f"--image-size {crop}: crops the images of a folder, {path} is none; leave it out")
    names, statistics = set() if is_folder else names_in(path, flag), {}
    for metric, kind in FRECHET.items():
        if metric in metrics and not fresh and set(STATISTICS[kind]) <= names:
            statistics[kind] = read_statistics(path, kind, network, flag)
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
    least = NEIGHBOUR + 1 if {"kid", "precision", "recall"} & set(metrics) else 2
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
        elif metric == "kid":
            rows = reference.features.rows, samples.features.rows
            size = subset_size(reference, samples)
            numbers[metric], deviation = kernel_distance(*rows, subset_size=size, device=network.device)
            numbers["kid_error"] = deviation / SUBSETS**0.5
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


def subset_size(reference, samples):
    """Of the subsets of the kernel distance: halves of the smaller side where that is below the usual size,
    since subsets of all would not differ."""
    count = min(reference.images.count, samples.images.count)
    return SUBSET_SIZE if count >= SUBSET_SIZE else count // 2


def find_warnings(numbers, reference, samples, network):
    """What the reader of the numbers should know, a line each."""
    doubts = []
    if network.name == "inception" and not network.is_published:
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
    if "kid" in numbers and subset_size(reference, samples) < SUBSET_SIZE:
        doubts.append(
            f"fewer than {SUBSET_SIZE:,} images on a side: {metric_name('kid', network)} is by subsets of"
            f" {subset_size(reference, samples)}"
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
    name, is_inception = metric_name("fid", network), network.name == "inception"
    name += f"-{name_of_count(samples.images.count)}" if is_inception else ""
    print(reference.describe())
    print(f"{samples.describe()}" + (f"; FID is {name}" if is_inception and "fid" in numbers else ""))
    for doubt in doubts:
        print(f"Warning: {doubt}")
    named = {metric_name(metric, network): value for metric, value in numbers.items()}
    for metric, value in named.items():
        print(f"{metric}: {value}")
    path = args.out or out_path(args.samples)
    record = dict(
        name=name, comparable_to_published=is_inception and network.is_published, metrics=named,
        warnings=doubts, reference=describe_side(reference), samples=describe_side(samples),
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
    if network.name == "inception":
        weights = dict(
            inception_weights=dict(
                file=args.inception_weights, sha256=network.sha256, published=network.is_published
            ),
            resize="TensorFlow 1 bilinear to 299x299, no antialiasing",
        )
    else:
        weights = dict(feature_weights=dict(file=args.feature_weights, sha256=network.sha256))
    return dict(
        network=network.name, **weights,
        features="float32, tf32 off", statistics="float64", fid="eigh and singular values, float64",
        distances="float16" if args.half_distances else "float32", k=NEIGHBOUR,
        kid=f"{SUBSETS} subsets of {SUBSET_SIZE}, or half of fewer images, float64",
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
        if kind in network.sizes
        for name, value in zip(names, reference.moments(kind))
    }
    with user_errors(f"--save-stats {args.save_stats}", UNWRITTEN, OSError):
        write_reference(
            args.save_stats, images, chosen, **arrays, count=images.count, **describe_network(network)
        )
    if network.name == "inception" and not network.is_published:
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
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=None,
                        help="which to compute (default: ADM's five, or all that --features has)")
    parser.add_argument("--features", choices=list(FEATURES), default="inception",
                        help="the network whose features are compared, inception for FID: pixels is none at"
                        " all, classifier one of experiments/classifier.py, mobilenet torchvision's"
                        " (default: inception)")
    parser.add_argument("--feature-weights", default=None, metavar="FILE",
                        help="its weights, for classifier and mobilenet (default: none)")
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
