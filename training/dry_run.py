"""train.py --dry-run: what a start would do, checked as far as that can be without writing or fetching."""

import os

import torch

from checkpointing import files as checkpoints
from checkpointing.published import find_local, local_inception
from models import DiT
from runtime.autoencoder import resolve_vae
from runtime.distributed import ALONE
from runtime.flops import count_macs
from training.resume import open_checkpoint
from training.run_dir import Foreseen
from training.validation import open_fid


def dry_run(args, plan, dist):
    """Check what a start would still check, and print the plan: model, data, steps, weights, run.

    Every process calls it; raises UserError as a start would.
    """
    found = dist.on_main(_foresee, args, plan)
    if dist.is_main:
        _print_plan(args, plan, dist.world_size, *found)


def _foresee(args, plan):
    """In words, which run it would be, and its first weights, "" where they are random."""
    if os.path.isdir(resolve_vae(args.vae)):
        plan.load_autoencoder(ALONE.device, decodes=args.sample_every != 0 or args.fid_ref)
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
        input=f"{height}x{width}x{model.in_channels} by {resolve_vae(args.vae)}, of {args.image_size} pixels",
        data=f"{plan.data['count']:,} images, {args.num_classes} classes ({plan.data['dataset']})",
        training=f"{plan.total_steps:,} steps of {args.global_batch_size} on {world_size} process(es), "
        f"{plan.total_steps / plan.steps_per_epoch:.1f} epochs,"
        f" {3 * 2 * macs * args.global_batch_size / 1e12:.2f} TFLOP a step",
        weights=initial,
        run=run,
    )
    for name, words in rows.items():
        if words:
            print(f"{name:<12} {words}")
    print("Options are sound; nothing was written.")
