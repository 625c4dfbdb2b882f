"""The options of sampling: flags, defaults, checks; the same in every command."""

import argparse
import math
import os
from numbers import Integral, Real

import torch

from diffusion import SCHEDULES, SOLVERS, Guidance
from diffusion.solvers import default_steps, samplers_of
from models import DiT_models, null_label
from runtime.autoencoder import add_vae_argument
from runtime.cli import UserError, int_at_least, user_errors
from runtime.distributed import add_precision_argument

# How the published script samples, where neither the caller nor the checkpoint says otherwise. The published
# samples guide three of the four latent channels; a model of another number of channels is guided whole.
# What a process is sampled by, it says itself.
FID_CFG_SCALE = 1.5  # with which the paper's best numbers were made
DEFAULTS = dict(cfg_scale=4.0, cfg_channels=None, cfg_interval=None, cfg_schedule="constant")


def as_plain(value):
    """A number of numpy or torch as Python's; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def is_whole_number(value):
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool)


def as_integers(values, name):
    """A list of ints, of whole numbers in any iterable, an array or a tensor; UserError for anything else."""
    try:
        values = [as_plain(value) for value in values]
        wrong = [value for value in values if not is_whole_number(value)]
    except TypeError:
        wrong = [values]
    if wrong:
        raise UserError(f"{name} {describe_value(wrong[0])}: must be whole numbers, one an image")
    return [int(value) for value in values]


def describe_value(value):
    """Any value in a line of an error."""
    line = " ".join(repr(value).split())
    return line if len(line) < 60 else f"{line[:59]}…"


def as_path(value, flag):
    """The str of a path, a pathlib.Path say; UserError, naming the flag, for what is none."""
    try:
        return os.fsdecode(value)
    except TypeError:
        raise UserError(f"{flag} {describe_value(value)}: must be the path of a file, or a name") from None


def resolve_sampling_options(model_config, process, defaults, *, labels=None, has_guide=False, **given):
    """All options, for a model of this config and its process: those given, else the defaults.

    Raises UserError for labels or options that this model cannot serve.
    """
    given, defaults = plain_options(given), plain_options(defaults)
    null, num_classes = null_label(model_config), model_config["num_classes"]
    if labels is not None:
        check_labels(labels, num_classes)
    guidable = null is not None or has_guide
    if given.get("cfg_scale") not in (None, 1) and not guidable:
        why = "was trained without label dropout" if num_classes else "is unconditional"
        raise UserError(
            f"--cfg-scale {given['cfg_scale']}: this model {why}, so there is nothing to guide; leave it out"
        )
    options = {
        name: default if given.get(name) is None else given[name] for name, default in defaults.items()
    }
    if not guidable:
        options["cfg_scale"] = 1.0
    if has_guide and given.get("cfg_scale") is None and options["cfg_scale"] == 1:
        raise UserError("--guide: this run samples with --cfg-scale 1, where nothing guides; give another")
    if given.get("steps") is None and options["sampler"] != defaults["sampler"]:
        options["steps"] = default_steps(options["sampler"])
    channels = model_config["in_channels"]
    if options["cfg_channels"] is None:
        options["cfg_channels"] = 3 if channels == 4 else "all"
    if options["cfg_channels"] != "all" and not 1 <= options["cfg_channels"] <= channels:
        raise UserError(f"--cfg-channels {options['cfg_channels']}: must be between 1 and {channels}, or all")
    check_sampling_options(options, process)
    return options


def plain_options(options):
    """Options of sampling whose numbers are Python's; UserError for a value of another type than its option
    has."""
    options = {name: as_plain(value) for name, value in options.items()}
    for name, is_right, what in (
        ("cfg_scale", is_number, "a number"),
        (
            "cfg_channels",
            lambda value: is_whole_number(value) or str(value) == "all",
            "a whole number, or all",
        ),
        ("cfg_schedule", lambda value: isinstance(value, str), "a name"),
        ("sampler", lambda value: isinstance(value, str), "a name"),
        ("steps", lambda value: not isinstance(value, bool | float | bytes), "a whole number, or a spacing"),
    ):
        value = options.get(name)
        if value is not None and not is_right(value):
            flag = "num-sampling-steps" if name == "steps" else name.replace("_", "-")
            raise UserError(f"--{flag} {describe_value(value)}: must be {what}")
    if options.get("cfg_interval") is not None:
        try:
            levels = [as_plain(level) for level in options["cfg_interval"]]
        except TypeError:
            levels = [None]
        if not all(map(is_number, levels)):
            raise UserError(
                f"--cfg-interval {describe_value(options['cfg_interval'])}: must be two noise levels"
            )
        options["cfg_interval"] = levels
    return options


def check_published_draws(seeds, options):
    """Raise UserError where the published script, with its one seed, could not have drawn so."""
    if not isinstance(seeds, range):
        raise UserError("--published-draws: takes one seed for all samples, a number rather than a list")
    if seeds[0] >= 2**63:
        raise UserError(f"--seed {seeds[0]}: must be below 2^63 for the published draws")
    if options["sampler"] != "ddpm":
        raise UserError(f"--published-draws: the published script samples by ddpm, not {options['sampler']}")


def make_guidance(options, model, guide=None):
    """The Guidance of settled options for a DiT, or None where there is none."""
    if options["cfg_scale"] == 1:
        return None
    channels, interval = options["cfg_channels"], options["cfg_interval"]
    return Guidance(
        options["cfg_scale"],
        model.y_embedder.null_like if null_label(model.config) is not None else None,
        channels=None if channels == "all" else channels,
        interval=None if interval is None else tuple(interval),
        schedule=options["cfg_schedule"],
        guide=guide,
    )


def check_cuda_graphs(cuda_graphs, device=None):
    """The device to sample on, None for a GPU where there is one; UserError for --cuda-graphs without one."""
    with user_errors(f"device {describe_value(device)}", errors=(RuntimeError, TypeError)):
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device}: this machine has {torch.cuda.device_count()} GPUs; leave it out")
    if cuda_graphs and device.type != "cuda":
        raise UserError(f"--cuda-graphs: needs a GPU, this is the {device}; leave it out")
    return device


def check_labels(labels, num_classes):
    """Raise UserError for a label that is not one of the model's classes."""
    for label in labels:
        if not num_classes:
            raise UserError(f"--class-labels {label}: this model is unconditional; leave it out")
        if not 0 <= label < num_classes:
            raise UserError(f"--class-labels {label}: must be between 0 and {num_classes - 1}")


def check_sampling_options(options, process):
    """Raise UserError for options (a dict, None for not given) that this process cannot serve."""
    scale, interval, sampler = options["cfg_scale"], options["cfg_interval"], options["sampler"]
    if scale is not None and not 0 <= scale < math.inf:
        raise UserError(f"--cfg-scale {scale}: must be 0 or more; 1 is without guidance")
    if interval is not None:
        if len(interval) != 2:
            raise UserError(f"--cfg-interval {interval}: must be two noise levels")
        with user_errors("--cfg-interval"):
            Guidance(1.0, 0, interval=tuple(interval))
    with user_errors("--cfg-schedule"):
        Guidance(1.0, 0, schedule=options["cfg_schedule"] or "constant")
    if sampler not in process.samplers:
        raise UserError(f"--sampler {sampler}: this model has {', '.join(process.samplers)}")
    with user_errors(f"--num-sampling-steps {options['steps']}"):
        process.count_steps(sampler, options["steps"])


# ---------------------------------------------------------------------------------------------
# The options of sampling, the same in every command


def add_checkpoint_arguments(parser, default_vae="mse"):
    """--ckpt, what it must hold, --vae and --weights. default_vae: as CheckpointSpec's."""
    # fmt: off
    parser.add_argument("--ckpt", default=None, metavar="FILE",
                        help="checkpoint: of train.py, weights as .pt or .safetensors, or a diffusers folder"
                        " (default: the published DiT-XL/2 of --image-size)")
    parser.add_argument("--model", choices=list(DiT_models), default=None,
                        help="what the checkpoint must hold (default: what it holds)")
    parser.add_argument("--image-size", type=int_at_least(1), default=None, metavar="PIXELS",
                        help="side of the images, which the checkpoint must be for"
                        " (default: the checkpoint's, or 256 for published weights)")
    parser.add_argument("--num-classes", type=int_at_least(0), default=None, metavar="N",
                        help="classes, which the checkpoint must have (default: the checkpoint's)")
    add_vae_argument(parser, default=None, unnamed=default_vae)
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema",
                        help="averaged weights, or those of the last step (default: ema)")
    # fmt: on


def add_sampling_arguments(group, cfg_scale=DEFAULTS["cfg_scale"]):
    """--cfg-scale and its kin, --num-sampling-steps and --sampler. cfg_scale: for a run without its own."""
    of_diffusion, of_flow = (", ".join(samplers_of(objective)) for objective in ("diffusion", "flow"))
    # fmt: off
    group.add_argument("--cfg-scale", type=float, default=None, metavar="SCALE",
                       help="classifier-free guidance: 1 for none, more for clearer and less varied images"
                       f" (default: the run's own; {cfg_scale} where it has none)")
    group.add_argument("--cfg-channels", type=_channels, default=None, metavar="CHANNELS",
                       help="how many channels are guided, or all (default: 3 of 4 latent channels, as"
                       " published; else all)")
    group.add_argument("--cfg-interval", type=float, nargs=2, default=None, metavar=("LOW", "HIGH"),
                       help="guide only at noise levels sigma / alpha above LOW, up to HIGH; the other steps"
                       " cost half; 0.38 3.22 is a start (default: the run's own; all where it has none)")
    group.add_argument("--cfg-schedule", choices=SCHEDULES, default=None,
                       help="the same guidance at every step, or rising from none at pure noise"
                       " (default: the run's own; constant where it has none)")
    group.add_argument("--num-sampling-steps", type=str, default=None, metavar="STEPS",
                       help="denoising steps: a number; for ddpm and ddim also sections as 10,15,20, or a"
                       " stride as ddim50 (default: the run's own; with another --sampler than the run's, "
                       + ", ".join(f"{solver.steps} for {name}" for name, solver in SOLVERS.items()) + ")")
    group.add_argument("--sampler", choices=list(SOLVERS), default=None,
                       help=f"of a diffusion: {of_diffusion}; of a flow: {of_flow}; dpm++ is best with few"
                       " steps, heun calls the model twice a step, "
                       + " and ".join(name for name, solver in SOLVERS.items() if solver.stochastic)
                       + " draw noise (default: the run's own; ddpm, or euler for a flow, where it has none)")
    # fmt: on


def add_guide_argument(group):
    """--guide."""
    group.add_argument(
        "--guide", default=None, metavar="FILE",
        help="checkpoint of a weaker model, smaller or trained for less, that guides in place of the missing"
        " label: autoguidance (default: none)",
    )  # fmt: skip


def add_speed_arguments(group):
    """--precision, --compile and --cuda-graphs."""
    add_precision_argument(group)
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False,
        help="compile the blocks with torch.compile, which takes a minute first (default: off)",
    )  # fmt: skip
    group.add_argument(
        "--cuda-graphs", action=argparse.BooleanOptionalAction, default=False,
        help="record a step's work on a GPU and replay it, for small batches (default: off)",
    )  # fmt: skip


def _channels(text):
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, or all")
    return text if text == "all" else int(text)


def sampling_options(args):
    """The options that add_sampling_arguments read, as Sampler takes them; None for those not given."""
    return dict(
        cfg_scale=args.cfg_scale, cfg_channels=args.cfg_channels, cfg_interval=args.cfg_interval,
        cfg_schedule=args.cfg_schedule, steps=args.num_sampling_steps, sampler=args.sampler,
    )  # fmt: skip
