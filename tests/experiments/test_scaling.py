"""experiments/scaling.py: what it makes once, and what it reads out of its numbers."""

import json

import numpy as np
import pytest

from evaluation.features import FEATURES
from experiments import scaling
from runtime.cli import UserError


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of digits in place of clothes, with two steps and twelve samples of a cell."""
    digits = dict(dataset="digits", image_size=8, max_steps=2, global_batch_size=4)
    monkeypatch.setattr(scaling, "TRAINING", scaling.TRAINING | digits)
    monkeypatch.setattr(scaling, "SAMPLES", 12)
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    networks = scaling.Networks({"classifier": FEATURES["pixels"]().load("cpu")}, images, subset_size=10)
    monkeypatch.setattr(scaling, "open_networks", lambda args: networks)
    monkeypatch.setattr(scaling, "real_distances", lambda *_: {})
    monkeypatch.setattr(scaling, "NETWORKS", ("classifier",))

    def run(*words):
        scaling.main(scaling.build_parser().parse_args(["--work", str(tmp_path), *words]))
        return json.loads((tmp_path / "seed-0" / "results.json").read_text())

    return run


def test_what_is_there_is_not_made_again(study, tmp_path, monkeypatch):
    first = study("--only", "S/4")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert files and (tmp_path / "seed-0" / "losses.csv").read_text().startswith("step,S/4\n2,")
    path = tmp_path / "seed-0" / "S-4" / "plain.npz"
    images = np.load(path)["arr_0"]
    path.unlink()
    (tmp_path / "seed-0" / "results.json").unlink()
    again = study("--only", "S/4")
    assert np.array_equal(np.load(path)["arr_0"], images)
    for results in (first, again):
        results["cells"]["S/4"]["distances"]["plain"].pop("seconds")
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")} == files
    monkeypatch.setattr(scaling, "PLAIN", scaling.PLAIN | dict(steps=9))
    with pytest.raises(UserError, match="results.json is of other settings; give another folder"):
        study("--only", "S/4")


def test_summary(tmp_path, monkeypatch):
    """Distances that fall as gflops^-1/2, but for one larger model that is further away."""
    args = scaling.build_parser().parse_args(["--work", str(tmp_path)])
    found = scaling.Results(tmp_path / "results.json", args)
    for i, cell in enumerate(scaling.CELLS):
        distance = 100.0 if cell == "XL/4" else 2.0 ** -(i / 2)
        distances = {network: dict(frechet=distance) for network in scaling.NETWORKS}
        found.cells[cell] = dict(gflops=2.0**i, parameters=1.0 + i % 4, distances=dict(plain=distances))
    found.summarize()
    summary = json.loads((tmp_path / "results.json").read_text())["summary"]["pixels"]
    assert summary["larger_not_nearer"] == [["L/4", "XL/4"]] and summary["larger_steps"] == 9
    assert summary["more_tokens_not_nearer"] == [["XL/7", "XL/4"]] and summary["more_tokens_steps"] == 8
    del found.cells["XL/4"]
    found.summarize()
    correlation = found.contents["summary"]["pixels"]["correlation_with_log_gflops"]
    assert correlation == pytest.approx(-1)
