"""A run's folder: its number, settings, log and metrics, and how an interrupted run is found again.

results/000-DiT-XL-2/
    args.json       the options
    log.txt         one line every --log-every steps
    metrics.jsonl   the same and more, as data
    checkpoints/    0050000.pt …, and best.pt with --fid-ref
    samples/        0050000.png …
"""

import contextlib
import itertools
import json
import math
import os
import re
import time

from filelock import FileLock, Timeout

from checkpointing import files as checkpoints
from runtime.cli import UserError, atomic_write, is_locked, user_errors
from runtime.distributed import identify, is_gone
from runtime.image_io import check_folder
from training.run_log import WANDB_ID

# Options that say how a run is executed or reported, not what it computes; two runs that differ in nothing
# else are the same run.
NON_REPRODUCIBLE = {
    "allow_changed_data", "by_hand", "cache_images", "dry_run", "resume", "results_dir", "num_workers",
    "log_every", "ckpt_every", "sample_every", "sample_cfg_scales", "sample_gif", "keep_checkpoints", "wandb",
    "world_size", "device_memory",
}  # fmt: skip
# Options that may be paths; or else names of published weights, or hub ids.
PATHS = ("data_path", "feature_path", "vae", "init_from", "fid_ref", "inception_weights")
# What options mean for runs that were begun before there were such options:
ADDED_OPTIONS = dict(
    optimizer="adamw", aux_loss=None, aux_weight=0.5, aux_layer=None, latent_normalization="scale",
    random_flip=True, residual_dtype="fp32", grad_compression="none",
)  # fmt: skip
FINISHED = ".finished"  # an empty file in the folder of a run that reached its last step
OWNER = ".owner"  # which process holds the folder, or held it last
JOB = ".job"  # which torchrun agents' processes last began or continued the run
# How long a run waits for what a dead one left; a loader's worker notices within 5 s:
LEFTOVER_SECONDS = 30
# The name of the checkpoint that is not numbered, so that retention passes it over:
BEST = "best.pt"


class Experiment:
    """A run's folder, held by a lock while the run is alive. Only the main process has one.

    agents: what torchrun_agent gave on every process
    resumed: the path of the checkpoint to continue from, or None.
    """

    def __init__(self, args, agents=()):
        self.resumed, self.lock, self.agents = None, None, sorted({*agents} - {None})
        with writing(args):
            self._open(args.results_dir)
            if args.resume == "auto":
                self.folder = self._find_restarted(args) or self._find_unfinished(args)
            elif args.resume == "never":
                self.folder = self._find_restarted(args)
            else:
                self.folder, self.resumed = self._open_requested_run(args)
            self.goes_back = self.resumed is not None
            if self.folder is None:
                self.folder = self._create(args)
            else:
                self.resumed = self.resumed or checkpoints.latest(self.checkpoints)

    def _open(self, results_dir):
        os.makedirs(results_dir, exist_ok=True)

    def prepare_resume(self, args):
        """Make the folder that of a run which goes on from `resumed`, with these options. UserError where it
        cannot be written to."""
        with writing(args):
            checkpoints.retain(self.checkpoints, 0)
            later = checkpoints.set_aside(
                self.checkpoints, checkpoints.step_of(self.resumed) if self.resumed else 0
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
            same = read_settings(folder) == reproducible_args(vars(args))
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
            if read_settings(folder) == reproducible_args(vars(args)) and not is_finished(folder):
                if self._acquire(folder):
                    if not is_finished(folder):  # between the two
                        return folder
                    self.lock.release()
        return None

    def _open_requested_run(self, args):
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
        with atomic_write(os.path.join(self.folder, "args.json")) as file:
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


def writing(args):
    """A context that turns a failure to write into a UserError that names the flag."""
    return user_errors(f"--results-dir {args.results_dir}", "cannot be written to", OSError)


def numbered_runs(results_dir):
    """{name: number} of what stands in a --results-dir under a name that begins with a number."""
    names = os.listdir(results_dir) if os.path.isdir(results_dir) else []
    matches = map(re.compile(r"\d+").match, names)
    return {found.string: int(found[0]) for found in matches if found}


def is_finished(folder):
    """Whether the run in this folder reached its last step."""
    return os.path.exists(os.path.join(folder, FINISHED))


def reproducible_args(settings):
    """Of options, what a run computes: plain JSON data. Two paths to one place are the same; relative ones,
    which earlier versions kept, are taken from here."""
    settings = resolve_paths({**ADDED_OPTIONS, **settings}, os.path.realpath)
    return json.loads(
        json.dumps({name: value for name, value in settings.items() if name not in NON_REPRODUCIBLE})
    )


def resolve_paths(settings, resolve):
    """Options with what resolve gives for each path to something that is there."""
    paths = {name: settings[name] for name in PATHS if isinstance(settings.get(name), str)}
    return {**settings, **{name: resolve(path) for name, path in paths.items() if os.path.exists(path)}}


def read_settings(folder, select=reproducible_args):
    """The comparable settings of a run's folder, or others of them; None where it is no such folder."""
    try:
        with open(os.path.join(folder, "args.json")) as file:
            return select(json.load(file))
    except (OSError, ValueError, TypeError, AttributeError):  # absent, damaged, or of something else
        return None


def write_note(folder, name, value):
    """Keep plain data in a run's folder."""
    with atomic_write(os.path.join(folder, name)) as file:
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
    same = read_settings(folder) == reproducible_args(vars(args))
    last = read_settings(folder, lambda settings: settings.get("resume"))
    same_place = last is not None and os.path.realpath(last) == os.path.realpath(args.resume)
    return same and same_place and not is_finished(folder)


class BestCheckpoint:
    """checkpoints/best.pt, the averaged weights with the lowest FID so far. Only the main process has one.

    settings: plain data, what two values of FID must share to be compared. One of other settings, or of a
    step that the run has gone back behind, is set aside.
    """

    def __init__(self, experiment, settings, start_step):
        self.path, self.settings, self.value = experiment.best_path, settings, math.inf
        if os.path.exists(self.path):
            found = {}
            with contextlib.suppress(UserError):  # damaged
                found = checkpoints.load(self.path).contents
            fid = found.get("fid", {})
            if found.get("step", math.inf) <= start_step and fid.get("settings") == settings:
                self.value = fid["value"]
            else:
                os.replace(self.path, f"{self.path}.unused")

    def offer(self, value, contents):
        """Keep these contents of a checkpoint if their FID is the lowest; whether it is."""
        if value >= self.value:
            return False
        checkpoints.save(self.path, dict(contents, fid=dict(value=value, settings=self.settings)))
        self.value = value
        return True
