"""The scripts that make the documents' tables of samplers and variants, with next to nothing to train."""

import json

import pytest
import torch
from conftest import build_tiny, load_rule_weights
from test_train import SMALL, run

from experiments import digits, samplers, variants
from runtime.cli import launch
from sampler import Sampler


@pytest.fixture(scope="module")
def judge():
    return digits.Judge()


@pytest.fixture
def trained(monkeypatch):
    """Trainings of the experiments take two steps, in this process."""

    def train(folder, *options, seed=0):
        run(
            *SMALL,
            "--results-dir",
            folder,
            *options,
            "--global-seed",
            seed,
            "--max-steps",
            2,
            "--sample-every",
            0,
        )
        return "", 1.0, str(folder / "000-DiT-S-2" / "checkpoints" / "0000002.pt")

    monkeypatch.setattr(samplers, "train", lambda folder, *options: train(digits.Path(folder), *options))
    monkeypatch.setattr(
        variants, "train", lambda folder, *options, seed: train(digits.Path(folder), *options, seed=seed)
    )


def make(module, monkeypatch, folder, *argv):
    argv = [f"{module.__name__}.py", *argv, "--per-class", "2", "--out", str(folder)]
    monkeypatch.setattr("sys.argv", argv)
    launch(module.main, module.build_parser())


def test_tables_of_samplers(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(samplers, "GUIDED", [("ddim", 2, None), ("dpm++", 2, (0.38, 3.22))])
    monkeypatch.setattr(samplers, "STEPS", (1, 2))
    make(samplers, monkeypatch, tmp_path)
    rows, table = json.loads((tmp_path / "guidance.json").read_text()), (tmp_path / "guidance.md").read_text()
    assert [row["cfg_scale"] for row in rows] == [1.0, 1.5, 2.0, 4.0, 1.5, 2.0, 4.0]
    interval = next(row for row in rows if row["cfg_interval"] and row["cfg_scale"] == 2.0)
    assert f"{interval['distance']:.2f}, {100 * interval['read']:.1f} %" in table
    assert (
        "| `dpm++`, 2, guided in an interval |  | " in table and "500 real digits to the others: 0.3" in table
    )
    rows, table = json.loads((tmp_path / "steps.json").read_text()), (tmp_path / "steps.md").read_text()
    assert [row["sampler"] for row in rows if row["model"] == "flow"][::2] == [
        "ddim", "dpm++", "euler", "heun", "sde",
    ]  # fmt: skip
    assert table.count("| cosine |") == table.count("| linear |") == 5 and "| flow | `sde` |" in table


def test_table_of_variants(tmp_path, trained, monkeypatch):
    make(variants, monkeypatch, tmp_path, "--only", "adaln-zero", "adaln", "--seeds", "2")
    rows, table = json.loads((tmp_path / "variants.json").read_text()), (tmp_path / "variants.md").read_text()
    assert [(row["name"], row["seed"]) for row in rows] == [
        ("adaln-zero", 0), ("adaln", 0), ("adaln-zero", 1), ("adaln", 1),
    ]  # fmt: skip
    with torch.device("meta"):
        model = build_tiny(hidden_size=32, depth=1, num_heads=2, in_channels=1, block="adaln")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"| {trainable:,} |" in next(line for line in table.splitlines() if "`--block adaln`" in line)
    assert table.splitlines()[2].startswith("| nothing else |") and table.splitlines()[2].endswith("| 1.00 |")


def test_the_judge(judge):
    """Real digits are read and close; noise is neither, and neither are legible copies of one."""
    real, labels = judge.real, digits.Digits().labels
    assert judge.accuracy > 0.97 and judge.read(real, labels) > 0.99
    assert judge.distance(real) == pytest.approx(0, abs=1e-6) and 0.25 < judge.real_distance() < 0.45
    one = real[labels == 3]
    assert judge.read(one, 3) > 0.99 and judge.distance(one) > 5
    model = load_rule_weights(build_tiny(in_channels=1, num_classes=10), 0.1)
    found = judge.measure(Sampler(model, device="cpu"), 3, steps=2)
    assert found["read"] < 0.5 and found["distance"] > 5 and found["seconds"] > 0
