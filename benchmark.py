"""Measure speed: training, sampling, and every stage before and behind them, on a CPU or GPUs.

    python benchmark.py                                       # DiT-S/2: a training and a sampling step
    python benchmark.py --against --compile --precision fp32 bf16
    python benchmark.py --mode train --model DiT-S/2 DiT-B/2 --batch 4 8 16 --image-size 256 512
    python benchmark.py --mode encode decode latents images write features
    python benchmark.py --mode train --processes 1 2 4 8

Ways of doing the same (a row each) take turns, so that a machine's moods fall on all of them; the table has
medians, and the spread from the fastest to the slowest window as a share of that. What happens once, the
first step with its compilation, stands apart. Every number goes to a JSON too.

modes       train     a step on cached latents: forward, backward, optimiser, average
            sample    a step of guided sampling, without the decoder; images/s are for --num-sampling-steps
            encode    the VAE's posteriors of images and their mirror images (extract_features.py)
            decode    latents to bytes
            latents   reading a cache; images: reading JPEGs as large as ImageNet's
            write     bytes to the .npz of sample_ddp.py, without and with PNGs
            features  Inception's features (evaluate.py)
--against   the published way, in float32, eager: rows "published"; ratios are to the first row

On one H200, what to run, and what to expect of it (aims; not measured yet):
    python benchmark.py --mode train --model DiT-XL/2 --batch 256 --precision bf16 --compile   2.5 steps/s
    python benchmark.py --mode train --model DiT-S/2 --batch 256 --precision bf16 --compile    22 steps/s
    python benchmark.py --mode sample --model DiT-XL/2 --batch 64 --precision bf16 --compile   4.1 images/s
    python benchmark.py --mode sample --model DiT-XL/2 --batch 1 --precision bf16 --compile --cuda-graphs
    python benchmark.py --mode train --model DiT-XL/2 --batch 128 --precision tf32 bf16 --compile \\
        --grad-checkpointing --against
"""

import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import sys
import time
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import product

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm.auto import tqdm

import workloads
from experiment import peak_flops
from models import DiT_models
from runtime import (
    PRECISIONS,
    Parser,
    UserError,
    launch,
    leave_group,
    set_precision,
    start_processes,
    whole_file,
)
from sampler import check_cuda_graphs
from workloads import Setting

MODES = ("train", "sample", "encode", "decode", "latents", "images", "write", "features")
SIZES_ALONE = MODES[2:]  # whose speed no DiT bears on


def main(args):
    """Measure speed."""
    check_options(args)
    if args.processes == [1]:
        run(args, start_processes())
    else:
        run_with_processes(args)


def save(args, machine, rows):
    """Write all numbers so far."""
    with whole_file(args.out) as file:
        json.dump(dict(command=sys.argv[1:], **machine, rows=rows), file, indent=1)


def check_options(args):
    """Raise UserError for numbers out of range, before any work."""
    least = dict(batch=1, image_size=64, processes=1, repeats=1, num_sampling_steps=1, num_workers=0)
    for name, low in least.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value < low:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {low}")
            if name == "image_size" and value % 64:
                raise UserError(f"--image-size {value}: must be a multiple of 64 (the VAE's 8 x patch 8)")
    if args.seconds <= 0:
        raise UserError(f"--seconds {args.seconds}: must be more than 0")
    check_cuda_graphs(args.cuda_graphs)
    if not os.access(os.path.dirname(os.path.abspath(args.out)), os.W_OK):
        raise UserError(f"--out {args.out}: cannot be written there")


def run(args, processes, earlier=()):
    """All measurements asked for, printed and saved as they come, behind earlier rows; returns the rows."""
    device, machine = processes.device, {}
    precisions = args.precision or [set_precision(None, device)]
    for precision in precisions:
        set_precision(precision, device)  # which refuses what the device has not
    if processes.is_main:
        machine = describe_machine(device, precisions)
        print_machine(machine)
    rates, rows = processes.broadcast(machine.get("matmul_flops")), []
    for group in groups(args, precisions, device):
        found = measure(group, args, processes)
        for row in found:
            complete(row, found[0], args, processes, rates)
            if processes.is_main:
                print_row(row, heading=not rows and row is found[0])
        rows += found
        if processes.is_main:
            save(args, machine, [*earlier, *rows])
    if processes.is_main:
        print(f"Saved {args.out}")
    return rows


def run_with_processes(args):
    """The same by 1, 2, … processes of this machine, and how the number of images grows with them."""
    reports = []  # rows, a list each
    for count in args.processes:
        print(f"\n{count} process{'es' if count > 1 else ''}:", flush=True)
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            max_restarts=0, run_id="benchmark",
        )  # fmt: skip
        try:
            earlier = [row for rows in reports for row in rows]
            reports.append(elastic_launch(config, run_as_one)(args, earlier)[0])
        except ChildFailedError as error:
            raise UserError(f"--processes {count}: failed, see above") from error
    print("\nimages/s of all processes, relative to the first count:")
    for rows in zip(*reports):
        first = rows[0]["images_per_sec"]
        speeds = (f"{row['processes']}: {row['images_per_sec']:.3g} ({row['images_per_sec'] / first:.2f}x)"
                  for row in rows if first and row["images_per_sec"])  # fmt: skip
        print(f"{describe(rows[0])}, {rows[0]['way']}    {',  '.join(speeds)}")


def run_as_one(args, earlier):
    """run, in one of several processes that torch.distributed started."""
    rows = run(args, start_processes(), earlier)
    leave_group()
    return rows


# ---------------------------------------------------------------------------------------------
# What is measured


def groups(args, precisions, device):
    """Yield groups of {name of a row: (mode, Setting, what builds its Workload)} that take turns."""
    for mode in args.mode:
        models = args.model[:1] if mode in SIZES_ALONE else args.model
        for model, image_size, batch in product(models, args.image_size, args.batch):
            setting = Setting(model, image_size, batch, precisions[0], num_workers=args.num_workers)
            yield {
                name: (mode, changed, build)
                for name, changed, build in ways(mode, setting, args, precisions, device)
            }


def ways(mode, setting, args, precisions, device):
    """Yield (name, Setting, class) for every way of doing this."""
    if mode in ("encode", "decode"):  # never in bf16, but in what that leaves
        build = workloads.Encode if mode == "encode" else workloads.Decode
        rest = set_precision(None, device)
        for precision in dict.fromkeys("fp32" if given == "fp32" else rest for given in precisions):
            yield precision, replace(setting, precision=precision), build
        return
    simple = dict(features=workloads.Features, latents=workloads.ReadLatents, images=workloads.ReadImages)
    if mode in simple:
        yield "", replace(setting, precision="fp32"), simple[mode]
        return
    if mode == "write":
        yield "npz", setting, partial(workloads.Write, png=False)
        yield "npz and PNGs", setting, partial(workloads.Write, png=True)
        return
    if args.against:
        plain, published = replace(setting, precision="fp32"), "published"
        if mode == "train":
            yield published, plain, workloads.PlainTrain
            if args.against == "online":
                yield f"{published}, VAE online", plain, partial(workloads.PlainTrain, online=True)
        else:
            yield published, plain, workloads.PlainSample
        if device.type == "cuda" and "tf32" in precisions:
            build = workloads.PlainTrain if mode == "train" else workloads.PlainSample
            yield f"{published}, tf32", replace(setting, precision="tf32"), build
    flags = dict(compile=args.compile)
    if mode == "train":
        flags["grad_checkpointing"] = args.grad_checkpointing
    else:
        flags["cuda_graphs"] = args.cuda_graphs
    build = workloads.Train if mode == "train" else workloads.Sample
    choices = [(False, True) if given else (False,) for given in flags.values()]
    for precision, *chosen in product(precisions, *choices):
        on = {name: value for name, value in zip(flags, chosen) if value}
        words = [precision, *(name.replace("_", " ") for name in on)]
        yield ", ".join(words), replace(setting, precision=precision, **on), build


# ---------------------------------------------------------------------------------------------
# Measuring


def measure(group, args, processes):
    """Rows of a group, whose ways take turns."""
    built, rows, memory = {}, [], Memory(processes.device)
    torch.compiler.reset()  # shapes of earlier groups
    for name, (mode, setting, build) in group.items():
        row = dict(mode=mode, way=name, **vars(setting), windows=[], memory_gib=None)
        rows.append(row)
        before = memory.held(setting.cuda_graphs)
        try:
            workload = build(setting, processes)
            first = timed(workload, 1, processes)
            steps = window(workload, args.seconds, processes)
        except torch.OutOfMemoryError:
            row["failed"], workload = "out of memory", None
        if "failed" in row:  # out here, where the exception's frames no longer hold tensors
            gc.collect()
            torch.cuda.empty_cache()
            continue
        row |= dict(first_step_s=first, steps=steps, images=workload.images, flops=workload.flops)
        built[name] = workload, row, memory.held(setting.cuda_graphs) - before
    turns = [(name, turn) for turn in range(args.repeats) for name in built]
    try:
        for name, _ in tqdm(
            turns, desc=rows[0]["mode"], unit="window", leave=False, disable=not processes.is_main
        ):
            workload, row, own = built[name]
            start = memory.restart()
            row["windows"].append(timed(workload, row["steps"], processes) / row["steps"])
            used = own + memory.peak() - start
            row["memory_gib"] = max(row["memory_gib"] or 0.0, used / 2**30)
    finally:
        for workload, _, _ in built.values():
            workload.close()
    built.clear()
    workload = None
    gc.collect()
    if processes.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def timed(workload, steps, processes):
    """Seconds that all processes together took for this many steps; a GPU is waited for at both ends only."""

    def settle():
        if processes.device.type == "cuda":
            torch.cuda.synchronize()
        processes.barrier()

    settle()
    start = time.perf_counter()
    workload.run(steps)
    settle()
    return time.perf_counter() - start


def window(workload, seconds, processes):
    """How many steps take this long."""
    steps = 1
    # A step may have been read ahead already, or be over before a clock can tell:
    while (took := processes.broadcast(timed(workload, steps, processes))) < seconds / 2:
        steps *= 2
    return max(1, round(seconds * steps / took))


class Memory:
    """What this process holds, in bytes: on the GPU, or else of the machine."""

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"

    def held(self, recorded=False):
        if self.on_gpu and recorded:  # what CUDA graphs work in, they reserve, and count as free
            torch.cuda.empty_cache()
            return torch.cuda.memory_reserved()
        if self.on_gpu:
            return torch.cuda.memory_allocated()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc: give back what was freed
        return self._read("VmRSS")

    def restart(self):
        """Forget the peak so far; returns what is held."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif os.path.exists("/proc/self/clear_refs"):
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # Linux: the peak of resident memory
        return self.held()

    def peak(self):
        return torch.cuda.max_memory_allocated() if self.on_gpu else self._read("VmHWM")

    def _read(self, name):
        if not os.path.exists("/proc/self/status"):  # a peak that cannot be forgotten
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
                1 if sys.platform == "darwin" else 1024
            )
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def complete(row, first, args, processes, rates):
    """Add to a row what its windows come to; first: the row that ratios are to."""
    row |= dict(processes=processes.world_size, steps_per_sec=None, images_per_sec=None, ratio=None)
    if not row["windows"]:
        return
    median = statistics.median(row["windows"])
    per_image = args.num_sampling_steps if row["mode"] == "sample" else 1
    row["steps_per_sec"] = 1 / median
    row["images_per_sec"] = row["images"] * processes.world_size / median / per_image
    row["spread"] = (max(row["windows"]) - min(row["windows"])) / median
    if row["flops"]:
        row["flops_per_sec"] = row["flops"] * processes.world_size / median
        row["of_matmul"] = row["flops"] / median / rates.get(row["precision"], float("inf"))
        peak = peak_flops(processes.device, row["precision"])
        row["of_datasheet"] = peak and row["flops"] / median / peak
    if row is not first and first["windows"]:  # window by window, since they were taken in turn
        row["ratio"] = statistics.median(a / b for a, b in zip(first["windows"], row["windows"]))


# ---------------------------------------------------------------------------------------------
# The machine, and the table


def describe_machine(device, precisions):
    """What the numbers hold for."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        if os.path.exists("/proc/cpuinfo"):
            with open("/proc/cpuinfo") as file:
                name = next((line.split(":")[1].strip() for line in file if "model name" in line), name)
    needed = dict.fromkeys([*precisions, set_precision(None, device), "fp32"])
    rates = {precision: matmul_rate(device, precision) for precision in needed}
    return dict(device=name, threads=torch.get_num_threads(), torch=torch.__version__,
                date=date.today().isoformat(), matmul_flops=rates)  # fmt: skip


def matmul_rate(device, precision):
    """FLOP/s of one large matrix product."""
    set_precision(precision, device)
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def print_machine(machine):
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in machine["matmul_flops"].items())
    print(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}")
    print(f"a large matrix product, GFLOP/s: {rates}\n")


COLUMNS = (
    ("what", 34), ("way", 26), ("images/s", 9), ("steps/s", 9), ("spread", 7), ("ratio", 6), ("GiB", 6),
    ("GFLOP/s", 9), ("of matmul", 10), ("of sheet", 9), ("first, s", 8),
)  # fmt: skip


def describe(row):
    """What a row measures, in words."""
    model = "" if row["mode"] in SIZES_ALONE else f"{row['model']}, "
    return f"{row['mode']}, {model}{row['image_size']} px, batch {row['batch']}"


def print_row(row, heading):
    """A line of the table."""
    if heading:
        print("  ".join(f"{name:<{width}}" if i < 2 else f"{name:>{width}}"
                        for i, (name, width) in enumerate(COLUMNS)))  # fmt: skip

    def show(name, form, factor=1.0):
        return "" if row.get(name) is None else format(row[name] * factor, form)

    cells = (
        describe(row), row["way"], show("images_per_sec", ".4g") or row.get("failed", ""),
        show("steps_per_sec", ".4g"), show("spread", ".0%"), show("ratio", ".2f"), show("memory_gib", ".2f"),
        show("flops_per_sec", ",.0f", 1e-9), show("of_matmul", ".0%"), show("of_datasheet", ".0%"),
        show("first_step_s", ".2f"),
    )  # fmt: skip
    print("  ".join(f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}"
                    for i, (cell, (_, width)) in enumerate(zip(cells, COLUMNS))), flush=True)  # fmt: skip


def build_parser():
    """The command-line options."""
    # fmt: off
    parser = Parser(description=__doc__)
    parser.add_argument("--mode", choices=MODES, nargs="+", default=["train", "sample"],
                        help="what to measure (default: train sample)")
    parser.add_argument("--model", choices=list(DiT_models), nargs="+", default=["DiT-S/2"],
                        help="models, for train and sample (default: DiT-S/2)")
    parser.add_argument("--image-size", type=int, nargs="+", default=[256], metavar="PIXELS",
                        help="sides of the images (default: 256)")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], metavar="IMAGES",
                        help="images a step, of each process (default: 8)")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=None,
                        help="arithmetic of matrix products, as train.py's (default: tf32 on a GPU that has"
                        " it, else fp32)")
    parser.add_argument("--compile", action="store_true",
                        help="measure compiled blocks too (default: off)")
    parser.add_argument("--grad-checkpointing", action="store_true",
                        help="measure training with blocks recomputed too (default: off)")
    parser.add_argument("--cuda-graphs", action="store_true",
                        help="measure sampling with recorded steps too, on a GPU (default: off)")
    parser.add_argument("--against", nargs="?", choices=("cached", "online"), const="cached", default=None,
                        help="measure the published way too: on the same cached latents, or also with the VAE"
                        " in the training step (default: off; cached where no word follows)")
    parser.add_argument("--num-sampling-steps", type=int, default=250, metavar="STEPS",
                        help="that images/s of sample are for; a step takes the same time in any number of"
                        " them (default: 250)")
    parser.add_argument("--num-workers", type=int, default=2, metavar="N",
                        help="processes that read, for latents and images (default: 2)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], metavar="N",
                        help="how many processes of this machine share the work: several counts are compared"
                        " (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N",
                        help="windows of each row (default: 5)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S",
                        help="length of a window, at least a step (default: 2)")
    parser.add_argument("--out", default="benchmark.json", metavar="FILE",
                        help="where every number goes (default: benchmark.json)")
    # fmt: on
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
