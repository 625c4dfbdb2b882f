"""Run by test_runtime.py under torchrun with two processes: what they do together."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion import create_diffusion  # noqa: E402
from diffusion.timestep_sampler import LossSecondMomentResampler  # noqa: E402
from runtime import start_processes  # noqa: E402

processes = start_processes()
rank = processes.rank
assert processes.world_size == 2 and processes.is_main == (rank == 0) and processes.device.type == "cpu"

assert processes.broadcast({"folder": f"from {rank}"}) == {"folder": "from 0"}
assert processes.mean(torch.tensor([1.0, 2.0]) * (rank + 1)).tolist() == [1.5, 3.0]

processes.assert_same([torch.ones(3), torch.tensor([float("nan")])])
try:
    processes.assert_same([torch.ones(3), torch.ones(2) + 1e-6 * rank])
except RuntimeError as error:
    assert "drifted apart" in str(error)
else:
    raise AssertionError("different weights went unnoticed")

# Ranks with different numbers of rows: both learn from all, in the same order.
sampler = LossSecondMomentResampler(create_diffusion("4", learn_sigma=False), history_per_term=1)
if rank == 0:
    sampler.update_with_local_losses(torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 3.0]))
else:
    sampler.update_with_local_losses(torch.tensor([3]), torch.tensor([4.0]))
weights = sampler.weights()
assert abs(weights[3] / weights[0] - 4) < 0.02, weights
processes.assert_same([weights])

torch.distributed.destroy_process_group()
print(f"rank {rank} is content")
