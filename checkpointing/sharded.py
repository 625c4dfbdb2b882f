"""Training beyond one GPU's memory: weights, average and optimiser state in shards, one a process (--shard).

FSDP2 (torch.distributed.fsdp.fully_shard) gathers a block's weights just before they are used. Each process
writes its own shards, as safetensors, so that no checkpoint holds code:

    checkpoints/0050000/
        shard-00001-….safetensors    model.*, ema.*, exp_avg.*, exp_avg_sq.*
        plain.pt                     what a checkpoint of one file has besides
        sizes.json                   the length of every file

`python checkpoint.py export --ckpt checkpoints/0050000 --out 0050000.pt` makes the ordinary file of it.

torch's sharding and distributed checkpoints are imported where they are used, since importing them takes
seconds, and most commands need neither.
"""

import contextlib
import json
import os
import shutil
import warnings

import torch

from models import DiT
from runtime.cli import UserError

PLAIN, SIZES = "plain.pt", "sizes.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def shard(model):
    """Shard a model's weights over all processes, block by block, in place."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    # The rest too gives its memory back after a forward pass that no backward one follows, the average's:
    return fully_shard(model, reshard_after_forward=True)


def gather_copy(model, device):
    """The whole model, plain, on every process's device; every process calls it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with torch.device("meta"):
        copy = DiT(**model.config)
    copy.load_state_dict(state, assign=True)  # rather than hold it twice
    return copy.to(device).eval()


def local(tensor):
    """A sharded tensor's part in this process; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor):
    """A sharded tensor gathered; any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def collect(model, ema, optimizer):
    """All shards of this process by name; the optimiser's moments come into being where there are none
    yet."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            for moment in MOMENTS:
                state.setdefault(moment, torch.zeros_like(parameter))
                tensors[f"{moment}.{name}"] = state[moment]
    return tensors


def save(path, model, ema, optimizer, plain, dist):
    """Write a folder of shards and plain data; every process calls it. It is whole, or not under its name.

    Raises UserError, on every process, where it cannot be written.
    """
    import torch.distributed.checkpoint as dcp

    temporary = f"{path}.tmp"

    def begin():
        with _refusing(path):
            shutil.rmtree(temporary, ignore_errors=True)
            os.makedirs(temporary)
            torch.save(plain, os.path.join(temporary, PLAIN))

    def end():
        with _refusing(path):
            sizes = {name: os.path.getsize(os.path.join(temporary, name)) for name in os.listdir(temporary)}
            with open(os.path.join(temporary, SIZES), "w") as file:
                json.dump(sizes, file)
            for name in [*sizes, SIZES, "."]:
                descriptor = os.open(os.path.join(temporary, name), os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            if os.path.exists(path):  # a folder cannot be renamed over another
                os.replace(path, f"{path}.old.tmp")
            os.replace(temporary, path)
            shutil.rmtree(f"{path}.old.tmp", ignore_errors=True)

    dist.on_main(begin)
    with _refusing(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of features that are not used here
        writer = dcp.HuggingFaceStorageWriter(temporary, save_distributed=True)
        dcp.save(collect(model, ema, optimizer), storage_writer=writer)
    dist.barrier()
    dist.on_main(end)


@contextlib.contextmanager
def _refusing(path):
    """Turn what a full disk makes torch raise into a UserError."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: could not be written ({reason}); earlier checkpoints stand; make room and run the same"
            " command again"
        ) from error


def is_complete(path):
    """Whether a folder of shards has every file in its full length."""
    try:
        with open(os.path.join(path, SIZES)) as file:
            sizes = json.load(file)
        return all(os.path.getsize(os.path.join(path, name)) == size for name, size in sizes.items())
    except (OSError, json.JSONDecodeError):
        return False


def restore(path, model, ema, optimizer, step):
    """Load shards into a sharded model, its average and its optimiser, of any number of processes."""
    import torch.distributed.checkpoint as dcp

    tensors = collect(model, ema, optimizer)
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(path))
    for parameter in model.parameters():
        if parameter.requires_grad:
            optimizer.state[parameter]["step"] = torch.tensor(float(step), device=parameter.device)


def load_whole(path, trainable):
    """Read a folder of shards in one process, as the contents of a checkpoint of one file.

    trainable(config): the names of a model's trained parameters, in the order of its optimiser.
    """
    import torch.distributed.checkpoint as dcp

    plain = torch.load(os.path.join(path, PLAIN), map_location="cpu", weights_only=True)
    reader = dcp.HuggingFaceStorageReader(path)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(path), no_dist=True)

    def part(prefix):
        return {
            name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
        }

    step = torch.tensor(float(plain["step"]))
    states = {
        i: dict(step=step.clone(), **{moment: tensors[f"{moment}.{name}"] for moment in MOMENTS})
        for i, name in enumerate(trainable(plain["config"]["model"]))
    }
    opt = dict(state=states, param_groups=plain["param_groups"])
    return {**plain, "model": part("model."), "ema": part("ema."), "opt": opt}
