"""The memory that a training step takes on a device, found without the device: a step is run on fake tensors,
which have shapes and types but no storage."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from diffusion import create_process
from models import DiT
from runtime.autoencoder import PIXELS_AT_ONCE, PUBLISHED_VAES, resolve_vae
from runtime.distributed import uses_bfloat16
from training.optimizers import build_optimizer
from training.state import autocast, set_up

CONTEXT = 2 * 2**30  # what CUDA and its libraries take for themselves, about
# Of an SD-VAE: its weights, and what encoding takes for each pixel that it is given at once, traced likewise:
VAE_WEIGHTS, VAE_PIXEL = 335 * 10**6, 2572


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are alive: `now`, and the most there were, `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self._sizes = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return True  # fake tensors have no values: every branch that depends on some is taken
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key):
        self.now -= self._sizes.pop(key)


def step_memory(args, model_config, process_config, images):
    """Bytes that a training step of so many images takes in one process, by what they are for: a dict of
    weights, average, optimizer, gradients and activations, all that is alive besides at the peak.

    args: as train.py's options; neither --shard nor an auxiliary loss is looked at
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), LiveMemory() as live, torch.device("cpu"):
        model = DiT(**model_config).train()
        set_up(model, args)
        found = dict(weights=live.now)
        average = [parameter.detach().clone() for parameter in model.parameters()]
        found["average"] = live.now - found["weights"]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = build_optimizer(trained, args)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        found["gradients"] = live.now - found["weights"] - found["average"]
        optimizer.step()
        optimizer.zero_grad()
        found["optimizer"] = live.now - found["weights"] - found["average"]
        process, live.peak = create_process(process_config), live.now
        for _ in range(args.grad_accum_steps):
            _forward_and_backward(model, process, images // args.grad_accum_steps, args.precision)
        optimizer.step()
        del average
    return dict(found, activations=live.peak - sum(found.values()))


def _forward_and_backward(model, process, images, precision):
    x_start = torch.zeros(images, model.in_channels, *model.input_size)
    noise, t = torch.zeros_like(x_start), process.stratified_t(images, "cpu")
    model_kwargs = {}
    if model.num_classes:
        y = model.y_embedder.from_labels(torch.zeros(images, dtype=torch.long))
        model_kwargs = dict(y=y, force_drop_ids=torch.zeros(images, dtype=torch.bool))

    network = autocast(model, torch.device("cpu"), precision)
    process.training_losses(network, x_start, t, model_kwargs, noise=noise)["loss"].mean().backward()


def training_memory(args, plan, world_size):
    """Bytes that a run of these options takes on each device, by what they are for."""
    images = args.global_batch_size // world_size
    found = step_memory(args, plan.model_config, plan.process.config, images)
    if args.shard:
        with torch.device("meta"):
            model = DiT(**plan.model_config)
        block = sum(parameter.nbytes for parameter in model.blocks[0].parameters())
        gathered = 2 * block * (0.5 if uses_bfloat16(args.precision) else 1)  # one at work, and the next
        rest = found["weights"] - block * len(model.blocks)
        for name in ("weights", "average", "optimizer", "gradients"):
            found[name] //= world_size
        found["gathered blocks"] = int(gathered + rest)
    elif world_size > 1:
        found["exchange of gradients"] = found["gradients"]
    if not plan.has_cached_latents and resolve_vae(args.vae) in (
        PUBLISHED_VAES["ema"],
        PUBLISHED_VAES["mse"],
    ):
        pixels = min(images // args.grad_accum_steps * args.image_size**2, PIXELS_AT_ONCE)
        found["autoencoder"] = VAE_WEIGHTS + VAE_PIXEL * pixels
    return dict(found, **{"CUDA": CONTEXT})
