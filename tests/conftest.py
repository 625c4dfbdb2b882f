"""What several test files share: the rule that makes the goldens' weights and inputs, and small models."""

import contextlib
import os
import sys
import zlib
from pathlib import Path

# The tests are the CPU's, those marked gpu aside (python -m pytest -m gpu); set before torch looks:
if "gpu" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# Their assertions too say what they found:
pytest.register_assert_rewrite("closed_forms", "forked", "in_process", "seams")

# The models here are small; more threads would only wait for one another, and for what else runs:
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# What the goldens are held to (tests/golden/README.md):
TOLERANCE = dict(atol=2e-4, rtol=2e-4)


def pytest_xdist_auto_num_workers(config):
    """How many workers share the tests: two, since many tests wait for processes of their own. None where
    there is one file to run, and for tests that are timed or fill a machine, slow and gpu."""
    one_file = len(config.args) == 1 and ".py" in config.args[0]
    return 0 if one_file or config.option.markexpr != "not slow and not gpu" else 2


def rule(key, shape):
    """The pseudo-random float32 array that the goldens' makers used under this name."""
    return np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, dtype=np.float32)


def rule_input(name, *shape):
    return torch.from_numpy(rule("input:" + name, shape))


def load_rule_weights(model, scale):
    """Give every parameter but pos_embed the values of the rule, times scale."""
    state = model.state_dict()
    for key, value in state.items():
        if key != "pos_embed":
            state[key] = torch.from_numpy(rule(key, tuple(value.shape)) * np.float32(scale))
    model.load_state_dict(state)
    return model


def assert_golden(actual, expected):
    np.testing.assert_allclose(torch.as_tensor(actual).numpy(), expected, **TOLERANCE)


def assert_golden_by_range(actual, expected):
    """For rows whose values reach 1000: within 1e-5 of the largest one, or 2e-4 where that is more."""
    atol = max(TOLERANCE["atol"], 1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(torch.as_tensor(actual).numpy(), expected, atol=atol, rtol=0)


def build_tiny(**overrides):
    from models import DiT

    options = dict(
        input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=2, num_heads=4, num_classes=10
    )
    return DiT(**{**options, **overrides})


# What a caller may have set for tensors of its own: default dtype, default device.
OTHER_DEFAULTS = [(torch.float64, None), (torch.bfloat16, None), (torch.float32, "meta")]


@contextlib.contextmanager
def other_defaults(dtype, device):
    """Defaults that a notebook may have set for its own tensors."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.fixture
def tiny():
    return load_rule_weights(build_tiny(), 0.1).eval()


@pytest.fixture(scope="session")
def golden():
    """The reference numbers, by file name."""
    return lambda name: np.load(ROOT / "tests" / "golden" / name)
