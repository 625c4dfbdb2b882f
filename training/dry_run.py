"""train.py --dry-run: what a start would do, checked as far as that can be without writing or fetching."""

import argparse
import math
import os

import torch

from checkpointing import files as checkpoints
from checkpointing.published import find_local, local_inception
from models import DiT
from runtime.autoencoder import is_deterministic, resolve_vae
from runtime.distributed import ALONE, uses_bfloat16
from runtime.flops import count_macs, datasheet_flops
from training.memory import training_memory
from training.resume import open_checkpoint
from training.run_dir import Foreseen
from training.validation import open_fid

# Shares of the datasheet's peak in training DiT-XL/2 at 256 pixels: 107 images/s were published for an A100,
# an H200 reaches the same with 32 images in TF32 or bfloat16, and with compiled blocks in bfloat16 the other.
SHARE, COMPILED_SHARE = 0.25, 0.34


def dry_run(args, plan, dist):
    """Check what a start would still check, and print the plan: model, data, steps, weights, run.

    Every process calls it; raises UserError as a start would.
    """
    found = dist.on_main(_foresee, args, plan)
    if dist.is_main:
        _print_plan(args, plan, args.world_size or dist.world_size, *found)


def _foresee(args, plan):
    """In words, which run it would be, and its first weights, "" where they are random."""
    if os.path.isdir(resolve_vae(args.vae)):
        plan.load_autoencoder(ALONE.device)
    if args.fid_ref and (args.inception_weights or local_inception()):
        open_fid(args, plan, ALONE)
    initial = ""
    if args.init_from:
        path = find_local(args.init_from)
        initial = f"from {args.init_from}, which has to be fetched first and was not checked"
        if path is not None:
            with torch.device("meta"):
                model = DiT(**plan.model_config)
            initial = checkpoints.initialize(model, checkpoints.load(path, "--init-from"))
    experiment = Foreseen(args)
    if experiment.resumed:
        contents, changes = open_checkpoint(experiment.resumed, args, plan)
        return f"continues after step {contents['step']:,} from {experiment.resumed}{changes}", initial
    if os.path.exists(experiment.folder):
        return f"begins {experiment.folder} again, which has no checkpoint", initial
    return f"a new one, in {experiment.folder}", initial


def _print_plan(args, plan, world_size, run, initial):
    with torch.device("meta"):
        model = DiT(**plan.model_config)
    parameters, macs = sum(p.numel() for p in model.parameters()), count_macs(model)
    height, width = model.input_size
    rows = dict(
        model=f"{checkpoints.describe_model(model.config)}: {parameters:,} parameters,"
        f" {macs / 1e9:.2f} GMACs",
        input=f"{height}x{width}x{model.in_channels} by {resolve_vae(args.vae)}, of {args.image_size} pixels"
        + (", normalised by channel" if args.latent_normalization == "channel" else ""),
        data=f"{plan.data['count']:,} images, {args.num_classes} classes ({plan.data['dataset']})",
        training=f"{plan.total_steps:,} steps of {args.global_batch_size} on {world_size} process(es)"
        f" in {args.precision}, "
        f"{plan.total_steps / plan.steps_per_epoch:.1f} epochs,"
        f" {3 * 2 * macs * args.global_batch_size / 1e12:.2f} TFLOP a step",
        weights=initial,
        **_costs(args, plan, world_size, macs),
        run=run,
    )
    for name, words in rows.items():
        if words:
            print(f"{name:<12} {words}")
    print("Options are sound; nothing was written.")


def _costs(args, plan, world_size, macs):
    """Rows on memory, time and disk."""
    memory = training_memory(args, plan, world_size)
    needed = sum(memory.values())
    shown = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in memory.items())
    rows = dict(memory=f"{needed / 2**30:.1f} GiB on each GPU, estimated: {shown}")
    available = args.device_memory and args.device_memory * 2**30
    if available is None and torch.cuda.is_available():
        available = torch.cuda.get_device_properties(0).total_memory
    if available and needed > available:
        rows["too much"] = (
            f"more than the {available / 2**30:.1f} GiB there are; {_remedy(args, plan, world_size)}"
        )
    if macs > 1e9:  # the steps of smaller models take other things than products
        rate, share = "tf32", SHARE
        if uses_bfloat16(args.precision):
            rate, share = "bf16", COMPILED_SHARE if args.compile else SHARE
        flops = 6 * macs * args.global_batch_size / world_size / share
        seconds = ", ".join(
            f"{name} {flops / datasheet_flops(name, rate):.2g} s" for name in ("A100", "H100", "H200")
        )
        rows["time"] = f"a step on {world_size} x {seconds}; estimated at {share:.0%} of the peak"
    checkpoint = memory["weights"] + memory["average"] + memory["optimizer"]
    checkpoint *= world_size if args.shard else 1
    kept = len(range(args.ckpt_every, plan.total_steps, args.ckpt_every)) + 1
    kept = min(kept, args.keep_checkpoints or kept)
    rows["disk"] = (
        f"{checkpoint / 2**30:.2f} GiB a checkpoint, {kept * checkpoint / 2**30:.1f} GiB for the {kept} kept"
    )
    latents = math.prod(plan.model_config["input_size"]) * plan.model_config["in_channels"]
    if not plan.has_cached_latents and resolve_vae(args.vae) != "none":
        moments = 1 if is_deterministic(args.vae) else 2
        cache = plan.data["count"] * 2 * moments * latents * 2  # of an image and its mirror, float16
        rows["disk"] += f"; a cache of its latents would take {cache / 2**30:.2f} GiB"
    return rows


def _remedy(args, plan, world_size):
    """What would take less, and how much that is."""
    choices = []
    if not args.grad_checkpointing:
        choices.append(("--grad-checkpointing", dict(grad_checkpointing=True)))
    parts = 2 * args.grad_accum_steps
    if args.global_batch_size % (world_size * parts) == 0:
        choices.append((f"--grad-accum-steps {parts}", dict(grad_accum_steps=parts)))
    if world_size > 1 and not args.shard and args.precision != "fp8" and args.grad_compression == "none":
        choices.append(("--shard", dict(shard=True)))
    if uses_bfloat16(args.precision) and args.residual_dtype == "fp32":
        choices.append(("--residual-dtype bf16", dict(residual_dtype="bf16")))
    if not uses_bfloat16(args.precision):
        choices.append(("--precision bf16", dict(precision="bf16")))
    found = []
    for flag, options in choices:
        other = argparse.Namespace(**{**vars(args), **options})
        found.append(f"{flag} ({sum(training_memory(other, plan, world_size).values()) / 2**30:.1f} GiB)")
    return "give " + ", ".join(found) if found else "use more processes"
