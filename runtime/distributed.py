"""Processes, devices, precision and seeds."""

import contextlib
import os
import secrets
import signal
import socket
import time
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch

from runtime.cli import Stopped, UserError, out_of_memory, reason_of, user_errors

PRECISIONS = ("fp32", "tf32", "bf16")
TRAINING_PRECISIONS = (*PRECISIONS, "fp8")
# How long processes wait for one another: tens of minutes, since the main one may download weights meanwhile.
TIMEOUT = timedelta(minutes=60)


# ---------------------------------------------------------------------------------------------
# Processes and device


@dataclass(frozen=True)
class Distributed:
    """This process among those of the run: rank of world_size, and its device."""

    rank: int
    world_size: int
    device: torch.device
    _counts: dict = field(default_factory=dict, compare=False, repr=False)  # of a single process

    @property
    def is_main(self):
        return self.rank == 0

    def barrier(self):
        if self.world_size > 1:
            torch.distributed.barrier()

    def count(self, name, n=1):
        """Add n to a number that all processes share under this name, and return it. Waits for no process."""
        if self.world_size > 1:
            return torch.distributed.distributed_c10d._get_default_store().add(f"dit/count/{name}", n)
        self._counts[name] = self._counts.get(name, 0) + n
        return self._counts[name]

    def wait_for_all(self, progress):
        """A barrier for processes that may come hours apart: it lasts as long as the number that they `count`
        under the name `progress` grows within TIMEOUT. Once for each name."""
        arrived, seen, since = f"past {progress}", None, time.monotonic()
        self.count(arrived)
        while self.count(arrived, 0) < self.world_size:
            if seen != (seen := self.count(progress, 0)):
                since = time.monotonic()
            if time.monotonic() - since > TIMEOUT.total_seconds():
                raise RuntimeError(f"another process made no progress for {TIMEOUT}")
            time.sleep(0.1)

    def broadcast(self, value):
        """The main process's value of any plain data, on every process."""
        if self.world_size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def on_main(self, call, *args):
        """What call(*args) gives on the main process, everywhere; a UserError there is one everywhere."""
        result, mistake = None, None
        if self.is_main:
            try:
                result = call(*args)
            except UserError as error:
                mistake = str(error)
        result, mistake = self.broadcast((result, mistake))
        if mistake is not None:
            raise UserError(mistake)
        return result

    @contextlib.contextmanager
    def agreeing(self):
        """Make a UserError, Stopped or lack of memory (a MemoryError) inside, on any process, one on all, so
        that they stay in step: `with dist.agreeing(): …`."""
        problem = None
        try:
            yield
        except (UserError, Stopped) as error:
            problem = error
        except Exception as error:
            if not out_of_memory(error):
                raise
            problem = MemoryError(reason_of(error))
        problems = [problem for problem in self.gather(problem) if problem is not None]
        if problems:
            raise problems[0]

    def check_shared(self, folder, flag):
        """Raise UserError, on every process, where one does not see the folder as the main process does."""
        if self.world_size == 1:
            return
        name, host = self.broadcast(f".shared.{secrets.token_hex(8)}"), socket.gethostname()
        mark = os.path.join(folder, name)
        with self.agreeing(), user_errors(f"{flag} {folder}", "cannot be written to", OSError):
            if self.is_main:
                open(mark, "x").close()
        deadline = time.monotonic() + 10  # which a network's file system may take to show what is new
        while not (seen := os.path.exists(mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        found = self.gather((seen, host))
        if self.is_main:
            with contextlib.suppress(OSError):
                os.remove(mark)
        for rank, (seen, host) in enumerate(found):
            if not seen:
                raise UserError(
                    f"{flag} {folder}: process {rank}, on {host}, does not see what process 0, on"
                    f" {found[0][1]}, writes there; give a folder that all machines share, by the same path"
                )

    def mean(self, value):
        """The mean over all processes of a tensor; every process calls it and gets it."""
        if self.world_size > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
            value /= self.world_size
        return value

    def sum_(self, tensor):
        """Make a tensor, in place, the sum of all processes'; every process calls it."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def join_rows(self, rows):
        """The rows (N, …) of all processes in order of rank, on the main process; None on the others.

        Every process calls it, with any number of rows, of the same length and type."""
        if self.world_size == 1:
            return rows
        counts = self.gather(len(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:], device=self.device)
        padded[: len(rows)] = rows.to(self.device)
        parts = [torch.empty_like(padded) for _ in counts] if self.is_main else None
        torch.distributed.gather(padded, parts, dst=0)
        if self.is_main:
            return torch.cat([part[:count].to(rows.device) for part, count in zip(parts, counts)])

    def gather(self, value):
        """The plain data of every process, in order of rank, on every process."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def assert_same(self, tensors):
        """Raise RuntimeError unless these tensors have the same sums, to the last bit, on every process."""
        if self.world_size == 1:
            return
        sums = torch.stack([tensor.detach().double().sum() for tensor in tensors]).view(torch.int64)
        low, high = sums.clone(), sums.clone()
        torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
        torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
        if not torch.equal(low, high):
            raise RuntimeError("the processes' weights have drifted apart; nothing was saved")


class StopRequest:
    """Whether the run was asked to stop, by SIGTERM, SIGINT or a problem, agreed on by all processes."""

    def __init__(self, dist):
        self.signalled = False
        self.group = (
            torch.distributed.new_group(backend="gloo", timeout=TIMEOUT) if dist.world_size > 1 else None
        )
        self.before = signal.signal(signal.SIGTERM, self._note)  # which a launcher may send more than once
        self.previous = signal.signal(signal.SIGINT, self._note)

    def _note(self, number, frame):
        self.signalled = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self.previous)  # a second Ctrl-C acts at once

    def close(self):
        """Let signals act at once again."""
        signal.signal(signal.SIGTERM, self.before)
        signal.signal(signal.SIGINT, self.previous)

    def agreed(self, problem=False):
        """Called by all processes at the same step: (any was signalled, any has a problem).

        Over the CPU, so that no GPU is waited for.
        """
        flags = torch.tensor([self.signalled, bool(problem)], dtype=torch.int32)
        if self.group is not None:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self.group)
        signalled, problem = flags.tolist()
        return bool(signalled), bool(problem)

    def check(self):
        """Raise Stopped, on all processes, where any was signalled; all call it at the same moment."""
        if self.agreed()[0]:
            raise Stopped

    @contextlib.contextmanager
    def interrupting(self, model):
        """Raise Stopped at the model's next forward pass once this process is signalled. The others are to be
        told, by Distributed.agreeing."""

        def look(*_):
            if self.signalled:
                raise Stopped

        hook = model.register_forward_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()


def init_distributed():
    """Join the processes that torchrun started, or be the only one. A GPU each where there are any, else the
    CPU."""
    copies = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if copies > 1 and not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        raise UserError(
            f"SLURM_STEP_NUM_TASKS={copies}: srun started {copies} copies of this command that do not know of"
            " one another; start torchrun once a machine (srun --ntasks-per-node=1 torchrun …), or export"
            " RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; where each is to run by itself,"
            " WORLD_SIZE=1"
        )
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # the rank itself counts on across machines
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            local_rank = 0  # Slurm may show each process a GPU of its own; torchrun shows all to all
        if local_rank >= count:
            raise UserError(
                f"torchrun --nproc_per_node: this machine has {count} GPUs, too few for process {local_rank};"
                " give at most one process a GPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world_size > 1 and not torch.distributed.is_initialized():
        options = dict(backend="nccl", device_id=device) if device.type == "cuda" else dict(backend="gloo")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            options |= dict(store=agree_on_store(rank, world_size), rank=rank, world_size=world_size)
        torch.distributed.init_process_group(timeout=TIMEOUT, **options)
    return Distributed(rank, world_size, device)


def identify(pid):
    """What names a process of this machine for good, a string; None where the system does not say, or there
    is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, *numbers = file.read().rpartition(")")[2].split()
        # The numbers of two containers' processes may be the same:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    since = numbers[18]
    return None if state in "ZX" else f"{socket.gethostname()} {space} {pid} {since}"


def is_gone(name):
    """Whether a process that `identify` named has ended; False where that cannot be known from here."""
    mine, other = identify(os.getpid()), name
    if not mine or not other or mine.split()[:2] != other.split()[:2]:
        return False
    return identify(other.split()[2]) != other


def torchrun_agent():
    """What names the torchrun process that started this one, and starts it again should it die; None without
    torchrun."""
    return identify(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else None


def agree_on_store(rank, world_size):
    """torchrun's store, under a prefix that only the processes of this attempt know.

    torchrun --max-restarts starts the processes again after one has died, but keeps its store, where they
    would find the addresses of the dead. How often they were started, TORCHELASTIC_RESTART_COUNT, is no name
    for the attempt: each machine counts the deaths on it alone. So the main process draws one, every other
    answers to it with a number of its own, and knows by the list of all answers that it is not an old one.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, is_master=False, timeout=TIMEOUT)
    mine = secrets.token_hex()
    if rank == 0:
        attempt = mine
        store.set("dit/attempt", attempt)
        answers = [store.get(f"dit/{attempt}/{other}").decode() for other in range(1, world_size)]
        store.set(f"dit/{attempt}/all", " ".join(answers))
        return torch.distributed.PrefixStore(f"dit/{attempt}", store)
    while True:
        attempt = store.get("dit/attempt").decode()
        store.set(f"dit/{attempt}/{rank}", mine)
        everyone = f"dit/{attempt}/all"
        if store.check([everyone]) and mine in store.get(everyone).decode().split():
            return torch.distributed.PrefixStore(f"dit/{attempt}", store)
        time.sleep(0.1)


def add_precision_argument(parser, precisions=PRECISIONS):
    """--precision, the same in every command but for those that train, which have fp8 too."""
    fp8 = "; fp8 (three bits) is for the blocks' layers, bf16 for the rest" if "fp8" in precisions else ""
    parser.add_argument(
        "--precision", choices=("auto", *precisions), default=None,
        help="arithmetic of matrix products: fp32, tf32 (ten bits of mantissa, on tensor cores) or bf16"
        f" (seven; weights, time embedding, final layer and loss stay float32){fp8}; auto is bf16 where the"
        " processor multiplies it faster (default: tf32 on a GPU that has it, else fp32)",
    )  # fmt: skip


def set_precision(precision, device):
    """Apply --precision to this process, and return what None or "auto" stands for here.

    What a device can do decides for auto, and no timing, so that a run goes on as it began."""
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "auto":
        fast = has_tf32 or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
        precision = "bf16" if fast else None
    if precision == "tf32" and not has_tf32:
        raise UserError(f"--precision tf32: {device} has none; use fp32")
    if precision == "fp8" and not has_fp8(device):
        raise UserError(f"--precision fp8: {device} has none, as GPUs have from Ada and Hopper on; use bf16")
    precision = precision or ("tf32" if has_tf32 else "fp32")
    # What bf16 leaves in float32 may as well run on tensor cores:
    use_tf32 = precision == "tf32" or (uses_bfloat16(precision) and has_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = use_tf32
    return precision


def has_fp8(device):
    """Whether a device multiplies matrices in fp8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def uses_bfloat16(precision):
    """Whether what --precision does not keep in float32 is computed in bfloat16 by autocast."""
    return precision in ("bf16", "fp8")


# ---------------------------------------------------------------------------------------------
# Seeds


# Which draws a seed is for; an epoch's order and a step's noise must not share a stream of numbers.
ORDER, STEP, HOLD_OUT, EVALUATION, LABEL = 0, 1, 2, 3, 4


def derive_seed(*numbers):
    """One 32-bit seed from several non-negative whole numbers, such as (seed, STEP, step): well mixed, so
    that neighbours share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def generator_for(device, *numbers):
    """A generator on the device seeded by derive_seed(*numbers)."""
    return torch.Generator(device).manual_seed(derive_seed(*numbers))


def fold_seed(seed):
    """A seed of any size as 32 bits, all that a generator of the CPU reads: below 2^32 the seed itself, from
    there on moved by what its higher bits say, so that the 2^32 seeds that share those stay distinct."""
    beyond, low = divmod(seed, 2**32)
    return (low + derive_seed(beyond)) % 2**32 if beyond else low


ALONE = Distributed(0, 1, torch.device("cpu"))
