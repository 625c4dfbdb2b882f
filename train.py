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
import os

import torch
from tqdm.auto import tqdm

from checkpointing import files as checkpoints
from checkpointing.published import find_file
from checkpointing.sharded import full_tensor, local_shard
from models import DiT
from runtime.cli import Stopped, launch
from runtime.distributed import (
    STEP,
    StopRequest,
    fold_seed,
    generator_for,
    init_distributed,
)
from runtime.image_io import to_float
from training.aux_losses import RecordAuxLoss
from training.dataset import DistributedBatchSampler, make_loader
from training.dry_run import dry_run
from training.options import build_parser
from training.resolve import resolve, settle_precision
from training.run import Run
from training.state import TrainingState
from training.validation import Validation, open_fid


def main(args):
    """Train a diffusion transformer, then sample it."""
    # Settle what this run is, and refuse what it cannot be:
    dist = init_distributed()
    args.precision = settle_precision(args, dist.device)
    plan = resolve(args, dist)
    if args.dry_run:
        dry_run(args, plan, dist)
        return

    # Load what can fail to load, before anything is written:
    with dist.agreeing():
        autoencoder = plan.load_autoencoder(dist.device)
        if not plan.has_cached_latents:
            autoencoder.encode_in(args.precision, args.compile)
        initial = args.init_from and checkpoints.load(find_file(args.init_from, "--init-from"), "--init-from")
        fid = open_fid(args, plan, dist) if args.fid_ref else None

    # Find the run to continue, or make its folder; build the model, its average and the optimizer:
    run = Run(args, plan, autoencoder, dist)
    torch.manual_seed(fold_seed(args.global_seed))
    # Shards come out of the main process's memory, since a GPU need not hold the whole model:
    with torch.device("meta" if args.shard and not dist.is_main else "cpu"):
        model = DiT(**plan.model_config)
    if initial:
        run.logger.info(checkpoints.initialize(model, initial))
    state = TrainingState(args, model, plan.process, dist, plan.total_steps)
    run.start(state, autoencoder, fid)

    # Train:
    order = DistributedBatchSampler(
        plan.training_set, args.global_batch_size, rank=dist.rank, world_size=dist.world_size,
        seed=args.global_seed, start_step=state.step, stop_step=state.total,
    )  # fmt: skip
    batches = make_loader(plan.training_set, order, args.num_workers, dist.device)
    stop = StopRequest(dist)
    validation = Validation(run, autoencoder, fid, stop)
    bar = tqdm(
        total=state.total, initial=state.step, desc="Training", unit="step", disable=not dist.is_main,
        dynamic_ncols=True,
    )  # fmt: skip
    problems, unreadable = [], False
    try:
        with bar, contextlib.closing(batches):
            validation.catch_up(state)
            for images, labels, problems in batches:
                signalled, unreadable = stop.agreed(problems and not args.skip_bad_images)
                if signalled or unreadable:
                    raise Stopped
                norm = train_step(state, images, labels, args, plan.encoder(autoencoder), stop.check)
                state.meter.add_skipped(len(problems))
                bar.update()

                is_last = state.step == state.total
                if state.step % args.log_every == 0 or is_last:
                    run.report(state, norm, learning_rate(args, state.step), bar)
                if validation.is_due(state, args.eval_every):
                    validation.measure(state)
                if state.step % args.ckpt_every == 0 and not is_last:
                    run.save(state)
                if validation.is_due(state, args.sample_every) and not is_last:
                    validation.sample(state)
        if state.step > run.saved_step:
            run.save(state)
        stop.close()  # from here on, nothing would be lost
        stop.check()
    except Stopped:
        run.end_early(state, problems, unreadable)
        return

    # Sample:
    run.close_metrics()
    if args.sample_every != 0:
        validation.sample(state)
    run.finish()
    python = "uv run" if "UV" in os.environ else "python"
    labels = " --class-labels 0 1 2 3 4 5 6 7 8 9" if model.num_classes == 10 else ""
    run.logger.info(f"More of them: {python} sample.py --ckpt {run.last_checkpoint}{labels}")
    run.logger.info("Done!")


def train_step(state, images, labels, args, encode, check=lambda: None):
    """Train on this process's rows of a batch; returns the norm of the gradients. Waits for no GPU.

    state    a TrainingState, which goes one step on
    images   as the data set gives them, (n, …); labels (n,)
    encode   a function (images, noise) -> x_start, of an autoencoder
    check    called between two of --grad-accum-steps parts; where it raises, nothing is trained
    """
    step, process, device = state.step + 1, state.process, state.dist.device
    draws = draw_step_noise(args, step, state.dist, state.timestep_sampler, state.model)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(args, step)
    state.optimizer.zero_grad(set_to_none=True)

    # Gradients of the batch, added up in parts, which processes exchange on the last part only:
    parts, losses = args.grad_accum_steps, []
    batch = dict(draws, images=images, labels=labels)
    for part, values in enumerate(zip(*(rows.chunk(parts) for rows in batch.values()))):
        if part:
            check()
        rows = {name: value.to(device, non_blocking=True) for name, value in zip(batch, values)}
        rows["images"] = to_float(rows["images"])
        rows["x_start"] = encode(rows["images"], rows["posterior"])
        model_kwargs = dict(y=rows["labels"], force_drop_ids=rows["drop"]) if args.num_classes else {}
        network = state.autocast_model
        if args.aux_loss:
            network = RecordAuxLoss(network, rows)
        with ddp_sync(state.ddp_model, part == parts - 1):
            terms = process.training_losses(
                network, rows["x_start"], rows["t"], model_kwargs, noise=rows["noise"]
            )
            loss = terms["loss"] * rows["weights"]
            if args.aux_loss:
                terms["aux"] = network.loss
                loss = loss + args.aux_weight * network.loss
            (loss.mean() / parts).backward()
        losses.append({name: value.detach() for name, value in terms.items()})
    losses = {name: torch.cat([terms[name] for terms in losses]) for name in losses[0]}

    norm = gradient_norm(state.ddp_model, args.clip_grad)
    state.optimizer.step()
    update_ema(state.ema, state.model, ema_decay(args, step))
    state.timestep_sampler.update_with_local_losses(draws["t"], losses["loss"])
    state.step = step
    state.nonfinite.record(step, norm, losses["loss"])
    state.meter.add(losses, (draws["t"] * 4 // process.num_timesteps).long().clamp(max=3))
    return norm


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
        return full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True))
    return full_tensor(torch.nn.utils.clip_grad_norm_(parameters, clip, foreach=True))


def learning_rate(args, step):
    """The learning rate of a step: --lr, or less during --warmup-steps."""
    return args.lr * min(1.0, step / max(1, args.warmup_steps))


def ema_decay(args, step):
    """The decay of the average at a step: --ema-decay, or less early on with --ema-warmup."""
    return min(args.ema_decay, (1 + step) / (10 + step)) if args.ema_warmup else args.ema_decay


@torch.no_grad()
def update_ema(ema_model, model, decay=0.9999):
    """Move every trained weight of ema_model to decay · itself + (1 - decay) · the model's."""
    pairs = [(e, p) for e, p in zip(ema_model.parameters(), model.parameters()) if p.requires_grad]
    averages, weights = zip(*((local_shard(e), local_shard(p)) for e, p in pairs))
    if averages[0].is_cuda:  # in one pass
        torch._foreach_lerp_(averages, weights, 1 - decay)
        return
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, weights, alpha=1 - decay)


if __name__ == "__main__":
    launch(main, build_parser(__doc__))
