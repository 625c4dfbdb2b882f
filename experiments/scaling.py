"""The paper's scaling study on Fashion-MNIST: twelve models, four sizes by three patches, trained alike.

    python experiments/scaling.py                            # train, sample, measure and draw
    python experiments/scaling.py --only S/7 XL/2 --seed 1   # some cells, by another seed

Sizes keep the paper's proportions, depth divided by six and width by twelve; patches of 7, 4 and 2 pixels
make 16, 49 and 196 tokens of an image. Steps, batch, rate and the rest are the same for all. Models are
compared by the distance of their samples from the 10,000 test images.

Runs, samples and results lie in --work. What is there is not made again, a training that was cut off goes on
with the same bits, and results.json is written after every cell; figures are drawn where matplotlib is.
"""

import csv
import json
import platform
import subprocess
import sys
import time
from glob import glob
from itertools import pairwise
from math import log
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.features import FEATURES, features_of
from evaluation.metrics import frechet_distance, kernel_distance, mean_and_covariance
from runtime.cli import Parser, UserError, atomic_write, launch, seed_number
from runtime.flops import count_macs
from runtime.image_io import to_uint8
from sampler import Sampler
from training.dataset import FashionMNIST

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"S": (2, 32, 1), "B": (2, 64, 2), "L": (4, 84, 3), "XL": (5, 96, 3)}  # depth, width, heads
PATCHES = (7, 4, 2)
CELLS = [f"{size}/{patch}" for patch in PATCHES for size in SIZES]  # the cheapest first
TRAINING = dict(
    dataset="fashion-mnist", image_size=28, vae="none", num_workers=0, precision="fp32", model="DiT-S/2",
    objective="flow", flow_prediction="data", timestep_sampler="logit-normal", max_steps=1000,
    global_batch_size=16, lr=2e-3, warmup_steps=50, ema_decay=0.995, ema_warmup=True, log_every=50,
    sample_every=0, ckpt_every=200, keep_checkpoints=1, resume="auto",
)  # fmt: skip
SAMPLES = 2000
SUBSETS = 50  # that the kernel distance is the mean of
NETWORKS = ("classifier", "pixels")
PLAIN = dict(sampler="dpm++", steps=8, cfg_scale=1.0)  # how the cells are compared
# What else is sampled: the name of a study, its cells, and what it changes.
STUDIES = [
    *(("solver", cell, dict(steps=250)) for cell in ("XL/7", "S/4")),
    *(("steps", "S/4", dict(steps=steps)) for steps in (2, 4, 16, 32, 64, 128)),
    *(("steps", "XL/4", dict(steps=steps)) for steps in (2, 4)),
    *(("guidance", "L/4", dict(cfg_scale=scale)) for scale in (1.25, 1.5, 2.0, 3.0, 4.0)),
    *(("interval", "L/4", dict(cfg_scale=scale, cfg_interval=(0.2, 3.0))) for scale in (1.5, 2.0, 3.0, 4.0)),
]
SIZE_COLOURS = dict(S="tab:blue", B="tab:orange", L="tab:green", XL="tab:red")
PATCH_MARKERS = {7: "s", 4: "^", 2: "o"}


def main(args):
    """Make what is missing of the study."""
    folder = Path(args.work) / f"seed-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    networks, found = open_networks(args), Results(folder / "results.json", args)
    for cell in args.only or CELLS:
        checkpoint = train(cell, folder, args)
        if cell not in found.cells:
            found.cells[cell] = describe(cell, checkpoint)
        found.measure(cell, checkpoint, {}, networks)
        for _, of_cell, changes in STUDIES if args.studies else ():
            if of_cell == cell:
                found.measure(cell, checkpoint, changes, networks)
        found.summarize()
    write_losses(folder, found.cells)
    draw(folder, found)


# ---------------------------------------------------------------------------------------------
# A cell


def train(cell, folder, args):
    """Train a cell, or go on with it; returns the path of its last checkpoint."""
    size, patch = cell.split("/")
    depth, width, heads = SIZES[size]
    runs = cell_folder(folder, cell) / "runs"
    last = str(runs / f"*/checkpoints/{TRAINING['max_steps']:07d}.pt")
    if not glob(last):
        options = TRAINING | dict(depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
        options |= dict(global_seed=args.seed, results_dir=runs)
        if args.data_path:
            options["data_path"] = args.data_path
        words = [sys.executable, str(ROOT / "train.py")]
        for name, value in options.items():
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
        code = subprocess.run(words).returncode
        if code or not glob(last):
            raise UserError(f"{cell}: its training ended with status {code}; run the same command again")
    return glob(last)[0]


def cell_folder(folder, cell):
    return folder / cell.replace("/", "-")


def describe(cell, checkpoint):
    """What a model costs. The paper's Gflops count multiply-adds, of one forward pass."""
    model = Sampler.from_checkpoint(checkpoint, device="cpu").model
    macs = count_macs(model)
    losses = read_losses(Path(checkpoint).parents[1])
    tail = [loss for step, loss in losses if step > TRAINING["max_steps"] * 0.8]
    images = TRAINING["global_batch_size"] * TRAINING["max_steps"]
    return dict(
        tokens=(TRAINING["image_size"] // int(cell.split("/")[1])) ** 2,
        parameters=sum(p.numel() for p in model.parameters()),
        gflops=macs / 1e9, training_gflops=3 * macs / 1e9 * images,
        loss=float(np.mean(tail)), distances={},
    )  # fmt: skip


def read_losses(run):
    """[(step, mean training loss since the line before)] of a run's metrics.jsonl."""
    with open(run / "metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def sample(checkpoint, path, options, seed):
    """The path of an .npz with a sample of every class in turn, made unless it is there."""
    if not path.exists():
        sampler = Sampler.from_checkpoint(checkpoint)
        labels = [i % 10 for i in range(SAMPLES)]
        start = time.perf_counter()
        images = sampler.sample(labels, seeds=seed * 10**6, batch_size=100, progress=True, **options)
        seconds = time.perf_counter() - start
        with atomic_write(path, "wb") as file:
            pixels = to_uint8(images * 2 - 1).numpy().repeat(3, axis=3)
            np.savez_compressed(file, arr_0=pixels, arr_1=labels, seconds=seconds)
    return path


# ---------------------------------------------------------------------------------------------
# Distances


class Networks:
    """The feature networks, and the features of the test images by each."""

    def __init__(self, networks, images, subset_size=1000):
        self.networks, self.subset_size = networks, subset_size
        self.reference = {name: features_of(images, network) for name, network in networks.items()}
        self.moments = {name: mean_and_covariance(rows) for name, rows in self.reference.items()}

    def distances(self, images, labels):
        """{network: its distances} of images uint8 (N, H, W, C) from the test images."""
        found = {}
        for name, network in self.networks.items():
            rows = features_of(images, network)
            kernel, deviation = kernel_distance(
                self.reference[name], rows, subsets=SUBSETS, subset_size=self.subset_size
            )
            found[name] = dict(
                frechet=frechet_distance(*self.moments[name], *mean_and_covariance(rows)), kernel=kernel,
                kernel_error=deviation / SUBSETS**0.5,
            )  # fmt: skip
            if hasattr(network, "logits"):
                told = network.logits(rows).argmax(1).numpy() == labels
                found[name]["accuracy"] = float(told.mean())
        return found


def open_networks(args):
    """The networks, with the classifier trained where it is not there yet."""
    weights, test = Path(args.work) / "classifier.safetensors", Path(args.work) / "fashion-test.npz"
    where = ["--data-path", args.data_path] if args.data_path else []
    for path, command in (
        (test, ["export_images.py"]),
        (weights, ["classifier.py", "--dataset", "fashion-mnist", "--test", str(test)]),
    ):
        if not path.exists():
            script = str(ROOT / "experiments" / command[0])
            subprocess.run([sys.executable, script, *command[1:], *where, "--out", str(path)], check=True)
    networks = {"classifier": FEATURES["classifier"](str(weights)), "pixels": FEATURES["pixels"]()}
    with np.load(test) as file:
        return Networks({name: network.load("cpu") for name, network in networks.items()}, file["arr_0"])


def real_distances(networks, data_path):
    """Those of as many real images as there are samples: what a perfect model would reach."""
    real = FashionMNIST(data_path)
    rows = np.concatenate([np.flatnonzero(real.labels == label)[: SAMPLES // 10] for label in range(10)])
    return networks.distances(np.repeat(real.images[rows], 3, axis=3), real.labels[rows])


# ---------------------------------------------------------------------------------------------
# Results


class Results:
    """The numbers in a file: settings, cells, what follows from them. Other settings are refused."""

    def __init__(self, path, args):
        self.path, self.args = path, args
        self.settings = json.loads(json.dumps(dict(
            training=TRAINING, sizes=SIZES, samples=SAMPLES, sampling=PLAIN, seed=args.seed,
            reference="the 10,000 test images",
        )))  # fmt: skip
        self.contents = dict(
            settings=self.settings, machine=f"{platform.machine()}, torch {torch.__version__}"
        )
        if path.exists():
            self.contents = json.loads(path.read_text())
            if self.contents["settings"] != self.settings:
                raise UserError(f"--work {args.work}: {path} is of other settings; give another folder")
        self.cells = self.contents.setdefault("cells", {})

    def measure(self, cell, checkpoint, changes, networks):
        """Add the distances of a cell's samples, by changed options, unless they are there."""
        name = "-".join(f"{name}-{value}" for name, value in changes.items()) or "plain"
        if name not in self.cells[cell]["distances"]:
            path = cell_folder(self.path.parent, cell) / f"{name}.npz"
            with np.load(sample(checkpoint, path, PLAIN | changes, self.args.seed)) as file:
                found = networks.distances(file["arr_0"], file["arr_1"])
                found["seconds"] = float(file["seconds"])
            self.cells[cell]["distances"][name] = found | dict(options=PLAIN | changes)
            if "real" not in self.contents:
                self.contents["real"] = real_distances(networks, self.args.data_path)
            self.write()

    def summarize(self):
        """Add the correlations, and where a larger model or more tokens did not lead nearer."""
        order = [cell for cell in CELLS if cell in self.cells]
        for network in NETWORKS:
            distance = {cell: self.cells[cell]["distances"]["plain"][network]["frechet"] for cell in order}
            found = {}
            if len(order) > 2:
                for cost in ("gflops", "parameters"):
                    pairs = [(log(self.cells[cell][cost]), log(distance[cell])) for cell in order]
                    found[f"correlation_with_log_{cost}"] = float(np.corrcoef(*zip(*pairs))[0, 1])
            sizes = [[f"{size}/{patch}" for size in SIZES] for patch in PATCHES]
            patches = [[f"{size}/{patch}" for patch in PATCHES] for size in SIZES]
            for name, rows in (("larger", sizes), ("more_tokens", patches)):
                steps = [pair for row in rows for pair in pairwise(row) if set(pair) <= distance.keys()]
                found[f"{name}_not_nearer"] = [
                    pair for pair in steps if distance[pair[1]] >= distance[pair[0]]
                ]
                found[f"{name}_steps"] = len(steps)
            self.contents.setdefault("summary", {})[network] = found
        self.write()

    def write(self):
        with atomic_write(self.path) as file:
            json.dump(self.contents, file, indent=1)


def write_losses(folder, cells):
    """losses.csv: a line for every 50 steps, a column for every cell."""
    columns = {
        cell: dict(read_losses(next((cell_folder(folder, cell) / "runs").glob("*/")))) for cell in cells
    }
    with atomic_write(folder / "losses.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *columns])
        for step in sorted(set().union(*columns.values())):
            writer.writerow([step, *(f"{losses.get(step, float('nan')):.4f}" for losses in columns.values())])


# ---------------------------------------------------------------------------------------------
# Figures


def draw(folder, found):
    """Draw the results, where matplotlib is installed (uv sync --group experiments)."""
    try:
        import matplotlib
    except ImportError:
        print("No figures: matplotlib is not installed; uv sync --group experiments, and start again")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw_scaling(pyplot, found, folder / "scaling.png")
    draw_losses(pyplot, folder)
    if any(cell_studies(found, study) for study in ("steps", "guidance")):
        draw_studies(pyplot, found, folder / "studies.png")


def draw_scaling(pyplot, found, path):
    """Distance against Gflops, parameters and training compute."""
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.8), sharey=True, layout="constrained")
    for axis, (cost, label) in zip(axes, (
        ("gflops", "Gflops of a forward pass"), ("parameters", "parameters"),
        ("training_gflops", "Gflops of the training"),
    )):  # fmt: skip
        for cell, row in found.cells.items():
            size, patch = cell.split("/")
            distance = row["distances"]["plain"]["classifier"]["frechet"]
            axis.loglog(row[cost], distance, PATCH_MARKERS[int(patch)], color=SIZE_COLOURS[size], label=cell)
            axis.annotate(cell, (row[cost], distance), (4, 4), textcoords="offset points", fontsize=7)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3, which="both")
    correlation = found.contents["summary"]["classifier"].get("correlation_with_log_gflops")
    if correlation is not None:
        axes[0].set_title(f"correlation {correlation:.2f}", fontsize=9)
    axes[0].set_ylabel("Fréchet distance, classifier's features")
    figure.savefig(path, dpi=90)


def draw_losses(pyplot, folder):
    """The loss curves, by losses.csv."""
    with open(folder / "losses.csv") as file:
        head, *rows = csv.reader(file)
    columns = np.array(rows, float).T
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for cell, losses in zip(head[1:], columns[1:]):
        size, patch = cell.split("/")
        style = {7: ":", 4: "--", 2: "-"}[int(patch)]
        axis.loglog(columns[0], losses, style, color=SIZE_COLOURS[size], label=cell)
    axis.set_xlabel("step")
    axis.set_ylabel("training loss")
    axis.legend(ncols=3, fontsize=7)
    figure.savefig(folder / "losses.png", dpi=90)


def cell_studies(found, study):
    """{cell: [(changes, distances)]} of a study, as far as it was made."""
    made = {}
    for name, cell, changes in STUDIES:
        for row in found.cells.get(cell, {"distances": {}})["distances"].values():
            if name == study and row["options"] == json.loads(json.dumps(PLAIN | changes)):
                made.setdefault(cell, []).append((changes, row))
    return made


def draw_studies(pyplot, found, path):
    """Distance over the compute of sampling, and over guidance."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    plain = {cell: row["distances"]["plain"] for cell, row in found.cells.items()}
    for cell, rows in cell_studies(found, "steps").items():
        points = sorted(
            (row["options"]["steps"] * found.cells[cell]["gflops"], row["classifier"]["frechet"])
            for row in [plain[cell], *(row for _, row in rows)]
        )
        axes[0].loglog(*zip(*points), "o-", label=cell)
    axes[0].set_xlabel("Gflops of a sample")
    for study, label in (("guidance", "constant"), ("interval", "in an interval")):
        for cell, rows in cell_studies(found, study).items():
            points = sorted(
                (row["options"]["cfg_scale"], row["classifier"]["frechet"])
                for row in [plain[cell], *(row for _, row in rows)]
            )
            axes[1].plot(*zip(*points), "o-", label=f"{cell}, {label}")
    axes[1].set_xlabel("guidance scale")
    for axis in axes:
        axis.set_ylabel("Fréchet distance")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def build_parser():
    """The command-line options."""
    # fmt: off
    parser = Parser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CELLS, default=None, metavar="CELL",
                        help="cells to make, as S/7 (default: all twelve)")
    parser.add_argument("--seed", type=seed_number, default=0, metavar="SEED",
                        help="of trainings and samples (default: 0)")
    parser.add_argument("--studies", action="store_true",
                        help="sample some cells with other steps and guidance too (default: off)")
    parser.add_argument("--data-path", default=None, metavar="FOLDER",
                        help="where Fashion-MNIST is, as for train.py (default: none)")
    parser.add_argument("--work", default="results/scaling", metavar="FOLDER",
                        help="where runs, samples and results are kept (default: results/scaling)")
    # fmt: on
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
