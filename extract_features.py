"""Encode a folder of images once, so that training need not: a cache of latents.

    python extract_features.py --data-path /path/to/images --features-path features
    torchrun --nproc_per_node=8 extract_features.py --data-path /path/to/imagenet/train
    torchrun --nproc_per_node=8 train.py --model DiT-XL/2 --feature-path features

Kept are the moments, mean and log-variance, of every image and of its mirror image, in half precision:
training still draws a fresh latent and a fresh flip every time. ImageNet at 256 pixels takes 42 GB. Of an
autoencoder without a posterior, such as taesd, the latents are kept, in half the space.

The mean and standard deviation of the latents are measured too, of all together and of every channel, after
the VAE's own shift and scale. train.py --latent-normalization channel normalises by those of the channels.

Run the same command again after an interruption: finished shards stay. The files are the same, byte for byte,
whatever the number of processes.

    features/
        manifest.json        VAE, scale, resolution, classes, counts, checksums, statistics
        moments-00000.npy    float16 (images, 2, 2 channels, h, w): the image, then its mirror image; or
        latents-00000.npy    float16 (images, 2, channels, h, w)
        labels-00000.npy     int64 (images,)
"""

import hashlib
import json
import math
import os
from collections import deque
from itertools import islice

import numpy as np
import torch
from tqdm.auto import tqdm

from runtime.autoencoder import VAE, add_vae_argument, describe_vae, load_autoencoder, resolve_vae
from runtime.cli import Parser, UserError, atomic_write, create_logger, int_at_least, launch, user_errors
from runtime.distributed import add_precision_argument, init_distributed, set_precision
from runtime.image_io import check_folder
from training.dataset import ReadableDataset, make_loader, open_dataset
from training.latent_cache import MANIFEST
from training.latent_statistics import SUMS, channel_sums, summarize

UNWRITTEN = "could not be written to; make room and run the same command again"


def main(args):
    """Encode a folder of images once, so that training need not."""
    # Check the options, and open the data:
    if args.precision == "bf16":
        raise UserError("--precision bf16: latents are kept more exactly than that; give tf32 or fp32")
    if args.vae == "none":
        raise UserError("--vae none: pixels need no cache; train.py reads the images themselves")
    dist = init_distributed()
    args.precision = set_precision(None if args.precision == "auto" else args.precision, dist.device)
    dataset = open_dataset("folder", args.data_path, args.image_size, dist=dist)
    _, factor, image_channels = describe_vae(args.vae, dataset.channels)
    if image_channels != dataset.channels:
        raise UserError(
            f"--vae {args.vae}: takes images of {image_channels} channels, these have {dataset.channels}"
        )
    if args.image_size % factor:
        raise UserError(
            f"--image-size {args.image_size}: must be divisible by {factor} (the VAE's downsampling)"
        )
    logger = create_logger(enabled=dist.is_main)
    described = dict(
        image_size=args.image_size, classes=dataset.classes, count=len(dataset),
        shard_size=shard_size(len(dataset)), precision=args.precision,
        images=fingerprint(dataset.samples, dist),
    )  # fmt: skip
    if args.dry_run:
        state = dist.on_main(foresee, args, described)
        logger.info(
            f"{len(dataset):,} images, {len(dataset.classes)} classes, into {args.features_path}, {state};"
            " nothing was written."
        )
        return
    autoencoder = load_autoencoder(args.vae, dist.device)
    manifest = dict(complete=False, vae=autoencoder.config, **described)

    # Begin a cache, or go on with an unfinished one:
    if dist.on_main(begin, args.features_path, manifest):
        logger.info(f"{args.features_path} is complete; remove it to extract again")
        return

    # Encode, a shard to a process at a time:
    dist.check_shared(args.features_path, "--features-path")
    shards = range(math.ceil(manifest["count"] / manifest["shard_size"]))
    missing = dist.on_main(
        lambda: [shard for shard in shards if read_note(args.features_path, shard) is None]
    )
    mistake = None
    try:
        encode_shards(missing, dataset, autoencoder, manifest, args, dist)
    except UserError as error:
        mistake = error
        dist.count("mistakes")  # so that the others stop too
    dist.wait_for_all("images")
    with dist.agreeing():
        if mistake:
            raise mistake

    # Sum up:
    dist.on_main(complete, args.features_path, manifest, shards)
    if dist.is_main:
        latents = manifest["latents"]
        logger.info(
            f"Encoded {manifest['count']:,} images into {args.features_path}; latents have mean"
            f" {latents['mean']:.3f} and standard deviation {latents['std']:.3f} after scaling, from"
            f" {min(latents['channel_std']):.3f} to {max(latents['channel_std']):.3f} by channel"
        )


def shard_size(count):
    """Images a shard: at most 4096, and few enough that 64 processes can share the work."""
    return max(1, min(4096, math.ceil(count / 64)))


def fingerprint(samples, dist):
    """A hash of the names, sizes and labels of the images, by which other ones are told; on the main process.

    Each process asks for the sizes of a part. The bytes hashed are those of all versions so far."""
    share = math.ceil(len(samples) / dist.world_size)
    names = islice(samples.relative_names(), dist.rank * share, (dist.rank + 1) * share)
    sizes = np.fromiter((os.path.getsize(os.path.join(samples.root, name)) for name in names), np.int64)
    sizes = dist.join_rows(torch.from_numpy(sizes))
    if not dist.is_main:
        return None
    digest = hashlib.sha256()
    for name, size, label in zip(samples.relative_names(), sizes.tolist(), samples.labels.tolist()):
        digest.update(f"{name} {size} {label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def begin(folder, manifest):
    """Write the manifest of an unfinished cache; whether the folder already holds the complete one.

    Raises UserError where it holds another.
    """
    with user_errors(f"--features-path {folder}", "cannot be written to", OSError):
        os.makedirs(folder, exist_ok=True)
        found = read_cache(folder, manifest)
        if found is None:
            write_manifest(folder, manifest)
        elif found["complete"]:  # what a kill between the last manifest and its notes left
            for name in os.listdir(folder):
                if name.startswith("shard-") or name.endswith(".tmp"):
                    os.remove(os.path.join(folder, name))
            if "channel_std" not in found.get("latents", {}):  # of an earlier version
                autoencoder = VAE(found["vae"]["vae"], found["vae"])
                paths = [os.path.join(folder, shard["moments"]) for shard in found["shards"]]
                bar = tqdm(paths, "Measuring", unit="shard")
                found["latents"] = summarize(
                    [channel_sums(np.load(p, mmap_mode="r"), autoencoder) for p in bar]
                )
                write_manifest(folder, found)
        return found is not None and found["complete"]


def write_manifest(folder, manifest):
    """Write manifest.json."""
    with atomic_write(os.path.join(folder, MANIFEST)) as file:
        json.dump(manifest, file, indent=1)


def read_cache(folder, manifest):
    """The manifest that a folder holds, or None. UserError where it is another cache's than this manifest,
    or part of one, says."""
    path = os.path.join(folder, MANIFEST)
    if not os.path.exists(path):
        return None
    with open(path) as file, user_errors(path, "cannot be read; remove the folder and extract again"):
        found = json.load(file)
    for name in manifest.keys() - {"complete"}:
        if found.get(name) != manifest[name]:
            raise UserError(
                f"--features-path {folder}: holds a cache of other {name.replace('_', ' ')}; give"
                " another folder, or remove it"
            )
    return found


def foresee(args, manifest):
    """Check what begin would, and a VAE that is at hand, for --dry-run, without writing anything; returns in
    words what the folder holds."""
    check_folder(args.features_path, "--features-path")
    if os.path.isdir(resolve_vae(args.vae)):
        manifest = dict(manifest, vae=load_autoencoder(args.vae, "cpu").config)
    found = read_cache(args.features_path, manifest)
    if found is None:
        return "which holds none yet"
    return "which is complete" if found["complete"] else "where those that are missing would be added"


def encode_shards(shards, dataset, autoencoder, manifest, args, dist):
    """Write these shards together with the other processes: each takes the next that none has taken, so that
    a slow process keeps no other waiting. Raises UserError for an image that cannot be read."""
    size, count, places = manifest["shard_size"], manifest["count"], deque()

    def take_batches():
        while not dist.count("mistakes", 0) and (taken := dist.count("shards")) <= len(shards):
            shard = shards[taken - 1]
            indices = range(shard * size, min((shard + 1) * size, count))
            for start in range(0, len(indices), args.per_proc_batch_size):
                places.append((shard, start, len(indices)))
                yield [(i, False) for i in indices[start : start + args.per_proc_batch_size]]

    loader = make_loader(ReadableDataset(dataset, skip=False), take_batches(), args.num_workers, dist.device)
    total = sum(min(size, count - shard * size) for shard in shards)
    with tqdm(total=total, desc="Encoding", unit="image", disable=not dist.is_main) as bar:
        for images, labels, problems in loader:
            shard, start, length = places.popleft()
            if problems:
                raise UserError(problems[0])
            if start == 0:
                moments, shard_labels = [], []
            images = images.to(dist.device, non_blocking=True)
            both = [autoencoder.moments(view) for view in (images, images.flip(-1))]
            moments.append(torch.stack(both, dim=1).half().cpu().numpy())
            shard_labels.append(labels.numpy())
            bar.update(dist.count("images", len(images)) - bar.n)  # of all processes
            if start + len(images) == length:
                finish_shard(args.features_path, shard, np.concatenate(moments), np.concatenate(shard_labels),
                             autoencoder)  # fmt: skip


def finish_shard(folder, shard, moments, labels, autoencoder):
    """Write a shard's files, and the note that says they are whole."""
    name = "latents" if autoencoder.is_deterministic else "moments"
    note = dict(moments=f"{name}-{shard:05d}.npy", labels=f"labels-{shard:05d}.npy", count=len(labels))
    with user_errors(f"--features-path {folder}", UNWRITTEN, OSError):
        for kind, values in (("labels", labels), ("moments", moments)):
            path = os.path.join(folder, note[kind])
            with atomic_write(path, "wb") as file:
                np.save(file, values)
        with open(path, "rb") as file:
            note |= dict(bytes=os.path.getsize(path), sha256=hashlib.file_digest(file, "sha256").hexdigest())
        note |= channel_sums(moments, autoencoder)
        with atomic_write(note_path(folder, shard)) as file:
            json.dump(note, file)


def note_path(folder, shard):
    """Where the note of a finished shard is kept until the manifest takes it up."""
    return os.path.join(folder, f"shard-{shard:05d}.json")


def read_note(folder, shard):
    """The note of a finished shard whose files are there, or None."""
    try:
        with open(note_path(folder, shard)) as file:
            note = json.load(file)
        whole = os.path.getsize(os.path.join(folder, note["moments"])) == note["bytes"]
        summed = isinstance(note["sum"], list)  # else of an earlier version, without a sum for each channel
        return note if whole and summed and os.path.exists(os.path.join(folder, note["labels"])) else None
    except (OSError, json.JSONDecodeError):
        return None


def complete(folder, manifest, shards):
    """Take the notes of all shards up into the manifest, and mark it complete."""
    notes = [read_note(folder, shard) for shard in shards]
    if None in notes:
        raise UserError(
            f"--features-path {folder}: shard {notes.index(None)} is missing; run the same command again"
        )
    manifest["latents"] = summarize([{key: note.pop(key) for key in SUMS} for note in notes])
    with user_errors(f"--features-path {folder}", UNWRITTEN, OSError):
        write_manifest(folder, dict(manifest, complete=True, shards=notes))
        for shard in shards:
            os.remove(note_path(folder, shard))


def build_parser():
    """The command-line options."""
    # fmt: off
    parser = Parser(description=__doc__)
    parser.add_argument("--data-path", default=None, metavar="FOLDER",
                        help="images, one subfolder a class or all in one (default: none)")
    parser.add_argument("--features-path", default="features", metavar="FOLDER",
                        help="where the cache is written (default: features)")
    parser.add_argument("--image-size", type=int_at_least(1), default=256, metavar="PIXELS",
                        help="side of the square that images are cropped to (default: 256)")
    add_vae_argument(parser, default="ema", pixels="")
    parser.add_argument("--per-proc-batch-size", type=int_at_least(1), default=32, metavar="IMAGES",
                        help="images encoded at a time by each process (default: 32)")
    parser.add_argument("--num-workers", type=int_at_least(0), default=4, metavar="N",
                        help="processes that read images, for each encoding process (default: 4)")
    add_precision_argument(parser)
    parser.add_argument("--dry-run", action="store_true",
                        help="check options and data, write nothing (default: off)")
    # fmt: on
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
