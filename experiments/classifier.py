"""Train the small classifier of evaluate.py --features classifier on labelled images.

    python experiments/classifier.py reference.npz --out classifier.safetensors
    python experiments/classifier.py --dataset fashion-mnist --test test.npz --out classifier.safetensors
    python evaluate.py reference.npz samples.npz --features classifier --feature-weights x.safetensors

The images are an .npz in ADM's format with labels (arr_0, arr_1), or a data set of train.py. Its accuracy is
that on --test, or on a tenth of the images that is held out. The same command gives the same weights on the
same machine. Fashion-MNIST takes some two and a half minutes of one core (18 s an epoch).
"""

import json
import os
import sys
import time

import numpy as np
import torch
from torch.nn import functional
from tqdm.auto import trange

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from evaluation.features import SmallCNN
from evaluation.image_reader import NpzReader
from runtime.cli import (
    Parser,
    UserError,
    atomic_write,
    float_above,
    int_at_least,
    launch,
    seed_number,
    user_errors,
)
from runtime.image_io import to_float, to_uint8
from training.dataset import DATASETS, open_dataset


def main(args):
    """Train a SmallCNN and write it with its accuracy."""
    # Read the images:
    if (args.images is None) == (args.dataset is None):
        raise UserError("REF: give an .npz with labels, or --dataset, one of the two")
    if args.dataset:
        images, labels, classes = read_dataset(args.dataset, args.data_path, args.image_size)
    else:
        images, labels, classes = *read_npz("REF", args.images), None
    order = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(images)))
    if args.test:
        test_images, test_labels = read_npz("--test", args.test)
    else:
        held_out, order = order[: len(order) // 10], order[len(order) // 10 :]
        test_images, test_labels = images[held_out], labels[held_out]
    if test_images.shape[1:] != images.shape[1:]:
        sizes = [tuple(some.shape[1:]) for some in (test_images, images)]
        raise UserError(f"--test {args.test}: its images are {sizes[0]}, those to train on {sizes[1]}")
    images, labels = images[order], labels[order]
    if not len(test_images) or images.shape[2] != images.shape[3]:
        raise UserError(
            f"REF: {len(order)} images {tuple(images.shape[1:])}; square ones, 10 or more, are needed"
        )
    num_classes = int(max(labels.max(), test_labels.max())) + 1

    # Train:
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    model = SmallCNN(num_classes, args.widths, args.hidden).to(memory_format=torch.channels_last)
    train(model, images, labels, args)

    # Test, and write:
    accuracy = measure(model, test_images, test_labels)
    config = dict(
        num_classes=num_classes, widths=args.widths, hidden=args.hidden, image_size=images.shape[2],
        classes=classes, accuracy=accuracy, tested_on=args.test or "a tenth, held out",
        test_count=len(test_images), trained_on=args.dataset or args.images, train_count=len(images),
        epochs=args.epochs,
    )  # fmt: skip
    with user_errors(f"--out {args.out}", "could not be written", OSError):
        save(model, args.out, config)
    print(
        f"Saved {args.out}: {accuracy:.2%} of {len(test_images):,} images told right,"
        f" after {time.perf_counter() - start:.0f} s"
    )


def read_npz(flag, path):
    """Images uint8 (N, 3, H, W) and labels (N,) of an .npz; UserError where it has none."""
    file = NpzReader(path, flag)
    labels = file.labels
    if labels is None or labels.shape != (file.count,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(f"{flag} {path}: no labels in it; they are arr_1, whole numbers, one an image")
    return torch.cat(list(file.batches(0, file.count, 1024))), torch.from_numpy(labels.astype(np.int64))


def read_dataset(name, path, image_size):
    """Images uint8 (N, 3, H, W), labels (N,) and the classes' names of a data set of train.py."""
    dataset = open_dataset(name, path, image_size)
    items = [dataset[i, False] for i in range(len(dataset))]
    pixels = to_uint8(to_float(torch.stack([image for image, _ in items]))).permute(0, 3, 1, 2)
    return pixels.expand(-1, 3, -1, -1), torch.tensor([label for _, label in items]), dataset.classes


def train(model, images, labels, args):
    """AdamW with a rate that rises and falls once, on images in a new order each epoch."""
    steps = args.epochs * (len(images) // args.batch_size or 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    generator, order = torch.Generator().manual_seed(args.seed), torch.empty(0, dtype=torch.int64)
    model.train()
    for _ in trange(steps, desc="Training", unit="step"):
        if len(order) < args.batch_size:
            order = torch.randperm(len(images), generator=generator)
        batch, order = order[: args.batch_size], order[args.batch_size :]
        pixels = images[batch].to(torch.float32, memory_format=torch.channels_last) / 255
        loss = functional.cross_entropy(model(pixels), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measure(model, images, labels):
    """The share of images whose class is told right."""
    model.eval()
    found = torch.cat([model(batch.float() / 255).argmax(1) for batch in images.split(1024)])
    return (found == labels).double().mean().item()


def save(model, path, config):
    """Write weights and config as evaluation.features.Classifier reads them."""
    from safetensors.torch import save as serialize

    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    with atomic_write(path, "wb") as file:
        file.write(serialize(state, metadata=dict(classifier=json.dumps(config))))


def build_parser():
    """The command-line options."""
    # fmt: off
    parser = Parser(description=__doc__)
    parser.add_argument("images", nargs="?", default=None, metavar="REF",
                        help="labelled images: an .npz in ADM's format with arr_1")
    parser.add_argument("--dataset", choices=DATASETS, default=None,
                        help="a data set of train.py in place of REF (default: none)")
    parser.add_argument("--data-path", default=None, metavar="FOLDER",
                        help="where that data set is, as for train.py (default: none)")
    parser.add_argument("--image-size", type=int_at_least(1), default=28, metavar="PIXELS",
                        help="side of its images (default: 28)")
    parser.add_argument("--test", default=None, metavar="FILE",
                        help="labelled images to test on, an .npz (default: a tenth of the others, held out)")
    parser.add_argument("--out", default="classifier.safetensors", metavar="FILE",
                        help="where the weights are written (default: classifier.safetensors)")
    parser.add_argument("--widths", type=int_at_least(1), nargs="+", default=[16, 32, 64, 128],
                        metavar="CHANNELS",
                        help="of the convolutions, the sides halved after each but the last"
                        " (default: 16 32 64 128)")
    parser.add_argument("--hidden", type=int_at_least(1), default=128, metavar="N",
                        help="features, of the layer before the classes (default: 128)")
    parser.add_argument("--epochs", type=int_at_least(1), default=8, metavar="N",
                        help="passes over the images (default: 8)")
    parser.add_argument("--batch-size", type=int_at_least(2), default=128, metavar="IMAGES",
                        help="images a step (default: 128)")
    parser.add_argument("--lr", type=float_above(0), default=5e-3, metavar="RATE",
                        help="AdamW's highest learning rate (default: 5e-3)")
    parser.add_argument("--seed", type=seed_number, default=0, metavar="SEED",
                        help="of weights, order and what is held out (default: 0)")
    # fmt: on
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
