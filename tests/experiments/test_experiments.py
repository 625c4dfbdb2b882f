"""The scripts that make the documents' tables of samplers and variants, with next to nothing to train."""

import json

import pytest
import torch
from conftest import build_tiny, load_rule_weights
from images import stack, write_image
from in_process import SMALL, command, run
from networks import save_tiny

import extract_features
from experiments import digits, latents, neighbours, samplers, variants
from runtime.autoencoder import load_autoencoder
from runtime.cli import launch
from sampler import Sampler
from training.dataset import open_dataset


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


def test_neighbours():
    """The nearest of some images, mirrored or not, by hand; and an image does not count as its own."""
    real = torch.zeros(3, 1, 2, 2)
    real[1, 0, 0, 0] = real[2, 0, 1] = 1.0
    images = torch.zeros(1, 1, 2, 2)
    images[0, 0, 0, 1] = 0.6  # the mirror image of real[1], but for 0.4 in one of four pixels
    distances, indices = neighbours.nearest(images, real, flips=True)
    assert indices.tolist() == [[1, 0]]
    assert distances[0].tolist() == pytest.approx([255 * 0.4 / 2, 255 * 0.6 / 2])
    distances, indices = neighbours.nearest(images, real, flips=False)
    assert indices.tolist() == [[0, 1]] and distances[0, 1] == pytest.approx(255 * (1 + 0.36) ** 0.5 / 2)
    distances, indices = neighbours.nearest(real, real, flips=True, itself=torch.arange(3))
    assert indices[:, 0].tolist() == [1, 0, 0]
    assert distances[:, 0].tolist() == pytest.approx([255 / 2, 255 / 2, 255 * 2**0.5 / 2])


def test_neighbours_of_a_run(tmp_path, monkeypatch):
    """A model that was hardly trained is far from its photographs, and what is found is drawn and told."""
    for i in range(6):
        write_image(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", seed=i)
    options = [*SMALL, "--dataset", "folder", "--data-path", tmp_path / "photos", "--global-batch-size", 2]
    run(*options, "--max-steps", 2, "--sample-every", 0, "--results-dir", tmp_path)
    (path,) = tmp_path.glob("000-*/checkpoints/*.pt")
    argv = [
        "--ckpt",
        path,
        "--data-path",
        tmp_path / "photos",
        "--num-samples",
        12,
        "--out",
        tmp_path / "found",
    ]
    monkeypatch.setattr("sys.argv", ["neighbours.py", *map(str, argv)])
    launch(neighbours.main, neighbours.build_parser())
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["samples"]["count"] == 12 and found["real"]["count"] == 6 and len(found["shown"]) == 10
    assert found["real"]["median"] > 20 and min(map(min, found["shown"])) > 20
    assert (tmp_path / "found.png").exists()


@pytest.mark.slow
def test_latents(tmp_path, monkeypatch):
    """Statistics and distances of an autoencoder that is nearly nothing."""
    for i in range(80):
        write_image(tmp_path / "images" / "ab"[i % 2] / f"{i:03d}.png", size=(16, 16), seed=i)
    vae = save_tiny(tmp_path / "vae")
    command(extract_features, "--data-path", tmp_path / "images", "--vae", vae, "--image-size", 16,
            "--features-path", tmp_path / "features", "--num-workers", 0)  # fmt: skip
    command(latents, "--data-path", tmp_path / "images", "--feature-path", tmp_path / "features",
            "--seeds", 1, "--max-steps", 2, "--num-samples", 40, "--num-images", 80,
            "--out", tmp_path)  # fmt: skip
    found = json.loads((tmp_path / "latents.json").read_text())
    dataset, vae = open_dataset("folder", str(tmp_path / "images"), 16), load_autoencoder(vae, "cpu")
    images = stack(dataset, range(80))
    again = vae.decode(vae.encode(images, None)).clamp(-1, 1)
    errors = ((images - again) * 127.5).square().mean((1, 2, 3))  # of levels of 255
    assert found["psnr"]["mean"] == pytest.approx(
        (20 * torch.log10(255 / errors.sqrt())).mean().item(), rel=1e-4
    )
    assert found["latents"]["channel"]["std"] == pytest.approx([1] * 4, abs=0.05)  # of the mirror images too
    assert max(found["latents"]["scale"]["std"]) < 0.9
    assert len(found["distances"]["scale"]) == len(found["distances"]["channel"]) == 1
    assert "| `channel` |" in (tmp_path / "latents.md").read_text()
    for name in ("again.png", "channel-0.png"):
        assert (tmp_path / name).stat().st_size
