"""Commands run in the process of the test, of settings small enough to train with, and what they leave."""

import json
import sys

import pytest

import train
from runtime.cli import launch

# A model and sampler small enough to test with:
SMALL = (
    "--dataset digits --image-size 8 --vae none --depth 1 --hidden-size 32 --num-heads 2 --model DiT-S/2"
    " --num-workers 0 --global-batch-size 16 --lr 1e-3 --num-sampling-steps 3 --cfg-scale 1.5 --log-every 1"
).split()
QUICK = [*SMALL, "--max-steps", 12, "--sample-every", 0]


def command(module, *argv):
    """Run a command as from a shell."""
    original, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, argv)]
    try:
        launch(module.main, module.build_parser())
    finally:
        sys.argv = original


def run(*argv):
    """train.py"""
    command(train, *argv)


def assert_refused(module, capsys, message, *argv):
    """Run a command that must end with a line of this message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        command(module, *argv)
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        exit_.value.code == 2 and error.startswith(f"{module.__name__}.py: error: ") and message in error
    ), error


def record_of(samples):
    """What evaluate.py wrote beside the samples."""
    return json.loads((samples.parent / f"{samples.stem}.evaluation.json").read_text())
