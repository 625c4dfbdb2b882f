"""What a training run is: options and data set become one plan, before any work."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from diffusion import create_process
from diffusion.flow_matching import TIME_SAMPLINGS
from diffusion.solvers import default_steps
from diffusion.timestep_sampler import timestep_samplers_of
from evaluation.inception import read_fid_reference, read_weights
from models import DiT_models
from runtime.autoencoder import VAE, describe_vae, is_copy, load_autoencoder, resolve_vae
from runtime.cli import UserError, is_utf8, require_parts, user_errors
from runtime.distributed import set_precision, uses_bfloat16
from sampling.options import (
    DEFAULTS,
    check_sampling_options,
    resolve_sampling_options,
    sampling_options,
)
from training.aux_losses import AUX_LOSSES
from training.dataset import ReadableDataset, held_out_count, hold_out, open_dataset, require_same_data
from training.fp8 import import_torchao
from training.latent_cache import LatentCache
from training.latent_statistics import measure, require_channels
from training.run_dir import resolve_paths
from training.run_log import import_wandb


@dataclass(frozen=True)
class Plan:
    """A training run, settled: what is built from it, and what its checkpoints keep of it.

    model_config     the full arguments of DiT
    process          how the model is trained and sampled, see create_process
    dataset          of images, or of cached latents
    training_set     the part of it to train on
    held_out         the part to validate on, None without --eval-every
    data             what a checkpoint keeps of the data set, plain data
    sampling         what a checkpoint keeps of how it is sampled, as far as the options say
    vae              as --vae takes it
    decodes          whether pictures will be made, in training or at its end
    total_steps      optimizer steps of the whole run; steps_per_epoch of them pass over the data once
    """

    model_config: dict
    process: Any
    dataset: Any
    training_set: Any
    held_out: ReadableDataset | None
    data: dict
    sampling: dict
    vae: str
    decodes: bool
    total_steps: int
    steps_per_epoch: int

    @property
    def has_cached_latents(self):
        return isinstance(self.dataset, LatentCache)

    def sampling_defaults(self, cfg_scale=DEFAULTS["cfg_scale"]):
        """How this run's checkpoints are sampled, in full; for FID, with FID_CFG_SCALE."""
        return {**DEFAULTS, "cfg_scale": cfg_scale, **self.process.sampling, **self.sampling}

    def load_autoencoder(self, device):
        """What encodes and decodes. From a cache, weights that no picture will need are not read."""
        if not self.has_cached_latents:
            return load_autoencoder(self.vae, device, self.dataset.channels)
        autoencoder = VAE(self.vae, self.dataset.vae).to(device)
        if self.decodes:
            _ = autoencoder.model  # to fail now rather than at the first picture
        return autoencoder

    def latent_statistics(self, autoencoder, args, dist):
        """Mean and standard deviation of every channel, over the cache or some of the training images."""
        if self.has_cached_latents:
            return require_channels(self.dataset.statistics, self.dataset.folder)
        found = measure(self.training_set, autoencoder, args.num_workers, dist)
        return require_channels(found, self.data["dataset"])

    def encoder(self, autoencoder):
        """The function (a batch of the data set, noise) -> x_start: of images, or of cached posteriors."""
        return autoencoder.sample_posterior if self.has_cached_latents else autoencoder.encode

    def config(self, autoencoder):
        """What rebuilds model, process, autoencoder, data and sampling, as a checkpoint keeps it."""
        return dict(
            model=self.model_config, process=self.process.config, autoencoder=autoencoder.config,
            data=self.data, sampling=self.sampling,
        )  # fmt: skip


def resolve(args, dist):
    """The Plan of these options, on all processes; what costs least is checked first. Settles in args what
    depends on the data, and makes its paths absolute.

    Raises UserError for options that cannot be, or not together, and for data that does not fit them.
    """
    check_objective(args)
    check_processes(args, dist.world_size)
    check_precision(args)
    process = create_process(process_config(args))
    options = {**dict.fromkeys(DEFAULTS), **process.sampling, **given_sampling(args)}
    check_sampling_options(options, process)
    if args.objective == "diffusion" and process.original_betas[-1] >= 1:
        raise UserError(
            f"--noise-schedule {args.noise_schedule}: ends in noise alone, of which a model that predicts the"
            " noise learns nothing; give another"
        )
    check_fid_options(args)
    if args.wandb:
        import_wandb()

    dataset = open_training_data(args, dist)
    check_data(args, dataset)
    keep_absolute(args)
    model_config = configure_model(args, dataset)
    check_aux_loss(args, model_config["depth"])
    check_latent_normalization(args, dataset)
    training_set, held_out = split(args, dataset, dist)
    training_set.flips = training_set.flips and args.random_flip
    steps_per_epoch = len(training_set) // args.global_batch_size
    plan = Plan(
        model_config=model_config, process=process, dataset=dataset,
        training_set=training_set, held_out=held_out, data=describe_data(args, dataset),
        sampling=given_sampling(args), vae=args.vae, decodes=args.sample_every != 0 or bool(args.fid_ref),
        steps_per_epoch=steps_per_epoch,
        total_steps=args.max_steps or args.epochs * steps_per_epoch,
    )  # fmt: skip
    # For the pictures at the end:
    resolve_sampling_options(plan.model_config, process, plan.sampling_defaults())
    return plan


def settle_precision(args, device):
    """What --precision stands for on this device; in a plan for another machine, on a GPU."""
    if args.dry_run and (args.world_size or args.device_memory):
        return {None: "tf32", "auto": "bf16"}.get(args.precision, args.precision)
    return set_precision(args.precision, device)


def check_processes(args, world_size):
    """Refuse what this number of processes, or that of --dry-run's plan, cannot share."""
    if not args.dry_run:
        refuse_by_hand(
            args, ("world_size", "device_memory"), "only with --dry-run, which plans for other machines"
        )
    world_size = args.world_size or world_size
    if args.shard and world_size == 1:
        raise UserError("--shard: one process has nothing to share weights with; start several with torchrun")
    if args.shard and not is_utf8(args.results_dir):
        raise UserError(f"--results-dir {args.results_dir}: --shard needs a UTF-8 name")
    if args.global_batch_size % (world_size * args.grad_accum_steps):
        raise UserError(
            f"--global-batch-size {args.global_batch_size}: must be divisible by {world_size} processes"
            f" x --grad-accum-steps {args.grad_accum_steps}"
        )


def check_precision(args):
    """Refuse what --precision or --shard leaves no room for."""
    if args.residual_dtype == "bf16" and not uses_bfloat16(args.precision):
        raise UserError(f"--residual-dtype bf16: --precision is {args.precision}; give --precision bf16 too")
    if args.grad_compression != "none" and args.shard:
        raise UserError("--grad-compression bf16: --shard sums gradients in float32; leave one out")
    if args.precision == "fp8":
        if args.shard:
            raise UserError("--precision fp8: not with --shard; leave one out")
        import_torchao()


def split(args, dataset, dist):
    """The ReadableDataset to train on, and with --eval-every that to validate on, or None."""
    if not args.eval_every:
        return ReadableDataset(dataset, args.skip_bad_images), None
    training_set, held_out = hold_out(dataset, args.global_seed)
    held_out = ReadableDataset(held_out, args.skip_bad_images)
    with dist.agreeing():
        # Otherwise every validation would meet the unreadable one:
        for row in range(len(held_out))[dist.rank :: dist.world_size]:
            problem = held_out[(row, False)][2]
            if problem and not args.skip_bad_images:
                raise UserError(problem)
    return ReadableDataset(training_set, args.skip_bad_images), held_out


def refuse_by_hand(args, names, why):
    """Raise UserError for the first of these options that was given, and not as switched off."""
    for name in names:
        if name in args.by_hand and getattr(args, name) is not False:
            raise UserError(f"--{name.replace('_', '-')}: {why}")


def check_objective(args):
    """Refuse options of the other objective, and settle --learn-sigma: a flow has no variance to learn."""
    other = dict(
        diffusion=("flow_path", "flow_prediction", "time_shift"),
        flow=("noise_schedule", "learn_sigma", "sigma_small"),
    )
    refuse_by_hand(args, other[args.objective], f"has no meaning with --objective {args.objective}")
    serving = timestep_samplers_of(args.objective)
    if args.timestep_sampler not in serving:
        raise UserError(
            f"--timestep-sampler {args.timestep_sampler}: --objective {args.objective} takes"
            f" {' or '.join(serving)}"
        )
    if args.objective == "flow":
        args.learn_sigma = False


def check_fid_options(args):
    """Refuse what --fid-ref needs, or alone needs it; and a reference or weights that are none."""
    if args.fid_ref is None:
        if args.inception_weights or args.any_weights:
            flag = "--inception-weights" if args.inception_weights else "--any-weights"
            raise UserError(f"{flag}: only --fid-ref needs the Inception network; give both")
        return
    if not args.eval_every:
        raise UserError(f"--fid-ref {args.fid_ref}: --eval-every says how often; give both")
    read_fid_reference(args.fid_ref)
    if args.inception_weights:
        read_weights(args.inception_weights, args.any_weights)


def open_training_data(args, dist):
    """The data set of these options, of images or of cached latents; UserError where they do not go
    together."""
    if not args.feature_path:
        dataset = open_dataset(
            args.dataset, args.data_path, args.image_size, args.dry_run, args.skip_bad_images, dist
        )
        if args.cache_images:
            dataset.keep_in_memory()
        return dataset
    refuse_by_hand(args, ("cache_images",), "--feature-path has latents in place of images; leave it out")
    cache = LatentCache(args.feature_path)
    if args.data_path:
        raise UserError(f"--data-path {args.data_path}: --feature-path stands in for it; leave one out")
    if args.image_size != cache.image_size:
        raise UserError(
            f"--image-size {args.image_size}: {args.feature_path} was extracted at {cache.image_size};"
            f" give --image-size {cache.image_size}"
        )
    if "vae" in args.by_hand and (vae := resolve_vae(args.vae)) != cache.vae["vae"]:
        if not is_copy(vae, cache.vae):
            raise UserError(
                f"--vae {args.vae}: {args.feature_path} was extracted with {cache.vae['vae']}; leave it out"
            )
        cache.vae["vae"] = vae
    args.vae = cache.vae["vae"]
    require_same_data(cache, dist, f"--feature-path {args.feature_path}")
    return cache


def check_data(args, dataset):
    """Settle --num-classes by the data set, and refuse a batch larger than it."""
    classes = len(dataset.classes)
    if args.num_classes is None:
        args.num_classes = classes
    if args.num_classes > 0 and not classes:
        raise UserError(
            f"--num-classes {args.num_classes}: {args.feature_path or args.data_path} has no classes; give"
            " 0 to train unconditionally, or make one subfolder a class"
        )
    if 0 < args.num_classes < classes:
        raise UserError(f"--num-classes {args.num_classes}: the data set has {classes}; give at least that")
    if args.num_classes > classes and dataset.condition != "class":
        raise UserError(
            f"--num-classes {args.num_classes}: the {dataset.condition} of the data has {classes} entries;"
            " leave it out"
        )
    if args.num_classes == 0 or args.class_dropout_prob == 0:
        why = "without label dropout" if args.num_classes else "in an unconditional model"
        for name, scales in (("cfg_scale", [args.cfg_scale]), ("sample_cfg_scales", args.sample_cfg_scales)):
            for scale in scales or () if name in args.by_hand else ():
                if scale != 1:
                    raise UserError(
                        f"--{name.replace('_', '-')} {scale}: {why} there is nothing to guide; leave it out"
                    )
        args.cfg_scale = 1.0
        args.sample_cfg_scales = None
    available = len(dataset) - (held_out_count(len(dataset)) if args.eval_every else 0)
    if available < args.global_batch_size:
        raise UserError(
            f"--global-batch-size {args.global_batch_size}: the data set has {available} images to train on,"
            " not enough for one batch; give at most that"
        )


def keep_absolute(args):
    """Make paths absolute, so that the run can be continued from another working directory."""
    vars(args).update(resolve_paths(vars(args), os.path.abspath))
    if args.resume not in ("auto", "never"):
        args.resume = os.path.abspath(args.resume)


def configure_model(args, dataset):
    """The full arguments of DiT for these options; UserError where such a model cannot be."""
    if args.feature_path:
        channels, factor, image_channels = dataset.vae["channels"], dataset.vae["factor"], dataset.channels
    else:
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
    with user_errors(f"--model {args.model}"), torch.device("meta"):
        return DiT_models[args.model](
            input_size=args.image_size // factor, in_channels=channels, num_classes=args.num_classes,
            class_dropout_prob=args.class_dropout_prob, learn_sigma=args.learn_sigma, block=args.block,
            ffn=args.ffn, pos_embed=args.pos_embed, registers=args.registers, qk_norm=args.qk_norm,
            condition=dataset.condition,
            **{name: size for name, size in sizes.items() if size is not None},
        ).config  # fmt: skip


def check_aux_loss(args, depth):
    """Settle --aux-layer, and refuse a row that computes nothing and a block that is not there."""
    if not args.aux_loss:
        refuse_by_hand(args, ("aux_weight", "aux_layer"), "only with --aux-loss")
        return
    row = AUX_LOSSES[args.aux_loss]
    require_parts(f"--aux-loss {args.aux_loss}", row, "forward" if isinstance(row, type) else "__call__")
    if args.aux_layer is None:
        args.aux_layer = max(1, depth // 3)
    if args.aux_layer > depth:
        raise UserError(f"--aux-layer {args.aux_layer}: the model has {depth} blocks; give at most that")


def check_latent_normalization(args, dataset):
    """Refuse statistics per channel where there are no latents, or none were kept of them."""
    if args.latent_normalization == "channel":
        if args.feature_path:
            require_channels(dataset.statistics, args.feature_path)
        elif resolve_vae(args.vae) == "none":
            raise UserError("--latent-normalization channel: pixels have no latents; leave it out")


def given_sampling(args):
    """How this run's checkpoints are sampled, as far as its options say."""
    given = {name: value for name, value in sampling_options(args).items() if value is not None}
    if "sampler" in given:
        given.setdefault("steps", default_steps(given["sampler"]))
    return given


def process_config(args):
    """What create_process builds the training process of these options from."""
    if args.objective == "diffusion":
        return dict(
            objective="diffusion", noise_schedule=args.noise_schedule, learn_sigma=args.learn_sigma,
            sigma_small=args.sigma_small,
        )  # fmt: skip
    return dict(
        objective="flow", path=args.flow_path, prediction=args.flow_prediction, shift=args.time_shift,
        time_sampling=args.timestep_sampler if args.timestep_sampler in TIME_SAMPLINGS else "uniform",
    )  # fmt: skip


def source(args):
    """Where the training data comes from, in a word."""
    return args.feature_path or args.data_path or args.dataset


def describe_data(args, dataset):
    """What a checkpoint keeps of the data that it was trained on."""
    return dict(
        dataset=source(args), image_size=args.image_size, classes=dataset.classes, count=len(dataset),
        fingerprint=dataset.fingerprint,
    )  # fmt: skip
