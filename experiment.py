"""A run's folder: its number, settings, log and metrics, and how an interrupted run is found again.

results/000-DiT-XL-2/
    args.json       the options
    log.txt         one line every --log-every steps
    metrics.jsonl   the same and more, as data
    checkpoints/    0050000.pt …, and best.pt with --fid-ref
    samples/        0050000.png …
"""

import contextlib
import ctypes
import gc
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import resource
import secrets
import statistics
import sys
import time

import torch
from filelock import FileLock, Timeout

import checkpoint
from images import check_folder
from runtime import UserError, identify, is_gone, is_locked, reason_of, set_precision, whole_file

# Options that say how a run is executed or reported, not what it computes; two runs that differ in nothing
# else are the same run.
EXECUTION = {
    "allow_changed_data", "by_hand", "dry_run", "resume", "results_dir", "num_workers", "log_every",
    "ckpt_every", "sample_every", "sample_cfg_scales", "sample_gif", "keep_checkpoints", "wandb",
}  # fmt: skip

# Options that may be paths; or else names of published weights, or hub ids.
PATHS = ("data_path", "feature_path", "vae", "init_from", "fid_ref", "inception_weights")

FINISHED = ".finished"  # an empty file in the folder of a run that reached its last step

OWNER = ".owner"  # which process holds the folder, or held it last
JOB = ".job"  # which torchrun agents' processes last began or continued the run
WANDB_ID = ".wandb-id"  # holds the id of the run's run at W&B, which a continued one goes on with

# How long a run waits for what a dead one left; a loader's worker notices within 5 s:
LEFTOVER_SECONDS = 30

# The name of the checkpoint that is not numbered, so that retention passes it over:
BEST = "best.pt"

# Dense matrix products, FLOP/s, of the datasheets, by a part of the device's name and the precision:
PEAK_FLOPS = {
    "H200": dict(bf16=989e12, tf32=495e12), "H100": dict(bf16=989e12, tf32=495e12),
    "A100": dict(bf16=312e12, tf32=156e12),
}  # fmt: skip


class Experiment:
    """A run's folder, held by a lock while the run is alive. Only the main process has one.

    agents: what torchrun_agent gave on every process
    resumed: the path of the checkpoint to continue from, or None.
    """

    def __init__(self, args, agents=()):
        self.resumed, self.lock, self.agents = None, None, sorted({*agents} - {None})
        with refusing(args):
            self._open(args.results_dir)
            if args.resume == "auto":
                self.folder = self._find_restarted(args) or self._find_unfinished(args)
            elif args.resume == "never":
                self.folder = self._find_restarted(args)
            else:
                self.folder, self.resumed = self._given(args)
            self.goes_back = self.resumed is not None
            if self.folder is None:
                self.folder = self._create(args)
            else:
                self.resumed = self.resumed or checkpoint.latest(self.checkpoints)

    def _open(self, results_dir):
        os.makedirs(results_dir, exist_ok=True)

    def go_on(self, args):
        """Make the folder that of a run which goes on from `resumed`, with these options. UserError where it
        cannot be written to."""
        with refusing(args):
            checkpoint.retain(self.checkpoints, 0)
            later = checkpoint.set_aside(
                self.checkpoints, checkpoint.step_of(self.resumed) if self.resumed else 0
            )
            self._write_settings(args)
            write_note(self.folder, JOB, self.agents)
            unwanted = [FINISHED]
            if later and self.goes_back:  # W&B cannot go back: its run ends there, and another begins
                unwanted.append(WANDB_ID)
            for name in unwanted:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(self.folder, name))

    @property
    def checkpoints(self):
        return os.path.join(self.folder, "checkpoints")

    def checkpoint_path(self, step, folder=False):
        return os.path.join(self.checkpoints, f"{step:07d}" + ("" if folder else ".pt"))

    @property
    def best_path(self):
        return os.path.join(self.checkpoints, BEST)

    def picture_path(self, step, cfg_scale=None):
        scale = "" if cfg_scale is None else f"-cfg-{cfg_scale}"
        return os.path.join(self.folder, "samples", f"{step:07d}{scale}.png")

    def has_pictures(self, step, args):
        """Whether all pictures of a step are there."""
        scales = args.sample_cfg_scales or [None]
        return all(os.path.exists(self.picture_path(step, scale)) for scale in scales)

    def _acquire(self, folder):
        """Whether the folder is now this run's, that is no living run's.

        Where the run has died but processes that it started have not, such as its loaders' workers, which
        look for it every few seconds, this waits for them."""
        self.lock = FileLock(os.path.join(folder, ".lock"))
        deadline = None
        while True:
            try:
                self.lock.acquire(timeout=0)
                break
            except Timeout:
                if not is_gone(read_note(folder, OWNER)):
                    return False
            if deadline is None:
                print(f"{folder}: its run has died; waiting for processes that it left", flush=True)
                deadline = time.monotonic() + LEFTOVER_SECONDS
            elif time.monotonic() > deadline:
                raise UserError(
                    f"{folder}: its run has died, but another process still holds {folder}/.lock; end that"
                    f" (fuser -v {folder}/.lock names it) and run the same command again"
                )
            time.sleep(0.1)
        write_note(folder, OWNER, identify(os.getpid()))
        return True

    def _find_restarted(self, args):
        """The folder of this very job, whose processes torchrun started again after one died, or None."""
        for name in numbered_runs(args.results_dir):
            folder = os.path.join(args.results_dir, name)
            same = read_settings(folder) == comparable(vars(args))
            if same and self._is_of_this_job(folder) and self._acquire(folder):
                return folder
        return None

    def _is_of_this_job(self, folder):
        return not {*self.agents}.isdisjoint(read_note(folder, JOB) or ())

    def _find_unfinished(self, args):
        """The newest folder of a run with the same settings that has not finished and is not running, or
        None."""
        numbers = numbered_runs(args.results_dir)
        # Where a copy shares the number of a run, the run comes first:
        for name in sorted(numbers, key=lambda name: (-numbers[name], len(name), name)):
            folder = os.path.join(args.results_dir, name)
            if read_settings(folder) == comparable(vars(args)) and not is_finished(folder):
                if self._acquire(folder):
                    if not is_finished(folder):  # between the two
                        return folder
                    self.lock.release()
        return None

    def _given(self, args):
        """The folder of --resume PATH, a run's or one of its checkpoints', and that checkpoint, unless it
        was gone back to before: then None, since what is newer came from it."""
        path, named, folder = args.resume, None, args.resume
        if os.path.basename(os.path.dirname(os.path.abspath(path))) == "checkpoints":
            if os.path.basename(path) == BEST:
                raise UserError(
                    f"--resume {path}: holds averaged weights alone; give a numbered checkpoint, or give this"
                    " one to --init-from"
                )
            if not re.fullmatch(r"\d+(\.pt)?", os.path.basename(os.path.abspath(path))):
                raise UserError(f"--resume {path}: set aside; rename it to a number, as 0050000.pt, first")
            folder = os.path.dirname(os.path.dirname(os.path.abspath(path)))
            named = None if is_repeated(folder, args) or self._is_of_this_job(folder) else path
            if named and not os.path.exists(named):
                raise UserError(f"--resume {path}: no such checkpoint; give one of that folder's")
        if read_settings(folder) is None:
            raise UserError(
                f"--resume {path}: no run's folder (no args.json); give results/NNN-…, auto or never"
            )
        if not self._acquire(folder):
            raise UserError(f"--resume {path}: that run is still running; stop it first")
        return folder, named

    def _create(self, args):
        """Make results/NNN-DiT-XL-2 under the next free number, with args.json; returns its path."""
        for folder in free_folders(args):
            try:
                os.mkdir(folder)
                break
            except FileExistsError:  # another run, started at the same moment
                continue
        self._acquire(folder)
        os.mkdir(os.path.join(folder, "checkpoints"))
        self.folder = folder
        self._write_settings(args)
        write_note(folder, JOB, self.agents)
        return folder

    def _write_settings(self, args):
        with whole_file(os.path.join(self.folder, "args.json")) as file:
            json.dump(vars(args), file, indent=2)

    def finish(self):
        """Mark the run as finished: the same command then starts a new one."""
        with open(os.path.join(self.folder, FINISHED), "w"):
            pass
        self.lock.release()


class Foreseen(Experiment):
    """What Experiment would find or make, for --dry-run: nothing is written, and no folder is held."""

    def _open(self, results_dir):
        check_folder(results_dir, "--results-dir")

    def _acquire(self, folder):
        self.lock = FileLock(os.path.join(folder, ".lock"))  # never acquired, since that makes the file
        if is_locked(self.lock.lock_file) and not is_gone(read_note(folder, OWNER)):
            return False
        check_folder(folder, "--results-dir")
        return True

    def _create(self, args):
        return next(free_folders(args))


def free_folders(args):
    """Where a new run's folder may be made: results/NNN-DiT-XL-2 under the next free number, and so on."""
    name = args.model.replace("/", "-") + (f"-{args.preset}" if args.preset else "")
    taken = numbered_runs(args.results_dir).values()
    for number in itertools.count(max(taken, default=-1) + 1):
        yield os.path.join(args.results_dir, f"{number:03d}-{name}")


@contextlib.contextmanager
def refusing(args):
    """Turn a failure to write into a UserError that names the flag."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--results-dir {args.results_dir}: cannot be written to ({error.strerror})"
        ) from error


def numbered_runs(results_dir):
    """{name: number} of what stands in a --results-dir under a name that begins with a number."""
    names = os.listdir(results_dir) if os.path.isdir(results_dir) else []
    matches = map(re.compile(r"\d+").match, names)
    return {found.string: int(found[0]) for found in matches if found}


def is_finished(folder):
    """Whether the run in this folder reached its last step."""
    return os.path.exists(os.path.join(folder, FINISHED))


def comparable(settings):
    """Of options, what a run computes: plain JSON data. Two paths to one place are the same; relative ones,
    which earlier versions kept, are taken from here."""
    settings = resolve_paths(settings, os.path.realpath)
    return json.loads(json.dumps({name: value for name, value in settings.items() if name not in EXECUTION}))


def resolve_paths(settings, resolve):
    """Options with what resolve gives for each path to something that is there."""
    paths = {name: settings[name] for name in PATHS if isinstance(settings.get(name), str)}
    return {**settings, **{name: resolve(path) for name, path in paths.items() if os.path.exists(path)}}


def read_settings(folder, select=comparable):
    """The comparable settings of a run's folder, or others of them; None where it is no such folder."""
    try:
        with open(os.path.join(folder, "args.json")) as file:
            return select(json.load(file))
    except (OSError, ValueError, AttributeError):  # absent, damaged, or of something else
        return None


def write_note(folder, name, value):
    """Keep plain data in a run's folder."""
    with whole_file(os.path.join(folder, name)) as file:
        json.dump(value, file)


def read_note(folder, name):
    """What write_note kept, or None."""
    try:
        with open(os.path.join(folder, name)) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def is_repeated(folder, args):
    """Whether the run in this folder was last continued as these options say, and has not finished."""
    same = read_settings(folder) == comparable(vars(args))
    last = read_settings(folder, lambda settings: settings.get("resume"))
    same_place = last is not None and os.path.realpath(last) == os.path.realpath(args.resume)
    return same and same_place and not is_finished(folder)


class Best:
    """checkpoints/best.pt, the averaged weights with the lowest FID so far. Only the main process has one.

    settings: plain data, what two values of FID must share to be compared. One of other settings, or of a
    step that the run has gone back behind, is set aside.
    """

    def __init__(self, experiment, settings, start_step):
        self.path, self.settings, self.value = experiment.best_path, settings, math.inf
        if os.path.exists(self.path):
            found = {}
            with contextlib.suppress(UserError):  # damaged
                found = checkpoint.load(self.path).contents
            fid = found.get("fid", {})
            if found.get("step", math.inf) <= start_step and fid.get("settings") == settings:
                self.value = fid["value"]
            else:
                os.replace(self.path, f"{self.path}.unused")

    def offer(self, value, contents):
        """Keep these contents of a checkpoint if their FID is the lowest; whether it is."""
        if value >= self.value:
            return False
        checkpoint.save(self.path, dict(contents, fid=dict(value=value, settings=self.settings)))
        self.value = value
        return True


class Metrics:
    """Where a run's numbers go: metrics.jsonl, TensorBoard where it is installed, W&B where
    asked. Only the main process has one.

    names     of the numbers that stand there for start_step
    tolerate  a Tolerance: what cannot be written is left out
    """

    def __init__(self, folder, *, start_step, tolerate, use_wandb=False, settings=None):
        self.path, self.tolerate, self.names = os.path.join(folder, "metrics.jsonl"), tolerate, set()
        with tolerate(self.path):
            self._drop_after(start_step)
        self.tensorboard = self.wandb = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            with tolerate("TensorBoard", Exception):
                path = os.path.join(folder, "tensorboard")
                self.tensorboard = SummaryWriter(path, purge_step=start_step + 1)
        if use_wandb:
            self._start_wandb(folder, settings, start_step)

    def _drop_after(self, step):
        """Forget what an interrupted run wrote after the checkpoint that it continues from."""
        if not os.path.exists(self.path):
            return
        kept = []
        with open(self.path) as file:
            for line in file:
                with contextlib.suppress(json.JSONDecodeError):  # a line that was never finished
                    row = json.loads(line)
                    if row["step"] <= step:
                        kept.append(line)
                    if row["step"] == step:
                        self.names |= row.keys()
        with whole_file(self.path) as file:
            file.writelines(kept)

    def _start_wandb(self, folder, settings, start_step):
        """Begin a run of W&B, or go on with this folder's."""
        wandb, path = import_wandb(), os.path.join(folder, WANDB_ID)
        try:
            if not os.path.exists(path):
                with whole_file(path) as file:
                    file.write(secrets.token_hex(4))
            with open(path) as file:
                run_id = file.read()
            self.wandb = wandb.init(
                project="DiT", name=os.path.basename(folder), dir=folder, config=settings, id=run_id,
                resume="allow", allow_val_change=True,
            )  # fmt: skip
        except Exception as error:  # of W&B's own kinds
            if not start_step:  # a run that has begun goes on without
                raise UserError(f"--wandb: did not start ({reason_of(error)}); leave it out") from error
            self.tolerate.warn("Weights & Biases", error)

    def write(self, step, **numbers):
        """Add a row for a step."""
        with self.tolerate(self.path):
            self._append(json.dumps(dict(step=step, **numbers)) + "\n")
        if self.tensorboard is not None:
            writer, self.tensorboard = self.tensorboard, None  # not to be tried again if it fails
            with self.tolerate("TensorBoard", Exception):
                for name, value in numbers.items():
                    writer.add_scalar(name, value, step)
                self.tensorboard = writer
        if self.wandb is not None:
            run, self.wandb = self.wandb, None
            with self.tolerate("Weights & Biases", Exception):
                run.log(numbers, step=step)
                self.wandb = run

    def _append(self, line):
        """Add a line to metrics.jsonl, or nothing of it."""
        with open(self.path, "ab", buffering=0) as file:
            size, data = file.tell(), line.encode()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise

    def close(self):
        """Flush what is not written yet."""
        if self.tensorboard is not None:
            with self.tolerate("TensorBoard", Exception):
                self.tensorboard.close()
        if self.wandb is not None:
            with self.tolerate("Weights & Biases", Exception):
                self.wandb.finish()


class Meter:
    """Running means of the losses between two log lines; looks at a GPU only when read."""

    def __init__(self):
        self.sums, self.steps, self.skipped = {}, 0, 0
        self.restored, self.since = 0, time.perf_counter()  # steps that an earlier process took the time for

    def add_skipped(self, count):
        """Count images that could not be read."""
        self.skipped += count

    def add(self, terms, quarter):
        """Count a step's terms, each (N,), and the loss by quarter (N,) of the steps of diffusion, 0 … 3."""
        self.steps += 1
        for name, values in terms.items():
            self._add(name, values.detach().mean())
        loss, counts = terms["loss"].detach().float(), torch.zeros(4, device=quarter.device)
        self._add("quarter_counts", counts.index_add(0, quarter, torch.ones_like(loss)))
        self._add("quarter_sums", counts.index_add(0, quarter, loss))

    def _add(self, name, value):
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def read(self, processes):
        """Means over steps and processes, loss_q1 … loss_q4 and steps_per_sec; starts anew."""
        sums = {name: processes.mean(total) for name, total in self.sums.items()}
        counts, losses = sums.pop("quarter_counts").tolist(), sums.pop("quarter_sums").tolist()
        means = {name: total.item() / self.steps for name, total in sums.items()}
        means |= {f"loss_q{i + 1}": losses[i] / counts[i] for i in range(4) if counts[i]}
        means["skipped_images"] = sum(processes.gather(self.skipped))
        means["steps_per_sec"] = (self.steps - self.restored) / (time.perf_counter() - self.since)
        self.__init__()
        return means

    def state_dict(self):
        """What a resumed run needs to go on in the middle of a window."""
        return dict(
            steps=self.steps,
            skipped=self.skipped,
            sums={name: total.cpu() for name, total in self.sums.items()},
        )

    def load_state_dicts(self, states, processes):
        """Take up what state_dict gave on every process that there was, or this process's share of it where
        there are others now."""
        if len(states) == processes.world_size:
            state = states[processes.rank]
        else:
            state = self._share(states, processes)
        self.steps, self.skipped = state["steps"], state["skipped"]
        self.restored = self.steps
        self.sums = {name: total.to(processes.device) for name, total in state["sums"].items()}

    @staticmethod
    def _share(states, processes):
        """A state that, the same on every process, has read give the same as these states together."""
        sums = {name: sum(state["sums"][name] for state in states) for name in states[0]["sums"]}
        # Means over a process's images are averaged; what is counted of its images is divided among the new
        # processes, as the images are from now on:
        for name, total in sums.items():
            sums[name] = total / (processes.world_size if name.startswith("quarter_") else len(states))
        skipped = sum(state["skipped"] for state in states) if processes.is_main else 0
        return dict(steps=states[0]["steps"], skipped=skipped, sums=sums)


def memory_gib(device, reserved=False):
    """The most memory this process has held, GiB: of the GPU, or of the machine.

    reserved: count all that PyTorch took from the GPU, also where no tensor is.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved if reserved else torch.cuda.max_memory_allocated
        return peak(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def restart_peak_memory(device):
    """Give unused memory back, and let memory_gib count from what is held now, where the system can."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif os.path.exists("/proc/self/clear_refs"):  # Linux
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # of glibc
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def device_name(device):
    """The GPU's or processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def measure_matmul_flops(device, precision):
    """FLOP/s that this device reaches in one large matrix product at this precision."""
    set_precision(precision, device)
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def peak_flops(device, precision):
    """The datasheet's FLOP/s of this device at this precision, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks.get(precision) for part, peaks in PEAK_FLOPS.items() if part in name), None)


def import_wandb():
    """The wandb package; UserError where it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb: not installed; uv sync --group wandb, or pip install wandb") from error
    return wandb
