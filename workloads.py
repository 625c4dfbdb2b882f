"""What benchmark.py times: every stage from images to a score, by the code that the commands run, and beside
it the published way of training and sampling.

Data and weights are random, never zeros, which some processors multiply faster. Nothing is downloaded.
"""

import copy
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import extract_features
import sample_ddp
from archive import SampleArchive
from autoencoder import SD_SCALE, VAE, Pixels
from data import BatchOrder, FolderImages, Guarded, LatentCache, read_batches
from diffusion import create_diffusion, create_process
from images import to_uint8
from inception import Inception
from models import DiT_models, count_macs
from runtime import set_precision
from sampler import Sampler
from settings import build_parser, process_config
from train import Trainer

CLASSES = 1000
FACTOR, CHANNELS = 8, 4  # of the SD-VAE
# The architecture of the SD-VAE, for diffusers' AutoencoderKL:
SD_VAE = dict(
    block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=CHANNELS,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is timed: sizes, and how. batch: images a step of each process."""

    model: str
    image_size: int
    batch: int
    precision: str
    compile: bool = False
    grad_checkpointing: bool = False
    cuda_graphs: bool = False
    num_workers: int = 0


class Workload:
    """A stage, ready to run.

    images   of a step, on this process
    flops    of a step, on this process: two for each multiply-add of a matrix product; None where it is no
             matter of arithmetic
    """

    flops = None

    def __init__(self, setting, processes):
        self.setting, self.processes, self.device = setting, processes, processes.device
        self.images = setting.batch

    def run(self, steps):
        """Do this many steps, without waiting for a GPU to finish them."""
        raise NotImplementedError

    def close(self):
        """Remove what it left outside its own memory."""


# ---------------------------------------------------------------------------------------------
# The network


def build_model(setting, device):
    """A DiT without zeros in it."""
    model = DiT_models[setting.model](input_size=setting.image_size // FACTOR, num_classes=CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model.to(device)


def random_moments(setting, device):
    """Posteriors (N, 2C, h, w) as a cache has them, and labels (N,), where the loader leaves them."""
    side = setting.image_size // FACTOR
    moments = torch.randn(setting.batch, 2 * CHANNELS, side, side)
    labels = torch.randint(CLASSES, (setting.batch,))
    return (moments.pin_memory(), labels.pin_memory()) if device.type == "cuda" else (moments, labels)


class RandomVAE(VAE):
    """The SD-VAE with random weights."""

    def __init__(self, device):
        config = dict(channels=CHANNELS, factor=FACTOR, scale=SD_SCALE, shift=0.0)
        super().__init__("random weights", config)
        self.to(device)

    @cached_property
    def model(self):
        from diffusers import AutoencoderKL

        return AutoencoderKL(**SD_VAE).eval().requires_grad_(False).to(self.device)


class Train(Workload):
    """A step of train.py on cached latents: forward, backward, optimiser, average."""

    def __init__(self, setting, processes):
        super().__init__(setting, processes)
        args = build_parser().parse_args(["--model", setting.model, "--feature-path", "random"])
        args.image_size, args.num_classes = setting.image_size, CLASSES
        args.global_batch_size = setting.batch * processes.world_size
        args.precision = set_precision(setting.precision, self.device)
        args.compile, args.grad_checkpointing = setting.compile, setting.grad_checkpointing
        model = build_model(setting, self.device).train()
        self.flops = 6 * count_macs(model) * setting.batch
        process = create_process(process_config(args))
        self.trainer = Trainer(args, model, process, RandomVAE(self.device), processes)
        self.batch, self.done = random_moments(setting, self.device), 0

    def run(self, steps):
        set_precision(self.setting.precision, self.device)
        for _ in range(steps):
            self.done += 1
            self.trainer.step(self.done, *self.batch)


class Latents(Pixels):
    """What leaves latents as they are, so that sampling is timed without the decoder."""

    clip_denoised = False


def parts_of(steps, most=250):
    """Split steps of sampling into as many runs as they are, of at most 250 steps."""
    return [min(most, steps - done) for done in range(0, steps, most)]


class Sample(Workload):
    """A step of ancestral sampling with guidance, by the Sampler, on one process or on each."""

    def __init__(self, setting, processes):
        super().__init__(setting, processes)
        model = build_model(setting, self.device)
        self.flops = 4 * count_macs(model) * setting.batch
        set_precision(setting.precision, self.device)
        if setting.precision == "bf16":
            model.store_bfloat16()
        if setting.compile:
            model.compile_blocks()
        self.sampler = Sampler(model, None, Latents(CHANNELS), self.device, cuda_graphs=setting.cuda_graphs)
        self.labels = torch.randint(CLASSES, (setting.batch,)).tolist()

    def run(self, steps):
        set_precision(self.setting.precision, self.device)
        for part in parts_of(steps):
            options = self.sampler.settle(labels=self.labels, cfg_scale=4.0, steps=str(part))
            self.sampler.generate(range(len(self.labels)), self.labels, options)


# ---------------------------------------------------------------------------------------------
# The published way: eager, no mixed precision, tokens as PatchEmbed leaves them in memory, tables copied to
# the device at every use, loops over the weights in Python, a loss read at every step.


class NothingKept(dict):
    """A dict that forgets at once."""

    def __contains__(self, key):
        return False


def plain_model(setting, device):
    model = build_model(setting, device)
    model.forward = partial(plain_forward, model)
    return model


def plain_forward(model, x, t, y):
    x = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(y, model.training)
    for block in model.blocks:
        x = block(x, c)
    return model.unpatchify(model.final_layer(x, c))


def plain_process(spacing):
    process = create_diffusion(spacing)
    process._on_device = NothingKept()
    return process


class PlainTrain(Workload):
    """A published training step, on cached latents, or with the VAE in it (online)."""

    def __init__(self, setting, processes, online=False):
        super().__init__(setting, processes)
        self.process, self.autoencoder = plain_process(""), RandomVAE(self.device)
        self.batch = random_moments(setting, self.device)
        if online:
            images = torch.rand(setting.batch, 3, setting.image_size, setting.image_size) * 2 - 1
            self.batch = (images.to(self.batch[0].device), self.batch[1])
        self.encode = self.autoencoder.encode if online else self.autoencoder.draw
        model = plain_model(setting, self.device).train()
        self.flops = 6 * count_macs(model) * setting.batch
        self.ema = copy.deepcopy(model).requires_grad_(False)
        self.model = self.network = model
        if processes.world_size > 1:
            self.network = DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)

    def run(self, steps):
        set_precision(self.setting.precision, self.device)
        for _ in range(steps):
            x, y = (values.to(self.device) for values in self.batch)
            n, side = len(x), self.setting.image_size // FACTOR
            x = self.encode(x, torch.randn(n, CHANNELS, side, side, device=self.device))
            t = torch.randint(self.process.num_timesteps, (n,), device=self.device)
            loss = self.process.training_losses(self.network, x, t, dict(y=y))["loss"].mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            weights = dict(self.model.named_parameters())
            with torch.no_grad():
                for name, average in self.ema.named_parameters():
                    average.mul_(0.9999).add_(weights[name], alpha=1 - 0.9999)
            loss.item()


class PlainSample(Workload):
    """A published sampling step: forward_with_cfg on twice the rows, in p_sample_loop."""

    def __init__(self, setting, processes):
        super().__init__(setting, processes)
        self.model = plain_model(setting, self.device).eval()
        self.flops = 4 * count_macs(self.model) * setting.batch

    def run(self, steps):
        set_precision(self.setting.precision, self.device)
        n, side = self.setting.batch, self.setting.image_size // FACTOR
        z = torch.randn(n, CHANNELS, side, side, device=self.device)
        y = torch.cat([torch.randint(CLASSES, (n,)), torch.full((n,), CLASSES)]).to(self.device)
        for part in parts_of(steps):
            plain_process(str(part)).p_sample_loop(
                self.model.forward_with_cfg, (2 * n, *z.shape[1:]), torch.cat([z, z]), clip_denoised=False,
                model_kwargs=dict(y=y, cfg_scale=4.0),
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# What stands before and behind it


class Encode(Workload):
    """A batch of extract_features.py: the posteriors of images and of their mirror images."""

    def __init__(self, setting, processes):
        super().__init__(setting, processes)
        self.autoencoder = RandomVAE(self.device)
        self.x = torch.rand(setting.batch, 3, setting.image_size, setting.image_size, device=self.device)
        self.flops = 2 * setting.batch * count_flops(self.autoencoder.moments, self.x[:1])

    def run(self, steps):
        set_precision(self.setting.precision, self.device)
        for _ in range(steps):
            both = [self.autoencoder.moments(view) for view in (self.x, self.x.flip(-1))]
            torch.stack(both, dim=1).half().cpu()


class Decode(Workload):
    """Latents to bytes."""

    def __init__(self, setting, processes):
        super().__init__(setting, processes)
        self.autoencoder, side = RandomVAE(self.device), setting.image_size // FACTOR
        self.x = torch.randn(setting.batch, CHANNELS, side, side, device=self.device)
        self.flops = setting.batch * count_flops(self.autoencoder.decode, self.x[:1])

    def run(self, steps):
        set_precision(self.setting.precision, self.device)
        for _ in range(steps):
            to_uint8(self.autoencoder.decode(self.x))


class Features(Workload):
    """A batch of evaluate.py: Inception's features."""

    def __init__(self, setting, processes):
        super().__init__(setting, processes)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        with patch.object(FeatureExtractorInceptionV3, "load_state_dict"):  # random weights are as fast
            self.network = Inception({}, None, self.device)
        for layer in self.network.network.modules():  # of one size from layer to layer, that none vanishes
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
        shape = (setting.batch, 3, setting.image_size, setting.image_size)
        self.pixels = torch.randint(256, shape, dtype=torch.uint8)
        self.flops = setting.batch * count_flops(self.network, self.pixels[:1])

    def run(self, steps):
        for _ in range(steps):
            pooled, _ = self.network(self.pixels)
            pooled.cpu()


def count_flops(call, *inputs):
    with FlopCounterMode(display=False) as counter:
        call(*inputs)
    return counter.get_total_flops()


class InFolder(Workload):
    """A workload with a folder of its own."""

    def __init__(self, setting, processes):
        super().__init__(setting, processes)
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = self.temporary.name

    def close(self):
        self.temporary.cleanup()


class Read(InFolder):
    """A batch of training data, read by --num-workers processes."""

    def __init__(self, setting, processes):
        super().__init__(setting, processes)
        dataset = self.make(setting)
        order = BatchOrder(dataset, setting.batch, stop_step=2**40)
        self.batches = read_batches(Guarded(dataset, skip=False), order, setting.num_workers, self.device)

    def make(self, setting):
        raise NotImplementedError

    def run(self, steps):
        for _ in range(steps):
            images, labels, problems = next(self.batches)
            images.to(self.device, non_blocking=True)

    def close(self):
        self.batches.close()
        super().close()


class ReadLatents(Read):
    """From a cache of extract_features.py, which lies in the machine's own cache of files."""

    def make(self, setting):
        side, count = setting.image_size // FACTOR, max(4096, setting.batch)
        vae, shards = RandomVAE(self.device), range(4)
        manifest = dict(vae=vae.config, image_size=setting.image_size, classes=["one"], count=count,
                        shard_size=-(-count // len(shards)))  # fmt: skip
        generator = np.random.default_rng(0)
        for shard in shards:
            rows = min(manifest["shard_size"], count - shard * manifest["shard_size"])
            moments = generator.standard_normal((rows, 2, 2 * CHANNELS, side, side), dtype=np.float32)
            extract_features.finish_shard(
                self.folder, shard, moments.astype(np.float16), np.zeros(rows, np.int64), vae
            )
        extract_features.complete(self.folder, manifest, shards)
        return LatentCache(self.folder)


class ReadImages(Read):
    """From JPEGs of 500x375 pixels and some 110 kB, as ImageNet's."""

    def make(self, setting):
        generator = np.random.default_rng(0)
        coarse = generator.integers(256, size=(16, 38, 50, 3), dtype=np.uint8)
        for i in range(max(256, setting.batch)):
            image = Image.fromarray(coarse[i % 16]).resize((500, 375), Image.BICUBIC)
            noise = generator.normal(0, 12, (375, 500, 3))
            pixels = (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(os.path.join(self.folder, f"{i:05d}.jpg"), quality=90)
        return FolderImages(self.folder, setting.image_size)


class Write(InFolder):
    """A batch of sample_ddp.py behind the decoder: bytes into the .npz, and PNGs where asked."""

    def __init__(self, setting, processes, png):
        super().__init__(setting, processes)
        side, self.png, self.files = setting.image_size, png, 0
        coarse = torch.rand(setting.batch, 3, side // 8, side // 8) * 2 - 1
        x = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic")
        self.x = x + 0.05 * torch.randn_like(x)

    def run(self, steps):
        self.files += 1
        name, side = os.path.join(self.folder, str(self.files)), self.setting.image_size
        os.makedirs(name)
        archive = SampleArchive(f"{name}.npz", name, (steps * self.images, side, side, 3), self.setting.batch)
        archive.begin()
        sampler = SimpleNamespace(
            generate=lambda seeds, labels, options: (self.x, [0] * len(seeds)),
            model=SimpleNamespace(num_classes=0),
        )
        args = SimpleNamespace(global_seed=0, labels="random", png=self.png)
        alone = SimpleNamespace(rank=0, is_main=False)  # without a bar
        sample_ddp.sample_batches(archive.batches, sampler, archive, args, None, alone)
