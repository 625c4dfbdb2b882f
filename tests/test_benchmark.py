"""benchmark.py: what it times is the real work, by both ways, and what it says of it adds up."""

import json
import os
import sys
from dataclasses import replace

import pytest
import torch

import benchmark
from benchmark import BenchmarkConfig
from diffusion import create_diffusion
from models import DiT_models
from runtime.cli import launch
from runtime.distributed import Distributed
from runtime.flops import count_macs
from training.run_log import memory_gib, restart_peak_memory

CPU = Distributed(0, 1, torch.device("cpu"))
SMALL = BenchmarkConfig("DiT-S/8", 64, 3, "fp32")
SIZES = ["--model", "DiT-S/8", "--image-size", 64, "--batch", 3]
BRIEF = ["--repeats", 2, "--seconds", 0.01, "--num-workers", 0]


def measure(monkeypatch, tmp_path, *argv):
    out = tmp_path / "benchmark.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, [*argv, "--out", out])])
    launch(benchmark.main, benchmark.build_parser())
    return json.loads(out.read_text())


def test_the_published_way_computes_the_same():
    ours = benchmark.sampling(SMALL, CPU).subject.model.eval()  # no label is dropped
    plain = benchmark.published_dit(SMALL, CPU.device).eval()
    plain.load_state_dict(ours.state_dict())
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999]), torch.tensor([0, 999, 1000])
    assert ours(x, t, y).std() > 0.1
    torch.testing.assert_close(plain(x, t, y), ours(x, t, y), atol=1e-5, rtol=1e-5)
    noise = torch.randn_like(x)
    losses = [process.training_losses(plain, x, t, dict(y=y), noise)["loss"]
              for process in (create_diffusion(""), benchmark.published_process(""))]  # fmt: skip
    assert torch.equal(*losses)


@pytest.mark.parametrize("build", [benchmark.training, benchmark.published_training])
def test_a_training_step_trains(build):
    torch.manual_seed(0)
    workload = build(SMALL, CPU)
    model, average = workload.subject.model, workload.subject.ema
    assert all(parameter.any() for parameter in model.parameters())
    trained = [i for i, p in enumerate(model.parameters()) if p.requires_grad]

    def weights(network):
        return [parameter.detach().clone() for parameter in network.parameters()]

    before = weights(model)
    workload.run(2)
    after, averages = weights(model), weights(average)
    assert all(not torch.equal(after[i], before[i]) for i in trained)
    trained_for = sum((after[i] - before[i]).abs().sum() for i in trained)
    share = sum((averages[i] - before[i]).abs().sum() for i in trained) / trained_for
    assert 0.5e-4 < share < 2e-4  # 1 - 0.9999, after the first step and the second


def test_numbers_add_up(monkeypatch, tmp_path, capsys):
    report = measure(monkeypatch, tmp_path, "--against", "--mode", "train", "sample", *SIZES, *BRIEF)
    rows, macs = report["rows"], count_macs(DiT_models["DiT-S/8"](input_size=8))
    assert [(row["mode"], row["way"]) for row in rows] == [
        ("train", "published"), ("train", "fp32"), ("sample", "published"), ("sample", "fp32"),
    ]  # fmt: skip
    for row in rows:
        passes = dict(train=3, sample=2)[row["mode"]]  # a backward pass is two; guidance runs two rows
        assert row["flops"] == 2 * macs * passes * 3
        assert len(row["windows"]) == 2 and row["memory_gib"] > 0
        median = sum(row["windows"]) / 2
        images = 3 / median / (250 if row["mode"] == "sample" else 1)
        assert row["images_per_sec"] == pytest.approx(images)
        assert row["of_matmul"] == pytest.approx(row["flops"] / median / report["matmul_flops"]["fp32"])
        assert 0 < row["of_matmul"] < 1.5
    assert rows[0]["ratio"] is None and rows[1]["ratio"] > 0
    printed = capsys.readouterr().out
    assert "train, DiT-S/8, 64 px, batch 3" in printed and f"{rows[3]['ratio']:.2f}" in printed


@pytest.mark.parametrize(
    "modes",
    [["images", "latents", "write"], pytest.param(["decode", "encode", "features"], marks=pytest.mark.slow)],
)
def test_every_stage(monkeypatch, tmp_path, modes):
    sizes = ["--image-size", 64, "--batch", 2, "--precision", "bf16"]
    report = measure(monkeypatch, tmp_path, "--mode", *modes, *sizes, *BRIEF)
    assert list(dict.fromkeys(row["mode"] for row in report["rows"])) == modes
    assert all(row["images_per_sec"] > 0 for row in report["rows"])
    for row in report["rows"]:
        assert row["mode"] in ("images", "latents", "write") or row["flops"] > 1e9


@pytest.mark.parametrize("mode", ["decode", "features"])
def test_these_never_run_in_bf16(mode):
    args = benchmark.build_parser().parse_args(["--precision", "bf16"])
    (variant,) = benchmark.list_variants(mode, replace(SMALL, precision="bf16"), args, ["bf16"], CPU.device)
    assert variant[1].precision == "fp32" and variant[0] in ("fp32", "")


@pytest.mark.parametrize("build", [benchmark.sampling, benchmark.published_sampling])
def test_windows_longer_than_the_process(build):
    """A fast GPU does more steps in a window than the process has."""
    workload = build(replace(SMALL, batch=1), CPU)
    model, calls = workload.subject.model, []
    model.t_embedder.register_forward_hook(lambda *call: calls.append(None))
    for block in model.blocks:
        block.forward = lambda x, c: x  # brief
    workload.run(1_001)
    assert len(calls) == 1_001


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux forgets a peak")
def test_the_peak_of_memory_restarts():
    restart_peak_memory(CPU.device)
    before, values = memory_gib(CPU.device), torch.ones(2**27)  # half a GiB
    del values
    assert memory_gib(CPU.device) > before + 0.4
    restart_peak_memory(CPU.device)
    assert memory_gib(CPU.device) < before + 0.1


@pytest.mark.slow
def test_numbers_of_processes(monkeypatch, tmp_path, capfd):
    report = measure(monkeypatch, tmp_path, "--mode", "train", *SIZES, *BRIEF, "--processes", 1, 2)
    one, two = report["rows"]
    assert (one["processes"], two["processes"]) == (1, 2) and "--processes" in report["command"]
    for row in report["rows"]:
        median = sum(row["windows"]) / 2
        assert row["images_per_sec"] == pytest.approx(3 * row["processes"] / median)
    assert f"2: {two['images_per_sec']:.3g}" in capfd.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--batch", "0"], "--batch 0: must be at least 1"),
        (["--image-size", "100"], "--image-size 100: must be a multiple of 64"),
        (["--repeats", "0"], "--repeats 0: must be"),
        (["--seconds", "-1"], "--seconds -1.0: must be"),
        (["--cuda-graphs"], "--cuda-graphs: needs a GPU"),
        (["--precision", "tf32"], "--precision tf32: cpu has none"),
        (["--out", "/nowhere/x.json"], "--out /nowhere/x.json: cannot be written"),
    ],
)
def test_bad_requests(monkeypatch, capsys, argv, message):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *argv])
    with pytest.raises(SystemExit) as stopped:
        launch(benchmark.main, benchmark.build_parser())
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
