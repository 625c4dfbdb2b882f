"""A run's numbers: the loss between two log lines, metrics.jsonl, TensorBoard, W&B."""

import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import resource
import secrets
import sys
import time

import torch

from runtime.cli import UserError, atomic_write, reason_of

WANDB_ID = ".wandb-id"  # holds the id of the run's run at W&B, which a continued one goes on with


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
        with atomic_write(self.path) as file:
            file.writelines(kept)

    def _start_wandb(self, folder, settings, start_step):
        """Begin a run of W&B, or go on with this folder's."""
        wandb, path = import_wandb(), os.path.join(folder, WANDB_ID)
        try:
            if not os.path.exists(path):
                with atomic_write(path) as file:
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

    def read(self, dist):
        """Means over steps and processes, loss_q1 … loss_q4 and steps_per_sec; starts anew."""
        sums = {name: dist.mean(total) for name, total in self.sums.items()}
        counts, losses = sums.pop("quarter_counts").tolist(), sums.pop("quarter_sums").tolist()
        means = {name: total.item() / self.steps for name, total in sums.items()}
        means |= {f"loss_q{i + 1}": losses[i] / counts[i] for i in range(4) if counts[i]}
        means["skipped_images"] = sum(dist.gather(self.skipped))
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

    def load_state_dicts(self, states, dist):
        """Take up what state_dict gave on every process that there was, or this process's share of it where
        there are others now."""
        if len(states) == dist.world_size:
            state = states[dist.rank]
        else:
            state = self._share(states, dist)
        self.steps, self.skipped = state["steps"], state["skipped"]
        self.restored = self.steps
        self.sums = {name: total.to(dist.device) for name, total in state["sums"].items()}

    @staticmethod
    def _share(states, dist):
        """A state that, the same on every process, has read give the same as these states together."""
        sums = {name: sum(state["sums"][name] for state in states) for name in states[0]["sums"]}
        # Means over a process's images are averaged; what is counted of its images is divided among the new
        # processes, as the images are from now on:
        for name, total in sums.items():
            sums[name] = total / (dist.world_size if name.startswith("quarter_") else len(states))
        skipped = sum(state["skipped"] for state in states) if dist.is_main else 0
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


def import_wandb():
    """The wandb package; UserError where it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb: not installed; uv sync --group wandb, or pip install wandb") from error
    return wandb
