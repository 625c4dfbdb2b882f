"""Training and sampling on fake tensors of a GPU, which have shapes, types and devices but no values: one
on the wrong device raises, and so does, here, what a GPU would be waited for."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import train
from diffusion import SOLVERS, create_process
from diffusion.flow_matching import FlowMatching
from models import BLOCKS, FFNS, DiT
from runtime.autoencoder import VAE, Pixels
from runtime.distributed import Distributed
from sampler import Sampler
from training.options import build_parser
from training.resolve import process_config
from training.state import TrainingState

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
GPU = torch.device("cuda", 0)
MODEL = dict(input_size=8, hidden_size=64, depth=2, num_heads=4, num_classes=10)


class NoWait(TorchDispatchMode):
    """Fails where a GPU would be waited for: a value is looked at, decides a shape, or is copied at once."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten, kwargs = torch.ops.aten, kwargs or {}
        assert function not in (aten._local_scalar_dense.default, aten.nonzero.default), function
        result = function(*args, **kwargs)
        if function is aten._to_copy.default and args[0].device.type != result.device.type:
            assert kwargs.get("non_blocking"), f"{args[0].shape} waits on its way to {result.device}"
        return result


def replace_parameters(module):
    """What Module.bfloat16 does, for parameters that are fake."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, torch.nn.Parameter(parameter.detach().bfloat16()))


@pytest.fixture
def fake_gpu(monkeypatch):
    """Inside, tensors of a GPU that is not there can be made and computed with, but by no generator."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)  # fakes cannot be swapped
    monkeypatch.setattr(torch.nn.Module, "bfloat16", replace_parameters)
    for module in ("train", "diffusion.timestep_sampler"):
        if hasattr(__import__(module, fromlist=["x"]), "generator_for"):
            monkeypatch.setattr(f"{module}.generator_for", lambda *args: None)
    points = FlowMatching.points

    def real_points(self, steps):  # whose values the steps depend on
        with _disable_current_modes():
            return points(self, steps)

    monkeypatch.setattr(FlowMatching, "points", real_points)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def build(**options):
    with GPU:
        return DiT(**{**MODEL, **options})


def build_vae():
    """A small SD-VAE of random weights, which halves the sides."""
    from diffusers import AutoencoderKL

    vae = VAE("random weights", dict(channels=4, factor=2, scale=1.0, shift=0.0))
    with GPU:
        vae._model = AutoencoderKL(
            block_out_channels=[32, 32], down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
        ).requires_grad_(False)  # fmt: skip
    vae.device = GPU
    return vae


TRAINING = [
    "", "--precision bf16 --residual-dtype bf16", "--precision bf16 --grad-checkpointing",
    "--grad-accum-steps 2 --clip-grad 1", "--objective flow --timestep-sampler logit-normal",
    "--timestep-sampler loss-second-moment", "--num-classes 0",
]  # fmt: skip
ARCHITECTURE = [f"--block {block}" for block in BLOCKS] + [f"--ffn {ffn}" for ffn in FFNS]
TRAINING += [*ARCHITECTURE, "--registers 2 --pos-embed learned --qk-norm"]
ONLINE = [("online", options) for options in TRAINING[:4]]


@pytest.mark.parametrize("source, options", [*[("cached", options) for options in TRAINING], *ONLINE])
def test_a_training_step_keeps_to_the_gpu_and_waits_for_nothing(fake_gpu, monkeypatch, options, source):
    args = build_parser().parse_args(["--global-batch-size", "4", *options.split()])
    args.num_classes = 10 if args.num_classes is None else args.num_classes
    args.learn_sigma = args.objective == "diffusion"
    names = ("num_classes", "learn_sigma", "block", "ffn", "registers", "pos_embed", "qk_norm")
    model = build(**{name: getattr(args, name) for name in names})
    state = TrainingState(args, model, create_process(process_config(args)), Distributed(0, 1, GPU))
    devices = []

    def backward(loss):  # needs a device; that of the loss stands for it
        devices.append(loss.device)
        for parameter in state.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    vae = build_vae()
    vae.encode_in(args.precision or "tf32")
    cached = source == "cached"
    images = torch.zeros(4, 8, 8, 8, dtype=torch.float16) if cached else torch.zeros(4, 3, 16, 16).byte()
    labels = torch.zeros(4, dtype=torch.long)
    encode = vae.sample_posterior if cached else vae.encode
    train.train_step(state, images, labels, args, encode)  # the first may copy tables
    with NoWait():
        norm = train.train_step(state, images, labels, args, encode)
    assert norm.device == GPU and state.step == 2
    assert set(devices) == {GPU} and len(devices) == 2 * args.grad_accum_steps


OBJECTIVES = {
    "diffusion": dict(objective="diffusion", noise_schedule="linear", learn_sigma=True, sigma_small=False),
    "flow": dict(objective="flow", path="linear", prediction="velocity", shift=1.0, time_sampling="uniform"),
}


SAMPLING = [(name, objective, "plain") for name, solver in SOLVERS.items() for objective in solver.objectives]
for solver, objective in (("ddpm", "diffusion"), ("heun", "flow")):
    SAMPLING += [(solver, objective, way) for way in ("bfloat16", "interval", "guide", "pixels")]


@pytest.mark.parametrize("solver, objective, way", SAMPLING)
def test_sampling_keeps_to_the_gpu(fake_gpu, solver, objective, way):
    model = build(learn_sigma=objective == "diffusion").eval()
    guide = build(learn_sigma=objective == "diffusion").eval() if way == "guide" else None
    if way == "bfloat16":
        model.store_bfloat16()
    autoencoder = Pixels(4) if way == "pixels" else build_vae()
    options = dict(sampler=solver, steps="6", cfg_scale=4.0)
    if way == "interval":
        options["cfg_interval"] = (0.5, 3.0)
    sampler = Sampler(model, create_process(OBJECTIVES[objective]), autoencoder, GPU, options, guide)
    images = sampler.sample([1, 2, 3])
    assert images.shape == ((3, 4, 8, 8) if way == "pixels" else (3, 3, 16, 16))


EVERYTHING = "--precision bf16 --residual-dtype bf16 --grad-checkpointing --grad-accum-steps 2 --clip-grad 1"


@pytest.mark.parametrize("options", ["255", "0 --shard", f"0 --shard {EVERYTHING}"])
def test_a_step_among_256_processes(options):
    command = [sys.executable, str(ROOT / "tests" / "many_processes.py"), *options.split()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    counts = re.search(r"took 2 steps; parameters here (\d+) of (\d+)", found.stdout)
    here, whole = map(int, counts.groups())
    # Every tensor is cut into 256 equal parts, the last of them padded:
    assert here == whole if "--shard" not in options else whole / 256 <= here < whole / 32
