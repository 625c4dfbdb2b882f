"""What every command needs: processes, device, precision, seeds, logging, errors."""

import argparse
import contextlib
import fcntl
import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from tqdm.auto import tqdm

PRECISIONS = ("fp32", "tf32", "bf16")

# How long processes wait for one another: tens of minutes, since the main one may download weights meanwhile.
TIMEOUT = timedelta(minutes=60)


class UserError(ValueError):
    """A mistake that the user can mend: its message, one line, names the flag or file, the value and the
    remedy."""


@contextlib.contextmanager
def blame(flag):
    """Turn a ValueError inside into a UserError that names the flag: `with blame("--image-size 250"): …`."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error


@contextlib.contextmanager
def whole_file(path, mode="w"):
    """A file to write that stands under its name only when complete and on the disk, or not at all.

    Any number of processes may write the same path at once, each to a temporary file of its own; the last to
    end wins. What a killed one left goes with the next write."""
    with contextlib.suppress(OSError):
        _remove_abandoned(path)
    file, temporary = _open_temporary(path, mode)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except Exception:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def _open_temporary(path, mode):
    """A new file beside a path, and its name. It is locked as long as its writer lives, where the file system
    has locks, so that only an abandoned one is removed."""
    while True:
        temporary = f"{path}.{secrets.token_hex(4)}.tmp"
        file = open(temporary, mode.replace("w", "x"))
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else taken for an abandoned one before it was locked
            return file, temporary
        file.close()


def _remove_abandoned(path):
    """Remove the temporary files of a path whose writers were killed."""
    folder, name = os.path.split(path)
    pattern = re.compile(re.escape(name) + r"\.[0-9a-f]{8}\.tmp")
    for found in filter(pattern.fullmatch, os.listdir(folder or ".")):
        temporary = os.path.join(folder, found)
        with contextlib.suppress(OSError), open(temporary, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.remove(temporary)


def is_locked(path):
    """Whether a process holds this lock of filelock's; nothing is written, and no file is made."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def out_of_memory(error):
    """Whether an exception says that memory ran out, a GPU's or the machine's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # What torch raises elsewhere, for the machine's memory above all, has no class of its own:
    signs = ("can't allocate memory", "out of memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


class Tolerance:
    """Lets a run go on where something beside the training fails, such as a picture or a line of its log:
    `with tolerate("picture"): …`. The first failure of each name is a warning, the later ones are silent."""

    def __init__(self, logger):
        self.logger, self.warned = logger, set()

    @contextlib.contextmanager
    def __call__(self, name, errors=OSError):
        """errors: the classes of exceptions to tolerate, beside those that say that memory ran out."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, errors) and not out_of_memory(error):
                raise
            self.warn(name, error)

    def warn(self, name, error):
        """Log that something failed, once for each name."""
        if name not in self.warned:
            self.warned.add(name)
            self.logger.warning(
                f"Warning: {name}: {reason_of(error)}; training goes on, and this is said once only"
            )


def reason_of(error):
    """Why something failed, in one line."""
    error = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Lasting:
    """A standard stream that outlives its reader: what is written once `tee`, say, has ended is lost, and
    ends nothing."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with self._lasting():
            self.stream.write(text)
        return len(text)

    def flush(self):
        with self._lasting():
            self.stream.flush()

    @contextlib.contextmanager
    def _lasting(self):
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        except OSError:  # a full disk, which may have room again
            pass

    def __getattr__(self, name):
        return getattr(self.stream, name)


def is_utf8(path):
    """Whether a path is UTF-8, as torch's memory maps and safetensors demand."""
    return not any("\udc80" <= character <= "\udcff" for character in str(path))


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, without the usage, which --help shows."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        # "argument --batch: 0: must be …" becomes "--batch 0: must be …", the form of all our errors:
        message = re.sub(r"^argument (--[\w-]+): (\S+: must be )", r"\1 \2", message)
        self.exit(2, f"{self.prog}: error: {message}\n")


def int_at_least(low, multiple_of=1):
    """An argparse type: whole numbers of at least low that are multiples of multiple_of."""

    def parse(text):
        value = int(text)
        if value < low:
            least = f"at least {low}" if low else "0 or more"
            raise argparse.ArgumentTypeError(f"{value}: must be {least}")
        if value % multiple_of:
            raise argparse.ArgumentTypeError(f"{value}: must be a multiple of {multiple_of}")
        return value

    parse.__name__ = "int"  # argparse's name for it where text is no number
    return parse


def float_above(low):
    """An argparse type: finite numbers above low."""

    def parse(text):
        value = float(text)
        if not value > low:
            raise argparse.ArgumentTypeError(f"{value}: must be more than {low}")
        if math.isinf(value):
            raise argparse.ArgumentTypeError(f"{value}: must be finite")
        return value

    parse.__name__ = "float"
    return parse


def launch(main, parser):
    """Run main(args) as a command: exit code 0, or 2 and one line on standard error for a UserError."""
    for stream in (sys.stdout, sys.stderr):  # file names need not be UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = parser.parse_args()
    streams = redirect_stdout(Lasting(sys.stdout)), redirect_stderr(Lasting(sys.stderr))
    try:
        with streams[0], streams[1]:
            main(args)
    except UserError as error:
        # An error from a data-loading worker carries that worker's traceback; its last line is the message.
        line = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
        parser.error(line)
    leave_group()


# ---------------------------------------------------------------------------------------------
# Processes and device


@dataclass(frozen=True)
class Processes:
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
            dist.barrier()

    def count(self, name, n=1):
        """Add n to a number that all processes share under this name, and return it. Waits for no process."""
        if self.world_size > 1:
            return dist.distributed_c10d._get_default_store().add(f"dit/count/{name}", n)
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
        dist.broadcast_object_list(values, src=0, device=self.device)
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
        that they stay in step: `with processes.agreeing(): …`."""
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
        with self.agreeing():
            try:
                if self.is_main:
                    open(mark, "x").close()
            except OSError as error:
                raise UserError(f"{flag} {folder}: cannot be written to ({error.strerror})") from error
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
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def sum_(self, tensor):
        """Make a tensor, in place, the sum of all processes'; every process calls it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
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
        dist.gather(padded, parts, dst=0)
        if self.is_main:
            return torch.cat([part[:count].to(rows.device) for part, count in zip(parts, counts)])

    def gather(self, value):
        """The plain data of every process, in order of rank, on every process."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def assert_same(self, tensors):
        """Raise RuntimeError unless these tensors have the same sums, to the last bit, on every process."""
        if self.world_size == 1:
            return
        sums = torch.stack([tensor.detach().double().sum() for tensor in tensors]).view(torch.int64)
        low, high = sums.clone(), sums.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            raise RuntimeError("the processes' weights have drifted apart; nothing was saved")


class Stopped(Exception):
    """The run was asked to stop in the midst of something that is done again when it continues."""


class StopRequest:
    """Whether the run was asked to stop, by SIGTERM, SIGINT or a problem, agreed on by all processes."""

    def __init__(self, processes):
        self.signalled = False
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if processes.world_size > 1 else None
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
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        signalled, problem = flags.tolist()
        return bool(signalled), bool(problem)

    def check(self):
        """Raise Stopped, on all processes, where any was signalled; all call it at the same moment."""
        if self.agreed()[0]:
            raise Stopped

    @contextlib.contextmanager
    def interrupting(self, model):
        """Raise Stopped at the model's next forward pass once this process is signalled. The others are to be
        told, by Processes.agreeing."""

        def look(*_):
            if self.signalled:
                raise Stopped

        hook = model.register_forward_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()


def leave_group():
    """Leave the other processes, with whom nothing more is to be done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def start_processes():
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
    if world_size > 1 and not dist.is_initialized():
        options = dict(backend="nccl", device_id=device) if device.type == "cuda" else dict(backend="gloo")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            options |= dict(store=agree_on_store(rank, world_size), rank=rank, world_size=world_size)
        dist.init_process_group(timeout=TIMEOUT, **options)
    return Processes(rank, world_size, device)


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
    store = dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)
    mine = secrets.token_hex()
    if rank == 0:
        attempt = mine
        store.set("dit/attempt", attempt)
        answers = [store.get(f"dit/{attempt}/{other}").decode() for other in range(1, world_size)]
        store.set(f"dit/{attempt}/all", " ".join(answers))
        return dist.PrefixStore(f"dit/{attempt}", store)
    while True:
        attempt = store.get("dit/attempt").decode()
        store.set(f"dit/{attempt}/{rank}", mine)
        everyone = f"dit/{attempt}/all"
        if store.check([everyone]) and mine in store.get(everyone).decode().split():
            return dist.PrefixStore(f"dit/{attempt}", store)
        time.sleep(0.1)


def add_precision_argument(parser):
    """--precision, the same in every command."""
    parser.add_argument(
        "--precision", choices=PRECISIONS, default=None,
        help="arithmetic of matrix products: fp32, tf32 (ten bits of mantissa, on tensor cores) or bf16"
        " (seven; weights, time embedding, final layer and loss stay float32)"
        " (default: tf32 on a GPU that has it, else fp32)",
    )  # fmt: skip


def set_precision(precision, device):
    """Apply --precision to this process, and return what None stands for here."""
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "tf32" and not has_tf32:
        raise UserError(f"--precision tf32: {device} has none; use fp32")
    precision = precision or ("tf32" if has_tf32 else "fp32")
    # What bf16 leaves in float32 may as well run on tensor cores:
    use_tf32 = precision == "tf32" or (precision == "bf16" and has_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = use_tf32
    return precision


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


@contextlib.contextmanager
def torch_defaults():
    """torch's own defaults, float32 on the CPU, for what is made inside, whatever the caller has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


# ---------------------------------------------------------------------------------------------
# Logging


class _ThroughTqdm(logging.StreamHandler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """Writes to a file as long as that can be written to; where not, says so once, on the terminal."""

    def __init__(self, path, others):
        super().__init__(path, delay=True, errors="backslashreplace")
        self.others, self.warned = others, False

    def emit(self, record):
        try:
            super().emit(record)
        except OSError:  # it could not be opened
            self.handleError(record)

    def handleError(self, record):
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.warned:
            self.warned = True
            text = f"Warning: {self.baseFilename}: {reason_of(error)}; the log is on the terminal alone"
            warning = logging.LogRecord(record.name, logging.WARNING, "", 0, text, None, None)
            for handler in self.others:
                handler.handle(warning)


def create_logger(folder=None, enabled=True):
    """A logger to the terminal and, with a folder, to its log.txt; silent where not enabled (all ranks but
    one)."""
    logger = logging.getLogger("dit")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO)
    if not enabled:
        logger.addHandler(logging.NullHandler())
        return logger
    handlers = [_ThroughTqdm()]
    if folder is not None:
        handlers.append(_LogFile(os.path.join(folder, "log.txt"), others=handlers[:1]))
        handlers[1].setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    for handler in handlers:
        logger.addHandler(handler)
    return logger
