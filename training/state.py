"""What a run trains, and its checkpoints keep; training/run.py writes them."""

import copy

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from checkpointing import files as checkpoints
from checkpointing import sharded
from diffusion.timestep_sampler import create_named_schedule_sampler
from runtime.cli import UserError
from runtime.distributed import uses_bfloat16
from training.aux_losses import ModelWithAuxLoss
from training.fp8 import convert_to_fp8
from training.optimizers import build_optimizer
from training.run_log import Meter


class TrainingState:
    """Model, average, optimizer, timestep sampler, meter, and how many steps were taken.

    model             a DiT, float32, on this process's device; with --shard in shards
    ema               the average of its weights, in evaluation mode
    trained           the modules whose weights the optimizer moves: the model, and an auxiliary loss's
    ddp_model         `trained` as a step calls it: its gradients are exchanged among processes
    autocast_model    the same, its matrix products in bfloat16 where --precision says so
    step              optimizer steps taken; `total` is the last
    """

    def __init__(self, args, model, process, dist, total=None):
        """model: on the CPU; with --shard the main process's alone needs weights."""
        self.args, self.process, self.dist, self.step, self.total = args, process, dist, 0, total
        trained = model
        if args.aux_loss:
            with torch.device(model.pos_embed.device):
                trained = ModelWithAuxLoss(model, args.aux_loss, args.aux_layer)
        if args.shard:
            self.ema = sharded.shard_copy(model, model_of, dist)
            self.trained = sharded.shard_copy(trained, model_of, dist, args.precision, args.compile)
        else:
            self.trained = trained.to(dist.device)
            self.ema = copy.deepcopy(model)
        self.model = model_of(self.trained)
        self.ema.requires_grad_(False).eval()
        self.ddp_model = prepare(self.trained, args, dist).train()
        self.autocast_model = autocast(self.ddp_model, dist.device, args.precision)
        self.optimizer = build_optimizer(self.parameters(), args)
        self.timestep_sampler = create_named_schedule_sampler(args.timestep_sampler, process)
        self.meter, self.nonfinite = Meter(), NonFiniteDetector(dist)

    def parameters(self):
        """The parameters that are trained."""
        return [parameter for parameter in self.trained.parameters() if parameter.requires_grad]

    @property
    def aux_head(self):
        """The module of an auxiliary loss that has weights of its own, or None."""
        return self.trained.head if self.args.aux_loss else None

    def state_dict(self):
        """The contents of a checkpoint, tensors in shards with --shard; every process calls it."""
        contents = dict(
            model=self.model.state_dict(), ema=self.ema.state_dict(), step=self.step,
            timestep_sampler=self.timestep_sampler.state_dict(),
            meter=self.dist.gather(self.meter.state_dict()),
        )  # fmt: skip
        if self.aux_head is not None:
            contents["aux_loss"] = self.aux_head.state_dict()
        if self.args.shard:
            return dict(contents, opt=sharded.optimizer_state(self.trained, self.optimizer))
        return dict(contents, opt=self.optimizer.state_dict())

    def load(self, path, contents):
        """Take up a checkpoint: its contents, or with --shard those beside the shards in its folder.

        Raises UserError, naming --resume, where it is of another model."""
        given = [group.get("weight_decay") for group in self.optimizer.param_groups]
        if self.args.shard:
            contents = sharded.load_into(path, self.state_dict(), contents)
            sharded.load_optimizer_state(self.trained, self.optimizer, contents["opt"])
        else:
            found = checkpoints.Checkpoint(path, contents)
            checkpoints.load_weights(self.model, found.state_dict("raw"), path, "--resume")
            checkpoints.load_weights(self.ema, found.state_dict("ema"), path, "--resume")
            if self.aux_head is not None:
                self.aux_head.load_state_dict(contents["aux_loss"])
            self.optimizer.load_state_dict(contents["opt"])
        for group, weight_decay in zip(self.optimizer.param_groups, given):
            if weight_decay is not None:  # as given now, should it differ
                group["weight_decay"] = weight_decay
        self.timestep_sampler.load_state_dict(contents["timestep_sampler"])
        self.meter.load_state_dicts(contents["meter"], self.dist)
        self.step = contents["step"]

    def full_ema(self):
        """The averaged model, whole, on every process; every process calls it."""
        return sharded.gather_copy(self.ema, self.dist.device) if self.args.shard else self.ema

    def assert_same(self):
        """Raise RuntimeError where the processes' weights have drifted apart."""
        if not self.args.shard:
            self.dist.assert_same(self.trained.parameters())


def model_of(trained):
    """The DiT of `trained`."""
    return trained.model if isinstance(trained, ModelWithAuxLoss) else trained


def set_up(model, args):
    """Let a DiT keep for its backward pass what the options say."""
    model.grad_checkpointing = args.grad_checkpointing
    model.residual_dtype = torch.bfloat16 if args.residual_dtype == "bf16" else None


def prepare(trained, args, dist):
    """Compile and checkpoint the model's blocks as asked, and share its work among processes; returns the
    trained module as a step calls it."""
    set_up(model_of(trained), args)
    if args.precision == "fp8":
        convert_to_fp8(model_of(trained).blocks)
    if args.shard:
        return trained
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # which would cut the blocks' graphs at its buckets
        model_of(trained).compile_blocks()
    if dist.world_size == 1:
        return trained
    device_ids = [dist.device.index] if dist.device.type == "cuda" else None
    # A static graph cannot know no_sync's and checkpointing's extra passes:
    static = args.grad_accum_steps == 1 and not args.grad_checkpointing
    parallel = DistributedDataParallel(
        trained, device_ids=device_ids, gradient_as_bucket_view=True, static_graph=static,
        bucket_cap_mb=100 if device_ids else None,  # fewer, larger exchanges suit GPUs
    )  # fmt: skip
    if args.grad_compression == "bf16":
        parallel.register_comm_hook(None, exchange_in_bfloat16)
    return parallel


def exchange_in_bfloat16(group, bucket):
    """torch's own exchange, under a name that DDP does not refuse to builds without NCCL."""
    return default_hooks.bf16_compress_hook(group, bucket)


def autocast(model, device, precision):
    """The model, with its matrix products in bfloat16 where --precision says so."""
    if not uses_bfloat16(precision):
        return model

    def network(*args, **kwargs):
        with torch.autocast(device.type, torch.bfloat16):
            return model(*args, **kwargs)

    return network


class NonFiniteDetector:
    """Notes the first step whose loss or gradient is not finite, without waiting for a GPU."""

    def __init__(self, dist):
        self.dist = dist
        self.first = torch.zeros((), dtype=torch.int64, device=dist.device)

    def record(self, step, norm, losses):
        bad = ~(torch.isfinite(norm) & torch.isfinite(losses).all())
        self.first = torch.where((self.first == 0) & bad, step, self.first)

    def raise_if_any(self, path):
        """Raise UserError on every process where there was one. path: the last checkpoint, which stands."""
        steps = [step for step in self.dist.gather(self.first.item()) if step]
        if steps:
            stands = f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"
            again = "continue with --resume FOLDER" if path else "start again"
            raise UserError(
                f"step {min(steps)}: the loss or its gradient is not finite; {stands}; lower --lr, give"
                f" --clip-grad 1 or --precision fp32, and {again}"
            )
