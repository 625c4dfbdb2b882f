"""What is looked at while a run trains: the loss on held-out images, FID, and pictures."""

import copy

import torch
from torch.utils.data import default_collate

from evaluation.inception import SampleFID, share_of
from runtime.distributed import EVALUATION, generator_for, uses_bfloat16
from sampler import Sampler
from sampling.options import FID_CFG_SCALE


class Validation:
    """Looks at the averaged weights of a run's training state; every process calls its methods.

    run          the Run, whose log, metrics and folder get what is found
    autoencoder  decodes samples, encodes held-out images
    fid          of open_fid, or None
    stop         a StopRequest, which ends each of them early, by Stopped
    """

    def __init__(self, run, autoencoder, fid, stop):
        self.run, self.args, self.plan, self.dist = run, run.args, run.plan, run.dist
        self.autoencoder, self.fid, self.stop = autoencoder, fid, stop
        self._bfloat16_copy = None  # of the average, for FID

    def catch_up(self, state):
        """Do what was due at the step that a run continues from, and was cut off."""
        names, has_pictures = self.run.found_of(state.step)
        if self.is_due(state, self.args.eval_every) and "eval_loss" not in names:
            self.measure(state)
        if self.is_due(state, self.args.sample_every) and state.step < state.total and not has_pictures:
            self.sample(state)

    @staticmethod
    def is_due(state, every):
        """Whether something is due at this step of the run, which happens every so many, if any."""
        return bool(every) and state.step > 0 and state.step % every == 0

    def measure(self, state):
        """The loss on held-out images, and FID where that was asked for."""
        loss = held_out_loss(state, self.plan, self.args, self.autoencoder, self.stop.check)
        self.run.logger.info(f"(step={state.step:07d}) Eval Loss: {loss:.4f}")
        numbers = dict(eval_loss=loss)
        if self.fid:
            ema = state.full_ema()
            network = self._network_for_fid(ema)
            sampler = Sampler(network, state.process, self.autoencoder, self.dist.device, self.fid.sampling)
            with self.stop.interrupting(network):
                numbers[self.fid.name] = self.fid(sampler)
            self.run.offer_best(state, ema, self.fid.name, numbers[self.fid.name])
        self.run.write_metrics(state.step, **numbers)

    def _network_for_fid(self, ema):
        """The average itself, or where a run trains in bfloat16 a copy that is sampled in it."""
        if not uses_bfloat16(self.args.precision):
            return ema
        if self._bfloat16_copy is None:
            self._bfloat16_copy = copy.deepcopy(ema).store_bfloat16()
            if self.args.compile:
                self._bfloat16_copy.compile_blocks()
        self._bfloat16_copy.load_state_dict(ema.state_dict())
        return self._bfloat16_copy

    def sample(self, state):
        """A picture for every guidance scale asked for."""
        with self.run.tolerate("pictures"):  # where memory runs out, which is known to all
            with self.dist.agreeing():
                ema = state.full_ema()
            sampler = Sampler(
                ema, state.process, self.autoencoder, self.dist.device, self.plan.sampling_defaults()
            )
            for scale in self.args.sample_cfg_scales or [None]:
                with self.stop.interrupting(ema):
                    pictures = sample_grid(
                        sampler, self.args.global_seed, scale, self.args.sample_gif, self.dist
                    )
                self.run.save_pictures(state.step, scale, *pictures)


def open_fid(args, plan, dist):
    """What computes --fid-ref's FID; UserError for a reference or weights that cannot be used."""
    return SampleFID(
        args.fid_ref, args.fid_samples, weights=args.inception_weights, any_weights=args.any_weights,
        sampling=plan.sampling_defaults(FID_CFG_SCALE), bfloat16=uses_bfloat16(args.precision), dist=dist,
    )  # fmt: skip


@torch.no_grad()
def held_out_loss(state, plan, args, autoencoder, check, batch_size=64):
    """The mean loss of the averaged weights on held-out images, each with the same t and noise every time.

    check: called before every batch."""
    process, ema, dist, held_out = state.process, state.ema, state.dist, plan.held_out
    generator, device = generator_for("cpu", args.global_seed, EVALUATION), dist.device
    n, shape = len(held_out), (len(held_out), ema.in_channels, *ema.input_size)
    t = process.stratified_t(n, "cpu")
    noise, posterior = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    encode, total = plan.encoder(autoencoder), 0.0
    for batch in torch.arange(n).split(batch_size * dist.world_size):
        check()
        rows = batch[dist.rank :: dist.world_size]
        rows = rows if len(rows) else batch[:1]  # so that sharded weights are gathered by all
        images, labels, _ = zip(*(held_out[(int(row), False)] for row in rows))
        images, labels = torch.stack(images).to(device), default_collate(labels).to(device)
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
