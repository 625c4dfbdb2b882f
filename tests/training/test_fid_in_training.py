"""train.py --fid-ref: FID of the averaged weights' samples while training; the best are kept."""

import itertools
import json
import os
import re
import signal

import forked
import in_process
import numpy as np
import pytest
import torch
from conftest import ROOT
from forked import finish, rows, start, start_two, wait_for_step
from in_process import SMALL
from networks import Tiny, use_tiny

from checkpointing import files as checkpoints
from evaluation import inception
from evaluation.metrics import frechet_distance
from sampler import Sampler

ARGV = [*SMALL, "--max-steps", 24, "--ckpt-every", 10, "--eval-every", 4, "--sample-every", 0,
        "--ema-decay", "0.5", "--lr", "1e-2", "--fid-samples", 70]  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Statistics of the digits by the tiny network."""
    digits = np.load(ROOT / "assets" / "digits.npz")["images"]
    pooled, _ = Tiny()(inception.to_bytes(torch.from_numpy(digits)[:, None] / 16))
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    np.savez(path, mu=pooled.double().mean(0), sigma=np.cov(pooled.double().T))
    return path


def run(folder, reference, *argv, before=use_tiny, **options):
    return forked.run(folder, *ARGV, "--fid-ref", reference, *argv, before=before, **options)


def fids(folder):
    return {row["step"]: row["FID-70"] for row in rows(folder) if "FID-70" in row}


def best_of(folder):
    return checkpoints.load(str(folder / "checkpoints" / "best.pt")).contents


@pytest.fixture(scope="module")
def straight(tmp_path_factory, reference):
    return run(tmp_path_factory.mktemp("straight"), reference)


def test_fid_is_logged_and_the_best_is_kept(straight, reference):
    folder, printed = straight
    values, best = fids(folder), best_of(folder)
    assert list(values) == [4, 8, 12, 16, 20, 24] and len(set(values.values())) == 6
    step = min(values, key=values.get)
    assert best["step"] == step and best["fid"]["value"] == values[step] and "opt" not in best
    assert f"(step={step:07d}) FID-70: {values[step]:.4f}, the best so far" in printed
    assert best["fid"]["settings"]["count"] == 70

    # It is the FID of what the kept weights sample:
    sampler = Sampler.from_checkpoint(str(folder / "checkpoints" / "best.pt"), device="cpu")
    pooled, _ = Tiny()(inception.to_bytes(sampler.sample(70, seeds=0)))
    with np.load(reference) as file:
        of_samples = pooled.double().mean(0), np.cov(pooled.double().T)
        again = frechet_distance(file["mu"], file["sigma"], *of_samples)
    assert again == pytest.approx(values[step], rel=1e-3)


def print_what_is_sampled():
    use_tiny()
    sample = inception.SampleFID._sample

    def printing(self, sampler, *share):
        print("sampled in", sampler.model.block_dtype, id(sampler.model))
        return sample(self, sampler, *share)

    inception.SampleFID._sample = printing


def test_a_run_in_bfloat16_is_sampled_in_it(straight, tmp_path, reference):
    """By one copy of the average, which follows it."""
    argv = ["--precision", "bf16", "--max-steps", 8]
    folder, printed = run(tmp_path, reference, *argv, before=print_what_is_sampled)
    found = re.findall(r"sampled in (\S+ \d+)", printed)
    assert len(found) == 2 and len({*found}) == 1 and "torch.bfloat16" in found[0]
    alone = fids(straight[0])
    assert fids(folder) == pytest.approx({4: alone[4], 8: alone[8]}, rel=0.05)
    assert best_of(folder)["ema"]["blocks.0.mlp.fc1.weight"].dtype == torch.float32


def test_two_processes_share_the_samples(straight, tmp_path, reference):
    """Trained by two the weights differ by rounding; and shards are gathered for it."""
    alone = fids(straight[0])
    for name, more in (("plain", []), ("shard", ["--shard"])):
        (tmp_path / name).mkdir()
        folder, _ = run(tmp_path / name, reference, "--max-steps", 8, *more, runs=start_two)
        assert fids(folder) == pytest.approx({4: alone[4], 8: alone[8]}, rel=0.02)
        assert best_of(folder)["step"] == min((4, 8), key=alone.get)


def test_a_killed_run_ends_with_the_same_best(straight, tmp_path, reference):
    argv = [*ARGV, "--fid-ref", reference, "--results-dir", tmp_path]
    process = start(argv, tmp_path / "out", before=use_tiny)
    wait_for_step(tmp_path / "000-DiT-S-2", 17, [process])
    process.kill()
    finish(process)
    folder, printed = run(tmp_path, reference)
    assert "Continuing after step 10" in printed
    assert fids(folder) == fids(straight[0])
    best, expected = best_of(folder), best_of(straight[0])
    assert best["step"] == expected["step"] and best["fid"]["value"] == expected["fid"]["value"]
    assert all(torch.equal(best["ema"][key], value) for key, value in expected["ema"].items())


def ask_to_stop_in_a_fid():
    use_tiny()
    sample, calls = inception.SampleFID._sample, itertools.count(1)

    def signalled(*args):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*args)

    inception.SampleFID._sample = signalled


def test_a_fid_is_cut_off(straight, tmp_path, reference):
    """By a signal, and computed when the run continues."""
    folder, printed = run(tmp_path, reference, before=ask_to_stop_in_a_fid)
    assert list(fids(folder)) == [4] and "Stopped after step 8, saved" in printed
    run(tmp_path, reference)
    assert fids(folder) == fids(straight[0])


def test_what_is_refused(tmp_path, reference, monkeypatch, capsys, straight):
    monkeypatch.setattr(inception.Inception, "sizes", Tiny.sizes)
    monkeypatch.setattr("training.resolve.open_training_data", lambda *_: pytest.fail("work was begun"))
    np.savez(tmp_path / "images.npz", np.zeros((5, 8, 8, 3), np.uint8))
    for argv, message in (
        (["--fid-ref", reference, "--eval-every", 0], "digits.npz: --eval-every says how often; give both"),
        (["--fid-ref", reference, "--fid-samples", 1], "--fid-samples 1: must be at least 2"),
        (["--fid-ref", "no.npz"], "--fid-ref no.npz: no such file"),
        (
            ["--fid-ref", tmp_path / "images.npz"],
            "images.npz: no statistics in it (mu, sigma); make one with",
        ),
        (["--any-weights"], "--any-weights: only --fid-ref needs the Inception network; give both"),
        (["--inception-weights", "x"], "--inception-weights: only --fid-ref needs the Inception network"),
    ):
        with pytest.raises(SystemExit):
            in_process.run(*ARGV, *argv, "--results-dir", tmp_path / "results")
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "results").exists()

    monkeypatch.undo()
    best = straight[0] / "checkpoints" / "best.pt"
    with pytest.raises(SystemExit):
        in_process.run(*ARGV, "--results-dir", tmp_path, "--resume", best)
    assert "best.pt: holds averaged weights alone; give a numbered checkpoint" in capsys.readouterr().err
    assert json.loads((straight[0] / "args.json").read_text())["fid_samples"] == 70
