"""What train.py can do besides: memory and precision, pictures and validation, fine-tuning."""

import functools
import itertools
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_rule_weights
from forked import finish, losses, rows, run, start_two, wait_for_step, weights
from images import write_image
from in_process import QUICK, SMALL
from PIL import Image, ImageSequence

import checkpoint
from checkpointing import files as checkpoints
from models import DiT, DiT_models
from runtime.image_io import save_gif, save_grid
from sampler import Sampler
from training.dataset import hold_out, open_dataset

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
