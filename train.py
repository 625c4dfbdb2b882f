"""Train a diffusion transformer.

On a laptop, handwritten digits in about two minutes, samples included:

    python train.py --preset digits

The paper's runs, on one machine with 8 GPUs, or on several:

    torchrun --nnodes=1 --nproc_per_node=8 train.py --model DiT-XL/2 --data-path /path/to/imagenet/train
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py \\
        --preset imagenet512 --data-path /path/to/imagenet/train

Your own images, one subfolder a class:

    python train.py --model DiT-B/4 --data-path /path/to/images --image-size 256

Every run makes a folder, results/000-DiT-XL-2, with args.json, log.txt, metrics.jsonl, checkpoints and
samples. A global batch is the same, and trains the same, however many processes share it. """

import argparse
import copy
import itertools
import json
import os
import re
import time

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

import checkpoint
from autoencoder import add_vae_argument, describe_vae, load_autoencoder, resolve_vae
from data import DATASETS, BatchOrder, create_loader, open_dataset
from diffusion import create_process
from diffusion.timestep_sampler import SCHEDULE_SAMPLERS, create_named_schedule_sampler
from models import DiT, DiT_models, count_macs
from runtime import (
    STEP,
    Parser,
    UserError,
    add_precision_argument,
    blame,
    create_logger,
    generator_for,
    launch,
    leave_group,
    set_precision,
    start_processes,
)
from sampler import DEFAULTS, Sampler, add_sampling_arguments, check_sampling_options, save_grid

# What --preset stands for; a flag given by hand wins. Behind each row: what it should give.
# fmt: off
PRESETS = {
    # Recognisable digits in two minutes on two CPU cores: at this size, the cosine schedule, a high constant
    # rate and a short average were measured best.
    "digits": dict(
        dataset="digits", image_size=8, vae="none", num_workers=0,
        model="DiT-S/2", depth=4, hidden_size=128, num_heads=4,
        noise_schedule="squaredcos_cap_v2", global_batch_size=64, max_steps=2000, lr=2e-3, warmup_steps=50,
        ema_decay=0.995, ema_warmup=True, cfg_scale=2.0, num_sampling_steps="50",
    ),
    # Just-a-DiT's recipe for CIFAR-10, with diffusion in place of flow matching.
    "cifar10": dict(
        dataset="cifar10", image_size=32, vae="none",
        model="DiT-S/2", learn_sigma=False, global_batch_size=128, max_steps=200_000, lr=1e-4,
        ema_decay=0.9999, ema_warmup=True, ckpt_every=10_000, cfg_scale=2.5,
    ),
    # The paper's two published models.
    "imagenet256": dict(model="DiT-XL/2", image_size=256, max_steps=7_000_000, cfg_scale=1.5),  # FID-50K 2.27
    "imagenet512": dict(model="DiT-XL/2", image_size=512, max_steps=3_000_000, cfg_scale=1.5),  # FID-50K 3.04
}
# fmt: on


def main(args):
    """Train a diffusion transformer, then sample it."""
    # Check the options, and open the data:
    check_options(args)
    processes = start_processes()
    device, world_size = processes.device, processes.world_size
    args.precision = set_precision(args.precision, device)
    if args.global_batch_size % world_size:
        raise UserError(
            f"--global-batch-size {args.global_batch_size}: must be divisible by {world_size} processes"
        )
    dataset = open_dataset(args.dataset, args.data_path, args.image_size, args.dry_run)
    check_data(args, dataset)
    model_config = configure_model(args, dataset)
    process = create_process(
        dict(objective="diffusion", noise_schedule=args.noise_schedule, learn_sigma=args.learn_sigma)
    )
    order = BatchOrder(
        dataset, args.global_batch_size, rank=processes.rank, world_size=world_size, seed=args.global_seed,
        stop_step=args.max_steps or args.epochs * (len(dataset) // args.global_batch_size),
    )  # fmt: skip
    if args.dry_run:
        if processes.is_main:
            print_plan(args, dataset, model_config, order, world_size)
        return

    # Load the autoencoder, which can fail, before anything is written:
    autoencoder = load_autoencoder(args.vae, device, dataset.channels)

    # Make the run's folder:
    folder = processes.on_main(create_run_folder, args)
    logger = create_logger(folder, enabled=processes.is_main)
    logger.info(f"Experiment directory created at {folder}")

    # Build the model, its average and the optimiser:
    torch.manual_seed(args.global_seed)
    model = DiT(**model_config).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=args.lr,
        weight_decay=args.weight_decay,
        fused=True,
    )
    timestep_sampler = create_named_schedule_sampler(args.timestep_sampler, process)
    parallel = model
    if world_size > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        parallel = DistributedDataParallel(
            model, device_ids=device_ids, gradient_as_bucket_view=True, static_graph=True
        )
    logger.info(f"DiT Parameters: {sum(p.numel() for p in model.parameters()):,}")
    logger.info(f"Dataset contains {len(dataset):,} images ({args.data_path or args.dataset})")
    logger.info(
        f"Training for {len(order):,} steps of {args.global_batch_size} images"
        f" on {world_size} x {device.type}"
    )

    def save(step):
        path = os.path.join(folder, "checkpoints", f"{step:07d}.pt")
        processes.assert_same(model.parameters())
        if processes.is_main:
            checkpoint.save(path, dict(
                model=model.state_dict(), ema=ema.state_dict(), opt=optimizer.state_dict(), args=vars(args),
                step=step, timestep_sampler=timestep_sampler.state_dict(),
                config=dict(
                    model=model.config, process=process.config, autoencoder=autoencoder.config,
                    data=dict(dataset=args.dataset, image_size=args.image_size, classes=dataset.classes),
                    sampling=sampling_defaults(args),
                ),
            ))  # fmt: skip
            logger.info(f"Saved checkpoint to {path}")
        processes.barrier()
        return path

    # Train:
    parallel.train()
    meter = Meter()
    batches = create_loader(dataset, order, args.num_workers, device)
    bar = tqdm(batches, desc="Training", unit="step", disable=not processes.is_main, dynamic_ncols=True)
    for step, (images, labels) in enumerate(bar, start=1):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        draws = draw_step(args, step, processes, timestep_sampler, model)
        x_start = autoencoder.encode(images, draws["posterior"])
        model_kwargs = dict(y=labels, force_drop_ids=draws["drop"]) if model.num_classes else {}
        terms = process.training_losses(parallel, x_start, draws["t"], model_kwargs, noise=draws["noise"])
        timestep_sampler.update_with_local_losses(draws["t"], terms["loss"])
        loss = (terms["loss"] * draws["weights"]).mean()

        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, step / max(1, args.warmup_steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        update_ema(
            ema, model, min(args.ema_decay, (1 + step) / (10 + step)) if args.ema_warmup else args.ema_decay
        )

        meter.add(terms)
        if step % args.log_every == 0 or step == len(order):
            report(meter.read(processes), step, folder, logger, bar, processes.is_main)
        if step % args.ckpt_every == 0 and step < len(order):
            save(step)
    bar.close()
    path = save(len(order))
    leave_group()

    # Sample:
    if processes.is_main:
        picture = os.path.join(folder, "samples", f"{len(order):07d}.png")
        sampler = Sampler(ema, process, autoencoder, device, sampling_defaults(args))
        rows = sample_grid(sampler, picture, args.global_seed)
        logger.info(f"Samples{rows}: {picture}")
        labels = " --class-labels 0 1 2 3 4 5 6 7 8 9" if model.num_classes == 10 else ""
        logger.info(f"More of them: python sample.py --ckpt {path}{labels}")
    logger.info("Done!")


# ---------------------------------------------------------------------------------------------
# Steps of a run


def draw_step(args, step, processes, timestep_sampler, model):
    """All that is random in a step, for this process's rows: posterior, t, weights, noise and drop.

    Drawn for the whole global batch from (seed, step), then cut: the same rows get the same draws however
    many processes there are, and a resumed run needs no generator's state.
    """
    n, device = args.global_batch_size, processes.device
    generator = generator_for(device, args.global_seed, STEP, step)
    shape = (n, model.in_channels, *model.input_size)
    posterior = torch.randn(shape, device=device, generator=generator)
    t, weights = timestep_sampler.sample(n, device, generator)
    noise = torch.randn(shape, device=device, generator=generator)
    drop = torch.rand(n, device=device, generator=generator) < args.class_dropout_prob
    share = n // processes.world_size
    rows = slice(processes.rank * share, (processes.rank + 1) * share)
    draws = dict(posterior=posterior, t=t, weights=weights, noise=noise, drop=drop)
    return {name: values[rows] for name, values in draws.items()}


@torch.no_grad()
def update_ema(ema_model, model, decay=0.9999):
    """Move every trained weight of ema_model to decay · itself + (1 - decay) · the model's."""
    pairs = [(e, p) for e, p in zip(ema_model.parameters(), model.parameters()) if p.requires_grad]
    averages, weights = zip(*pairs)
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, weights, alpha=1 - decay)


class Meter:
    """Running means of the loss and its parts between two log lines; looks at a GPU only when read."""

    def __init__(self):
        self.sums, self.steps, self.since = {}, 0, time.perf_counter()

    def add(self, terms):
        """Count a step's terms, each (N,)."""
        self.steps += 1
        for name, values in terms.items():
            self.sums[name] = self.sums.get(name, 0) + values.detach().mean()

    def read(self, processes):
        """The means over steps and processes, and steps_per_sec; starts anew."""
        means = {name: (processes.mean(total) / self.steps).item() for name, total in self.sums.items()}
        means["steps_per_sec"] = self.steps / (time.perf_counter() - self.since)
        self.__init__()
        return means


def report(means, step, folder, logger, bar, is_main):
    """Write a line of log.txt and of metrics.jsonl, and the loss on the bar."""
    if not is_main:
        return
    parts = "".join(f", {name}: {means[name]:.4f}" for name in ("mse", "vb") if "vb" in means)
    logger.info(
        f"(step={step:07d}) Train Loss: {means['loss']:.4f},"
        f" Train Steps/Sec: {means['steps_per_sec']:.2f}{parts}"
    )
    bar.set_postfix(loss=f"{means['loss']:.4f}")
    with open(os.path.join(folder, "metrics.jsonl"), "a") as file:
        file.write(json.dumps(dict(step=step, **means)) + "\n")


def sample_grid(sampler, path, seed):
    """Write a PNG of samples, a row a class of at most ten, evenly spread; returns in words what its rows
    are."""
    classes = sampler.model.num_classes
    if classes:
        shown = sorted({round(i * (classes - 1) / 9) for i in range(10)})
        images = sampler.sample_each_class(10, shown, seeds=seed, progress=True)
    else:
        shown, images = [], sampler.sample(40, seeds=seed, progress=True)
    save_grid(images, path, nrow=10)
    return f" of classes {', '.join(map(str, shown))} (rows)" if classes else ""


# ---------------------------------------------------------------------------------------------
# Set-up


def check_options(args):
    """Raise UserError for numbers out of range, before any work."""
    for name in ("image_size", "epochs", "global_batch_size", "log_every", "ckpt_every"):
        _require(args, name, getattr(args, name) >= 1, "must be at least 1")
    for name in ("weight_decay", "warmup_steps", "num_workers"):
        _require(args, name, getattr(args, name) >= 0, "must be 0 or more")
    _require(args, "global_seed", 0 <= args.global_seed < 2**63, "must be 0 or more, below 2^63")
    _require(args, "max_steps", args.max_steps is None or args.max_steps >= 1, "must be at least 1")
    _require(args, "num_classes", args.num_classes is None or args.num_classes >= 0, "must be 0 or more")
    _require(args, "lr", args.lr > 0, "must be more than 0")
    _require(args, "ema_decay", 0 <= args.ema_decay < 1, "must be in [0, 1)")
    _require(args, "class_dropout_prob", 0 <= args.class_dropout_prob < 1, "must be in [0, 1)")
    check_sampling_options(args.cfg_scale, args.num_sampling_steps)


def _require(args, name, condition, what):
    if not condition:
        raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: {what}")


def check_data(args, dataset):
    """Settle --num-classes by the data set, and refuse a batch larger than it."""
    classes = len(dataset.classes)
    if args.num_classes is None:
        args.num_classes = classes
    if args.num_classes > 0 and not classes:
        raise UserError(
            f"--num-classes {args.num_classes}: {args.data_path} is a flat folder, without classes; give 0 to"
            " train unconditionally, or make one subfolder a class"
        )
    if 0 < args.num_classes < classes:
        raise UserError(f"--num-classes {args.num_classes}: the data set has {classes}; give at least that")
    if args.num_classes == 0 or args.class_dropout_prob == 0:
        if "cfg_scale" in args.by_hand and args.cfg_scale != 1:
            why = "without label dropout" if args.num_classes else "in an unconditional model"
            raise UserError(f"--cfg-scale {args.cfg_scale}: {why} there is nothing to guide; leave it out")
        args.cfg_scale = 1.0
    if len(dataset) < args.global_batch_size:
        raise UserError(
            f"--global-batch-size {args.global_batch_size}: the data set has {len(dataset)} images,"
            " not enough for one batch; give at most that"
        )


def configure_model(args, dataset):
    """The full arguments of DiT for these options; UserError where such a model cannot be."""
    channels, factor, image_channels = describe_vae(args.vae, dataset.channels)
    if image_channels != dataset.channels:
        raise UserError(
            f"--vae {args.vae}: takes images of {image_channels} channels, these have {dataset.channels};"
            " give --vae none"
        )
    sizes = {name: getattr(args, name) for name in ("depth", "hidden_size", "num_heads", "patch_size")}
    registered = DiT_models[args.model].keywords
    patch_size = sizes["patch_size"] or registered["patch_size"]
    if args.image_size % (factor * patch_size):
        parts = f"patch {patch_size}" if factor == 1 else f"the VAE's {factor} x patch {patch_size}"
        raise UserError(
            f"--image-size {args.image_size}: must be divisible by {factor * patch_size} ({parts})"
        )
    with blame(f"--model {args.model}"), torch.device("meta"):
        return DiT_models[args.model](
            input_size=args.image_size // factor, in_channels=channels, num_classes=args.num_classes,
            class_dropout_prob=args.class_dropout_prob, learn_sigma=args.learn_sigma,
            **{name: size for name, size in sizes.items() if size is not None},
        ).config  # fmt: skip


def sampling_defaults(args):
    """How this run's checkpoints are sampled unless told otherwise."""
    given = dict(cfg_scale=args.cfg_scale, steps=args.num_sampling_steps, sampler=args.sampler)
    return {**DEFAULTS, **{name: value for name, value in given.items() if value is not None}}


def create_run_folder(args):
    """Make results/NNN-DiT-XL-2 under the next free number, with args.json; returns its path."""
    name = args.model.replace("/", "-") + (f"-{args.preset}" if args.preset else "")
    try:
        os.makedirs(args.results_dir, exist_ok=True)
        taken = [
            int(found[0]) for found in map(re.compile(r"\d+").match, os.listdir(args.results_dir)) if found
        ]
        for number in itertools.count(max(taken, default=-1) + 1):
            folder = os.path.join(args.results_dir, f"{number:03d}-{name}")
            try:
                os.mkdir(folder)
                break
            except FileExistsError:  # another run, started at the same moment
                continue
        os.mkdir(os.path.join(folder, "checkpoints"))
        with open(os.path.join(folder, "args.json"), "w") as file:
            json.dump(vars(args), file, indent=2)
    except OSError as error:
        raise UserError(
            f"--results-dir {args.results_dir}: cannot be written to ({error.strerror})"
        ) from error
    return folder


def print_plan(args, dataset, model_config, order, world_size):
    """What --dry-run shows."""
    with torch.device("meta"):
        model = DiT(**model_config)
    parameters, macs = sum(p.numel() for p in model.parameters()), count_macs(model)
    height, width = model.input_size
    print(
        f"model        {checkpoint.describe_model(model.config)}: {parameters:,} parameters,"
        f" {macs / 1e9:.2f} GMACs"
    )
    print(
        f"input        {height}x{width}x{model.in_channels} by {resolve_vae(args.vae)},"
        f" of {args.image_size} pixels"
    )
    print(
        f"data         {len(dataset):,} images, {args.num_classes} classes ({args.data_path or args.dataset})"
    )
    print(
        f"training     {len(order):,} steps of {args.global_batch_size} on {world_size} process(es), "
        f"{len(order) / order.steps_per_epoch:.1f} epochs, {3 * 2 * macs * args.global_batch_size / 1e12:.2f}"
        " TFLOP a step"
    )
    print("Options are sound; nothing was written.")


# ---------------------------------------------------------------------------------------------
# Options


def build_parser():
    """The command-line options."""
    # fmt: off
    parser = PresetParser(description=__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), default=None,
                        help="defaults for all other options; one given by hand wins (default: none)")
    parser.add_argument("--dry-run", action="store_true",
                        help="check options and data, show the plan, write nothing (default: off)")

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="folder",
                       help="a folder of images, the embedded digits, or CIFAR-10 (default: folder)")
    group.add_argument("--data-path", default=None, metavar="FOLDER",
                       help="images, one subfolder a class or all in one; for cifar10, where to keep"
                       " it, or data (default: none)")
    group.add_argument("--image-size", type=int, default=256, metavar="PIXELS",
                       help="side of the square that images are cropped to (default: 256)")
    group.add_argument("--num-classes", type=int, default=None, metavar="N",
                       help="rows of the label table, null label aside; 0 for an unconditional model"
                       " (default: as many as the data set has)")
    group.add_argument("--num-workers", type=int, default=4, metavar="N",
                       help="processes that read images, for each training process (default: 4)")
    add_vae_argument(group, default="ema")

    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=list(DiT_models), default="DiT-XL/2",
                       help="size S, B, L or XL, and side of a patch in latent pixels (default: DiT-XL/2)")
    group.add_argument("--depth", type=int, default=None, metavar="BLOCKS",
                       help="blocks, in place of the model's (default: the model's)")
    group.add_argument("--hidden-size", type=int, default=None, metavar="WIDTH",
                       help="channels of a token, in place of the model's (default: the model's)")
    group.add_argument("--num-heads", type=int, default=None, metavar="HEADS",
                       help="attention heads, in place of the model's (default: the model's)")
    group.add_argument("--patch-size", type=int, default=None, metavar="SIDE",
                       help="latent pixels a side of a patch, in place of the model's (default: the model's)")
    group.add_argument("--class-dropout-prob", type=float, default=0.1, metavar="SHARE",
                       help="share of labels dropped, for guidance; 0 for none (default: 0.1)")
    group.add_argument("--learn-sigma", action=argparse.BooleanOptionalAction, default=True,
                       help="predict the variance too, with twice the channels (default: on)")
    group.add_argument("--noise-schedule", choices=("linear", "squaredcos_cap_v2"), default="linear",
                       help="how noise grows over the 1000 steps (default: linear)")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=1400, metavar="N",
                       help="passes over the data (default: 1400)")
    group.add_argument("--max-steps", type=int, default=None, metavar="STEPS",
                       help="optimiser steps, in place of --epochs (default: none)")
    group.add_argument("--global-batch-size", type=int, default=256, metavar="IMAGES",
                       help="images a step, over all processes (default: 256)")
    group.add_argument("--global-seed", type=int, default=0, metavar="SEED",
                       help="of initialisation, order and noise (default: 0)")
    group.add_argument("--lr", type=float, default=1e-4, metavar="RATE",
                       help="AdamW's learning rate (default: 1e-4)")
    group.add_argument("--warmup-steps", type=int, default=0, metavar="STEPS",
                       help="over which the learning rate rises from 0 (default: 0)")
    group.add_argument("--weight-decay", type=float, default=0.0, metavar="RATE",
                       help="AdamW's weight decay (default: 0)")
    group.add_argument("--ema-decay", type=float, default=0.9999, metavar="DECAY",
                       help="a step, of the averaged weights that are sampled (default: 0.9999)")
    group.add_argument("--ema-warmup", action=argparse.BooleanOptionalAction, default=False,
                       help="average over a tenth of the steps so far at most, for short runs (default: off)")
    group.add_argument("--timestep-sampler", choices=list(SCHEDULE_SAMPLERS), default="uniform",
                       help="how training times are drawn (default: uniform)")
    add_precision_argument(group)

    group = parser.add_argument_group("output")
    group.add_argument("--results-dir", default="results", metavar="FOLDER",
                       help="where runs make their folders (default: results)")
    group.add_argument("--log-every", type=int, default=100, metavar="STEPS",
                       help="steps between two lines of the log (default: 100)")
    group.add_argument("--ckpt-every", type=int, default=50_000, metavar="STEPS",
                       help="steps between two checkpoints; there is always one at the end (default: 50000)")

    add_sampling_arguments(parser.add_argument_group("samples at the end, and defaults kept for sample.py"))
    # fmt: on
    return parser


class PresetParser(Parser):
    """A parser whose --preset sets the other options' defaults; `by_hand` in its result names those given."""

    def parse_args(self, args=None, namespace=None):
        found = super().parse_args(args)
        # What a namespace already holds, argparse takes for the default; here a mark of what was not given:
        marked = super().parse_args(args, argparse.Namespace(**dict.fromkeys(vars(found), self)))
        by_hand = sorted(name for name, value in vars(marked).items() if value is not self)
        preset = dict(PRESETS[found.preset]) if found.preset else {}
        if "epochs" in by_hand:
            preset.pop("max_steps", None)
        if "model" in by_hand:  # whose sizes the preset may have changed
            for name in ("depth", "hidden_size", "num_heads", "patch_size"):
                preset.pop(name, None)
        return super().parse_args(args, argparse.Namespace(**preset, by_hand=by_hand))


if __name__ == "__main__":
    launch(main, build_parser())
