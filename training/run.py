"""A training run as all its processes see it: its folder, log, metrics, pictures and checkpoints."""

from datetime import timedelta

from checkpointing import files as checkpoints
from checkpointing import sharded
from runtime.autoencoder import channel_statistics
from runtime.cli import Tolerance, UserError, create_logger
from runtime.flops import count_macs, device_name, peak_flops
from runtime.image_io import save_gif, save_grid
from training.resume import create_or_resume, open_checkpoint
from training.run_dir import BestCheckpoint
from training.run_log import Metrics, memory_gib


class Run:
    """The run to continue, or a new one in a folder of its own. Every process has one and calls its methods,
    of which the main process alone writes.

    config           what rebuilds the model and all around it, for checkpoints
    last_checkpoint  path of the newest one, or None; saved_step: its step
    """

    def __init__(self, args, plan, autoencoder, dist):
        self.args, self.plan, self.dist, self.config = args, plan, dist, plan.config(autoencoder)
        self.experiment, self.folder, self.last_checkpoint = create_or_resume(args, dist)
        self.logger = create_logger(self.folder, enabled=dist.is_main)
        self.tolerate = Tolerance(self.logger)
        self.metrics = self.best = None
        self.saved_step, self.device = 0, device_name(dist.device)
        found = "found" if self.last_checkpoint else "created"
        self.logger.info(f"Experiment directory {found} at {self.folder}")

    def start(self, state, autoencoder, fid=None):
        """Take up the checkpoint that there is, and make the folder ready to be written to."""
        contents = None
        if self.last_checkpoint:
            contents, changes = open_checkpoint(self.last_checkpoint, self.args, self.plan)
            state.load(self.last_checkpoint, contents)
            self.saved_step = state.step
            before = contents.get("device")
            if before not in (None, self.device):  # even the random numbers of two models of GPU differ
                changes += f"; now on {self.device} (was {before}), which gives other bits"
            self.logger.info(f"Continuing after step {state.step:,} from {self.last_checkpoint}{changes}")
        args, device, plan = self.args, self.dist.device, self.plan
        if args.latent_normalization == "channel":
            self._normalize_channels(autoencoder, contents)
        self.dist.on_main(self._open, state, fid)
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
        self.logger.info(f"DiT Parameters: {parameters:,}")
        self.logger.info(f"Dataset contains {len(plan.training_set):,} images ({plan.data['dataset']})")
        self.logger.info(
            f"Training for {plan.total_steps:,} steps of {args.global_batch_size} images on"
            f" {self.dist.world_size} x {device.type}, in {args.precision}"
        )
        self.share_of_peak = None  # that a step a second would be, by this device's FLOP
        if peak := peak_flops(device, args.precision):
            flops = 6 * count_macs(state.model) * args.global_batch_size / self.dist.world_size
            self.share_of_peak = flops / peak

    def _normalize_channels(self, autoencoder, contents):
        """Normalise latents by channel: by the statistics that a run began with, or of the data."""
        if contents:
            statistics = channel_statistics(contents["config"]["autoencoder"])
        else:
            statistics = self.plan.latent_statistics(autoencoder, self.args, self.dist)
        autoencoder.normalize_channels(**statistics)
        self.config = self.plan.config(autoencoder)
        low, high = (limit(statistics["channel_std"]) for limit in (min, max))
        self.logger.info(f"Latents are normalised by channel, of standard deviations {low:.3f} to {high:.3f}")

    def _open(self, state, fid):
        self.experiment.prepare_resume(self.args)
        self.metrics = Metrics(
            self.folder, start_step=state.step, tolerate=self.tolerate, use_wandb=self.args.wandb,
            settings=vars(self.args),
        )  # fmt: skip
        self.best = BestCheckpoint(self.experiment, fid.settings, state.step) if fid else None

    def found_of(self, step):
        """What there is already of the step that is continued from: the names of its numbers, and whether its
        pictures are there."""
        return self.dist.on_main(lambda: (self.metrics.names, self.experiment.has_pictures(step, self.args)))

    def save(self, state):
        """Write a checkpoint, and delete old ones by --keep-checkpoints.

        Raises UserError, on every process, where a loss was not finite, or it cannot be written."""
        state.nonfinite.raise_if_any(self.last_checkpoint)
        state.assert_same()
        contents = dict(state.state_dict(), args=vars(self.args), config=self.config, device=self.device)
        path = self.dist.broadcast(
            self.experiment and self.experiment.checkpoint_path(state.step, folder=self.args.shard)
        )
        if self.args.shard:
            sharded.save(path, contents, self.dist)
        else:
            self.dist.on_main(checkpoints.save, path, contents)
        self.last_checkpoint, self.saved_step = path, state.step
        if self.dist.is_main:
            with self.tolerate("--keep-checkpoints"):
                checkpoints.retain(self.experiment.checkpoints, self.args.keep_checkpoints)
        self.logger.info(f"Saved checkpoint to {path}")

    def report(self, state, norm, lr, bar):
        """Write a line of log.txt and a row of metrics.jsonl, and the loss on the bar.

        norm: of the gradients, a tensor; lr: the learning rate."""
        state.nonfinite.raise_if_any(self.last_checkpoint)
        means = state.meter.read(self.dist)
        if not self.dist.is_main:
            return
        speed = means["steps_per_sec"]
        left = timedelta(seconds=round((state.total - state.step) / speed))
        numbers = dict(grad_norm=norm.item(), lr=lr, memory_gib=memory_gib(self.dist.device))
        if self.share_of_peak:
            numbers["mfu"] = self.share_of_peak * speed
        self.metrics.write(state.step, **means, **numbers)
        parts = [name for name in ("mse", "vb") if "vb" in means] + ["aux"] * ("aux" in means)
        self.logger.info(
            f"(step={state.step:07d}) Train Loss: {means['loss']:.4f}, Train Steps/Sec: {speed:.2f}"
            + "".join(f", {name}: {means[name]:.4f}" for name in parts)
            + f", Grad Norm: {numbers['grad_norm']:.3f}, LR: {numbers['lr']:.2e}"
            + f", Memory: {numbers['memory_gib']:.1f} GiB, Left: {left}"
            + (f", MFU: {numbers['mfu']:.1%}" if self.share_of_peak else "")
            + (f", Skipped: {means['skipped_images']:.0f}" if means["skipped_images"] else "")
        )
        bar.set_postfix(loss=f"{means['loss']:.4f}")

    def write_metrics(self, step, **numbers):
        """Add a row of numbers."""
        if self.dist.is_main:
            self.metrics.write(step, **numbers)

    def offer_best(self, state, ema, name, value):
        """Log a FID, and keep the averaged weights where it is the lowest so far."""
        kept = False
        if self.dist.is_main:
            contents = dict(ema=ema.state_dict(), args=vars(self.args), step=state.step, config=self.config)
            with self.tolerate(self.best.path, UserError):  # a numbered checkpoint that fails stops the run
                kept = self.best.offer(value, contents)
        note = ", the best so far" if kept else ""
        self.logger.info(f"(step={state.step:07d}) {name}: {value:.4f}{note}")

    def save_pictures(self, step, scale, images, frames, classes):
        """Write samples (N, C, H, W), ten a row, as a PNG, and as a GIF where there are frames, a list of how
        they came out of the noise. classes: of the rows; [] for an unconditional model."""
        if not self.dist.is_main:
            return
        with self.tolerate("pictures"):
            path = self.experiment.picture_path(step, scale)
            if frames is not None:
                save_gif(frames, path.replace(".png", ".gif"), nrow=10)
            save_grid(images, path, nrow=10)
            rows = f" of classes {', '.join(map(str, classes))} (rows)" if classes else ""
            self.logger.info(f"Samples{rows}: {path}")

    def end_early(self, state, problems, unreadable):
        """Save what was trained, and say how to go on; for an unreadable image, raise UserError."""
        if state.step > self.saved_step:
            self.save(state)
        saved = f"saved {self.last_checkpoint}" if self.last_checkpoint else "nothing was trained yet"
        if unreadable:
            what = problems[0] if problems else "another process met an unreadable image"
            raise UserError(f"{what} [{saved}]")
        again = "run the same command again"
        if self.args.resume == "never":
            again = f"give --resume {self.folder}"
        self.logger.info(f"Stopped after step {state.step:,}, {saved}; {again} to continue.")

    def close_metrics(self):
        """Flush what is not written yet."""
        if self.dist.is_main:
            self.metrics.close()

    def finish(self):
        """Mark the run as finished."""
        if self.dist.is_main:
            with self.tolerate(self.folder):
                self.experiment.finish()
