"""Faults while train.py runs, and what is left: losses that are not finite, full disks, lost memory, images
that cannot be read."""

import functools
import importlib.machinery
import itertools
import json
import os
import resource
import signal
import sys
import types

import numpy as np
import pytest
import torch
from forked import losses, rows, run, start_two, weights
from images import write_image
from in_process import SMALL

from checkpointing import files as checkpoints
from sampler import Sampler

STEADY = [*SMALL, "--max-steps", 20, "--ckpt-every", 8, "--sample-every", 0]


def spoil_step_13():
    import train

    draw = train.draw_step_noise

    def spoiled(args, step, *rest):
        draws = draw(args, step, *rest)
        if step == 13:
            draws["noise"][3] = float("inf")
        return draws

    train.draw_step_noise = spoiled


@pytest.mark.parametrize("runs", [None, start_two])
@pytest.mark.parametrize("log_every", [1, 5])
def test_a_loss_that_is_not_finite(tmp_path, runs, log_every):
    folder, printed = run(
        tmp_path, *STEADY, "--log-every", log_every, runs=runs, expect=2, before=spoil_step_13
    )
    assert "error: step 13: the loss or its gradient is not finite; the last good checkpoint is" in printed
    assert os.listdir(folder / "checkpoints") == ["0000008.pt"]
    assert all(torch.isfinite(value).all() for value in weights(folder, 8).values())
    assert all(np.isfinite(losses(folder)))


def fill_the_disk_at_the_second_save():
    save, saves = torch.save, []

    def limited(contents, file):
        saves.append(file)
        if len(saves) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        save(contents, file)

    torch.save = limited


@pytest.mark.parametrize(
    "runs, extra, suffix", [(None, [], ".pt"), (start_two, [], ".pt"), (start_two, ["--shard"], "")]
)
def test_a_full_disk(tmp_path, runs, extra, suffix):
    folder, printed = run(
        tmp_path, *STEADY, *extra, runs=runs, expect=2, before=fill_the_disk_at_the_second_save
    )
    lines = [line for line in printed.splitlines() if "error: " in line]
    assert len(lines) == (2 if runs else 1)  # every process says it
    assert all(f"0000016{suffix}: could not be written; earlier checkpoints stand" in line for line in lines)
    newest = checkpoints.latest(str(folder / "checkpoints"))
    assert newest == str(folder / "checkpoints" / f"0000008{suffix}")
    assert len(checkpoints.load(newest).state_dict()) > 0


def spoil_the_folder():
    """A run whose log, metrics and pictures cannot be written."""
    from training.run_dir import Experiment
    from training.run_log import Metrics

    make, begin = Experiment.__init__, Metrics.__init__

    def spoiled_experiment(self, *args):
        make(self, *args)
        os.symlink("/dev/full", os.path.join(self.folder, "log.txt"))

    def spoiled_metrics(self, folder, **options):
        begin(self, folder, **options)
        os.symlink("/dev/full", self.path)
        with open(os.path.join(folder, "samples"), "w"):  # where a folder is to be made
            pass

    Experiment.__init__, Metrics.__init__ = spoiled_experiment, spoiled_metrics


@pytest.mark.parametrize("runs", [None, start_two])
def test_what_cannot_be_written_ends_no_run(tmp_path, runs):
    """But for checkpoints. Each kind is said once."""
    argv = [*STEADY, "--sample-every", 4, "--sample-cfg-scales", 1, 2]
    folder, printed = run(tmp_path, *argv, runs=runs, before=spoil_the_folder)
    assert os.path.exists(folder / "checkpoints" / "0000020.pt") and os.path.exists(folder / ".finished")
    assert "Done!" in printed and "Traceback" not in printed
    warnings = [line for line in printed.splitlines() if line.startswith("Warning: ")]
    assert len(warnings) == 3, warnings
    for part in ("log.txt: No space left", "metrics.jsonl: No space left", "pictures: File exists"):
        assert any(part in line for line in warnings), warnings
    assert printed.count("(step=0000020) Train Loss: ") == 1


def run_out_of_memory():

    sample = Sampler.sample

    def greedy(self, *args, **options):
        if os.environ.get("RANK", "1") == "1":
            torch.empty(10**15)
        return sample(self, *args, **options)

    Sampler.sample = greedy


@pytest.mark.parametrize("runs, extra", [(None, []), (start_two, []), (start_two, ["--shard"])])
def test_pictures_that_memory_is_too_small_for(tmp_path, runs, extra):
    """Of two processes one runs out; the other does not wait for it."""
    argv = [*STEADY, "--sample-every", 4, "--sample-cfg-scales", 1, 2, *extra]
    folder, printed = run(tmp_path, *argv, runs=runs, before=run_out_of_memory)
    assert printed.count("Warning: pictures: ") == 1 and "can't allocate memory" in printed
    assert losses(folder)[19] < losses(folder)[0] and (folder / ".finished").exists()
    assert not (folder / "samples").exists()


def close_the_terminal():
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(reader)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # which know a pipe


def test_a_terminal_that_goes_away_ends_no_run(tmp_path):
    """As in `train.py 2>&1 | head -1`."""
    folder, _ = run(tmp_path, *STEADY, before=close_the_terminal)
    assert "Done!" in (folder / "log.txt").read_text()


def fill_the_disk_for_one_line():
    """The limit on the size of files stands for a full disk: the line of step 3 is cut, and then there is
    room again."""
    from training import run_log

    append = run_log.Metrics._append

    def limited(self, line):
        if json.loads(line)["step"] != 3:
            return append(self, line)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(self.path) + 20, before[1]))
        try:
            append(self, line)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    run_log.Metrics._append = limited


def test_a_line_of_metrics_that_is_cut_leaves_the_others(tmp_path):
    folder, printed = run(tmp_path, *STEADY, before=fill_the_disk_for_one_line)
    text = (folder / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, *range(4, 21)]
    assert printed.count("metrics.jsonl: File too large; training goes on") == 1


def add_loggers(fault=""):
    """Stand-ins for wandb and tensorboard that write down what they are given, and break at step 3 where
    asked to."""

    class Run:
        def __init__(self, folder):
            self.path = os.path.join(folder, "given.jsonl")

        def note(self, **given):
            with open(self.path, "a") as file:
                file.write(json.dumps(given) + "\n")

        def log(self, numbers, step):
            if fault == "wandb" and step == 3:
                raise ConnectionError("no network")
            self.note(step=step, **numbers)

        def finish(self):
            self.note(finished=True)

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            if fault == "tensorboard at once":
                raise FileExistsError(17, "File exists")

        def add_scalar(self, name, value, step):
            if fault == "tensorboard" and step == 3:
                raise OSError(28, "No space left on device")

        def close(self):
            pass

    def init(project, name, dir, config, id, resume, allow_val_change):
        if fault == "wandb at once":
            raise ConnectionError("no network")
        Run(dir).note(id=id, resume=resume)
        return Run(dir)

    for name, members in (
        ("wandb", dict(init=init)),
        ("tensorboard", {}),
        ("torch.utils.tensorboard", dict(SummaryWriter=SummaryWriter)),
    ):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(sys.modules[name]).update(members)


def die_at_step_13():
    import train

    draw = train.draw_step_noise

    def deadly(args, step, *rest):
        if step == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(args, step, *rest)

    train.draw_step_noise = deadly


def add_loggers_and_die():
    add_loggers()
    die_at_step_13()


def test_a_continued_run_is_the_same_at_wandb(tmp_path):
    """And one that goes back is another, since W&B cannot."""
    argv = [*STEADY, "--wandb"]
    folder, _ = run(tmp_path, *argv, before=add_loggers_and_die, expect=-signal.SIGKILL)
    run(tmp_path, *argv, before=add_loggers)
    run(tmp_path, *argv, "--resume", folder / "checkpoints" / "0000020.pt", before=add_loggers)  # the newest
    run(tmp_path, *argv, "--resume", folder / "checkpoints" / "0000008.pt", before=add_loggers)
    given = [json.loads(line) for line in (folder / "given.jsonl").read_text().splitlines()]
    starts = [i for i, row in enumerate(given) if "id" in row]
    first, second, third, back = [given[i]["id"] for i in starts]
    assert first == second == third != back and {given[i]["resume"] for i in starts} == {"allow"}
    parts = [given[i:j] for i, j in itertools.pairwise([*starts, None])]
    assert [[row["step"] for row in part if "step" in row] for part in parts] == [
        [*range(1, 13)], [*range(9, 21)], [], [*range(9, 21)],
    ]  # fmt: skip
    assert [sum("finished" in row for row in part) for part in parts] == [0, 1, 1, 1]


@pytest.mark.parametrize("fault", ["wandb", "tensorboard", "tensorboard at once"])
def test_loggers_that_fail_end_no_run(tmp_path, fault):
    before = functools.partial(add_loggers, fault)
    folder, printed = run(tmp_path, *STEADY, "--wandb", before=before)
    name = "Weights & Biases: no network" if fault == "wandb" else "TensorBoard: "
    assert printed.count("Warning: ") == printed.count(f"Warning: {name}") == 1
    assert len(losses(folder)) == 20 and (folder / ".finished").exists()


def test_wandb_that_does_not_start(tmp_path):
    """A new run is refused; one that has begun goes on without."""
    before = functools.partial(add_loggers, "wandb at once")
    _, printed = run(tmp_path, *STEADY, "--wandb", before=before, expect=2)
    assert "error: --wandb: did not start (no network); leave it out" in printed
    run(tmp_path, *STEADY, before=die_at_step_13, expect=-signal.SIGKILL)
    folder, printed = run(tmp_path, *STEADY, "--wandb", before=before)
    assert printed.count("Warning: Weights & Biases: no network; training goes on") == 1
    assert len(losses(folder)) == 20


@pytest.mark.parametrize("runs, then", [(None, start_two), (start_two, None)])
def test_the_losses_logged_next_by_another_number_of_processes(tmp_path, runs, then):
    """Are the means over all steps since the last line, those before the checkpoint too."""
    argv = [*STEADY, "--log-every", 20]
    straight, _ = run(tmp_path / "straight", *argv)
    run(tmp_path / "cut", *argv, runs=runs, before=die_at_step_13, expect=-signal.SIGKILL)
    folder, _ = run(tmp_path / "cut", *argv, runs=then)
    ((row,), (expected,)) = rows(folder), rows(straight)
    names = [name for name in expected if name.startswith("loss") or name in ("mse", "vb")]
    assert len(names) == 7
    for name in names:
        assert row[name] == pytest.approx(expected[name], rel=1e-4), name


def die_at_the_first_picture():

    Sampler.sample = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_due_when_a_run_was_killed_is_made(tmp_path, runs=start_two):
    """After the checkpoint and before the picture; and, as after a power cut, before the validation loss."""
    argv = [*STEADY, "--sample-every", 8, "--eval-every", 8]
    straight, _ = run(tmp_path / "straight", *argv, runs=runs)
    folder, _ = run(
        tmp_path / "cut", *argv, runs=runs, before=die_at_the_first_picture, expect=-signal.SIGKILL
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 9), 8]
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    run(tmp_path / "cut", *argv, runs=runs)
    pictures = sorted(os.listdir(straight / "samples"))
    assert pictures == ["0000008.png", "0000016.png", "0000020.png"]
    assert sorted(os.listdir(folder / "samples")) == pictures
    for name in pictures:
        assert (folder / "samples" / name).read_bytes() == (straight / "samples" / name).read_bytes()
    assert [row["step"] for row in rows(folder)] == [row["step"] for row in rows(straight)]
    assert losses(folder, "eval_loss") == losses(straight, "eval_loss")


@pytest.fixture
def images(tmp_path):
    """40 images, of which three are cut short, and the options to train on them: the seed has them come
    late."""
    for i in range(40):
        write_image(tmp_path / "images" / f"{i:02d}.png", size=(40, 40), seed=i)
    for i in (7, 8, 21):
        path = tmp_path / "images" / f"{i:02d}.png"
        path.write_bytes(path.read_bytes()[:2000])
    return [
        "--data-path", tmp_path / "images", "--num-classes", 0, "--image-size", 8, "--vae", "none",
        "--depth", 1, "--hidden-size", 32, "--num-heads", 2, "--model", "DiT-S/2", "--global-batch-size", 4,
        "--max-steps", 10, "--log-every", 1, "--sample-every", 0, "--num-workers", 0, "--global-seed", 2,
    ]  # fmt: skip


@pytest.mark.parametrize("runs", [None, start_two])
def test_an_unreadable_image_stops_after_saving(tmp_path, images, runs):
    folder, printed = run(tmp_path / "results", *images, runs=runs, expect=2)
    errors = [line for line in printed.splitlines() if "error: " in line]
    assert any("cannot be read as an image; mend or remove it" in line and ".png" in line for line in errors)
    trained = losses(folder)
    assert 0 < len(trained) < 10
    assert os.listdir(folder / "checkpoints") == [f"{len(trained):07d}.pt"] and "[saved " in errors[0]


def test_an_unreadable_held_out_image_is_refused_first(tmp_path, images):
    """Later it would stop every run that comes to it."""
    for i in range(40):
        (tmp_path / "images" / f"{i:02d}.png").write_bytes((tmp_path / "images" / "07.png").read_bytes())
    folder, printed = run(tmp_path / "results", *images, "--eval-every", 2, expect=2)
    assert "cannot be read as an image" in printed and not folder.exists()


@pytest.mark.parametrize("runs", [None, start_two])
def test_unreadable_images_skipped_and_counted(tmp_path, images, runs):
    folder, printed = run(tmp_path / "results", *images, "--skip-bad-images", runs=runs)
    assert len(losses(folder)) == 10
    assert sum(losses(folder, "skipped_images")) == 3 and "Skipped: 1" in printed  # an epoch, all of it
