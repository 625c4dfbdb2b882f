"""Sample many images for evaluation, on any number of processes, into one .npz (and PNGs).

    torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --model DiT-XL/2 --num-fid-samples 50000
    python sample_ddp.py --ckpt results/000-DiT-S-2-digits/checkpoints/0002000.pt --num-fid-samples 1000

Sample i has seed --global-seed + i, whatever the number of processes. To continue an interrupted run, run the
same command again. The .npz stands beside the folder of PNGs, with a JSON of every setting; both are named
after the settings.
"""

import argparse
import hashlib
import json
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm.auto import tqdm

from checkpointing import files as checkpoints
from checkpointing.published import find_local, published_checkpoint
from runtime.autoencoder import PUBLISHED_VAES, resolve_vae
from runtime.cli import (
    Parser,
    UserError,
    atomic_write,
    create_logger,
    int_at_least,
    launch,
    seed_number,
    user_errors,
)
from runtime.distributed import init_distributed, set_precision
from runtime.image_io import check_folder, make_folder, save_image, to_uint8
from sampler import CheckpointSpec
from sampling.noise import DRAWS
from sampling.npz_writer import NpzWriter
from sampling.options import (
    FID_CFG_SCALE,
    add_checkpoint_arguments,
    add_guide_argument,
    add_sampling_arguments,
    add_speed_arguments,
    check_cuda_graphs,
    sampling_options,
)

DEFAULT_VAE = "ema"  # of weights that name none: the published script's, where sample.py's is mse
PENDING = 2  # batches that may wait for the disk while the next one is sampled


def main(args):
    """Sample --num-fid-samples images into an .npz."""
    # Check the options:
    if not args.tf32 and args.precision not in (None, "fp32"):
        raise UserError(f"--no-tf32: contradicts --precision {args.precision}; leave one out")
    check_cuda_graphs(args.cuda_graphs)
    options = sampling_options(args)
    if args.ckpt is None:
        args.ckpt = published_checkpoint(args)
    dist = init_distributed()
    plan = CheckpointSpec(
        args.ckpt, weights=args.weights, model=args.model, image_size=args.image_size,
        num_classes=args.num_classes, vae=args.vae, guide=args.guide, default_vae=DEFAULT_VAE,
        defaults=dict(cfg_scale=FID_CFG_SCALE),
    )  # fmt: skip
    options = plan.check(**options)
    plan.check_pictures()
    if args.labels == "balanced" and not plan.model_config["num_classes"]:
        raise UserError("--labels balanced: this model is unconditional; leave it out")
    precision = set_precision(args.precision or (None if args.tf32 else "fp32"), dist.device)
    folder = os.path.join(args.sample_dir, folder_name(args, plan, options))
    archive = NpzWriter(
        f"{folder}.npz", folder, (args.num_fid_samples, *plan.image_size, 3), args.per_proc_batch_size,
        has_labels=plan.model_config["num_classes"] > 0,
    )  # fmt: skip
    if args.dry_run:
        would = dist.on_main(foresee, args, plan, options, precision, archive)
        if dist.is_main:
            print(f"Would {would} {os.path.basename(folder)}; options are sound, nothing was written.")
        return

    # Find what is there of this run, or make its folder:
    done, is_complete, draws = dist.on_main(begin, args, plan, options, precision, archive)
    logger = create_logger(enabled=dist.is_main)
    if is_complete:
        if dist.is_main:
            gone = args.png and not any(name.endswith(".png") for name in os.listdir(folder))
            also = ", its PNGs are removed and not made again" if gone else ""
            logger.info(f"{archive.path} is complete{also}; remove it and its folder to sample again")
        return
    if done:
        logger.info(f"Continuing {folder}: {len(done)} of {len(archive.batches)} batches are there")

    # Sample:
    sampler = plan.build(dist.device, precision, args.compile, args.cuda_graphs)
    todo = [batch for batch in archive.batches if batch not in done][dist.rank :: dist.world_size]
    sample_batches(todo, sampler, archive, args, dict(options, draws=draws), dist)
    dist.barrier()

    # Sum up:
    if dist.is_main:
        archive.finish()
        logger.info(f"Saved .npz file to {archive.path} [shape={archive.shape}].")
    dist.barrier()


def sample_batches(todo, sampler, archive, args, options, dist):
    """Sample these batches; images are written by threads while the next ones are made."""
    total = sum(len(archive.rows(batch)) for batch in todo)
    pending = deque()
    bar = tqdm(total=total, desc="Sampling", unit="image", disable=not dist.is_main)
    remedy = "could not be written; make room and run the same command again"
    writing = user_errors(archive.folder, remedy, OSError)
    with writing, ThreadPoolExecutor(max_workers=4) as pool, ThreadPoolExecutor(max_workers=1) as writer, bar:
        try:
            for batch in todo:
                rows = archive.rows(batch)
                seeds, classes = [args.global_seed + row for row in rows], sampler.model.num_classes
                labels = [row % classes for row in rows] if classes and args.labels == "balanced" else None
                x, labels = sampler.generate(seeds, labels, options)
                pixels = to_uint8(x).numpy()
                jobs = []
                for i, row in enumerate(rows if args.png else ()):
                    path = os.path.join(archive.folder, f"{row:06d}.png")
                    jobs.append(pool.submit(save_image, path, pixels[i], seeds[i], labels and labels[i]))
                pending.append(writer.submit(commit, archive, batch, pixels, labels, jobs, dist.rank))
                while len(pending) > PENDING:
                    pending.popleft().result()
                bar.update(len(rows))
            while pending:
                pending.popleft().result()
        finally:
            for job in pending:  # which may still be writing
                job.cancel() or job.exception()
            archive.close()


def commit(archive, batch, pixels, labels, jobs, writer):
    """Note a batch as done once all its files are written."""
    for job in jobs:
        job.result()
    if pixels.shape[3] == 1:  # evaluation suites read colours
        pixels = pixels.repeat(3, axis=3)
    archive.write(batch, pixels, labels, writer)


def begin(args, plan, options, precision, archive):
    """Make the folder and the JSON of settings, or check that they are this run's; then see what is there.

    Returns what NpzWriter.begin does, and the rule of its draws, see SampleNoise."""
    settings = describe(args, plan, options, precision)
    make_folder(args.sample_dir, "--sample-dir")
    make_folder(archive.folder, "--sample-dir")
    archive.acquire()  # before anything is looked at, which another run may be just making
    settings["draws"] = check_found(archive, settings)
    with atomic_write(f"{archive.folder}.json") as file:
        versions = dict(torch=torch.__version__, ckpt=args.ckpt, images=os.path.basename(archive.path))
        json.dump(dict(versions, settings=settings), file, indent=1)
    return *archive.begin(), settings["draws"]


def foresee(args, plan, options, precision, archive):
    """Check what begin would, for --dry-run, without writing anything or fetching weights; returns in words
    what would be done in the folder."""
    for folder in (args.sample_dir, archive.folder):
        check_folder(folder, "--sample-dir")
    archive.check_free()
    is_local = all(find_local(path) for path in (args.ckpt, args.guide) if path)
    settings = describe(args, plan, options, precision) if is_local else {}
    check_found(archive, settings)
    return "continue" if os.path.exists(f"{archive.folder}.json") else "sample to"


def describe(args, plan, options, precision):
    """All that decides what is sampled, as plain data."""
    settings = dict(
        weights=fingerprint(plan.checkpoint.state_dict(args.weights)), which_weights=args.weights,
        guide=plan.guide and fingerprint(plan.guide.checkpoint.state_dict()),
        model=plan.model_config, process=plan.process.config, vae=resolve_vae(plan.vae), **options,
        global_seed=args.global_seed, labels=args.labels, num_fid_samples=args.num_fid_samples,
        per_proc_batch_size=args.per_proc_batch_size, precision=precision, compile=args.compile, png=args.png,
        draws=DRAWS,
    )  # fmt: skip
    return json.loads(json.dumps(settings))


def check_found(archive, settings):
    """Raise UserError where the folder holds samples of other settings, or something else; returns the rule
    of draws of what it holds, or the present one."""
    path, draws = f"{archive.folder}.json", DRAWS
    if os.path.exists(path):
        errors = (OSError, ValueError, KeyError)
        with user_errors(path, "cannot be read; remove it and its folder", errors), open(path) as file:
            found = json.load(file)["settings"]
        draws = found.get("draws", 1)
        if draws == 1:  # begun by an earlier version, and continued by its rule
            settings = {**settings, "draws": found.setdefault("draws", 1)}
        for name, value in settings.items():
            if found.get(name) != value:
                raise UserError(
                    f"{archive.folder}: holds samples with other {name.replace('_', '-')}"
                    f"{_short(found.get(name))}; remove it, or give another --sample-dir"
                )
        return draws
    others = os.path.isdir(archive.folder) and set(os.listdir(archive.folder)) - {".lock"}
    if os.path.exists(archive.path) or others:
        there = archive.path if os.path.exists(archive.path) else archive.folder
        raise UserError(f"{there}: is there without its .json; remove it, or give another --sample-dir")
    return draws


def _short(value):
    return f" ({value})" if isinstance(value, (int, float, str)) and len(str(value)) < 30 else ""


def fingerprint(state):
    """A hash of a state dict's names and values."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def folder_name(args, plan, options):
    """The name of the folder of samples: what tells one run from another."""
    config = plan.model_config
    model = checkpoints.registry_name(config) or "DiT-{depth}x{hidden_size}p{patch_size}".format(**config)
    path = os.path.abspath(args.ckpt)
    weights = os.path.splitext(os.path.basename(path))[0]
    if os.path.basename(os.path.dirname(path)) == "checkpoints":
        weights = f"{os.path.basename(os.path.dirname(os.path.dirname(path)))}-{weights}"
    height, width = plan.image_size
    size = str(height) if height == width else f"{height}x{width}"
    vae = {name: short for short, name in PUBLISHED_VAES.items()}.get(plan.vae, plan.vae)
    cfg = f"cfg-{options['cfg_scale']}"
    if options["cfg_interval"] is not None:
        cfg += "-in-{:g}-{:g}".format(*options["cfg_interval"])
    if options["cfg_schedule"] != "constant":
        cfg += f"-{options['cfg_schedule']}"
    if args.guide:
        cfg += f"-by-{os.path.splitext(os.path.basename(args.guide))[0]}"
    return (
        f"{model.replace('/', '-')}-{weights}-size-{size}-vae-{os.path.basename(vae)}-{cfg}"
        f"-steps-{options['steps']}-sampler-{options['sampler']}-seed-{args.global_seed}-labels-{args.labels}"
    )


def build_parser():
    """The command-line options."""
    # fmt: off
    parser = Parser(description=__doc__)
    add_checkpoint_arguments(parser, DEFAULT_VAE)
    parser.add_argument("--num-fid-samples", type=int_at_least(1), default=50_000, metavar="N",
                        help="images (default: 50000)")
    parser.add_argument("--labels", choices=("random", "balanced"), default="random",
                        help="classes drawn at random, or taking turns (default: random)")
    parser.add_argument("--global-seed", type=seed_number, default=0, metavar="SEED",
                        help="of the first image, from which the next ones count on: 50000 gives a second set"
                        " that shares none (default: 0)")
    group = parser.add_argument_group("sampling")
    add_sampling_arguments(group, FID_CFG_SCALE)
    add_guide_argument(group)
    group = parser.add_argument_group("output")
    group.add_argument("--sample-dir", default="samples", metavar="FOLDER",
                       help="where the .npz and the folder of PNGs are made (default: samples)")
    group.add_argument("--png", action=argparse.BooleanOptionalAction, default=True,
                       help="write every image as a PNG too; once the .npz is complete they may go, and"
                       " are not made again (default: on)")
    group = parser.add_argument_group("speed")
    group.add_argument("--per-proc-batch-size", type=int_at_least(1), default=32, metavar="IMAGES",
                       help="images at a time on each process (default: 32)")
    add_speed_arguments(group)
    group.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True,
                       help="let a GPU that has TF32 use it; --no-tf32 is --precision fp32 (default: on)")
    parser.add_argument("--dry-run", action="store_true",
                        help="check the options, load and write nothing (default: off)")
    # fmt: on
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
