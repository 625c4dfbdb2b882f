"""What train.py can do besides: memory and precision, pictures and validation, fine-tuning, and faults."""

import functools
import importlib.machinery
import itertools
import json
import os
import resource
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_rule_weights
from forked import finish, losses, rows, run, start_two, wait_for_step
from images import write_image
from in_process import QUICK, SMALL
from PIL import Image, ImageSequence

import checkpoint
from checkpointing import files as checkpoints
from models import DiT, DiT_models
from runtime.image_io import save_gif, save_grid
from sampler import Sampler
from training.dataset import hold_out, open_dataset


def weights(folder, step=12, which="raw"):
    return checkpoints.load(str(folder / "checkpoints" / f"{step:07d}.pt")).state_dict(which)


# ---------------------------------------------------------------------------------------------
# Memory and precision


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"), *QUICK, "--global-batch-size", 32)[0]


@pytest.mark.parametrize("runs", [None, start_two])
def test_accumulated_gradients(tmp_path, plain, runs):
    """Four parts of 8 are a batch of 32; also with two processes, which exchange gradients once a step."""
    folder, _ = run(tmp_path, *QUICK, "--global-batch-size", 32, "--grad-accum-steps", 4, runs=runs)
    np.testing.assert_allclose(losses(folder), losses(plain), rtol=1e-5, atol=1e-5)
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(folder)[key], value, atol=2e-4, rtol=1e-3)


def count_exchanges():
    from training import state

    prepare = state.prepare

    def counting(*args):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(state, bucket):
            print("exchange")
            return allreduce_hook(None, bucket)

        parallel = prepare(*args)
        parallel.register_comm_hook(None, hook)
        return parallel

    state.prepare = counting


def test_gradients_are_exchanged_once_a_step(tmp_path):
    argv = [*QUICK, "--global-batch-size", 32, "--grad-accum-steps", 4]
    _, printed = run(tmp_path, *argv, runs=start_two, before=count_exchanges)
    assert printed.count("exchange\n") == 2 * 12  # by two processes, in twelve steps of four parts


def ask_to_stop_in_a_step():
    import train

    ddp_sync, parts = train.ddp_sync, itertools.count(1)

    def counting(*args):
        part = next(parts)
        print("part")
        if part == 14 and os.environ["RANK"] == "1":  # the second of the fourth step's
            os.kill(os.getpid(), signal.SIGTERM)
        return ddp_sync(*args)

    train.ddp_sync = counting


@pytest.mark.parametrize("more", [[], ["--shard"]])
def test_a_step_is_given_up_between_its_parts(tmp_path, more):
    """A signal to one process stops all after the part at hand; what was saved goes on as if undisturbed."""
    argv = [*QUICK, "--max-steps", 6, "--global-batch-size", 32, "--grad-accum-steps", 4, *more]
    straight, _ = run(tmp_path / "straight", *argv, runs=start_two)
    folder, printed = run(tmp_path / "stopped", *argv, runs=start_two, before=ask_to_stop_in_a_step)
    assert printed.count("part\n") == 2 * 14 and "Stopped after step 3, saved" in printed
    run(tmp_path / "stopped", *argv, runs=start_two)
    assert losses(folder) == losses(straight) and len(losses(folder)) == 6
    newest = "0000006" + ("" if more else ".pt")
    ends = [checkpoints.load(str(f / "checkpoints" / newest)).contents for f in (folder, straight)]
    for part in ("model", "ema"):
        assert all(torch.equal(value, ends[1][part][key]) for key, value in ends[0][part].items())


@pytest.mark.parametrize("runs", [None, start_two])
def test_checkpointed_blocks(tmp_path, plain, runs):
    folder, _ = run(tmp_path, *QUICK, "--global-batch-size", 32, "--grad-checkpointing", runs=runs)
    np.testing.assert_allclose(losses(folder), losses(plain), rtol=1e-5, atol=0)


def gradients(model, precision="fp32"):
    torch.manual_seed(0)
    x, t, y = torch.randn(4, 4, 32, 32), torch.tensor([3, 200, 600, 990]), torch.tensor([1, 2, 3, 1000])
    target = torch.randn(4, 8, 32, 32)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = model.train()(x, t, y, force_drop_ids=torch.zeros(4))
    assert out.dtype == torch.float32  # the final layer's
    (out - target).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_of_checkpointed_blocks_are_the_same_bits():
    model = load_rule_weights(DiT_models["DiT-S/8"](), 0.05)
    plain = gradients(model)
    model.grad_checkpointing = True
    assert all(torch.equal(value, plain[name]) for name, value in gradients(model).items())


def test_gradients_in_bf16():
    """Those of every layer of S/2 point where float32's do."""
    model = load_rule_weights(DiT_models["DiT-S/2"](), 0.02)
    full, half = gradients(model), gradients(model, "bf16")
    cosines = {
        name: torch.nn.functional.cosine_similarity(half[name].flatten(), value.flatten(), dim=0).item()
        for name, value in full.items()
    }
    assert min(cosines.values()) > 0.99, min(cosines, key=cosines.get)
    assert all(value.dtype == torch.float32 for value in half.values())


def test_bf16_trains_like_fp32(tmp_path, plain):
    folder, _ = run(tmp_path, *QUICK, "--global-batch-size", 32, "--precision", "bf16")
    np.testing.assert_allclose(losses(folder), losses(plain), rtol=0.02)
    assert losses(folder) != losses(plain)
    assert all(value.dtype == torch.float32 for value in weights(folder).values())


@pytest.mark.slow
def test_compiled_blocks(tmp_path, plain):
    folder, _ = run(tmp_path, *QUICK, "--global-batch-size", 32, "--compile", "--depth", 1)
    np.testing.assert_allclose(losses(folder), losses(plain), rtol=1e-4)
    assert weights(folder).keys() == weights(plain).keys()


def test_clipping(tmp_path, plain):
    folder, _ = run(tmp_path, *QUICK, "--global-batch-size", 32, "--clip-grad", "1e-3")
    assert losses(folder, "grad_norm")[0] == pytest.approx(losses(plain, "grad_norm")[0], rel=1e-4)  # before
    # AdamW hardly minds the scale, but the second moments tell:
    opt = [
        checkpoints.load(str(f / "checkpoints" / "0000012.pt")).contents["opt"]["state"]
        for f in (folder, plain)
    ]
    norms = [sum(state["exp_avg_sq"].sum() for state in states.values()).item() for states in opt]
    assert norms[0] < 1e-6 * 12 < norms[1]


def test_sharded_weights(tmp_path):
    """FSDP gives DDP's losses, resumes exactly, and its checkpoint becomes an ordinary one that samples."""
    argv = [
        *SMALL,
        "--max-steps",
        20,
        "--ckpt-every",
        8,
        "--depth",
        2,
        "--sample-every",
        12,
        "--eval-every",
        9,
    ]
    plain, _ = run(tmp_path / "ddp", *argv, runs=start_two)
    sharded, _ = run(tmp_path / "fsdp", *argv, "--shard", runs=start_two)
    for name in ("loss", "mse", "vb", "grad_norm", "eval_loss"):
        np.testing.assert_allclose(losses(sharded, name), losses(plain, name), rtol=1e-4, atol=1e-4)
    assert sorted(os.listdir(sharded / "checkpoints")) == ["0000008", "0000016", "0000020"]

    out = tmp_path / "whole.pt"
    checkpoint.main(checkpoint.build_parser().parse_args(
        ["export", "--ckpt", str(sharded / "checkpoints" / "0000020"), "--out", str(out)]
    ))  # fmt: skip
    contents = [checkpoints.load(str(path)).contents for path in (out, plain / "checkpoints" / "0000020.pt")]
    for part in ("model", "ema"):
        for key, value in contents[1][part].items():
            torch.testing.assert_close(contents[0][part][key], value, atol=2e-4, rtol=1e-3)
    assert contents[0].keys() >= contents[1].keys()
    model = DiT(**contents[0]["config"]["model"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.load_state_dict(contents[0]["opt"])
    assert Sampler.from_checkpoint(str(out), device="cpu").sample([3, 5]).shape == (2, 1, 8, 8)
    assert len(os.listdir(sharded / "samples")) == 2

    again = tmp_path / "killed" / "000-DiT-S-2"
    (tmp_path / "killed").mkdir()
    runs = start_two([*argv, "--shard", "--results-dir", tmp_path / "killed"], tmp_path / "killed" / "out")
    wait_for_step(again, 18, runs)
    for process in runs:
        process.kill()
    finish(*runs)
    run(tmp_path / "killed", *argv, "--shard", runs=start_two)
    for name in ("loss", "eval_loss"):
        assert losses(again, name) == losses(sharded, name)
    weights = [checkpoints.load(str(f / "checkpoints" / "0000020")).contents for f in (again, sharded)]
    assert all(torch.equal(value, weights[1]["ema"][key]) for key, value in weights[0]["ema"].items())


@pytest.mark.parametrize("extra", [["--grad-accum-steps", 4], ["--grad-checkpointing"], ["--clip-grad", 100]])
def test_sharded_weights_with(tmp_path, plain, extra):
    argv = [*QUICK, "--global-batch-size", 32, "--shard", *extra]
    folder, _ = run(tmp_path, *argv, runs=start_two)
    np.testing.assert_allclose(losses(folder), losses(plain), rtol=1e-4)


def test_sharding_needs_processes(tmp_path):
    _, printed = run(tmp_path, *QUICK, "--shard", expect=2)
    assert "--shard: one process has nothing to share weights with" in printed


# ---------------------------------------------------------------------------------------------
# Seeing what happens


def test_log_pictures_and_validation(tmp_path):
    argv = [*SMALL, "--max-steps", 12, "--sample-every", 5, "--eval-every", 4, "--keep-checkpoints", 2]
    folder, printed = run(tmp_path, *argv, "--ckpt-every", 3)
    assert sorted(os.listdir(folder / "samples")) == ["0000005.png", "0000010.png", "0000012.png"]
    assert sorted(os.listdir(folder / "checkpoints")) == ["0000009.pt", "0000012.pt"]
    assert len(losses(folder, "eval_loss")) == 3 and losses(folder, "eval_loss")[0] == pytest.approx(
        1, abs=0.2
    )
    assert "Dataset contains 1,762 images" in printed  # 35 are held out
    row = next(row for row in rows(folder) if "loss" in row)
    assert {"loss", "mse", "vb", "grad_norm", "lr", "memory_gib", "steps_per_sec"} <= set(row)
    # One step's quarters, weighed by their counts of 16 rows, are its mean:
    quarters = [row[f"loss_q{i}"] for i in range(1, 5) if f"loss_q{i}" in row]
    assert min(quarters) <= row["loss"] <= max(quarters)
    assert "Grad Norm: " in printed and "LR: 1.00e-03" in printed and "Left: 0:00:0" in printed


def test_validation_is_shared_by_processes(tmp_path):
    argv = [*SMALL, "--max-steps", 4, "--eval-every", 2, "--sample-every", 0]
    one, _ = run(tmp_path / "one", *argv)
    two, _ = run(tmp_path / "two", *argv, runs=start_two)
    np.testing.assert_allclose(losses(two, "eval_loss"), losses(one, "eval_loss"), rtol=1e-5)


def test_a_held_out_image_that_one_process_cannot_read(tmp_path):
    """Neither trains, and no folder is left."""
    for i in range(100):
        write_image(tmp_path / "images" / "a" / f"{i}.png", seed=i)
    dataset = open_dataset("folder", str(tmp_path / "images"), 16)
    _, held_out = hold_out(dataset, 0)
    path = Path(dataset.samples[held_out.indices[1]][0])  # the second process's
    path.write_bytes(path.read_bytes()[:600])
    argv = [*QUICK, "--dataset", "folder", "--data-path", tmp_path / "images", "--image-size", 16,
            "--eval-every", 2]  # fmt: skip
    _, printed = run(tmp_path / "results", *argv, runs=start_two, expect=2)
    assert printed.count(f"train.py: error: {path}: cannot be read as an image") == 2
    assert not list((tmp_path / "results").glob("0*"))


def go_to_a_folder_of_its_own(root):
    os.chdir(os.path.join(root, os.environ["RANK"]))


def test_results_that_are_not_shared(tmp_path):
    """By machines, as here by two processes that each see another folder by this name."""
    for rank in "01":
        (tmp_path / rank).mkdir()
    away = functools.partial(go_to_a_folder_of_its_own, str(tmp_path))
    processes = start_two([*QUICK, "--results-dir", "results"], tmp_path / "out", before=away)
    assert finish(*processes) == [2, 2]
    for rank in "01":
        assert "--results-dir results: process 1, on " in (tmp_path / f"out.{rank}").read_text()
    assert not list(tmp_path.glob("*/results/*"))


def ask_to_stop_in(name):
    """In the first call of a function of training/validation.py, by a signal to the second process."""
    from training import validation

    call, calls = getattr(validation, name), itertools.count()

    def signalled(*args):
        if not next(calls) and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return call(*args)

    setattr(validation, name, signalled)


def test_evaluations_and_pictures_are_cut_off(tmp_path):
    """By a signal, and made when the run continues, which ends as if undisturbed."""
    argv = [*SMALL, "--max-steps", 8, "--sample-every", 4, "--eval-every", 4]
    straight, _ = run(tmp_path / "straight", *argv, runs=start_two)
    for name in ("held_out_loss", "sample_grid"):
        before = functools.partial(ask_to_stop_in, name)
        folder, printed = run(tmp_path / "stopped", *argv, runs=start_two, before=before)
        assert "Stopped after step 4, saved" in printed and not os.path.exists(folder / "samples")
        assert len(losses(folder, "eval_loss")) == (name == "sample_grid")
    folder, printed = run(tmp_path / "stopped", *argv, runs=start_two)
    assert "Continuing after step 4" in printed
    for name in ("loss", "eval_loss"):
        assert losses(folder, name) == losses(straight, name)
    for name in ("0000004.png", "0000008.png"):
        assert (folder / "samples" / name).read_bytes() == (straight / "samples" / name).read_bytes()


def say_what_is_sampled():
    sample = Sampler.sample

    def counting(self, labels, **options):
        print(f"rank {os.environ['RANK']} sampled {len(labels)}")
        return sample(self, labels, **options)

    Sampler.sample = counting


@pytest.mark.parametrize("more", [[], ["--shard"]])
def test_pictures_are_shared_by_processes(tmp_path, more):
    """Each of three makes a third, while training and at the end: the picture and frames that one makes."""
    argv = [*SMALL, "--max-steps", 8, "--sample-every", 4, "--global-batch-size", 12, "--ema-decay", 0.5,
            "--lr", "1e-2", "--sample-gif"]  # fmt: skip
    runs = functools.partial(start_two, count=3)
    folder, printed = run(tmp_path, *argv, *more, runs=runs, before=say_what_is_sampled)
    for rank, count in enumerate((33, 33, 34)):
        assert printed.count(f"rank {rank} sampled {count}\n") == 2
    names = {f"000000{step}.{kind}" for step in (4, 8) for kind in ("png", "gif")}
    assert set(os.listdir(folder / "samples")) == names

    newest = str(folder / "checkpoints" / ("0000008" + ("" if more else ".pt")))
    sampler = Sampler.from_checkpoint(newest, device="cpu")
    images, frames = sampler.sample_each_class(10, seeds=0, return_trajectory=True)
    assert (images[:30] - images[30:60]).abs().mean() > 0.05  # a row in another's place would show
    save_grid(images, str(tmp_path / "again.png"), nrow=10)
    save_gif(frames, str(tmp_path / "again.gif"), nrow=10)
    for kind, count in (("png", 1), ("gif", 4)):
        one, shared = (
            [np.array(frame.convert("L"), float) for frame in ImageSequence.Iterator(Image.open(path))]
            for path in (tmp_path / f"again.{kind}", folder / "samples" / f"0000008.{kind}")
        )
        assert len(one) == len(shared) == count
        assert np.abs(np.subtract(one, shared)).mean() < 0.1  # levels of 256: rounding alone


# ---------------------------------------------------------------------------------------------
# Fine-tuning


def test_starting_from_a_checkpoint(tmp_path, plain):
    path = plain / "checkpoints" / "0000012.pt"
    folder, printed = run(
        tmp_path / "same", *QUICK, "--init-from", path, "--max-steps", 1, "--lr", "1e-12", "--ema-decay", 0
    )
    taken = weights(folder, 1)
    for key, value in weights(plain, which="ema").items():
        torch.testing.assert_close(taken[key], value, atol=1e-9, rtol=1e-5)
    assert "tensors taken\n" in printed

    folder, printed = run(
        tmp_path / "classes", *QUICK, "--init-from", path, "--num-classes", 12, "--max-steps", 1
    )
    assert "new: y_embedder.embedding_table.weight" in printed
    assert weights(folder, 1)["y_embedder.embedding_table.weight"].shape == (13, 32)

    model = DiT(**checkpoints.load(str(path)).config["model"] | dict(input_size=[16, 16]))
    note = checkpoints.initialize(model, checkpoints.load(str(path)))
    assert "new: pos_embed" in note and model.pos_embed.abs().sum() > 0  # its own, for the other resolution

    _, printed = run(tmp_path / "other", *QUICK, "--init-from", path, "--hidden-size", 64, expect=2)
    assert f"--init-from {path}: no block of it fits a DiT of depth 1" in printed
    _, printed = run(tmp_path / "none", *QUICK, "--init-from", "nowhere.pt", expect=2)
    assert "--init-from nowhere.pt: no such file" in printed


# ---------------------------------------------------------------------------------------------
# Faults

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
    from sampler import Sampler

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
    from sampler import Sampler

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
