"""runtime.py: processes, errors, seeds."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from forked import at_once

from runtime import cli, distributed
from runtime.cli import (
    UserError,
    atomic_write,
    float_above,
    float_at_least,
    fraction,
    int_at_least,
    seed_number,
    user_errors,
)
from runtime.distributed import derive_seed, generator_for
from runtime.image_io import make_folder


def test_two_processes_together():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "tests" / "two_processes.py")]  # fmt: skip
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0 is content" in done.stdout and "rank 1 is content" in done.stdout


def test_two_processes_write_one_file_at_once(tmp_path):
    """Neither fails, what stands there is whole at any time, and nothing else is left."""
    path = tmp_path / "settings.json"

    def write(index, wait):
        for _ in range(100):
            wait()
            make_folder(tmp_path, "--out")
            with atomic_write(path) as file:
                json.dump([index] * 3000, file)
            assert len(set(json.loads(path.read_text()))) == 1

    assert at_once(write) == [0, 0]
    assert os.listdir(tmp_path) == ["settings.json"]


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text("whole")

    def die(index, wait):
        with atomic_write(path) as file:
            file.write("half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    assert at_once(die, count=1) == [-signal.SIGKILL]
    assert path.read_text() == "whole" and len(os.listdir(tmp_path)) == 2
    with atomic_write(path) as living:  # another's write leaves a living one's alone
        living.write("first")
        with atomic_write(path) as file:
            file.write("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["settings.json"]


def test_seeds_are_well_mixed():
    seeds = [
        derive_seed(seed, stream, step) for seed in range(20) for stream in range(3) for step in range(50)
    ]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**32
    first = [torch.rand((), generator=generator_for("cpu", 0, step)).item() for step in range(1000)]
    assert sum(first) / 1000 == pytest.approx(0.5, abs=0.03)


def test_user_errors_name_flag_and_reason():
    with pytest.raises(UserError, match="^--lr 5: too much$"), user_errors("--lr 5"):
        raise ValueError("too much\nand more")
    with pytest.raises(UserError, match=r"^--out x: could not be written \(No space left on device\)$"):
        with user_errors("--out x", "could not be written", OSError):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "elsewhere")
    with pytest.raises(UserError, match="^mine$"), user_errors("--lr 5", "wrong", Exception):
        raise UserError("mine")
    with pytest.raises(torch.OutOfMemoryError), user_errors("--lr 5", "wrong", Exception):
        raise torch.OutOfMemoryError("no room")
    with pytest.raises(KeyError), user_errors("--lr 5"):
        raise KeyError("a bug stays a bug")


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--n 0", "--n 0: must be at least 1"),
        ("--n 3 -2", "--n -2: must be at least 1"),
        ("--n 1.5", "argument --n: invalid int value: '1.5'"),
        ("--workers -1", "--workers -1: must be 0 or more"),
        ("--side 96", "--side 96: must be a multiple of 64"),
        ("--rate 0", "--rate 0.0: must be more than 0"),
        ("--rate nan", "--rate nan: must be more than 0"),
        ("--rate inf", "--rate inf: must be finite"),
        ("--rate fast", "argument --rate: invalid float value: 'fast'"),
        ("--decay -0.1", "--decay -0.1: must be 0 or more"),
        ("--decay nan", "--decay nan: must be 0 or more"),
        ("--share 1", "--share 1.0: must be in [0, 1)"),
        ("--share nan", "--share nan: must be in [0, 1)"),
        (f"--seed {2**63}", f"--seed {2**63}: must be 0 or more, below 2^63"),
    ],
)
def test_ranges_of_options(capsys, argv, message):
    parser = cli.Parser(prog="prog")
    parser.add_argument("--n", type=int_at_least(1), nargs="+")
    parser.add_argument("--workers", type=int_at_least(0))
    parser.add_argument("--side", type=int_at_least(64, multiple_of=64))
    parser.add_argument("--rate", type=float_above(0))
    parser.add_argument("--decay", type=float_at_least(0))
    parser.add_argument("--share", type=fraction)
    parser.add_argument("--seed", type=seed_number)
    given = f"--n 1 2 --workers 0 --side 128 --rate 1e-9 --decay 0 --share 0.9 --seed {2**63 - 1}"
    good = vars(parser.parse_args(given.split()))
    expected = dict(n=[1, 2], workers=0, side=128, rate=1e-9, decay=0, share=0.9, seed=2**63 - 1)
    assert good == expected
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(argv.split())
    assert stopped.value.code == 2 and capsys.readouterr().err == f"prog: error: {message}\n"


def test_only_user_errors_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prog"])
    parser = cli.Parser(prog="prog")

    def wrong(args):
        raise UserError("--x 1: no")

    def broken(args):
        raise ValueError("a bug")

    with pytest.raises(SystemExit) as stopped:
        cli.launch(wrong, parser)
    assert stopped.value.code == 2 and capsys.readouterr().err == "prog: error: --x 1: no\n"
    with pytest.raises(ValueError, match="a bug"):
        cli.launch(broken, parser)


@pytest.mark.parametrize(
    "environment, expected",
    [
        (dict(SLURM_NTASKS="2", SLURM_PROCID="0"), "alone"),  # a batch script, without srun
        (dict(SLURM_NTASKS="2", SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="2"), "refused"),
        (dict(SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1"), "alone"),  # srun --pty bash
        (dict(SLURM_NTASKS="2", SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="2", WORLD_SIZE="1"), "alone"),
    ],
)
def test_copies_that_srun_started(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if expected == "alone":
        assert distributed.init_distributed().world_size == 1
    else:
        with pytest.raises(UserError, match="^SLURM_STEP_NUM_TASKS=2: srun started 2 copies"):
            distributed.init_distributed()


@pytest.mark.parametrize(
    "count, local_rank, torchrun, expected",
    [
        (4, 3, True, 3),
        (4, 3, False, 3),
        (1, 0, True, 0),
        (1, 3, False, 0),
        (1, 1, True, None),
        (2, 2, 0, None),
    ],
)
def test_which_gpu(monkeypatch, count, local_rank, torchrun, expected):
    """Slurm may show each process one GPU alone; torchrun's processes all see the same."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    if expected is None:
        with pytest.raises(UserError, match=f"has {count} GPUs, too few for process {local_rank};"):
            distributed.init_distributed()
    else:
        assert [distributed.init_distributed().device] == chosen == [torch.device("cuda", expected)]


def test_importing_changes_nothing():
    code = (
        "import torch; before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32;"
        "threads = torch.get_num_threads();"
        "import train, sample, download, models;"
        "assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32);"
        "assert threads == torch.get_num_threads() and not torch.distributed.is_initialized();"
        "import sys; assert 'diffusers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("fast, expected", [(True, "bf16"), (False, "fp32")])
def test_automatic_precision_goes_by_the_processor(monkeypatch, fast, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    assert distributed.set_precision("auto", torch.device("cpu")) == expected
