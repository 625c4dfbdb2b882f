"""Measure speed: training, sampling, and every stage before and after them, on a CPU or GPUs.

    python benchmark.py                                       # DiT-S/2: a training and a sampling step
    python benchmark.py --against --compile --precision fp32 bf16
    python benchmark.py --mode train --model DiT-S/2 DiT-B/2 --batch 4 8 16 --image-size 256 512
    python benchmark.py --mode encode decode latents images write features
    python benchmark.py --mode train --processes 1 2 4 8

Variants of the same work, a row each, run round-robin, so noise affects all equally. The table shows medians
of --repeats windows, and their spread, (slowest - fastest) / median. The first step, with compilation, is
timed apart. Every number is also written to a JSON file. Data and weights are random; nothing is downloaded.

modes       train     a training step on cached latents: forward, backward, optimizer, EMA
            sample    a step of guided sampling, without the decoder; images/s are for --num-sampling-steps
            encode    the VAE's posteriors of images and their mirror images (extract_features.py)
            decode    latents to uint8 pixels
            latents   reading a latent cache; images: reading JPEGs as large as ImageNet's
            write     pixels to the .npz of sample_ddp.py, without and with PNGs
            features  Inception features (evaluate.py)
--against   the published implementation, float32 and eager: rows "published"; ratios are to the first row

On a GPU (docs/speed.md has what an H200 gave):
    python benchmark.py --mode train --model DiT-XL/2 --batch 256 --precision bf16 --compile --profile
    python benchmark.py --mode train --model DiT-XL/2 --batch 32 --precision tf32 bf16 --compile \\
        --grad-checkpointing --against
    python benchmark.py --mode sample --model DiT-XL/2 --batch 4 --precision bf16 --compile --cuda-graphs
    python benchmark.py --mode encode decode --batch 32 --precision fp32 tf32 bf16 --compile
"""

import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import product
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from diffusion import create_diffusion, create_process
from evaluation.inception import Inception
from extract_features import complete, finish_shard
from models import DiT_models
from runtime.autoencoder import SD_SCALE, VAE, Pixels
from runtime.cli import Parser, UserError, atomic_write, float_above, int_at_least, launch, leave_group
from runtime.distributed import TRAINING_PRECISIONS, init_distributed, set_precision, uses_bfloat16
from runtime.flops import count_macs, device_name, measure_matmul_flops, peak_flops
from runtime.image_io import to_uint8
from runtime.profiling import profile_step
from sample_ddp import sample_batches
from sampler import Sampler
from sampling.npz_writer import NpzWriter
from sampling.options import check_cuda_graphs
from train import train_step
from training.dataset import DistributedBatchSampler, FolderImages, ReadableDataset, make_loader
from training.latent_cache import LatentCache
from training.options import build_parser as build_train_parser
from training.resolve import process_config
from training.run_log import memory_gib, restart_peak_memory
from training.state import TrainingState

MODES = ("train", "sample", "encode", "decode", "latents", "images", "write", "features")
WITHOUT_DIT = MODES[2:]  # whose speed does not depend on --model
NUM_CLASSES, CHANNELS, FACTOR = 1000, 4, 8  # CHANNELS of latents; FACTOR: pixels a latent, on a side
VAE_CONFIG = dict(channels=CHANNELS, factor=FACTOR, scale=SD_SCALE, shift=0.0)


@dataclass(frozen=True)
class BenchmarkConfig:
    """What a row measures. image_size: pixels a side; batch: images a step, on each process."""

    model: str
    image_size: int
    batch: int
    precision: str
    compile: bool = False
    grad_checkpointing: bool = False
    cuda_graphs: bool = False
    residual_dtype: str = "fp32"
    num_workers: int = 0


@dataclass
class Workload:
    """A stage, set up to run."""

    run: Callable  # run(steps) does so many steps, without waiting for a GPU to finish them
    flops: int | None = None  # of an image in a step, two a multiply-add; None where that is not what it does
    subject: object = None  # the TrainingState, Sampler or model that it runs
    close: Callable = lambda: None  # ends what it started, and removes its files


def main(args):
    """Measure speed."""
    check_cuda_graphs(args.cuda_graphs)
    if args.bf16_residual and not any(map(uses_bfloat16, args.precision or ())):
        raise UserError("--bf16-residual: has no meaning without --precision bf16 or fp8")
    if not os.access(os.path.dirname(os.path.abspath(args.out)), os.W_OK):
        raise UserError(f"--out {args.out}: cannot be written there")
    if args.processes == [1]:
        run(args)
    else:
        compare_process_counts(args)


def compare_process_counts(args):
    """Run with each of --processes on this machine, and print how images/s grow with their number."""
    reports = []  # lists of rows, one for each count
    for count in args.processes:
        print(f"\n{count} process{'es' if count > 1 else ''}:", flush=True)
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            max_restarts=0, run_id="benchmark",
        )  # fmt: skip
        try:
            reports.append(elastic_launch(config, run)(args, sum(reports, []))[0])
        except ChildFailedError as error:
            raise UserError(f"--processes {count}: failed, see above") from error
    print("\nimages/s of all processes, relative to the first count:")
    for rows in zip(*reports):
        speeds = [(row["processes"], row["images_per_sec"]) for row in rows if row["images_per_sec"]]
        shown = (f"{count}: {speed:.3g} ({speed / speeds[0][1]:.2f}x)" for count, speed in speeds)
        print(f"{describe(rows[0])}, {rows[0]['way']}    {',  '.join(shown)}")


def run(args, earlier=()):
    """Measure, print and save all rows, behind those of earlier runs; returns them."""
    dist, rows, machine = init_distributed(), [], {}
    precisions = args.precision or [set_precision(None, dist.device)]
    for precision in precisions:
        set_precision(precision, dist.device)  # raises UserError where the device lacks it
    if dist.is_main:
        machine = describe_machine(dist.device, precisions)
    matmul_flops = dist.broadcast(machine.get("matmul_flops"))
    for mode in args.mode:
        models = args.model[:1] if mode in WITHOUT_DIT else args.model
        for model, image_size, batch in product(models, args.image_size, args.batch):
            config = BenchmarkConfig(model, image_size, batch, precisions[0], num_workers=args.num_workers)
            group = measure(mode, list_variants(mode, config, args, precisions, dist.device), args, dist)
            for row in group:
                summarize(row, group[0], args, dist, matmul_flops)
                if dist.is_main:
                    print_row(row, with_heading=not rows)
                rows.append(row)
            if dist.is_main:
                report = dict(command=sys.argv[1:], **machine, rows=[*earlier, *rows])
                with atomic_write(args.out) as file:
                    json.dump(report, file, indent=1)
    if dist.is_main:
        print(f"Saved {args.out}")
    leave_group()
    return rows


def list_variants(mode, config, args, precisions, device):
    """The variants of a mode that the options ask for: [(name, BenchmarkConfig, what builds a Workload)]."""
    fp32 = replace(config, precision="fp32")
    if mode != "train":  # which alone has fp8
        precisions = list(dict.fromkeys("bf16" if one == "fp8" else one for one in precisions))
    if mode == "decode":  # which is never in bf16, but in the default precision
        default = set_precision(None, device)
        used = dict.fromkeys("fp32" if precision == "fp32" else default for precision in precisions)
        return [(precision, replace(config, precision=precision), decoding) for precision in used]
    if mode == "write":
        return [("npz", config, writing), ("npz and PNGs", config, partial(writing, png=True))]
    if mode in WITHOUT_DIT and mode != "encode":
        build = dict(latents=reading_latents, images=reading_images, features=extracting_features)[mode]
        return [("", fp32, build)]
    training_mode, variants = mode == "train", []
    if args.against and mode != "encode":
        build = published_training if training_mode else published_sampling
        variants.append(("published", fp32, build))
        if args.against == "online" and training_mode:
            variants.append(("published, VAE online", fp32, partial(build, online=True)))
        if "tf32" in precisions:
            variants.append(("published, tf32", replace(config, precision="tf32"), build))
    switches = dict(train=("compile", "grad_checkpointing", "bf16_residual"), encode=("compile",),
                    sample=("compile", "cuda_graphs"))[mode]  # fmt: skip
    choices = [(False, True) if getattr(args, name) else (False,) for name in switches]
    for precision, *chosen in product(precisions, *choices):
        on = [name for name, value in zip(switches, chosen) if value]
        if "bf16_residual" in on and not uses_bfloat16(precision):
            continue
        options = {name: True for name in on if name != "bf16_residual"}
        if "bf16_residual" in on:
            options["residual_dtype"] = "bf16"
        changed = replace(config, precision=precision, **options)
        build = dict(train=training, sample=sampling, encode=encoding)[mode]
        variants.append((", ".join([precision, *on]).replace("_", " "), changed, build))
    return variants


def measure(mode, variants, args, dist):
    """Time all variants, round-robin; returns their rows, dicts."""
    torch.compiler.reset()  # drops what was compiled for other shapes
    rows, ready = [], []
    for name, config, build in variants:
        row = dict(mode=mode, way=name, **vars(config), windows=[], memory_gib=None)
        rows.append(row)
        # CUDA graphs work in memory that is reserved but not allocated:
        read_peak = partial(memory_gib, dist.device, reserved=config.cuda_graphs)
        restart_peak_memory(dist.device)
        before = read_peak()
        try:
            workload = build(config, dist)
            row["first_step_s"], steps = time_steps(workload, config, 1, dist), 1
            restart_peak_memory(dist.device)  # without what only compilation needs
            # One step alone may have been prefetched, or be too short for the clock:
            while (took := dist.broadcast(time_steps(workload, config, steps, dist))) < args.seconds / 2:
                steps *= 2
        except torch.OutOfMemoryError:
            row["failed"], workload = "out of memory", None
            continue
        row |= dict(steps=max(1, round(steps * args.seconds / took)), images=config.batch)
        row |= dict(flops=workload.flops and workload.flops * config.batch, memory_gib=read_peak() - before)
        ready.append((row, config, workload))
    for row, config, workload in tqdm(
        ready * args.repeats, desc=mode, unit="window", leave=False, disable=not dist.is_main
    ):
        row["windows"].append(time_steps(workload, config, row["steps"], dist) / row["steps"])
    for row, config, workload in ready if args.profile else ():
        three = partial(time_steps, workload, config, 3, dist)
        row["profile"] = profile_step(three, 3, dist.device, median(row["windows"]))
    for _, _, workload in ready:
        workload.close()
    return rows


def time_steps(workload, config, steps, dist):
    """Seconds that all processes together take for these steps; a GPU is waited for at both ends only."""

    def now():
        if dist.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter()

    set_precision(config.precision, dist.device)
    start = now()
    workload.run(steps)
    return now() - start


def summarize(row, first, args, dist, matmul_flops):
    """Add what a row's windows come to; first: the row that ratios are relative to."""
    row |= dict(processes=dist.world_size, steps_per_sec=None, images_per_sec=None, ratio=None)
    if not row["windows"]:
        return
    seconds, steps = median(row["windows"]), args.num_sampling_steps if row["mode"] == "sample" else 1
    row["steps_per_sec"] = 1 / seconds
    row["images_per_sec"] = row["images"] * dist.world_size / (seconds * steps)
    row["spread"] = (max(row["windows"]) - min(row["windows"])) / seconds
    if row["flops"]:
        peak = peak_flops(dist.device, row["precision"])
        row["flops_per_sec"] = row["flops"] * dist.world_size / seconds
        if row["precision"] in matmul_flops:
            row["of_matmul"] = row["flops"] / seconds / matmul_flops[row["precision"]]
        row["of_datasheet"] = peak and row["flops"] / seconds / peak
    if row is not first and first["windows"]:  # window by window: neighbours saw the same noise
        row["ratio"] = median(a / b for a, b in zip(first["windows"], row["windows"]))


def describe_machine(device, precisions):
    """Print and return what the numbers hold for."""
    rates = {precision: measure_matmul_flops(device, precision)
             for precision in dict.fromkeys([*precisions, set_precision(None, device), "fp32"])
             if precision != "fp8"}  # fmt: skip
    name, threads, today = device_name(device), torch.get_num_threads(), date.today().isoformat()
    print(f"{name}, {threads} threads, torch {torch.__version__}, {today}")
    shown = ", ".join(f"{precision} {rate / 1e9:,.0f}" for precision, rate in rates.items())
    print(f"a large matrix product, GFLOP/s: {shown}\n")
    return dict(device=name, threads=threads, torch=torch.__version__, date=today, matmul_flops=rates)


COLUMNS = (  # title, width, key of a row, format, factor
    ("images/s", 9, "images_per_sec", ".4g", 1), ("steps/s", 9, "steps_per_sec", ".4g", 1),
    ("spread", 7, "spread", ".0%", 1), ("ratio", 6, "ratio", ".2f", 1), ("GiB", 6, "memory_gib", ".2f", 1),
    ("GFLOP/s", 9, "flops_per_sec", ",.0f", 1e-9), ("of matmul", 10, "of_matmul", ".0%", 1),
    ("of sheet", 9, "of_datasheet", ".0%", 1), ("first, s", 8, "first_step_s", ".2f", 1),
)  # fmt: skip


def describe(row):
    """What a row measures, in words."""
    model = "" if row["mode"] in WITHOUT_DIT else f"{row['model']}, "
    return f"{row['mode']}, {model}{row['image_size']} px, batch {row['batch']}"


def print_row(row, with_heading):
    """A line of the table."""
    if with_heading:
        titles = (f"{title:>{width}}" for title, width, *_ in COLUMNS)
        print(f"{'what':<34}  {'way':<26}", *titles, sep="  ")
    cells = []
    for _, width, key, form, factor in COLUMNS:
        text = "" if row.get(key) is None else format(row[key] * factor, form)
        cells.append(f"{text:>{width}}")
    cells = [row["failed"]] if "failed" in row else cells
    print(f"{describe(row):<34}  {row['way']:<26}", *cells, sep="  ", flush=True)
    if "profile" in row:
        print("    ms a step:", ", ".join(f"{kind} {ms:.1f}" for kind, ms in row["profile"].items()))


# ---------------------------------------------------------------------------------------------
# Workloads: training and sampling, ours and as published; then the stages before and after them


def build_dit(config, device):
    """A DiT without zeros, which some processors multiply faster."""
    with device:
        model = DiT_models[config.model](input_size=config.image_size // FACTOR, num_classes=NUM_CLASSES)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def build_vae(device):
    """An SD-VAE of random weights."""
    from diffusers import AutoencoderKL  # here, since it takes seconds

    vae = VAE("random weights", VAE_CONFIG)
    vae._model = AutoencoderKL(
        block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=CHANNELS,
    ).eval().requires_grad_(False)  # fmt: skip
    return vae.to(device)


def random_batch(config, device, channels=2 * CHANNELS, factor=FACTOR):
    """Moments (N, 2C, h, w), or other values, and labels (N,), in memory as a data loader leaves them."""
    side = config.image_size // factor
    batch = torch.randn(config.batch, channels, side, side), torch.randint(NUM_CLASSES, (config.batch,))
    return [values.pin_memory() for values in batch] if device.type == "cuda" else batch


def training(config, dist):
    """A step of train.py on cached latents: forward, backward, optimizer, EMA."""
    args = build_train_parser().parse_args(["--model", config.model, "--feature-path", "random"])
    vars(args).update(vars(config), num_classes=NUM_CLASSES, global_batch_size=config.batch * dist.world_size)
    model, vae = build_dit(config, dist.device), VAE("random weights", VAE_CONFIG)
    state = TrainingState(args, model, create_process(process_config(args)), dist)
    batch = random_batch(config, dist.device)

    def run(steps):
        for _ in range(steps):
            train_step(state, *batch, args, vae.sample_posterior)

    return Workload(run, 6 * count_macs(model), state)


def published_training(config, dist, online=False):
    """A training step as published: eager, a loop over the weights for the EMA, the loss read in every step.

    online: on images, with the VAE in it; else on cached latents."""
    process, model = published_process(""), published_dit(config, dist.device).train()
    ema = copy.deepcopy(model).requires_grad_(False)
    network = DistributedDataParallel(model) if dist.world_size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    vae = build_vae(dist.device) if online else VAE("random weights", VAE_CONFIG)
    encode = vae.encode if online else vae.sample_posterior
    batch = random_batch(config, dist.device, *((3, 1) if online else ()))

    def run(steps):
        for _ in range(steps):
            x, y = (values.to(dist.device) for values in batch)
            x = encode(x, torch.randn(len(x), CHANNELS, *model.input_size, device=dist.device))
            t = torch.randint(process.num_timesteps, (len(x),), device=dist.device)
            loss = process.training_losses(network, x, t, dict(y=y))["loss"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            weights = dict(model.named_parameters())
            with torch.no_grad():
                for name, average in ema.named_parameters():
                    average.mul_(0.9999).add_(weights[name], alpha=1 - 0.9999)
            loss.item()

    return Workload(run, 6 * count_macs(model), SimpleNamespace(model=model, ema=ema))


def published_dit(config, device):
    """A DiT as published: tokens stay as PatchEmbed leaves them in memory, transposed."""
    model = build_dit(config, device)

    def forward(x, t, y):
        x = model.x_embedder(x) + model.pos_embed
        c = model.t_embedder(t) + model.y_embedder(y, model.training)
        for block in model.blocks:
            x = block(x, c)
        return model.unpatchify(model.final_layer(x, c))

    model.forward = forward
    return model


def published_process(spacing):
    """A diffusion as published: it copies its tables to the device at every use."""

    class NoCache(dict):
        def __contains__(self, key):
            return False

    process = create_diffusion(spacing)
    process._on_device = NoCache()
    return process


def sampling(config, dist):
    """A step of guided DDPM sampling by the Sampler."""
    model, latents = build_dit(config, dist.device).eval(), Pixels(CHANNELS)
    latents.clip_denoised = False
    if config.precision == "bf16":
        model.store_bfloat16()
    if config.compile:
        model.compile_blocks()
    sampler = Sampler(model, None, latents, dist.device, cuda_graphs=config.cuda_graphs)
    labels = torch.randint(NUM_CLASSES, (config.batch,)).tolist()

    def run(steps):
        for done in range(0, steps, 250):
            sampler.sample(labels, cfg_scale=4.0, steps=min(250, steps - done), batch_size=config.batch)

    return Workload(run, 4 * count_macs(model), sampler)


def published_sampling(config, dist):
    """A sampling step as published: forward_with_cfg on twice the rows, in p_sample_loop."""
    model, n = published_dit(config, dist.device).eval(), config.batch

    def run(steps):
        z = torch.randn(n, CHANNELS, *model.input_size, device=dist.device)
        y = torch.cat([torch.randint(NUM_CLASSES, (n,)), torch.full((n,), NUM_CLASSES)]).to(dist.device)
        for done in range(0, steps, 250):
            published_process(str(min(250, steps - done))).p_sample_loop(
                model.forward_with_cfg, (2 * n, *z.shape[1:]), torch.cat([z, z]), clip_denoised=False,
                model_kwargs=dict(y=y, cfg_scale=4.0),
            )  # fmt: skip

    return Workload(run, 4 * count_macs(model), SimpleNamespace(model=model))


def calling(call, x):
    """A Workload of call(x), whose operations are counted."""
    with FlopCounterMode(display=False) as counter:
        call(x[:1])

    def run(steps):
        for _ in range(steps):
            call(x)

    return Workload(run, counter.get_total_flops())


def encoding(config, dist):
    """A batch of extract_features.py: posteriors of images and of their mirror images."""
    vae, images = build_vae(dist.device), random_batch(config, dist.device, 3, 1)[0].to(dist.device)
    workload = calling(lambda x: torch.stack([vae.moments(x), vae.moments(x.flip(-1))], 1).half(), images)
    vae.encode_in(config.precision, config.compile)
    return workload


def decoding(config, dist):
    """A batch of latents to uint8 pixels."""
    vae, latents = build_vae(dist.device), random_batch(config, dist.device, CHANNELS)[0].to(dist.device)
    return calling(lambda x: to_uint8(vae.decode(x)), latents)


def extracting_features(config, dist):
    """A batch of evaluate.py: Inception features."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with patch.object(FeatureExtractorInceptionV3, "load_state_dict"):  # which keeps random weights
        inception = Inception({}, None, dist.device)
    for layer in inception.network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)  # so that activations keep their size
    pixels = torch.randint(256, (config.batch, 3, config.image_size, config.image_size), dtype=torch.uint8)
    return calling(lambda x: inception(x)[0].cpu(), pixels)


def reading(dataset, folder, config, dist):
    """A batch of training data, read by --num-workers processes from a temporary folder."""
    order = DistributedBatchSampler(dataset, config.batch, stop_step=2**40)
    batches = make_loader(ReadableDataset(dataset, skip=False), order, config.num_workers, dist.device)

    def run(steps):
        for _ in range(steps):
            next(batches)[0].to(dist.device, non_blocking=True)

    def close():
        batches.close()
        folder.cleanup()

    return Workload(run, close=close)


def reading_latents(config, dist):
    """From a cache of extract_features.py, in the operating system's file cache."""
    folder, vae = tempfile.TemporaryDirectory(), VAE("random weights", VAE_CONFIG)
    rows, side, rng = max(1024, config.batch), config.image_size // FACTOR, np.random.default_rng(0)
    for shard in range(4):
        moments = rng.standard_normal((rows, 2, 2 * CHANNELS, side, side), np.float32).astype(np.float16)
        finish_shard(folder.name, shard, moments, np.zeros(rows, np.int64), vae)
    manifest = dict(vae=vae.config, image_size=config.image_size, classes=["one"])
    complete(folder.name, dict(manifest, count=4 * rows, shard_size=rows), range(4))
    return reading(LatentCache(folder.name), folder, config, dist)


def reading_images(config, dist):
    """From JPEGs of 500x375 pixels and some 110 kB, as ImageNet's."""
    folder, rng = tempfile.TemporaryDirectory(), np.random.default_rng(0)
    for i in range(max(256, config.batch)):
        coarse = Image.fromarray(rng.integers(256, size=(38, 50, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.BICUBIC)) + rng.normal(0, 12, (375, 500, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(os.path.join(folder.name, f"{i:05d}.jpg"), quality=90)
    return reading(FolderImages(folder.name, config.image_size), folder, config, dist)


def writing(config, dist, png=False):
    """A batch of sample_ddp.py after the decoder: pixels into the .npz, and PNGs where asked."""
    folder, side = tempfile.TemporaryDirectory(), config.image_size
    coarse = torch.rand(config.batch, 3, side // 8, side // 8) * 2 - 1
    images = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic")
    images += 0.05 * torch.randn_like(images)
    sampler = SimpleNamespace(
        model=SimpleNamespace(num_classes=0), generate=lambda seeds, *_: (images, [0] * len(seeds))
    )
    args = SimpleNamespace(global_seed=0, labels="random", png=png)

    def run(steps):
        path = tempfile.mkdtemp(dir=folder.name)
        archive = NpzWriter(f"{path}.npz", path, (steps * config.batch, side, side, 3), config.batch)
        archive.begin()
        sample_batches(archive.batches, sampler, archive, args, None, SimpleNamespace(rank=0, is_main=False))

    return Workload(run, close=folder.cleanup)


def build_parser():
    """The command-line options."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--mode", choices=MODES, nargs="+", default=["train", "sample"],
        help="what to measure (default: train sample)")
    add("--model", choices=list(DiT_models), nargs="+", default=["DiT-S/2"],
        help="models, for train and sample (default: DiT-S/2)")
    add("--image-size", type=int_at_least(64, multiple_of=64), nargs="+", default=[256], metavar="PIXELS",
        help="sides of the images (default: 256)")
    add("--batch", type=int_at_least(1), nargs="+", default=[8], metavar="IMAGES",
        help="images a step, of each process (default: 8)")
    add("--precision", choices=TRAINING_PRECISIONS, nargs="+", default=None,
        help="arithmetic of matrix products, as train.py's (default: tf32 on a GPU that has it, else fp32)")
    add("--compile", action="store_true", help="measure compiled blocks too (default: off)")
    add("--grad-checkpointing", action="store_true",
        help="measure training with blocks recomputed too (default: off)")
    add("--bf16-residual", action="store_true",
        help="measure training with --residual-dtype bf16 too, in bf16 and fp8 (default: off)")
    add("--profile", action="store_true",
        help="show where the time of a step goes, by kind of work (default: off)")
    add("--cuda-graphs", action="store_true",
        help="measure sampling with recorded steps too, on a GPU (default: off)")
    add("--against", nargs="?", choices=("cached", "online"), const="cached", default=None,
        help="measure the published way too: on the same cached latents, or also with the VAE in the training"
        " step (default: off; cached where no word follows)")
    add("--num-sampling-steps", type=int_at_least(1), default=250, metavar="STEPS",
        help="that images/s of sample are for; a step takes the same time in any number of them"
        " (default: 250)")
    add("--num-workers", type=int_at_least(0), default=2, metavar="N",
        help="processes that read, for latents and images (default: 2)")
    add("--processes", type=int_at_least(1), nargs="+", default=[1], metavar="N",
        help="how many processes of this machine share the work: several counts are compared (default: 1)")
    add("--repeats", type=int_at_least(1), default=5, metavar="N", help="windows of each row (default: 5)")
    add("--seconds", type=float_above(0), default=2.0, metavar="S",
        help="length of a window, at least a step (default: 2)")
    add("--out", default="benchmark.json", metavar="FILE",
        help="where every number goes (default: benchmark.json)")
    # fmt: on
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
