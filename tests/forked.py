"""Training runs in processes of their own that start at once, forked from a server that imported train, and
what they leave."""

import importlib
import json
import multiprocessing
import os
import socket
import sys
import time

from conftest import ROOT

from checkpointing import files as checkpoints

INCEPTION = "torch_fidelity.feature_extractor_inceptionv3"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["train", "extract_features", "evaluate", "diffusers", INCEPTION])


def start(argv, output, environment=None, before=None, command="train"):
    """Start `train.py argv` with standard output and error in a file; before: a function called first."""
    process = _context.Process(
        target=_run, args=([*map(str, argv)], str(output), environment or {}, before, command)
    )
    process.start()
    return process


def start_two(argv, output, before=None, command="train", count=2):
    """The same as two processes, or as many, that work together; output gets .0 and .1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = dict(
        WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1"
    )
    return [
        start(argv, f"{output}.{rank}", dict(together, RANK=str(rank), LOCAL_RANK=str(rank)), before, command)
        for rank in range(count)
    ]


def _run(argv, output, environment, before, command):
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.path.insert(0, str(ROOT))
    import torch

    from runtime.cli import launch

    module = importlib.import_module(command)

    torch.set_num_threads(1)  # enough for models this small, and two runs share two cores
    if before is not None:
        before()
    sys.argv = [f"{command}.py", *argv]
    launch(module.main, module.build_parser())


def finish(*processes, timeout=300):
    """Wait for processes and return their exit codes."""
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutError("a run did not end")
    return [process.exitcode for process in processes]


def rows(folder):
    """What metrics.jsonl holds by now."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for_step(folder, step, processes, timeout=60):
    """Return as soon as a run has logged a step, or ended."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in rows(folder)) or not all(p.is_alive() for p in processes):
            return
        time.sleep(0.001)
    raise TimeoutError(f"step {step} was not reached")


def run(folder, *argv, runs=None, expect=0, **options):
    """Run train.py into a folder, check its exit code, and return the run's folder and what it printed.

    runs: start, the default, or start_two."""
    folder.mkdir(exist_ok=True)
    processes = (runs or start)([*argv, "--results-dir", folder], folder / "out", **options)
    codes = finish(*(processes if isinstance(processes, list) else [processes]))
    printed = "".join(path.read_text() for path in sorted(folder.glob("out*")))
    assert set(codes) == {expect}, printed[-3000:]
    return folder / "000-DiT-S-2", printed


def losses(folder, name="loss"):
    """What train.py logged by this name, step by step."""
    return [row[name] for row in rows(folder) if name in row]


def weights(folder, step=12, which="raw"):
    """A state dict of a checkpoint of a run."""
    return checkpoints.load(str(folder / "checkpoints" / f"{step:07d}.pt")).state_dict(which)


def at_once(work, count=2):
    """Call work(index, wait) in forked processes; wait() lets them go on together. Their exit codes."""
    context = multiprocessing.get_context("fork")
    wait = context.Barrier(count, timeout=20).wait
    processes = [context.Process(target=work, args=(index, wait)) for index in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]
