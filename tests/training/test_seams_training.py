"""An optimizer and auxiliary losses of one's own: a function or class and a row, from outside."""

import json
import os
import signal

import forked
import numpy as np
import pytest
import torch
from forked import rows, start, start_two
from in_process import SMALL, assert_refused

import train
from checkpointing import files as checkpoints
from training.aux_losses import AUX_LOSSES
from training.optimizers import OPTIMIZERS

ARGV = [*SMALL, "--max-steps", 6, "--sample-every", 0, "--ckpt-every", 3]


def add_lion():
    """An optimizer whose state has none of AdamW's names: 11 lines in training/optimizers.py."""

    class Lion(torch.optim.Optimizer):
        def __init__(self, parameters, lr):
            super().__init__(parameters, dict(lr=lr))

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    p -= group["lr"] * (0.9 * momentum + 0.1 * p.grad).sign()
                    momentum.mul_(0.99).add_(p.grad, alpha=0.01)

    OPTIMIZERS["lion"] = lambda parameters, args: Lion(parameters, args.lr)


def add_aux_losses():
    """A function, and a head with weights: 9 lines in training/aux_losses.py."""

    class PredictX(torch.nn.Module):
        """The mean of every patch's pixels, from its token."""

        def __init__(self, hidden_size):
            super().__init__()
            self.head = torch.nn.Linear(hidden_size, 1)

        def forward(self, features, batch):
            patches = torch.nn.functional.avg_pool2d(batch["x_start"], 2).flatten(1)
            return (self.head(features)[..., 0] - patches).square().mean(1)

    AUX_LOSSES["predict-x"] = PredictX
    AUX_LOSSES["small"] = lambda features, batch: features.float().square().mean((1, 2))


def stop_before_the_last_save():
    """As a kill after the fifth step: what the third one saved is gone on from."""
    from training.run import Run

    save = Run.save

    def killed(self, state):
        if state.step > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, state)

    Run.save = killed


def run(folder, *argv, **options):
    return forked.run(folder, *ARGV, *argv, **options)[0]


def load(folder, step=6):
    (path,) = (folder / "checkpoints").glob(f"{step:07d}*")
    return checkpoints.load(str(path)).contents


def assert_same(one, two):
    """Contents of checkpoints, to the bit."""
    for part in ("model", "ema", "aux_loss"):
        for name, value in one.get(part, {}).items():
            assert torch.equal(value, two[part][name]), name
    for i, state in one["opt"]["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(two["opt"]["state"][i][key])), key


OPTIONS = [
    (add_lion, ["--optimizer", "lion", "--lr", "1e-3"]),
    (add_aux_losses, ["--aux-loss", "predict-x", "--aux-layer", "1"]),
]


class Together:
    """Two functions called one after the other, in another process."""

    def __init__(self, *calls):
        self.calls = calls

    def __call__(self):
        for call in self.calls:
            call()


@pytest.mark.parametrize("add, argv", OPTIONS)
@pytest.mark.parametrize("runs, more", [(start, []), (start_two, ["--shard"])])
def test_a_row_trains_and_resumes(tmp_path, add, argv, runs, more):
    """Killed and continued, it ends with the bits of a run that was not, plain and in shards."""
    straight = load(run(tmp_path / "straight", *argv, *more, runs=runs, before=add))
    killed = Together(add, stop_before_the_last_save)
    folder = run(tmp_path / "killed", *argv, *more, runs=runs, before=killed, expect=-signal.SIGKILL)
    assert len(list((folder / "checkpoints").glob("*"))) == 1
    run(tmp_path / "killed", *argv, *more, runs=runs, before=add)
    assert_same(straight, load(folder))
    start_of_run = load(folder, 3)
    assert start_of_run["step"] == 3 and straight["step"] == 6


def test_two_processes_and_parts_are_one(tmp_path):
    """The gradients of an auxiliary head are exchanged and added up as the model's."""
    argv = ["--aux-loss", "predict-x", "--global-batch-size", 32]
    alone = run(tmp_path / "one", *argv, before=add_aux_losses)
    two = run(tmp_path / "two", *argv, "--grad-accum-steps", 2, runs=start_two, before=add_aux_losses)
    for name in ("loss", "aux"):
        found, expected = ([row[name] for row in rows(folder) if name in row] for folder in (two, alone))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for part in ("model", "aux_loss"):
        for name, value in load(alone)[part].items():
            torch.testing.assert_close(load(two)[part][name], value, atol=2e-4, rtol=1e-3)


def test_an_auxiliary_loss_moves_what_it_is_of(tmp_path):
    """A function without weights: the features it wants small become smaller than without it."""
    argv = ["--max-steps", 30, "--log-every", 30, "--lr", "1e-2", "--aux-layer", "1", "--aux-loss", "small"]
    folders = [
        run(tmp_path / weight, *argv, "--aux-weight", weight, before=add_aux_losses)
        for weight in ("1e-9", "1")
    ]
    without, with_it = ([row["aux"] for row in rows(folder) if "aux" in row][-1] for folder in folders)
    assert with_it < 0.8 * without
    settings = json.loads((folders[0] / "args.json").read_text())
    assert settings["aux_layer"] == 1


def add_counting():
    """An optimizer that keeps a number among its options, as some do."""

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
            super().step(closure)

    OPTIMIZERS["counting"] = lambda parameters, args: Counting(parameters, args.lr)


def test_what_an_optimizer_keeps_among_its_options(tmp_path):
    killed = Together(add_counting, stop_before_the_last_save)
    run(tmp_path, "--optimizer", "counting", before=killed, expect=-signal.SIGKILL)
    folder = run(tmp_path, "--optimizer", "counting", before=add_counting)
    assert load(folder)["opt"]["param_groups"][0]["count"] == 6


def test_what_is_refused(tmp_path):
    folder = run(tmp_path / "run", "--optimizer", "lion", before=add_lion)
    argv = ["--resume", folder, "--max-steps", 8]
    for more, message in (
        ([], "--optimizer adamw: "),
        (["--optimizer", "lion", "--aux-loss", "predict-x"], "--aux-loss predict-x: "),
    ):
        run(tmp_path / "run", *argv, *more, before=Together(add_lion, add_aux_losses), expect=2)
        printed = (tmp_path / "run" / "out").read_text()
        assert message in printed and "give that, or give the file to --init-from" in printed
    for argv, message in (
        (["--optimizer", "lion"], "--optimizer: invalid choice: 'lion'"),
        (["--aux-loss", "small", "--aux-layer", 9], "--aux-layer 9: the model has"),
        (["--aux-weight", 3], "--aux-weight: only with --aux-loss"),
        (["--noise-schedule", "jsd"], "--noise-schedule jsd: ends in noise alone"),
    ):
        before = add_aux_losses if "--aux-loss" in argv else None
        run(tmp_path, *argv, before=before, expect=2)
        assert message in (tmp_path / "out").read_text()


class NoHead(torch.nn.Module):
    pass


class NoStep(torch.optim.Optimizer):
    def __init__(self, parameters, args):
        super().__init__(parameters, dict(lr=args.lr))


@pytest.mark.parametrize("rows, option, row, message", [
    (OPTIMIZERS, "--optimizer", NoStep, "NoStep lacks step"),
    (OPTIMIZERS, "--optimizer", lambda *_: None, "NoneType lacks param_groups, step, zero_grad, state_dict"),
    (OPTIMIZERS, "--optimizer", "adam", "str lacks __call__"),
    (AUX_LOSSES, "--aux-loss", NoHead, "NoHead lacks forward"),
    (AUX_LOSSES, "--aux-loss", 0.5, "float lacks __call__"),
])  # fmt: skip
def test_what_a_row_lacks_is_refused_by_name(tmp_path, monkeypatch, capsys, rows, option, row, message):
    monkeypatch.setitem(rows, "toy", row)
    argv = [*ARGV, option, "toy", "--results-dir", tmp_path]
    assert_refused(train, capsys, f"{option} toy: {message}", *argv)
