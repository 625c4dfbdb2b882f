"""A run killed at any moment and started again by the same command ends as one that was not, bit for bit."""

import contextlib
import fcntl
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from forked import finish, rows, start, start_two, wait_for_step
from images import write_image
from in_process import SMALL, run

import train
import training.run_dir
from checkpointing import files as checkpoints
from runtime.cli import UserError
from runtime.distributed import identify
from training import run_dir
from training.run_dir import Experiment

ARGV = [*SMALL, "--max-steps", 40, "--ckpt-every", 8, "--log-every", 3, "--sample-every", 0, "--ema-warmup"]
TIMING = {"steps_per_sec", "memory_gib"}


def folder_of(results, number=0):
    return results / f"{number:03d}-DiT-S-2"


def outcome(folder):
    """All that a finished run computed: its last checkpoint's tensors, and its metrics but for times."""
    contents = checkpoints.load(str(folder / "checkpoints" / "0000040.pt")).contents
    numbers = [{name: value for name, value in row.items() if name not in TIMING} for row in rows(folder)]
    return {name: contents[name] for name in ("model", "ema", "opt")}, numbers


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_outcome(one, other):
    (weights, numbers), (other_weights, other_numbers) = outcome(one), outcome(other)
    assert numbers == other_numbers and [row["step"] for row in numbers] == [*range(3, 40, 3), 40]
    assert same(weights, other_weights)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of an undisturbed run."""
    root = tmp_path_factory.mktemp("straight")
    assert finish(start([*ARGV, "--results-dir", root], root / "out")) == [0], (root / "out").read_text()
    return folder_of(root)


@pytest.fixture(scope="module")
def straight_two(tmp_path_factory):
    """The same of two processes."""
    root = tmp_path_factory.mktemp("straight_two")
    assert finish(*start_two([*ARGV, "--results-dir", root], root / "out")) == [0, 0]
    return folder_of(root)


def kill_and_continue(results, runs, kill_steps, pause):
    """Start a run again and again, each time killed after a step, then let it finish."""
    for kill_step in [*kill_steps, None]:
        processes = runs([*ARGV, "--results-dir", results], results / "out")
        if kill_step is None:
            assert set(finish(*processes)) == {0}
            return
        wait_for_step(folder_of(results), kill_step, processes)
        time.sleep(pause)
        for process in processes:
            process.kill()
        finish(*processes)


def one(argv, output):
    return [start(argv, output)]


@pytest.mark.parametrize("runs, reference", [(one, "straight"), (start_two, "straight_two")])
def test_killed_and_continued(tmp_path, request, runs, reference):
    kill_and_continue(tmp_path, runs, [21, 30], pause=0.003)
    assert_same_outcome(folder_of(tmp_path), request.getfixturevalue(reference))
    assert not folder_of(tmp_path, 1).exists()


@pytest.mark.slow
def test_twenty_random_kills(tmp_path, straight):
    generator = random.Random(0)
    for number in range(20):
        results = tmp_path / str(number)
        results.mkdir()
        kill_and_continue(results, one, [generator.randrange(3, 39)], pause=generator.random() * 0.03)
        assert_same_outcome(folder_of(results), straight)


def die_in_the_second_save():
    saves, save = itertools.count(1), torch.save

    def half_then_die(contents, file):
        if next(saves) == 2:
            file.write(b"half of a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(contents, file)

    torch.save = half_then_die


def test_killed_inside_a_checkpoint_write(tmp_path, straight):
    run = start([*ARGV, "--results-dir", tmp_path], tmp_path / "out", before=die_in_the_second_save)
    assert finish(run) == [-signal.SIGKILL]
    folder = folder_of(tmp_path) / "checkpoints"
    whole, half = sorted(os.listdir(folder))
    assert whole == "0000008.pt" and re.fullmatch(r"0000016\.pt\..*\.tmp", half)
    assert finish(start([*ARGV, "--results-dir", tmp_path], tmp_path / "out")) == [0]
    assert_same_outcome(folder_of(tmp_path), straight)
    assert half not in os.listdir(folder)


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, straight):
    (run,) = one([*ARGV, "--results-dir", tmp_path], tmp_path / "out")
    wait_for_step(folder_of(tmp_path), 18, [run])
    run.kill()
    finish(run)
    (folder_of(tmp_path) / "checkpoints" / "0000016.pt").write_bytes(b"junk")
    assert finish(start([*ARGV, "--results-dir", tmp_path], tmp_path / "out")) == [0]
    assert "Continuing after step 8" in (tmp_path / "out").read_text()
    assert_same_outcome(folder_of(tmp_path), straight)


@pytest.mark.parametrize(
    "number, runs, reference",
    [
        (signal.SIGTERM, one, "straight"),
        (signal.SIGINT, one, "straight"),
        (signal.SIGTERM, start_two, "straight_two"),
    ],
)
def test_a_signal_saves_and_exits(tmp_path, request, number, runs, reference):
    argv = [*ARGV, "--results-dir", tmp_path]
    processes = runs(argv, tmp_path / "out")
    wait_for_step(folder_of(tmp_path), 12, processes)
    os.kill(processes[0].pid, number)  # the other is told
    assert set(finish(*processes, timeout=10)) == {0}
    (log,) = tmp_path.glob("out*0") if len(processes) == 2 else [tmp_path / "out"]
    assert "run the same command again to continue" in log.read_text()
    assert set(finish(*runs(argv, tmp_path / "out"))) == {0}
    assert_same_outcome(folder_of(tmp_path), request.getfixturevalue(reference))


def test_which_run_is_continued(tmp_path, straight):
    """auto: the unfinished one of equal settings; a finished, a different or a living one is left alone."""

    def run(*more):
        process = start([*ARGV, "--results-dir", tmp_path, *more], tmp_path / "out")
        return process, (tmp_path / "out")

    first, _ = run()
    wait_for_step(folder_of(tmp_path), 12, [first])
    first.kill()
    finish(first)
    assert finish(run("--lr", "2e-3")[0]) == [0]  # other settings: a run of its own
    assert not (folder_of(tmp_path) / ".finished").exists() and folder_of(tmp_path, 1).exists()
    assert finish(run("--resume", "never")[0]) == [0] and folder_of(tmp_path, 2).exists()
    assert finish(run("--keep-checkpoints", "2")[0]) == [0]  # how, not what
    assert_same_outcome(folder_of(tmp_path), straight)
    assert len(os.listdir(folder_of(tmp_path) / "checkpoints")) == 2
    assert finish(run()[0]) == [0] and folder_of(tmp_path, 3).exists()  # all finished: afresh

    living, _ = run("--max-steps", "100000", "--results-dir", tmp_path / "other")
    wait_for_step(folder_of(tmp_path / "other"), 3, [living])
    process, out = run("--resume", folder_of(tmp_path / "other"))
    assert finish(process) == [2] and "that run is still running" in out.read_text()
    living.kill()
    finish(living)


def arguments(results, *more):
    return train.build_parser().parse_args([*SMALL, "--results-dir", str(results), *map(str, more)])


def test_a_run_waits_for_what_a_dead_one_left(tmp_path, monkeypatch, capsys):
    """Workers of a killed run's loader, say, that hold its lock for some seconds more."""
    folder = Experiment(arguments(tmp_path)).folder
    dead = subprocess.Popen(["sleep", "60"])
    name = identify(dead.pid)
    dead.kill()
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # its parent has not noticed yet

    def hold(owner):
        run_dir.write_note(folder, run_dir.OWNER, owner)
        held = open(os.path.join(folder, ".lock"))
        fcntl.flock(held, fcntl.LOCK_EX)
        return held

    threading.Timer(0.3, hold(name).close).start()
    again = Experiment(arguments(tmp_path))
    assert again.folder == folder and "its run has died; waiting" in capsys.readouterr().out
    again.lock.release()

    monkeypatch.setattr(training.run_dir, "LEFTOVER_SECONDS", 0.2)
    with hold(name), pytest.raises(UserError, match=f"{folder}/.lock; end that"):
        Experiment(arguments(tmp_path))
    for living in (identify(os.getpid()), "another-machine pid:[1] 1 1", None):  # or who knows
        with hold(living):
            assert Experiment(arguments(tmp_path)).folder != folder
    dead.wait()


def test_which_folder_a_restarted_job_continues(tmp_path):
    """torchrun's agents tell the job, one of them is enough; whatever --resume says, and also at the end."""

    def begin(resume, *agents):
        one = Experiment(arguments(tmp_path, "--resume", resume), agents)
        one.lock.release()
        return one

    first = begin("never", "agent 1", "agent 2")
    assert begin("never").folder != first.folder and begin("never", None).folder != first.folder
    begin("never", "agent 3")
    assert begin("never", "agent 2", "agent 4", None).folder == first.folder
    Path(first.folder, run_dir.FINISHED).touch()
    assert begin("never", "agent 1").folder == begin("auto", "agent 1").folder == first.folder
    other = Experiment(arguments(tmp_path, "--resume", "never", "--lr", 1), ["agent 1"])
    assert other.folder != first.folder

    path = Path(first.folder, "checkpoints", "0000008.pt")
    path.touch()
    assert begin(path, "agent 5").resumed == str(path)
    assert begin(path, "agent 5").resumed == str(path)  # killed before it went on from there
    begin(path, "agent 5").prepare_resume(arguments(tmp_path, "--resume", path))
    Path(first.folder, run_dir.FINISHED).touch()
    newer = str(path.with_name("0000016.pt"))
    checkpoints.save(newer, dict(model={"x": torch.zeros(1)}, step=16))
    assert begin(path, "agent 5").resumed == newer
    assert begin(path, "agent 6").resumed == str(path)  # by another job: once more


def test_a_given_run_is_continued_with_other_options(tmp_path):
    def run(*argv, expect=0):
        process = start([*ARGV, "--results-dir", tmp_path, *argv], tmp_path / "out")
        assert finish(process) == [expect], (tmp_path / "out").read_text()
        return (tmp_path / "out").read_text()

    run()
    folder = folder_of(tmp_path)
    run("--max-steps", 48, "--weight-decay", 0.5, "--resume", folder)
    assert [row["step"] for row in rows(folder)][-3:] == [42, 45, 48]
    newest = folder / "checkpoints" / "0000048.pt"
    assert checkpoints.load(str(newest)).contents["opt"]["param_groups"][0]["weight_decay"] == 0.5

    # A given checkpoint is gone back to; what came after it is set aside:
    assert "Continuing after step 16" in run("--resume", folder / "checkpoints" / "0000016.pt")
    assert {"0000024.pt.unused", "0000024.pt", "0000048.pt.unused"} < set(os.listdir(folder / "checkpoints"))
    assert [row["step"] for row in rows(folder)][-1] == 40
    assert checkpoints.latest(str(folder / "checkpoints")).endswith("0000040.pt")

    # What is refused leaves the run as it was:
    def state():
        return (folder / "args.json").read_text(), sorted(os.listdir(folder / "checkpoints"))

    before, first = state(), folder / "checkpoints" / "0000008.pt"
    assert "--max-steps 10: " in run("--max-steps", 10, "--resume", folder, expect=2)
    for option, value, message in (
        ("--model", "DiT-S/4", "its patch size is 2, by these options 4"),
        (
            "--noise-schedule",
            "squaredcos_cap_v2",
            "its noise schedule is linear, by these options squaredcos_",
        ),
        ("--class-dropout-prob", 0.2, "its class dropout prob is 0.1, by these options 0.2"),
    ):
        assert message in run(option, value, "--resume", folder, expect=2)
    whole = first.read_bytes()
    first.write_bytes(whole[:1000])
    assert "0000008.pt: not a checkpoint" in run("--resume", first, expect=2)
    first.write_bytes(whole)
    aside = folder / "checkpoints" / "0000048.pt.unused"
    assert "set aside; rename it to a number" in run("--resume", aside, expect=2)
    assert state() == before

    # Other changes are said:
    assert "; now lr 0.005 (was 0.001)" in run("--lr", 5e-3, "--max-steps", 41, "--resume", folder)
    assert "no run's folder (no args.json)" in run("--resume", tmp_path, expect=2)


def test_going_back_happens_once(tmp_path):
    """A command that goes back to a checkpoint, interrupted and given again, goes on from there."""
    argv = [*ARGV, "--results-dir", tmp_path]
    assert finish(start(argv, tmp_path / "out")) == [0]
    folder, step = folder_of(tmp_path), 40
    longer = [*argv, "--max-steps", 100_000, "--keep-checkpoints", 1]  # which deletes the one gone back to
    back = [*longer, "--resume", folder / "checkpoints" / "0000016.pt"]
    for command, after in ((back, 16), (back, None), (longer, None)):  # the last, since it has not finished
        (tmp_path / "out").unlink()
        process = start(command, tmp_path / "out")
        wait_for_step(folder, step + 10, [process])
        os.kill(process.pid, signal.SIGTERM)
        assert finish(process) == [0]
        assert f"Continuing after step {after or step:,} " in (tmp_path / "out").read_text()
        step = checkpoints.step_of(checkpoints.latest(str(folder / "checkpoints")))
    assert not folder_of(tmp_path, 1).exists()


# ---------------------------------------------------------------------------------------------
# The data of a continued run


@pytest.fixture
def pictures(tmp_path):
    """A folder of ten images of each of two classes, and a run of four steps on it."""
    for i in range(20):
        write_image(tmp_path / "home" / "images" / ("cat", "dog")[i % 2] / f"{i}.png", size=(8, 8), seed=i)
    train_on(tmp_path / "home" / "images", tmp_path)
    return tmp_path / "home" / "images"


PICTURES = [*SMALL[SMALL.index("--image-size") :], "--ckpt-every", 2, "--sample-every", 0]


def train_on(path, results, *argv):
    run(*PICTURES, "--data-path", path, "--results-dir", results, "--max-steps", 4, *argv)


def trained(results, number=0):
    """The step of a run's last checkpoint, and what it keeps of the data."""
    found = checkpoints.load(checkpoints.latest(str(folder_of(results, number) / "checkpoints"))).contents
    return found["step"], found["config"]["data"]


def interrupt(results):
    """Make a finished run one that was killed after step 2."""
    os.remove(folder_of(results) / ".finished")
    os.remove(folder_of(results) / "checkpoints" / "0000004.pt")


def test_changed_classes_are_refused(pictures, tmp_path, capsys):
    (pictures / "cat").rename(pictures / "fox")  # the labels of both change
    interrupt(tmp_path)
    for more in ([], ["--resume", folder_of(tmp_path)], ["--allow-changed-data"]):
        with pytest.raises(SystemExit):
            train_on(pictures, tmp_path, *more)
        message = capsys.readouterr().err
        assert f"--data-path {pictures}: has other classes than {folder_of(tmp_path)}" in message
        assert "label 0 is 'dog', and was 'cat'; give the run's own data" in message
    assert trained(tmp_path)[0] == 2 and not folder_of(tmp_path, 1).exists()
    train_on(pictures, tmp_path, "--resume", "never")
    assert trained(tmp_path, 1)[1]["classes"] == ["dog", "fox"]


@pytest.mark.parametrize("change", ["add", "rename"])
def test_changed_images_are_refused_unless_asked_for(pictures, tmp_path, capsys, change):
    interrupt(tmp_path)
    if change == "add":
        for i in range(5):
            write_image(pictures / "cat" / f"new-{i}.png", size=(8, 8))
    else:
        (pictures / "cat" / "0.png").rename(pictures / "cat" / "99.png")
    count = 25 if change == "add" else 20
    with pytest.raises(SystemExit):
        train_on(pictures, tmp_path)
    message = capsys.readouterr().err
    assert "holds other images than" in message
    assert f"({count}; were 20); give --allow-changed-data" in message
    train_on(pictures, tmp_path, "--allow-changed-data")
    log = (folder_of(tmp_path) / "log.txt").read_text()
    assert "Continuing after step 2" in log and f"; now {count} images, others (was 20)" in log
    assert trained(tmp_path)[0] == 4 and trained(tmp_path)[1]["count"] == count
    train_on(pictures, tmp_path, "--resume", folder_of(tmp_path))  # on the data that it has by now


def test_a_relative_path_is_the_same_data_from_anywhere(pictures, tmp_path, monkeypatch):
    write_image(tmp_path / "elsewhere" / "images" / "cat" / "0.png", size=(8, 8))
    os.system(f"cp -r {pictures}/* {tmp_path}/elsewhere/images")
    results = tmp_path / "relative"
    monkeypatch.chdir(tmp_path / "home")
    train_on("images", results)
    assert trained(results)[1]["dataset"] == str(pictures)
    assert json.loads((folder_of(results) / "args.json").read_text())["data_path"] == str(pictures)
    interrupt(results)
    monkeypatch.chdir(tmp_path / "elsewhere")
    train_on("images", results)  # another data set, of the same name
    assert trained(results)[0] == 2 and trained(results, 1)[0] == 4
    (tmp_path / "link").symlink_to(tmp_path / "home")
    train_on("../link/images", results)
    assert trained(results)[0] == 4 and not folder_of(results, 2).exists()


def test_runs_of_earlier_versions_go_on(pictures, tmp_path, monkeypatch, capsys):
    """They kept relative paths, and no fingerprint; their classes count nonetheless."""
    interrupt(tmp_path)
    path, settings = folder_of(tmp_path) / "checkpoints" / "0000002.pt", folder_of(tmp_path) / "args.json"
    found = checkpoints.load(str(path)).contents
    found["config"]["data"] = dict(dataset="images", image_size=8, classes=["cat", "dog"])
    found["args"]["data_path"] = "images"
    checkpoints.save(str(path), found)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "data_path": "images"}))
    monkeypatch.chdir(tmp_path / "home")
    (pictures / "cat").rename(pictures / "fox")
    with pytest.raises(SystemExit):
        train_on("images", tmp_path)
    assert "label 0 is 'dog', and was 'cat'" in capsys.readouterr().err
    (pictures / "fox").rename(pictures / "cat")
    train_on("images", tmp_path)
    assert trained(tmp_path)[0] == 4 and not folder_of(tmp_path, 1).exists()


def test_retention_does_not_count_damaged_checkpoints(tmp_path):
    argv = [*ARGV, "--results-dir", tmp_path, "--keep-checkpoints", 1]
    (run,) = one([*ARGV, "--results-dir", tmp_path], tmp_path / "out")
    wait_for_step(folder_of(tmp_path), 27, [run])
    run.kill()
    finish(run)
    folder = folder_of(tmp_path) / "checkpoints"
    (folder / "0000024.pt").write_bytes(b"junk")
    (run,) = one(argv, tmp_path / "again")
    while not (tmp_path / "again").exists() or "step=0000018" not in (tmp_path / "again").read_text():
        assert run.is_alive()
    os.kill(run.pid, signal.SIGTERM)
    assert finish(run) == [0]
    kept = [name for name in os.listdir(folder) if name.endswith(".pt")]
    assert len(kept) == 1 and checkpoints.latest(str(folder)) == str(folder / kept[0])
    for name in kept:
        (folder / name).write_bytes(b"junk")
    assert finish(start(argv, tmp_path / "out")) == [2]  # rather than from the beginning, over what is there
    assert "none of its 1 checkpoints can be read" in (tmp_path / "out").read_text()


def torchrun(*options, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train.py")]
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **environment)
    return lambda *argv: subprocess.Popen(
        [*command, *map(str, argv)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_sigterm_under_torchrun(tmp_path, straight_two):
    """Both save and exit 0 within 10 s, their loaders' workers too; then the agent is asked, then killed
    outright."""
    launch = torchrun("--standalone", "--nproc_per_node=2")
    argv = [*ARGV, "--results-dir", tmp_path, "--num-workers", 2]

    run = launch(*argv)
    _wait(folder_of(tmp_path), 6)
    sent = time.monotonic()
    for worker in workers(run):
        os.killpg(os.getpgid(worker), signal.SIGTERM)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and time.monotonic() - sent < 10, output
    assert "run the same command again to continue" in output

    run = launch(*argv)
    _wait(folder_of(tmp_path), 18)
    sent = time.monotonic()
    os.kill(run.pid, signal.SIGTERM)  # the agent passes it on, and exits non-zero itself
    output, _ = run.communicate(timeout=60)
    assert time.monotonic() - sent < 10 and "run the same command again to continue" in output, output

    run = launch(*argv)
    _wait(folder_of(tmp_path), 30)
    for worker in workers(run):
        os.killpg(os.getpgid(worker), signal.SIGKILL)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    run = launch(*argv)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    assert_same_outcome(folder_of(tmp_path), straight_two)


def _wait(folder, step, timeout=300):
    deadline = time.monotonic() + timeout
    while not any(row["step"] >= step for row in rows(folder)):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def workers(*agents):
    """{process id: its environment} of the processes that torchrun's agents have started."""
    parents, found = ",".join(str(agent.pid) for agent in agents), {}
    for pid in subprocess.run(["pgrep", "-P", parents], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(OSError):  # ended since
            found[int(pid)] = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return found


def kill_in_turn(folder, kills, *agents, pause=0.0):
    """kill -9 the process of each rank, that many seconds after a step is logged; kills: [(rank, step)]."""
    killed, deadline = set(), time.monotonic() + 900
    for rank, step in kills:
        pids = []
        while not pids and time.monotonic() < deadline:  # long before it trains
            alive = {pid: names for pid, names in workers(*agents).items() if pid not in killed}
            pids = [pid for pid, names in alive.items() if f"RANK={rank}" in names]
            time.sleep(0.1)
        _wait(folder, step)
        time.sleep(pause)
        killed |= {*workers(*agents)}
        os.kill(*pids, signal.SIGKILL)


def finish_torchrun(*runs, timeout=300):
    """Wait for torchrun's agents; all that they and their processes printed."""
    try:
        printed = "".join(run.communicate(timeout=timeout)[0] for run in runs)
    finally:
        for run in runs:
            for pid in [*workers(run), run.pid] if run.poll() is None else ():
                with contextlib.suppress(OSError):  # ended since
                    os.kill(pid, signal.SIGKILL)
    assert {run.returncode for run in runs} == {0}, printed
    return printed


def test_torchrun_starts_a_killed_process_again(tmp_path, straight_two):
    """The same job goes on by itself, in its own folder, even where it was told to continue none."""
    argv = [*ARGV, "--results-dir", tmp_path, "--resume", "never"]
    run = torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=3")(*argv)
    kill_in_turn(folder_of(tmp_path), [(0, 18)], run)
    assert "Continuing after step " in finish_torchrun(run)  # which one, a busy machine decides
    assert_same_outcome(folder_of(tmp_path), straight_two)
    assert not folder_of(tmp_path, 1).exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_ten_random_kills(tmp_path, straight_two, rank):
    generator, kills = random.Random(rank), 0
    for number in itertools.count():
        results = tmp_path / str(number)
        launch = torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=3")
        run = launch(*ARGV, "--results-dir", results)
        pause = generator.random() * 0.03
        kill_in_turn(folder_of(results), [(rank, generator.randrange(3, 37))], run, pause=pause)
        finish_torchrun(run)
        assert_same_outcome(folder_of(results), straight_two)
        assert not folder_of(results, 1).exists()
        # Unless the run was faster:
        kills += (folder_of(results) / "log.txt").read_text().count("Experiment directory") == 2
        if kills == 10:
            break


@pytest.mark.slow
def test_two_nodes(tmp_path, straight_two):
    """Two torchrun agents with a process each, found by c10d rendezvous, train as one agent with two."""
    runs = start_two_nodes(tmp_path)
    finish_torchrun(*runs)
    assert_same_outcome(folder_of(tmp_path), straight_two)


@pytest.mark.slow
@pytest.mark.parametrize("share", ["0", "1"])
def test_two_nodes_with_kills(tmp_path, straight_two, share):
    """One process after the other, on either node, so that the nodes count the deaths differently."""
    runs = start_two_nodes(tmp_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=share)
    kill_in_turn(folder_of(tmp_path), [(1, 6), (0, 18), (1, 30)], *runs)
    finish_torchrun(*runs)
    assert_same_outcome(folder_of(tmp_path), straight_two)
    assert not folder_of(tmp_path, 1).exists()


def start_two_nodes(results, **environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = torchrun("--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--max-restarts=5",
                      f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=dit", **environment)  # fmt: skip
    return [launch(*ARGV, "--results-dir", results) for _ in range(2)]
