"""Training beyond one GPU's memory: weights, average and optimiser state in shards, one a process (--shard).

FSDP2 (torch.distributed.fsdp.fully_shard) gathers a block's weights just before they are used. Each process
writes its own shards, as safetensors, so that no checkpoint holds code:

    checkpoints/0050000/
        shard-00001-….safetensors    model.*, ema.*, and the optimizer's state by key: exp_avg.*, exp_avg_sq.*
        plain.pt                     what a checkpoint of one file has besides
        sizes.json                   the length of every file

`python checkpoint.py export --ckpt checkpoints/0050000 --out 0050000.pt` makes the ordinary file of it.

torch's sharding and distributed checkpoints are imported where they are used, since importing them takes
seconds, and most commands need neither.
"""

import copy
import json
import os
import shutil
import warnings

import torch

from models import DiT
from runtime.cli import UserError, user_errors
from runtime.distributed import uses_bfloat16

PLAIN, SIZES = "plain.pt", "sizes.json"
UNWRITTEN = "could not be written; earlier checkpoints stand; make room and run the same command again"
# Parts of a checkpoint that are tensors by name; of the optimizer's state, those of its state by key:
STATES = ("model", "ema", "aux_loss")


def shard_copy(module, model_of, dist, precision="fp32", compile=False):
    """A copy of a module in shards, block by block, on the devices, none of which ever holds it whole.

    module     on the main process's CPU; the other processes' needs no storage
    model_of   a function that gives the DiT in the module
    precision  "bf16" to gather the blocks' weights in bfloat16; gradients are summed in float32

    Raises UserError for a module with a buffer that no state dict holds, which would be lost.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    lost = dict(module.named_buffers()).keys() - module.state_dict().keys()
    if lost:
        raise UserError(f"--shard: the buffer {min(lost)} is not persistent; register it as one that is")
    shards = copy.deepcopy(module if dist.is_main else module.to("meta")).to("meta")
    dtypes = {}
    if gathers_bfloat16(precision, dist.device):
        dtypes = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # Autocast decides what is computed in bfloat16; the policy only spares float32 copies of the weights:
    policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    if compile:
        model_of(shards).compile_blocks()
    for block in model_of(shards).blocks:
        fully_shard(block, mp_policy=policy)
    # The rest too gives its memory back after a forward pass that no backward one follows, the average's:
    fully_shard(shards, reshard_after_forward=True)
    shards.to_empty(device=dist.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(shards, module.state_dict() if dist.is_main else {}, options=options)
    return shards


def gathers_bfloat16(precision, device):
    """Whether blocks are gathered in bfloat16: on GPUs. Norms on a CPU have the type of their weights."""
    return uses_bfloat16(precision) and device.type == "cuda"


def gather_copy(model, device):
    """The whole model, plain, on every process's device; every process calls it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with torch.device("meta"):
        whole = DiT(**model.config)
    whole.load_state_dict(state, assign=True)  # rather than hold it twice
    return whole.to(device).eval()


def local_shard(tensor):
    """A sharded tensor's part in this process; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor):
    """A sharded tensor gathered; any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def optimizer_state(module, optimizer):
    """An optimizer's state by the names of a module's parameters; made where there is none
    yet."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(module, optimizer)


def load_optimizer_state(module, optimizer, state):
    """Take up what optimizer_state gave."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(module, optimizer, state)


def _split(contents):
    """The sharded tensors of a checkpoint's contents, {model.NAME, ema.NAME, exp_avg.NAME, …: tensor},
    and what else it holds, plain."""
    tensors = {f"{part}.{name}": value
               for part in STATES for name, value in contents.get(part, {}).items()}  # fmt: skip
    states, plain_states = contents["opt"]["state"], {}
    for name, state in states.items():
        tensors |= {f"{key}.{name}": value for key, value in state.items() if _is_sharded(value)}
        plain_states[name] = {key: value for key, value in state.items() if not _is_sharded(value)}
    plain = {name: value for name, value in contents.items() if name not in STATES}
    return tensors, dict(plain, opt=dict(contents["opt"], state=plain_states))


def _is_sharded(value):
    return hasattr(value, "full_tensor")


def save(path, contents, dist):
    """Write a folder of shards and plain data; every process calls it. It is whole, or not under its name.

    contents: a training state's, its optimizer's by optimizer_state.
    Raises UserError, on every process, where it cannot be written.
    """
    import torch.distributed.checkpoint as dcp

    temporary = f"{path}.tmp"
    tensors, plain = _split(contents)

    def begin():
        with _writing(path):
            shutil.rmtree(temporary, ignore_errors=True)
            os.makedirs(temporary)
            torch.save(plain, os.path.join(temporary, PLAIN))

    def end():
        with _writing(path):
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
    with _writing(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of features that are not used here
        writer = dcp.HuggingFaceStorageWriter(temporary, save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
    dist.barrier()
    dist.on_main(end)


def _writing(path):
    """A context that turns what a full disk makes torch raise into a UserError."""
    from torch.distributed.checkpoint import CheckpointException

    return user_errors(path, UNWRITTEN, (OSError, RuntimeError, CheckpointException))


def is_complete(path):
    """Whether a folder of shards has every file in its full length."""
    try:
        with open(os.path.join(path, SIZES)) as file:
            sizes = json.load(file)
        return all(os.path.getsize(os.path.join(path, name)) == size for name, size in sizes.items())
    except (OSError, json.JSONDecodeError):
        return False


def load_plain(path):
    """What a folder of shards holds beside them."""
    return torch.load(os.path.join(path, PLAIN), map_location="cpu", weights_only=True)


def load_into(path, contents, plain):
    """Load shards into a training state's contents, whose tensors are its own, of any number of processes.

    plain: what load_plain gave. Returns the contents of the checkpoint.
    """
    import torch.distributed.checkpoint as dcp

    tensors, _ = _split(contents)
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(path))
    states = contents["opt"]["state"]
    if "opt" in plain:
        groups, found = plain["opt"]["param_groups"], plain["opt"]["state"]
    else:  # of an earlier version, which knew AdamW alone
        groups, step = contents["opt"]["param_groups"], torch.tensor(float(plain["step"]))
        found = {name: dict(step=step.clone()) for name in states}
    states = {name: {**state, **found.get(name, {})} for name, state in states.items()}
    return {**contents, **plain, "opt": dict(state=states, param_groups=groups)}


def load_whole(path, trainable):
    """Read a folder of shards in one process, as the contents of a checkpoint of one file.

    trainable(config): the names of a model's trained parameters, in the order of its optimizer.
    """
    import torch.distributed.checkpoint as dcp

    plain = load_plain(path)
    reader = dcp.HuggingFaceStorageReader(path)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process alone
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(path), no_dist=True)
    parts = {}
    for name, value in tensors.items():
        part, _, name = name.partition(".")
        parts.setdefault(part, {})[name] = value
    contents = {**plain, **{part: parts.pop(part) for part in STATES if part in parts}}
    return {**contents, "opt": _by_index(plain, parts, trainable)}


def _by_index(plain, parts, trainable):
    """The state of an optimizer as its own state_dict numbers it; parts: {key: {name: tensor}}."""
    if "opt" in plain:
        names = [name for group in plain["opt"]["param_groups"] for name in group["params"]]
        groups, rest = [], iter(range(len(names)))
        for group in plain["opt"]["param_groups"]:
            groups.append({**group, "params": [next(rest) for _ in group["params"]]})
        found = plain["opt"]["state"]
    else:  # of an earlier version, which knew AdamW alone
        names, groups = trainable(plain["config"]["model"]), plain["param_groups"]
        found = {name: dict(step=torch.tensor(float(plain["step"]))) for name in names}
    states = {}
    for i, name in enumerate(names):
        tensors = {key: values[name] for key, values in parts.items() if name in values}
        states[i] = {**found.get(name, {}), **tensors}
    return dict(state=states, param_groups=groups)
