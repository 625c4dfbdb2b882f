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

import contextlib
import copy
import os
from datetime import timedelta
from itertools import zip_longest

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from checkpointing import files as checkpoints
from checkpointing import sharded
from checkpointing.published import find_file, find_local, local_inception
from checkpointing.sharded import local, whole
from diffusion import create_process
from diffusion.timestep_sampler import create_named_schedule_sampler
from evaluation.inception import SampleFID, share_of
from models import DiT
from runtime.autoencoder import resolve_vae
from runtime.cli import Stopped, Tolerance, UserError, create_logger, launch, leave_group
from runtime.distributed import (
    ALONE,
    EVALUATION,
    STEP,
    StopRequest,
    fold_seed,
    generator_for,
    init_distributed,
    set_precision,
    torchrun_agent,
)
from runtime.flops import count_macs, peak_flops
from runtime.image_io import make_folder, save_gif, save_grid
from sampler import Sampler
from sampling.options import FID_CFG_SCALE, resolve_sampling_options
from training.dataset import DistributedBatchSampler, ReadableDataset, hold_out, make_loader
from training.options import (
    build_parser,
    check_data,
    check_options,
    configure_model,
    describe_data,
    given_sampling,
    keep_absolute,
    open_autoencoder,
    open_training_data,
    print_plan,
    process_config,
    sampling_defaults,
    source,
)
from training.run_dir import BestCheckpoint, Experiment, Foreseen, reproducible_args
from training.run_log import Meter, Metrics, memory_gib


def main(args):
    """Train a diffusion transformer, then sample it."""
    # Check the options, and open the data:
    check_options(args)
    dist = init_distributed()
    device, world_size = dist.device, dist.world_size
    args.precision = set_precision(args.precision, device)
    if args.shard and world_size == 1:
        raise UserError("--shard: one process has nothing to share weights with; start several with torchrun")
    if args.global_batch_size % (world_size * args.grad_accum_steps):
        raise UserError(
            f"--global-batch-size {args.global_batch_size}: must be divisible by {world_size} processes"
            f" x --grad-accum-steps {args.grad_accum_steps}"
        )
    dataset = open_training_data(args, dist)
    check_data(args, dataset)
    keep_absolute(args)
    model_config = configure_model(args, dataset)
    process = create_process(process_config(args))
    resolve_sampling_options(model_config, process, sampling_defaults(args))  # for the pictures at the end
    training_set, held_out = hold_out(dataset, args.global_seed) if args.eval_every else (dataset, None)
    steps_per_epoch = len(training_set) // args.global_batch_size
    total = args.max_steps or args.epochs * steps_per_epoch
    if held_out is not None:
        held_out = ReadableDataset(held_out, args.skip_bad_images)
        with dist.agreeing():
            # Later on, an unreadable one would stop every run:
            for row in range(len(held_out))[dist.rank :: world_size]:
                problem = held_out[(row, False)][2]
                if problem and not args.skip_bad_images:
                    raise UserError(problem)
    data = describe_data(args, dataset)
    if args.dry_run:
        config = dict(model=model_config, process=process.config, data=data)
        words = dist.on_main(foresee, args, dataset, config, total)
        if dist.is_main:
            print_plan(args, dataset, model_config, total, steps_per_epoch, world_size, *words)
        return

    # Load the autoencoder and the weights to start from, which can fail, before anything is written:
    initial = fid = None
    with dist.agreeing():
        autoencoder = open_autoencoder(args, dataset, device)
        if args.init_from:
            initial = checkpoints.load(find_file(args.init_from, "--init-from"), "--init-from")
        if args.fid_ref:
            fid = open_fid(args, dist)

    # Find the run to continue, or make a folder:
    experiment, folder, resume_path = find_run(args, dist)
    logger = create_logger(folder, enabled=dist.is_main)
    tolerate = Tolerance(logger)
    logger.info(f"Experiment directory {'found' if resume_path else 'created'} at {folder}")

    # Build the model, its average and the optimiser:
    torch.manual_seed(fold_seed(args.global_seed))
    model = DiT(**model_config)
    if initial is not None:
        logger.info(checkpoints.initialize(model, initial))
    model = model.to(device)
    trainer, meter = Trainer(args, model, process, autoencoder, dist), Meter()
    ema, optimizer, timestep_sampler = trainer.ema, trainer.optimizer, trainer.timestep_sampler
    start = 0
    config = dict(
        model=model.config, process=process.config, autoencoder=autoencoder.config,
        data=data, sampling=given_sampling(args),
    )  # fmt: skip
    if resume_path:
        start, changes = restore(resume_path, args, config, total, trainer, meter)
        logger.info(f"Continuing after step {start:,} from {resume_path}{changes}")
    dist.on_main(lambda: experiment.prepare_resume(args))
    logger.info(f"DiT Parameters: {sum(p.numel() for p in model.parameters()):,}")
    logger.info(f"Dataset contains {len(training_set):,} images ({source(args)})")
    logger.info(
        f"Training for {total:,} steps of {args.global_batch_size} images on {world_size} x {device.type}"
    )

    def save(step):
        watch.check(dist, path)
        plain = dict(
            args=vars(args), step=step, timestep_sampler=timestep_sampler.state_dict(),
            meter=dist.gather(meter.state_dict()), config=config,
        )  # fmt: skip
        if args.shard:
            groups = optimizer.state_dict()["param_groups"]
            written = dist.broadcast(experiment and experiment.checkpoint_path(step, folder=True))
            sharded.save(written, model, ema, optimizer, dict(plain, param_groups=groups), dist)
        else:
            dist.assert_same(model.parameters())
            state = dict(plain, model=model.state_dict(), ema=ema.state_dict(), opt=optimizer.state_dict())
            written = dist.on_main(write_checkpoint, experiment, step, state)
        if dist.is_main:
            with tolerate("--keep-checkpoints"):
                checkpoints.retain(experiment.checkpoints, args.keep_checkpoints)
            logger.info(f"Saved checkpoint to {written}")
        return written

    def sample(step):
        with tolerate("pictures"):  # where memory runs out, which is known to all
            averaged = ema
            if args.shard:
                with dist.agreeing():
                    averaged = sharded.gather_copy(ema, device)
            sampler = Sampler(averaged, process, autoencoder, device, sampling_defaults(args))
            for scale in args.sample_cfg_scales or [None]:
                with stop.interrupting(averaged):
                    pictures = sample_grid(sampler, args.global_seed, scale, args.sample_gif, dist)
                if dist.is_main:
                    with tolerate("pictures"):
                        path = experiment.picture_path(step, scale)
                        rows = save_pictures(*pictures, path)
                        logger.info(f"Samples{rows}: {path}")

    def compute_fid(step):
        averaged = sharded.gather_copy(ema, device) if args.shard else ema
        with stop.interrupting(averaged):
            value = fid(Sampler(averaged, process, autoencoder, device, fid.sampling))
        contents = dict(ema=averaged.state_dict(), args=vars(args), step=step, config=config)
        kept = False
        if dist.is_main:
            with tolerate(best.path, UserError):  # a numbered checkpoint that cannot be written stops the run
                kept = best.offer(value, contents)
        logger.info(f"(step={step:07d}) {fid.name}: {value:.4f}" + (", the best so far" if kept else ""))
        return {fid.name: value}

    def measure(step):
        loss = evaluate(process, ema, autoencoder, held_out, args, dist, stop.check)
        logger.info(f"(step={step:07d}) Eval Loss: {loss:.4f}")
        fids = compute_fid(step) if fid else {}
        if dist.is_main:
            metrics.write(step, eval_loss=loss, **fids)

    # Train:
    metrics = best = None

    def open_metrics():
        nonlocal metrics
        settings = vars(args)
        metrics = Metrics(
            folder, start_step=start, tolerate=tolerate, use_wandb=args.wandb, settings=settings
        )

    dist.on_main(open_metrics)
    if dist.is_main:
        best = BestCheckpoint(experiment, fid.settings, start) if fid else None
    order = DistributedBatchSampler(
        training_set, args.global_batch_size, rank=dist.rank, world_size=world_size,
        seed=args.global_seed, start_step=start, stop_step=total,
    )  # fmt: skip
    batches = make_loader(
        ReadableDataset(training_set, args.skip_bad_images), order, args.num_workers, device
    )
    peak = peak_flops(device, args.precision)
    # The share of the peak that a step a second would be, by this device's FLOP:
    share = 6 * count_macs(model) * args.global_batch_size / world_size / peak if peak else None
    stop, watch, path, saved = StopRequest(dist), NonFiniteDetector(device), resume_path, start
    bar = tqdm(
        total=total, initial=start, desc="Training", unit="step", disable=not dist.is_main,
        dynamic_ncols=True,
    )  # fmt: skip
    trained, problems, unreadable = start, [], False
    try:
        with bar, contextlib.closing(batches):
            # What was due at the step that is gone on from, and was cut off:
            made = dist.on_main(lambda: (metrics.names, experiment.has_pictures(start, args)))
            if start and args.eval_every and start % args.eval_every == 0 and "eval_loss" not in made[0]:
                measure(start)
            if args.sample_every and 0 < start < total and start % args.sample_every == 0 and not made[1]:
                sample(start)
            for step, (images, labels, problems) in enumerate(batches, start=start + 1):
                signalled, unreadable = stop.agreed(problems and not args.skip_bad_images)
                if signalled or unreadable:
                    raise Stopped
                terms, t, norm = trainer.step(step, images, labels, stop.check)
                trained = step
                meter.add_skipped(len(problems))
                watch.look(step, norm, terms["loss"])
                meter.add(terms, (t * 4 // process.num_timesteps).long().clamp(max=3))
                bar.update()

                if step % args.log_every == 0 or step == total:
                    watch.check(dist, path)
                    means = meter.read(dist)
                    if dist.is_main:
                        report(means, norm, step, total, share, args, device, metrics, logger, bar)
                if args.eval_every and step % args.eval_every == 0:
                    measure(step)
                if step % args.ckpt_every == 0 and step < total:
                    path, saved = save(step), step
                if args.sample_every and step % args.sample_every == 0 and step < total:
                    sample(step)
        if total > saved:
            path, saved = save(total), total
        stop.close()  # from here on, nothing would be lost
        stop.check()
    except Stopped:
        path = save(trained) if trained > saved else path
        again = f"give --resume {folder}" if args.resume == "never" else "run the same command again"
        end_early(problems, unreadable, trained, path, again, logger)
        return

    # Sample:
    if dist.is_main:
        metrics.close()
    if args.sample_every != 0:
        sample(total)
    leave_group()
    if dist.is_main:
        with tolerate(folder):
            experiment.finish()
        python = "uv run" if "UV" in os.environ else "python"
        labels = " --class-labels 0 1 2 3 4 5 6 7 8 9" if model.num_classes == 10 else ""
        logger.info(f"More of them: {python} sample.py --ckpt {path}{labels}")
    logger.info("Done!")


# ---------------------------------------------------------------------------------------------
# A step


class Trainer:
    """A model (on its device, in training), its average and its optimiser; one step of all three.

    args: as train.py's options
    """

    def __init__(self, args, model, process, autoencoder, dist):
        self.args, self.model, self.process = args, model, process
        self.autoencoder, self.dist = autoencoder, dist
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.parallel = prepare(model, self.ema, args, dist).train()
        self.network = autocast(self.parallel, dist.device, args.precision)
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=args.lr,
            weight_decay=args.weight_decay,
            fused=True,
        )
        self.timestep_sampler = create_named_schedule_sampler(args.timestep_sampler, process)

    def step(self, step, images, labels, check=lambda: None):
        """Train on this process's rows; returns the loss's terms, each (N,), their times t (N,), and the norm
        of the gradients. Waits for no GPU.

        check: called between two of --grad-accum-steps parts; where it raises, nothing is trained.
        """
        args = self.args
        draws = draw_step_noise(args, step, self.dist, self.timestep_sampler, self.model)
        set_learning_rate(self.optimizer, learning_rate(args, step))
        self.optimizer.zero_grad(set_to_none=True)
        terms = backward(
            self.process, self.network, self.parallel, self.autoencoder, images, labels, draws, args, check
        )
        norm = gradient_norm(self.parallel, args.clip_grad)
        self.optimizer.step()
        update_ema(self.ema, self.model, ema_decay(args, step))
        self.timestep_sampler.update_with_local_losses(draws["t"], terms["loss"])
        return terms, draws["t"], norm


def draw_step_noise(args, step, dist, timestep_sampler, model):
    """All that is random in a step, for this process's rows: posterior, t, weights, noise and drop.

    Drawn for the whole global batch from (seed, step), then cut: the same rows get the same draws however
    many processes there are, and a resumed run needs no generator's state.
    """
    n, device = args.global_batch_size, dist.device
    generator = generator_for(device, args.global_seed, STEP, step)
    shape = (n, model.in_channels, *model.input_size)
    posterior = torch.randn(shape, device=device, generator=generator)
    t, weights = timestep_sampler.sample(n, device, generator)
    noise = torch.randn(shape, device=device, generator=generator)
    drop = torch.rand(n, device=device, generator=generator) < args.class_dropout_prob
    share = n // dist.world_size
    rows = slice(dist.rank * share, (dist.rank + 1) * share)
    draws = dict(posterior=posterior, t=t, weights=weights, noise=noise, drop=drop)
    return {name: values[rows] for name, values in draws.items()}


def backward(process, network, parallel, autoencoder, images, labels, draws, args, check):
    """Add up the gradients of a batch, in --grad-accum-steps parts, calling check() between two; returns its
    terms, each (N,), detached.

    Processes exchange gradients on the last part only.
    """
    parts, device = args.grad_accum_steps, draws["t"].device
    encode = autoencoder.draw if args.feature_path else autoencoder.encode
    collected = []
    batch = dict(draws, images=images, labels=labels)
    for part, values in enumerate(zip(*(rows.chunk(parts) for rows in batch.values()))):
        if part:
            check()
        rows = {name: value.to(device, non_blocking=True) for name, value in zip(batch, values)}
        x_start = encode(rows["images"], rows["posterior"])
        model_kwargs = dict(y=rows["labels"], force_drop_ids=rows["drop"]) if args.num_classes else {}
        is_last = part == parts - 1
        with ddp_sync(parallel, is_last):
            terms = process.training_losses(network, x_start, rows["t"], model_kwargs, noise=rows["noise"])
            ((terms["loss"] * rows["weights"]).mean() / parts).backward()
        collected.append({name: value.detach() for name, value in terms.items()})
    return {name: torch.cat([terms[name] for terms in collected]) for name in collected[0]}


def ddp_sync(parallel, now):
    """A context in which processes exchange gradients, or put that off while they add up."""
    if hasattr(parallel, "set_requires_gradient_sync"):  # FSDP
        parallel.set_requires_gradient_sync(now)
    elif hasattr(parallel, "no_sync") and not now:  # DDP
        return parallel.no_sync()
    return contextlib.nullcontext()


def gradient_norm(model, clip):
    """The norm of all gradients together, a tensor; they are scaled down where it exceeds clip, if that is
    given."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if clip is None:
        return whole(torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True))
    return whole(torch.nn.utils.clip_grad_norm_(parameters, clip, foreach=True))


class NonFiniteDetector:
    """Notes the first step whose loss or gradient is not finite, without waiting for a GPU."""

    def __init__(self, device):
        self.first = torch.zeros((), dtype=torch.int64, device=device)

    def look(self, step, norm, losses):
        bad = ~(torch.isfinite(norm) & torch.isfinite(losses).all())
        self.first = torch.where((self.first == 0) & bad, step, self.first)

    def check(self, dist, path):
        """Stop the run where there was one; path: the last checkpoint, which stands."""
        steps = [step for step in dist.gather(self.first.item()) if step]
        if steps:
            stands = f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"
            again = "continue with --resume FOLDER" if path else "start again"
            raise UserError(
                f"step {min(steps)}: the loss or its gradient is not finite; {stands}; lower --lr, give"
                f" --clip-grad 1 or --precision fp32, and {again}"
            )


def learning_rate(args, step):
    """The learning rate of a step: --lr, or less during --warmup-steps."""
    return args.lr * min(1.0, step / max(1, args.warmup_steps))


def set_learning_rate(optimizer, rate):
    """Give all parameters this learning rate from now on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def ema_decay(args, step):
    """The decay of the average at a step: --ema-decay, or less early on with --ema-warmup."""
    return min(args.ema_decay, (1 + step) / (10 + step)) if args.ema_warmup else args.ema_decay


@torch.no_grad()
def update_ema(ema_model, model, decay=0.9999):
    """Move every trained weight of ema_model to decay · itself + (1 - decay) · the model's."""
    pairs = [(e, p) for e, p in zip(ema_model.parameters(), model.parameters()) if p.requires_grad]
    averages, weights = zip(*((local(e), local(p)) for e, p in pairs))
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, weights, alpha=1 - decay)


def report(means, norm, step, total, share, args, device, metrics, logger, bar):
    """Write a line of log.txt and a row of metrics.jsonl, and the loss on the bar."""
    speed, left = means["steps_per_sec"], (total - step) / means["steps_per_sec"]
    numbers = dict(grad_norm=norm.item(), lr=learning_rate(args, step),
                   memory_gib=memory_gib(device))  # fmt: skip
    if share:
        numbers["mfu"] = share * speed
    metrics.write(step, **means, **numbers)
    logger.info(
        f"(step={step:07d}) Train Loss: {means['loss']:.4f}, Train Steps/Sec: {speed:.2f}"
        + "".join(f", {name}: {means[name]:.4f}" for name in ("mse", "vb") if "vb" in means)
        + f", Grad Norm: {numbers['grad_norm']:.3f}, LR: {numbers['lr']:.2e}"
        + f", Memory: {numbers['memory_gib']:.1f} GiB, Left: {timedelta(seconds=round(left))}"
        + (f", MFU: {numbers['mfu']:.1%}" if share else "")
        + (f", Skipped: {means['skipped_images']:.0f}" if means["skipped_images"] else "")
    )
    bar.set_postfix(loss=f"{means['loss']:.4f}")


@torch.no_grad()
def evaluate(process, ema, autoencoder, held_out, args, dist, check, batch_size=64):
    """The mean loss of the averaged weights on held-out images, each with the same t and noise every time."""
    generator, device = generator_for("cpu", args.global_seed, EVALUATION), dist.device
    n, shape = len(held_out), (len(held_out), ema.in_channels, *ema.input_size)
    t = process.stratified_t(n, "cpu")
    noise, posterior = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    encode, total = autoencoder.draw if args.feature_path else autoencoder.encode, 0.0
    for batch in torch.arange(n).split(batch_size * dist.world_size):
        check()
        rows = batch[dist.rank :: dist.world_size]
        rows = rows if len(rows) else batch[:1]  # so that sharded weights are gathered by all
        images, labels, _ = zip(*(held_out[(int(row), False)] for row in rows))
        images, labels = torch.stack(images).to(device), torch.tensor(labels, device=device)
        x_start = encode(images, posterior[rows].to(device))
        model_kwargs = dict(y=labels) if args.num_classes else {}
        losses = process.training_losses(
            ema, x_start, t[rows].to(device), model_kwargs, noise=noise[rows].to(device)
        )
        total += losses["loss"].double().sum().item() if dist.rank < len(batch) else 0.0
    return sum(dist.gather(total)) / n


def sample_grid(sampler, seed, cfg_scale, gif, dist):
    """Samples, a row of ten a class of at most ten, evenly spread, each process making an equal part of them.

    Returns, on the main process, images (N, C, H, W), how they came out of the noise, a list of the same or
    None without gif, and the classes of the rows. Raises MemoryError on all where one lacks memory.
    """
    classes = sampler.model.num_classes
    shown = sorted({round(i * (classes - 1) / 9) for i in range(10)}) if classes else []
    labels = [label for label in shown for _ in range(10)]
    count = len(labels) or 40
    start, stop = share_of(count, 1, dist)
    # Where there are more processes than samples, those without one make the first, and it is not taken:
    mine = range(start, stop) or range(1)
    with dist.agreeing():
        images = sampler.sample(
            [labels[i] for i in mine] if classes else len(mine), seeds=seed + mine.start, cfg_scale=cfg_scale,
            return_trajectory=gif, progress=dist.is_main,
        )  # fmt: skip
    images, frames = images if gif else (images, None)
    images = dist.join_rows(images[: stop - start])
    if gif:  # one at a time, for the sake of a GPU's memory
        frames = [dist.join_rows(frame[: stop - start]) for frame in frames]
    return images, frames, shown


def save_pictures(images, frames, shown, path):
    """Write what sample_grid gave the main process, a PNG, and a GIF if there are frames; returns in words
    what the rows are."""
    if frames is not None:
        save_gif(frames, path.replace(".png", ".gif"), nrow=10)
    save_grid(images, path, nrow=10)
    return f" of classes {', '.join(map(str, shown))} (rows)" if shown else ""


# ---------------------------------------------------------------------------------------------
# Beginning, continuing and ending


def find_run(args, dist):
    """Find the run to continue, or make a folder, which every process must see.

    Returns its Experiment, which the main process alone has, its folder, and the checkpoint to continue from.
    """
    agents = dist.gather(torchrun_agent())
    if args.resume in ("auto", "never"):
        dist.on_main(make_folder, args.results_dir, "--results-dir")
        dist.check_shared(args.results_dir, "--results-dir")
    experiment = None

    def begin():
        nonlocal experiment
        experiment = Experiment(args, agents)
        return experiment.folder, experiment.resumed

    folder, resume_path = dist.on_main(begin)
    if args.resume not in ("auto", "never"):
        dist.check_shared(folder, "--resume")
    return experiment, folder, resume_path


def open_fid(args, dist):
    """What computes --fid-ref's FID."""
    return SampleFID(
        args.fid_ref, args.fid_samples, weights=args.inception_weights, any_weights=args.any_weights,
        sampling=sampling_defaults(args, FID_CFG_SCALE), dist=dist,
    )  # fmt: skip


def foresee(args, dataset, config, total):
    """Check what a start would still check, for --dry-run, as far as that can be without a download; returns
    in words which run it would be, and its first weights. One process alone calls it; it writes nothing.

    config: of the model, process and data, as in a checkpoint
    """
    if os.path.isdir(resolve_vae(args.vae)):
        open_autoencoder(args, dataset, ALONE.device)
    if args.fid_ref and (args.inception_weights or local_inception()):
        open_fid(args, ALONE)
    initial = ""
    if args.init_from:
        path = find_local(args.init_from)
        initial = f"from {args.init_from}, which has to be fetched first and was not checked"
        if path is not None:
            with torch.device("meta"):
                model = DiT(**config["model"])
            initial = checkpoints.initialize(model, checkpoints.load(path, "--init-from"))
    experiment = Foreseen(args)
    if experiment.resumed:
        contents, _, changes = open_run(experiment.resumed, args, config, total)
        run = f"continues after step {contents['step']:,} from {experiment.resumed}{changes}"
    elif os.path.exists(experiment.folder):
        run = f"begins {experiment.folder} again, which has no checkpoint"
    else:
        run = f"a new one, in {experiment.folder}"
    return run, initial


def prepare(model, ema, args, dist):
    """Compile and checkpoint the model's blocks as asked, and share its work, or its weights, among
    processes."""
    model.grad_checkpointing = args.grad_checkpointing
    if args.compile:
        model.compile_blocks()
    if args.shard:
        sharded.shard(ema)
        return sharded.shard(model)
    if dist.world_size == 1:
        return model
    device_ids = [dist.device.index] if dist.device.type == "cuda" else None
    # A static graph cannot know no_sync's and checkpointing's extra passes:
    static = args.grad_accum_steps == 1 and not args.grad_checkpointing
    return DistributedDataParallel(
        model, device_ids=device_ids, gradient_as_bucket_view=True, static_graph=static
    )


def autocast(model, device, precision):
    """The model, with its matrix products in bfloat16 where --precision says so."""
    if precision != "bf16":
        return model

    def network(*args, **kwargs):
        with torch.autocast(device.type, torch.bfloat16):
            return model(*args, **kwargs)

    return network


def restore(path, args, config, total, trainer, meter):
    """Take up a checkpoint where it left off; returns its step, and in words what options are others now.

    Raises UserError, with nothing changed, where it is of another model or process, or beyond the last step.
    """
    contents, found, changes = open_run(path, args, config, total)
    if args.shard:
        sharded.restore(path, trainer.model, trainer.ema, trainer.optimizer, contents["step"])
    else:
        checkpoints.load_weights(trainer.model, found.state_dict("raw"), path, "--resume")
        checkpoints.load_weights(trainer.ema, found.state_dict("ema"), path, "--resume")
        trainer.optimizer.load_state_dict(contents["opt"])
        for group in trainer.optimizer.param_groups:  # as given now, should it differ
            group["weight_decay"] = args.weight_decay
    trainer.timestep_sampler.load_state_dict(contents["timestep_sampler"])
    meter.load_state_dicts(contents["meter"], trainer.dist)
    return contents["step"], changes


def open_run(path, args, config, total):
    """Read a checkpoint that a run is to go on from; returns its plain contents, the Checkpoint, None where
    it is of shards, and in words what options are others now. Raises UserError as restore."""
    found = None
    if args.shard:
        if not os.path.isdir(path):
            raise UserError(
                f"--shard: {path} is of a run without it; leave it out, or give it to --init-from"
            )
        contents = torch.load(os.path.join(path, sharded.PLAIN), map_location="cpu", weights_only=True)
    else:
        found = checkpoints.load(path, "--resume")
        contents = found.contents
    changes = check_same_run(path, contents, config, args)
    if total < contents["step"]:
        raise UserError(f"--max-steps {total}: {path} is beyond that; give at least {contents['step']}")
    return contents, found, changes


def check_same_run(path, contents, config, args):
    """Raise UserError where a checkpoint is of another model, process or data; returns what else has changed
    since, as "; now lr 0.0002 (was 0.0001)", or ""."""
    for part in ("model", "process"):
        old, new = contents["config"][part], config[part]
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                raise UserError(
                    f"--resume {path}: its {name.replace('_', ' ')} is {old.get(name)}, by these options"
                    f" {new.get(name)}; give the run's own, or give the file to --init-from"
                )
    changed_data = check_same_data(path, contents["config"].get("data", {}), config["data"], args)
    old, new = reproducible_args(contents["args"]), reproducible_args(vars(args))
    changed = [name for name in new if name in old and new[name] != old[name]]
    return changed_data + "".join(f"; now {name} {new[name]} (was {old[name]})" for name in changed)


def check_same_data(path, old, new, args):
    """Raise UserError where the data is not what a checkpoint was trained on, as far as that kept it: other
    classes, or other images unless --allow-changed-data. Returns what has changed, as check_same_run."""
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


def write_checkpoint(experiment, step, state):
    """Save a checkpoint of the main process's; returns its path."""
    path = experiment.checkpoint_path(step)
    checkpoints.save(path, state)
    return path


def end_early(problems, unreadable, step, path, again, logger):
    """Say how to go on after a signal; for an unreadable image, raise UserError."""
    saved = f"saved {path}" if path else "nothing was trained yet"
    if unreadable:
        raise UserError(f"{problems[0] if problems else 'another process met an unreadable image'} [{saved}]")
    logger.info(f"Stopped after step {step:,}, {saved}; {again} to continue.")


if __name__ == "__main__":
    launch(main, build_parser(__doc__))
