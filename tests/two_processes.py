"""Run by test_runtime.py under torchrun with two processes: what they do together."""

import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import train  # noqa: E402
from diffusion import create_diffusion  # noqa: E402
from diffusion.timestep_sampler import LossSecondMomentResampler  # noqa: E402
from runtime import distributed  # noqa: E402
from runtime.cli import UserError  # noqa: E402
from runtime.distributed import Distributed, init_distributed  # noqa: E402
from training.run_dir import Experiment  # noqa: E402

processes = init_distributed()
rank = processes.rank
assert processes.world_size == 2 and processes.is_main == (rank == 0) and processes.device.type == "cpu"

assert processes.broadcast({"folder": f"from {rank}"}) == {"folder": "from 0"}
assert processes.mean(torch.tensor([1.0, 2.0]) * (rank + 1)).tolist() == [1.5, 3.0]

rows = processes.join_rows(torch.full((2 * (1 - rank), 3), 7))  # of which rank 1 has none
assert rows is None if rank else rows.tolist() == [[7] * 3] * 2

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

# A learned distribution past its warm-up: the ranks' draws are the halves of what one process draws.
model, args = SimpleNamespace(in_channels=1, input_size=(4, 4)), SimpleNamespace()
args.global_batch_size, args.global_seed, args.class_dropout_prob = 64, 5, 0.1
alone = train.draw_step_noise(args, 7, Distributed(0, 1, processes.device), sampler, model)
mine = train.draw_step_noise(args, 7, processes, sampler, model)
for name, values in alone.items():
    assert torch.equal(mine[name], values[32 * rank : 32 * rank + 32]), name
assert len(alone["weights"].unique()) > 1 and 0 < alone["drop"].sum() < 20

# A mistake on the main process is everyone's:
try:
    processes.on_main(Experiment, SimpleNamespace(resume="never", results_dir=__file__))
except UserError as error:
    assert "cannot be written to" in str(error)
else:
    raise AssertionError("the other process went on")

# The group that agrees on signals waits as long as the run's other groups do:
distributed.TIMEOUT = timedelta(seconds=3)
stop = distributed.StopRequest(processes)
if rank == 0:  # alone
    try:
        stop.agreed()
    except RuntimeError as error:
        assert "imed out" in str(error), error
    else:
        raise AssertionError("waited beyond the limit")
processes.barrier()

torch.distributed.destroy_process_group()
print(f"rank {rank} is content")
