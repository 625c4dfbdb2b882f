"""The command line: errors of one line, the parser, launching, the log, files written whole."""

import argparse
import contextlib
import fcntl
import inspect
import logging
import math
import os
import re
import secrets
import sys
from contextlib import redirect_stderr, redirect_stdout

import torch
from tqdm.auto import tqdm


class UserError(ValueError):
    """A mistake that the user can mend: its message, one line, names the flag or file, the value and the
    remedy."""


@contextlib.contextmanager
def user_errors(subject, message="", errors=ValueError):
    """Turn what goes wrong inside into a UserError of one line, "subject: message (reason)".

    subject  a flag with its value, or a file
    message  what could not be done, and the remedy; where empty, the reason itself says so
    errors   the classes of exceptions to turn; a UserError, and a GPU's lack of memory, pass as they are
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except errors as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UserError(f"{subject}: {message} ({reason})" if message else f"{subject}: {reason}") from error


def require_parts(what, row, *names):
    """Raise UserError for a row of a dict of choices, or what it made, that lacks any of these methods and
    attributes. what: the choice, as "block 'toy'"."""
    # Methods of torch's that raise, for a subclass to replace:
    raising = (torch.nn.Module.forward, torch.optim.Optimizer.step, torch.utils.data.Dataset.__getitem__)
    nothing = [None, *map(inspect.unwrap, raising)]
    found = {name: inspect.unwrap(inspect.getattr_static(row, name, None)) for name in names}
    missing = [name for name, value in found.items() if any(value is other for other in nothing)]
    missing += sorted(getattr(row, "__abstractmethods__", ()))
    if missing:
        name = getattr(row, "__name__", type(row).__name__)
        raise UserError(f"{what}: {name} lacks {', '.join(missing)}; docs/design-space.md says what it needs")


@contextlib.contextmanager
def atomic_write(path, mode="w"):
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
    least = f"at least {low}" if low else "0 or more"
    multiple = f"a multiple of {multiple_of}"
    return _checked(int, {least: lambda value: value >= low, multiple: lambda value: not value % multiple_of})


def float_above(low):
    """An argparse type: finite numbers above low."""
    return _checked(float, {f"more than {low}": lambda value: value > low, "finite": math.isfinite})


def float_at_least(low):
    """An argparse type: finite numbers of at least low."""
    least = f"at least {low}" if low else "0 or more"
    return _checked(float, {least: lambda value: value >= low, "finite": math.isfinite})


def _checked(kind, rules):
    """An argparse type: int or float, with {what a value must be: whether it is} to hold in this order."""

    def parse(text):
        value = kind(text)
        for what, holds in rules.items():
            if not holds(value):
                raise argparse.ArgumentTypeError(f"{value}: must be {what}")
        return value

    parse.__name__ = kind.__name__  # argparse's name for it where text is no number
    return parse


# Argparse types of shares, decay rates and seeds:
fraction = _checked(float, {"in [0, 1)": lambda value: 0 <= value < 1})
seed_number = _checked(int, {"0 or more, below 2^63": lambda value: 0 <= value < 2**63})


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
    # Not before main has let go of its DDP model. Freed after the group, it would be the last to own it and
    # would end it: waiting, with the lock of the interpreter held, for threads that need that lock.
    leave_group()


def leave_group():
    """Leave the other processes, with whom nothing more is to be done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Stopped(Exception):
    """The run was asked to stop in the midst of something that is done again when it continues."""


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
