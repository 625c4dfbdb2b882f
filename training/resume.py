"""Whether a run may go on from a checkpoint; which one, run_dir.Experiment finds."""

import os
from itertools import zip_longest

from checkpointing import files as checkpoints
from checkpointing import sharded
from runtime.cli import UserError
from runtime.distributed import torchrun_agent
from runtime.image_io import make_folder
from training.run_dir import Experiment, reproducible_args


def create_or_resume(args, dist):
    """Find the run to continue, or make a folder, which every process must see.

    Returns its Experiment, which the main process alone has, its folder, and the checkpoint to continue from.
    """
    agents = dist.gather(torchrun_agent())
    if args.resume in ("auto", "never"):
        dist.on_main(make_folder, args.results_dir, "--results-dir")
        dist.check_shared(args.results_dir, "--results-dir")
    experiment = None
    with dist.agreeing():
        if dist.is_main:
            experiment = Experiment(args, agents)
    folder, resume_path = dist.broadcast(experiment and (experiment.folder, experiment.resumed))
    if args.resume not in ("auto", "never"):
        dist.check_shared(folder, "--resume")
    return experiment, folder, resume_path


def open_checkpoint(path, args, plan):
    """Read a checkpoint that a run is to go on from; returns its contents, only the plain ones where it is of
    shards, and in words what options are others now.

    Raises UserError where it is of another model, process or data, or beyond the last step.
    """
    if args.shard and not os.path.isdir(path):
        raise UserError(f"--shard: {path} is of a run without it; leave it out, or give it to --init-from")
    contents = sharded.load_plain(path) if args.shard else checkpoints.load(path, "--resume").contents
    changes = _check_may_continue(path, contents, args, plan)
    if plan.total_steps < contents["step"]:
        raise UserError(
            f"--max-steps {plan.total_steps}: {path} is beyond that; give at least {contents['step']}"
        )
    return contents, changes


def _check_may_continue(path, contents, args, plan):
    """Raise UserError where a checkpoint is of another model, process or data; returns what else has changed
    since, as "; now lr 0.0002 (was 0.0001)", or ""."""
    for part, new in (("model", plan.model_config), ("process", plan.process.config)):
        old = contents["config"][part]
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                raise UserError(
                    f"--resume {path}: its {name.replace('_', ' ')} is {old.get(name)}, by these options"
                    f" {new.get(name)}; give the run's own, or give the file to --init-from"
                )
    old, new = reproducible_args(contents["args"]), reproducible_args(vars(args))
    for name in ("optimizer", "aux_loss", "aux_layer", "latent_normalization"):
        if old[name] != new[name]:
            raise UserError(
                f"--{name.replace('_', '-')} {new[name]}: {path} was trained with {old[name]}; give that, or"
                " give the file to --init-from"
            )
    changed_data = _check_same_data(path, contents["config"].get("data", {}), plan.data, args)
    changed = [name for name in new if name in old and new[name] != old[name]]
    return changed_data + "".join(f"; now {name} {new[name]} (was {old[name]})" for name in changed)


def _check_same_data(path, old, new, args):
    """Raise UserError where the data is not what a checkpoint was trained on, as far as that kept it: other
    classes, or other images unless --allow-changed-data. Returns what has changed, as _check_may_continue."""
    flag = "--feature-path" if args.feature_path else "--data-path" if args.data_path else "--dataset"
    remedy = "give the run's own data, or --resume never to start another run"
    if args.num_classes and old.get("classes", new["classes"]) != new["classes"]:
        pairs = enumerate(zip_longest(old["classes"], new["classes"]))
        label, (was, now) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
        raise UserError(
            f"{flag} {new['dataset']}: has other classes than {path} was trained on: label {label} is"
            f" {now!r}, and was {was!r}; {remedy}"
        )
    if old.get("fingerprint", new["fingerprint"]) == new["fingerprint"]:
        return ""
    if not args.allow_changed_data:
        raise UserError(
            f"{flag} {new['dataset']}: holds other images than {path} was trained on, or under other names"
            f" ({new['count']:,}; were {old['count']:,}); give --allow-changed-data to go on with them,"
            f" {remedy}"
        )
    return f"; now {new['count']} images, others (was {old['count']})"
