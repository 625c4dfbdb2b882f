"""What only a GPU can show: run with python -m pytest -m gpu tests."""

import copy
import json
import sys

import pytest
import torch
from conftest import build_tiny, load_rule_weights

import benchmark
import train
from benchmark import BenchmarkConfig
from runtime.cli import launch
from runtime.distributed import Distributed, set_precision
from sampler import Sampler

pytestmark = pytest.mark.gpu
LABELS = [0, 3, 7]


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device("cuda", 0)
    set_precision("fp32", device)
    return device


def build_sampler(device, **options):
    model = load_rule_weights(build_tiny(in_channels=3, learn_sigma=False), 0.1)
    return Sampler(copy.deepcopy(model), device=device, defaults=dict(steps="8", cfg_scale=2.0), **options)


@pytest.mark.parametrize("solver", ["ddpm", "dpm++"])
def test_images_are_those_of_the_cpu(gpu, solver):
    on_cpu = build_sampler("cpu").sample(LABELS, sampler=solver, steps=8)
    on_gpu = build_sampler(gpu).sample(LABELS, sampler=solver, steps=8)
    assert on_cpu.std() > 0.1
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-4, rtol=0)


def test_recorded_steps_are_the_plain_ones(gpu):
    options = dict(cfg_interval=(0.5, 3.0))  # which takes turns between two shapes
    plain = build_sampler(gpu).sample(LABELS, **options)
    recorded = build_sampler(gpu, cuda_graphs=True)
    for _ in range(2):  # recording, then replaying alone
        torch.testing.assert_close(recorded.sample(LABELS, **options), plain, atol=1e-4, rtol=0)
    assert len(recorded.network.recorded) == 2


def test_no_step_waits_for_the_gpu(gpu):
    processes, config = Distributed(0, 1, gpu), BenchmarkConfig("DiT-S/8", 64, 4, "bf16")
    training = benchmark.training(config, processes)
    sampler = benchmark.sampling(config, processes).subject
    options = sampler.settle(labels=LABELS, cfg_scale=2.0, steps="4")

    def forbid(state=None):  # from the first step on, which copies the tables
        torch.cuda.set_sync_debug_mode("error")

    training.run(2)
    try:
        forbid()
        training.run(2)
        torch.cuda.set_sync_debug_mode("default")
        sampler.generate(range(3), LABELS, options, callback=forbid)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train_digits(monkeypatch, folder, *argv):
    """The rows of metrics.jsonl of a run of the digits in this folder."""
    argv = ["train.py", "--preset", "digits", "--log-every", "20", "--results-dir", str(folder), *argv]
    monkeypatch.setattr(sys, "argv", argv)
    launch(train.main, train.build_parser())
    rows = (folder / "000-DiT-S-2-digits" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows]


def test_training_with_everything_on(gpu, monkeypatch, tmp_path):
    argv = ["--max-steps", "60", "--precision", "bf16", "--compile", "--grad-checkpointing"]
    rows = train_digits(monkeypatch, tmp_path, *argv)
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_continued_run_has_the_same_losses(gpu, monkeypatch, tmp_path, precision):
    argv = ["--max-steps", "60", "--ckpt-every", "20", "--precision", precision, "--compile"]
    whole = [row["loss"] for row in train_digits(monkeypatch, tmp_path, *argv)]
    middle = tmp_path / "000-DiT-S-2-digits" / "checkpoints" / "0000020.pt"
    again = [row["loss"] for row in train_digits(monkeypatch, tmp_path, *argv, "--resume", str(middle))]
    assert len(whole) == 3 and again == whole


def test_training_in_fp8(gpu, monkeypatch, tmp_path):
    pytest.importorskip("torchao")
    argv = ["--max-steps", "40", "--compile", "--residual-dtype", "bf16", "--precision"]
    losses = {}
    for precision in ("bf16", "fp8"):
        rows = train_digits(monkeypatch, tmp_path / precision, *argv, precision)
        losses[precision] = rows[-1]["loss"]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.05)


def test_latents_encoded_in_bfloat16(gpu):
    vae, images = benchmark.build_vae(gpu), torch.rand(2, 3, 128, 128, device=gpu) * 2 - 1
    exact = vae.moments(images)[:, :4]
    vae.encode_in("bf16", compile=True)
    error = (vae.moments(images)[:, :4] - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.03


def test_benchmark(gpu, monkeypatch, tmp_path):
    out = tmp_path / "benchmark.json"
    argv = ["--model", "DiT-S/2", "--batch", "32", "--against", "--compile", "--cuda-graphs",
            "--precision", "bf16", "--repeats", "2", "--seconds", "0.2", "--out", str(out)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *argv])
    launch(benchmark.main, benchmark.build_parser())
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 8 and all(row["images_per_sec"] > 0 for row in rows)
    assert rows[2]["ratio"] > 1  # compiled bf16 against the published way
