"""Run by test_fake_gpu.py in a process of its own: training among 256 processes, of which this alone is
there, by collectives that do nothing."""

import sys
from pathlib import Path

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from diffusion import create_process  # noqa: E402
from models import DiT  # noqa: E402
from runtime.autoencoder import Pixels  # noqa: E402
from runtime.distributed import Distributed  # noqa: E402
from training.options import build_parser  # noqa: E402
from training.resolve import process_config  # noqa: E402
from training.state import TrainingState  # noqa: E402

rank, *options = sys.argv[1:]
WORLD_SIZE = 256
torch.distributed.init_process_group("fake", store=FakeStore(), rank=int(rank), world_size=WORLD_SIZE)
dist = Distributed(int(rank), WORLD_SIZE, torch.device("cpu"))
args = build_parser().parse_args(["--global-batch-size", "512", "--num-classes", "10", *options])
torch.manual_seed(0)
model = DiT(input_size=8, hidden_size=64, depth=2, num_heads=4, num_classes=10)
state = TrainingState(args, model, create_process(process_config(args)), dist)
whole = sum(parameter.numel() for parameter in model.parameters())
mine = sum(train.local_shard(parameter).numel() for parameter in state.model.parameters())
if not args.shard:  # whose own exchange looks at what a collective gave

    def exchange(_, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    state.ddp_model.register_comm_hook(None, exchange)
for _ in range(2):
    train.train_step(state, torch.zeros(2, 4, 8, 8), torch.zeros(2).long(), args, Pixels(4).encode)
# What such collectives give has no meaning, so nor have the values:
print("took", state.step, "steps; parameters here", mine, "of", whole)
