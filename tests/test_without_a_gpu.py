"""What a GPU will need, as far as that shows without one: shards, precision, graphs, devices, memory."""

import copy
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from forked import losses, run, start_two
from in_process import QUICK
from torch.utils._python_dispatch import TorchDispatchMode

import train
from diffusion import create_diffusion, create_process
from diffusion.timestep_sampler import LossSecondMomentResampler
from models import DiT, DiT_models
from runtime.cli import UserError
from runtime.distributed import ALONE
from runtime.flops import datasheet_flops
from training.fp8 import convert_to_fp8
from training.memory import step_memory
from training.run_log import memory_gib, restart_peak_memory
from training.state import TrainingState

XL_2 = "DiT-XL/2"


def print_where_weights_are():
    """Those that a process builds, and those that its blocks multiply with, gathered as on a GPU."""
    from checkpointing import sharded
    from training.state import TrainingState

    sharded.gathers_bfloat16 = lambda precision, device: precision == "bf16"

    init = TrainingState.__init__

    def printing(self, args, model, *more):
        print("built on", {parameter.device.type for parameter in model.parameters()})
        init(self, args, model, *more)
        linear = self.model.blocks[0].mlp.fc1
        linear.register_forward_hook(lambda *_: print("multiplies", linear.weight.dtype))

    TrainingState.__init__ = printing


@pytest.mark.parametrize("precision, dtype", [("fp32", "torch.float32"), ("bf16", "torch.bfloat16")])
def test_shards_come_from_one_process_and_are_gathered_in_their_precision(tmp_path, precision, dtype):
    """The losses are those of whole weights at the same precision; only the main process builds the model."""
    argv = [*QUICK, "--max-steps", 4, "--depth", 2, "--precision", precision]
    whole, _ = run(tmp_path / "whole", *argv, runs=start_two)
    folder, printed = run(
        tmp_path / "shards", *argv, "--shard", runs=start_two, before=print_where_weights_are
    )
    np.testing.assert_allclose(losses(folder), losses(whole), rtol=1e-4 if precision == "fp32" else 2e-3)
    assert sorted(line for line in printed.splitlines() if "built" in line) == [
        "built on {'cpu'}", "built on {'meta'}",
    ]  # fmt: skip
    assert set(re.findall(r"multiplies (\S+)", printed)) == {dtype}


class NoWait(TorchDispatchMode):
    """Fails where a GPU would have to be waited for: a value is looked at, or decides a shape."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (
            torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
        ), function  # fmt: skip
        return function(*args, **(kwargs or {}))


def test_learned_timesteps_wait_for_no_gpu():
    """They are what one loss after the other gives, those of one step in any number, and NaN left out."""
    sampler = LossSecondMomentResampler(create_diffusion("6", learn_sigma=False), history_per_term=3)
    generator, history = torch.Generator().manual_seed(0), [[] for _ in range(6)]
    for _ in range(20):
        t = torch.randint(6, (16,), generator=generator)
        losses = torch.rand(16, generator=generator)
        losses[3] = torch.nan
        with NoWait():
            sampler.update_with_local_losses(t, losses)
            found = sampler.weights()
            sampler.sample(4, "cpu", generator)
        for step, loss in zip(t.tolist(), losses.tolist()):
            history[step] += [loss] if math.isfinite(loss) else []
        expected = np.ones(6)
        if min(map(len, history)) >= 3:
            expected = np.sqrt([np.mean(np.square(losses[-3:])) for losses in history])
            expected = expected / expected.sum() * (1 - 0.001) + 0.001 / 6
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    again = LossSecondMomentResampler(create_diffusion("6", learn_sigma=False), history_per_term=3)
    again.load_state_dict(sampler.state_dict())
    assert torch.equal(again.weights(), found)


def count_graphs():
    """Compile the blocks by a backend that prints a line for every graph, rather than by a compiler."""
    from functools import partial

    from torch._dynamo.backends.common import aot_autograd

    def counting(way, graph, inputs):
        print("graph", way)
        return graph

    backend = aot_autograd(
        fw_compiler=partial(counting, "forward"), bw_compiler=partial(counting, "backward")
    )
    compile_module = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **options: compile_module(self, **options, backend=backend)


def test_a_compiled_block_is_one_graph_under_ddp(tmp_path):
    argv = [*QUICK, "--max-steps", 2, "--hidden-size", 384, "--compile"]
    _, printed = run(tmp_path, *argv, runs=start_two, before=count_graphs)
    # A block each of two processes, large enough to be cut at the buckets of gradients:
    for way in ("forward", "backward"):
        assert printed.count(f"graph {way}") == 2, printed


def test_a_gpu_is_known_by_its_form():
    rates = {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 836e12,
        "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "Some GPU": None,
    }  # fmt: skip
    assert {name: datasheet_flops(name, "bf16") for name in rates} == rates


def test_fp8_rounds_the_blocks_large_layers_alone():
    """Emulated, as a device with fp8 would: other numbers, near enough; the same names, float32 weights."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=64, depth=2, num_heads=4, num_classes=10)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    rounded = copy.deepcopy(model)
    convert_to_fp8(rounded.blocks, emulate=True)
    assert {name: (value.shape, value.dtype) for name, value in rounded.state_dict().items()} == {
        name: (value.shape, value.dtype) for name, value in model.state_dict().items()
    }
    found = []
    for network, bf16 in ((model, False), (model, True), (rounded, True)):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = network(torch.ones(4, 4, 8, 8), torch.arange(4.0), torch.arange(4), torch.zeros(4))
        out.square().mean().backward()
        found.append((out.detach(), network.blocks[0].mlp.fc1.weight.grad.clone()))
    exact, *others = found
    (out_bf16, gradient_bf16), (out_fp8, gradient_fp8) = (
        [(value - right).norm() / right.norm() for value, right in zip(values, exact)] for values in others
    )
    assert out_bf16 < out_fp8 < 0.01 and gradient_bf16 < 0.01 < gradient_fp8 < 0.1
    assert any("Float8" in type(layer).__name__ for layer in rounded.modules())
    assert type(rounded.blocks[0].adaLN_modulation[1]) is torch.nn.Linear


@pytest.mark.parametrize("argv, message", [
    (["--precision", "fp8"], "--precision fp8: cpu has none, as GPUs have from Ada and Hopper on; use bf16"),
    (["--residual-dtype", "bf16"], "--residual-dtype bf16: --precision is fp32; give --precision bf16 too"),
])  # fmt: skip
def test_precisions_that_cannot_be(tmp_path, argv, message):
    _, printed = run(tmp_path, *QUICK, *argv, expect=2)
    assert message in printed


def hide_torchao():
    sys.modules["torchao"] = sys.modules["torchao.float8"] = None


def test_fp8_without_its_library(tmp_path):
    """A plan for other machines too says what they need."""
    argv = ["--precision", "fp8", "--dry-run", "--world-size", "1", "--resume", "never"]
    _, printed = run(tmp_path, *QUICK, *argv, before=hide_torchao, expect=2)
    assert "--precision fp8: torchao is not installed; uv sync --group fp8" in printed


@pytest.mark.parametrize("parts", ["1", "2"])
def test_gradients_exchanged_in_bfloat16(tmp_path, parts):
    argv = [*QUICK, "--grad-accum-steps", parts]
    whole, _ = run(tmp_path / "whole", *argv, runs=start_two)
    folder, _ = run(tmp_path / "bf16", *argv, "--grad-compression", "bf16", runs=start_two)
    np.testing.assert_allclose(losses(folder), losses(whole), rtol=2e-3)
    norms = [losses(name, "grad_norm") for name in (folder, whole)]
    assert norms[0] != norms[1]
    np.testing.assert_allclose(*norms, rtol=5e-3)
    # By one process: of two, the other may still be joining when the first has refused and is gone.
    argv += ["--grad-compression", "bf16", "--shard", "--dry-run", "--world-size", "2"]
    _, printed = run(tmp_path / "shard", *argv, expect=2)
    assert "--grad-compression bf16: --shard sums gradients in float32; leave one out" in printed


def rename_the_device():
    from training import run

    run.device_name = lambda device: "Another Processor"


def test_sharded_blocks_with_norms_of_their_own_in_bf16(tmp_path):
    argv = [*QUICK, "--max-steps", 2, "--precision", "bf16", "--block", "in-context"]
    whole, _ = run(tmp_path / "whole", *argv, runs=start_two)
    folder, _ = run(tmp_path / "shards", *argv, "--shard", runs=start_two)
    np.testing.assert_allclose(losses(folder), losses(whole), rtol=2e-3)


def test_another_device_is_said(tmp_path):
    """Its random numbers may be others: a run that is continued there is not the same to the bit."""
    argv = [*QUICK, "--ckpt-every", 4]
    run(tmp_path, *argv)
    last = tmp_path / "000-DiT-S-2" / "checkpoints" / "0000008.pt"
    _, printed = run(tmp_path, *argv, "--resume", last, before=rename_the_device)
    assert "Continuing after step 8" in printed and "; now on Another Processor (was " in printed


# What a fake GPU held in a step of DiT-XL/2, GiB: --precision, images, pixels, checkpointed, parts
MEASURED = {
    ("bf16", 32, 256, False, 1): 23.3, ("bf16", 32, 256, True, 1): 13.1, ("tf32", 32, 256, False, 1): 30.0,
    ("tf32", 32, 256, True, 1): 13.4, ("bf16", 256, 256, False, 1): 107.5, ("bf16", 256, 256, True, 1): 22.0,
    ("bf16", 256, 256, False, 4): 37.9, ("bf16", 32, 512, False, 1): 59.4, ("tf32", 32, 512, False, 1): 89.7,
}  # fmt: skip


@pytest.mark.parametrize("case", MEASURED)
def test_estimated_memory_of_a_gpu(case):
    precision, images, pixels, checkpointed, parts = case
    args = parse(
        "--model", XL_2, "--precision", precision, "--grad-accum-steps", parts,
        "--grad-checkpointing" if checkpointed else "--no-grad-checkpointing",
    )  # fmt: skip
    config = dict(DiT_models[XL_2].keywords, input_size=pixels // 8)
    found = sum(step_memory(args, config, dict(learn_sigma=True), images).values())
    assert found / 2**30 == pytest.approx(MEASURED[case], rel=0.1)


def parse(*argv):
    return train.build_parser().parse_args([*map(str, argv)])


def train_and_print_the_peak(model, images):
    """Two steps of train.py's own, in this process; the memory that they took at most, GiB."""
    args = parse(
        "--model", model, "--global-batch-size", images, "--num-classes", 1000, "--precision", "fp32"
    )

    def two_steps(images, **config):
        state = TrainingState(
            args, DiT_models[model](**config), create_process(dict(learn_sigma=True)), ALONE
        )
        args.global_batch_size = images
        batch = torch.zeros(images, 4, 32, 32), torch.zeros(images, dtype=torch.long)
        for _ in range(2):
            train.train_step(state, *batch, args, lambda images, noise: images)

    two_steps(2, depth=1, hidden_size=48, num_heads=1)  # loads the libraries
    restart_peak_memory(ALONE.device)
    before = memory_gib(ALONE.device)
    two_steps(images)
    print("peak", memory_gib(ALONE.device) - before)


@pytest.mark.slow  # and by the memory that the machine says is held, which one short of memory takes back
@pytest.mark.parametrize("model, images", [("DiT-S/2", 32), ("DiT-B/2", 8)])
def test_estimated_memory_is_what_a_step_takes(model, images):
    """On the CPU, with an allocator that gives back what is freed."""
    code = f"import test_without_a_gpu as test; test.train_and_print_the_peak({model!r}, {images})"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "MALLOC_MMAP_THRESHOLD_": "65536"},
    ).stdout  # fmt: skip
    measured = float(printed.split("peak ")[1])
    args = parse("--model", model, "--precision", "fp32")
    estimated = sum(step_memory(args, DiT_models[model].keywords, dict(learn_sigma=True), images).values())
    assert estimated / 2**30 == pytest.approx(measured, rel=0.15)


def test_the_plan_of_eight_gpus(tmp_path, monkeypatch, capsys):
    """The paper's run on cards of 24 GiB, seen from a laptop: too much, and what would take less."""
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset", "cifar10", "--image-size", 32, "--vae", "none", "--model", XL_2, "--dry-run"]
    train.main(parse(*argv, "--world-size", 8, "--device-memory", 24))
    printed = capsys.readouterr().out
    needed = float(re.search(r"memory +([\d.]+) GiB on each GPU", printed)[1])
    less = re.search(r"than the 24.0 GiB there are; give --grad-checkpointing \(([\d.]+) GiB", printed)
    assert needed == pytest.approx(30.0 + 2 + 2.5, rel=0.1)  # of 32 images, float32; CUDA, exchange
    assert float(less[1]) == pytest.approx(13.4 + 2 + 2.5, rel=0.1)
    assert "--shard (" in printed and "a step on 8 x A100" in printed
    train.main(parse(*argv, "--world-size", 8, "--precision", "auto"))
    assert "on 8 process(es) in bf16" in capsys.readouterr().out
    with pytest.raises(UserError, match="--world-size: only with --dry-run"):
        train.main(parse(*argv[:-1], "--world-size", 8))
