"""What tests of additions from outside share: training, resuming and sampling with them."""

import inspect
import textwrap

import torch
from in_process import SMALL, run

from checkpointing import files as checkpoints
from sampler import Sampler

ARGV = [*SMALL, "--sample-every", "0", "--ckpt-every", 2]


def lines_of(*parts):
    """Lines of code and documentation that an addition takes, and one for its row."""
    return 1 + sum(len(textwrap.dedent(inspect.getsource(part)).splitlines()) for part in parts)


def train_and_resume(folder, *argv):
    """Train four steps at once, and two and again two; both end in the same bits. Returns the checkpoint's
    path."""
    argv = [*ARGV, *argv, "--max-steps", 4]
    weights = []
    for results in ("straight", "resumed"):
        run(*argv, "--results-dir", folder / results)
        path = folder / results / "000-DiT-S-2" / "checkpoints" / "0000004.pt"
        if results == "resumed":
            path.unlink()
            run(*argv, "--results-dir", folder / results, "--resume", folder / results / "000-DiT-S-2")
        contents = checkpoints.load(str(path)).contents
        weights.append({**contents["model"], **{f"ema.{key}": v for key, v in contents["ema"].items()}})
    assert all(torch.equal(weights[0][key], value) for key, value in weights[1].items())
    return str(path)


def assert_samples(path, *, of=3, **options):
    """Sample a checkpoint; an image depends on its own seed alone."""
    sampler = Sampler.from_checkpoint(path, device="cpu")
    images = sampler.sample(of, **options)
    assert torch.isfinite(images).all() and images.std() > 0.01
    alone = sampler.sample(of if isinstance(of, int) else of[:1], seeds=0, batch_size=1, **options)
    torch.testing.assert_close(alone[:1], images[:1], atol=1e-4, rtol=0)  # another batch's rounding
    return sampler, images
