"""train.py: what a run leaves behind, that processes share a batch exactly, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from forked import losses
from images import write_image
from in_process import SMALL, run
from networks import save_vae
from PIL import Image

import sample_ddp
import train
from checkpointing import files as checkpoints
from models import DiT
from runtime.cli import launch
from runtime.distributed import ALONE
from runtime.image_io import save_grid
from sampler import Sampler
from sampling.options import DEFAULTS
from training import options as options_module
from training.dataset import DistributedBatchSampler
from training.resolve import resolve
from training.run_dir import Experiment


def torchrun(processes, folder, *argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               str(ROOT / "train.py"), *map(str, argv)]  # fmt: skip
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 12 steps, and its folder."""
    root = tmp_path_factory.mktemp("run")
    run(*SMALL, "--max-steps", 12, "--ckpt-every", 5, "--results-dir", root / "results", "--no-learn-sigma")
    return root / "results" / "000-DiT-S-2"


def test_guidance_that_was_not_asked_for(tmp_path, monkeypatch, capsys):
    """Each command's own: 4 for pictures, 1.5 for FID, as published."""
    options = [option for option in SMALL if option not in ("--cfg-scale", "1.5")]
    run(*options, "--max-steps", 1, "--results-dir", tmp_path, "--sample-every", 0)
    path = str(tmp_path / "000-DiT-S-2" / "checkpoints" / "0000001.pt")
    assert Sampler.from_checkpoint(path, device="cpu").settle()["cfg_scale"] == 4.0
    argv = ["sample_ddp.py", "--ckpt", path, "--sample-dir", str(tmp_path), "--dry-run"]
    monkeypatch.setattr(sys, "argv", argv)
    launch(sample_ddp.main, sample_ddp.build_parser())
    assert "cfg-1.5-steps-3" in capsys.readouterr().out


def test_run_folder(finished):
    assert sorted(os.listdir(finished)) == [
        ".finished",
        ".job",
        ".lock",
        ".owner",
        "args.json",
        "checkpoints",
        "log.txt",
        "metrics.jsonl",
        "samples",
    ]
    assert sorted(os.listdir(finished / "checkpoints")) == ["0000005.pt", "0000010.pt", "0000012.pt"]
    assert json.loads((finished / "args.json").read_text())["global_batch_size"] == 16
    log = (finished / "log.txt").read_text()
    assert re.search(r"\(step=0000012\) Train Loss: \d+\.\d{4}, Train Steps/Sec: \d+\.\d{2}, ", log)
    assert "Done!" in log and "Dataset contains 1,797 images" in log
    logged = losses(finished)
    assert len(logged) == 12 and logged[0] == pytest.approx(1, abs=0.15)  # a new model predicts no noise
    with Image.open(finished / "samples" / "0000012.png") as picture:
        assert picture.size == (662, 662)  # ten classes, ten each, 64 pixels and a border


def test_checkpoint(finished):
    contents = torch.load(finished / "checkpoints" / "0000012.pt", weights_only=True)
    assert {"model", "ema", "opt", "args", "step", "config"} <= set(contents)
    assert contents["step"] == 12 and contents["args"]["model"] == "DiT-S/2"
    model = DiT(**contents["config"]["model"])
    model.load_state_dict(contents["model"])
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).load_state_dict(contents["opt"])
    assert contents["config"]["data"]["classes"] == list("0123456789")
    assert not torch.equal(
        contents["ema"]["final_layer.linear.bias"], contents["model"]["final_layer.linear.bias"]
    )
    assert torch.equal(contents["ema"]["pos_embed"], contents["model"]["pos_embed"])


def test_picture_is_what_the_checkpoint_samples(finished, tmp_path):
    sampler = Sampler.from_checkpoint(str(finished / "checkpoints" / "0000012.pt"), device="cpu")
    assert sampler.defaults == {**DEFAULTS, "cfg_scale": 1.5, "steps": "3", "sampler": "ddpm"}
    save_grid(sampler.sample_each_class(10, seeds=0), str(tmp_path / "again.png"), nrow=10)
    pictures = [
        np.array(Image.open(path)).astype(int)
        for path in (tmp_path / "again.png", *finished.glob("samples/*"))
    ]
    assert pictures[0].std() > 10 and np.abs(pictures[0] - pictures[1]).max() <= 1


def test_runs_are_numbered(tmp_path):
    for name in ("003-DiT-S-2", "notes"):
        (tmp_path / name).mkdir()
    args = train.build_parser().parse_args([*SMALL, "--results-dir", str(tmp_path)])
    assert os.path.basename(Experiment(args).folder) == "004-DiT-S-2"
    args = train.build_parser().parse_args(["--preset", "digits", "--results-dir", str(tmp_path)])
    assert os.path.basename(Experiment(args).folder) == "005-DiT-S-2-digits"


def test_the_newest_run_is_found_by_its_number(tmp_path):
    """Not by the order of letters, in which 999 and a copy's name come after 1000."""
    args = train.build_parser().parse_args([*SMALL, "--results-dir", str(tmp_path)])
    folder = Experiment(args).folder  # which is unfinished, and no longer held
    for name in ("backup-000-DiT-S-2", "999-DiT-S-2", "1000-DiT-S-2", "1000-DiT-S-2-copy", "notes"):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "2000-list").mkdir()
    (tmp_path / "2000-list" / "args.json").write_text("[]")
    held = [Experiment(args) for _ in range(5)]
    assert [os.path.basename(experiment.folder) for experiment in held] == [
        "1000-DiT-S-2", "1000-DiT-S-2-copy", "999-DiT-S-2", "000-DiT-S-2", "2001-DiT-S-2",
    ]  # fmt: skip


def test_presets():
    parse = train.build_parser().parse_args
    assert parse(["--preset", "digits"]).dataset == "digits"
    by_hand = parse(["--lr", "0.5", "--preset", "digits"])
    assert by_hand.lr == 0.5 and by_hand.image_size == 8 and by_hand.by_hand == ["lr", "preset"]
    assert parse(["--preset", "digits", "--epochs", "5"]).max_steps is None  # which would overrule it
    assert parse(["--preset", "digits", "--model", "DiT-B/4"]).depth is None  # of another model
    official = parse(["--data-path", "x"])
    defaults = dict(
        results_dir="results", model="DiT-XL/2", image_size=256, epochs=1400, global_batch_size=256,
        global_seed=0, vae="ema", num_workers=4, log_every=100, ckpt_every=50_000, lr=1e-4,
        weight_decay=0, ema_decay=0.9999, class_dropout_prob=0.1, learn_sigma=True,
    )  # fmt: skip
    assert {name: getattr(official, name) for name in defaults} == defaults
    for name, options in options_module.PRESETS.items():
        assert set(options) <= set(vars(official)), name  # every key is an option
        for key, value in options.items():
            values = map(str, value) if isinstance(value, list) else [str(value)]
            argv = ["--preset", name] + (
                [] if isinstance(value, bool) else [f"--{key.replace('_', '-')}", *values]
            )
            assert getattr(parse(argv), key) == value  # and has the type that the option gives


def test_ema():
    torch.manual_seed(0)
    model, ema = (
        DiT(input_size=4, in_channels=1, hidden_size=8, depth=1, num_heads=1, num_classes=2) for _ in "ab"
    )
    before = {name: p.detach().clone() for name, p in ema.named_parameters()}
    train.update_ema(ema, model, decay=0.9)
    for name, p in ema.named_parameters():
        expected = (
            before[name] if name == "pos_embed" else 0.9 * before[name] + 0.1 * model.get_parameter(name)
        )
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)


def test_two_processes_train_as_one(tmp_path):
    """Same losses over 30 steps, and in the end the same weights on both ranks and as one process has."""
    argv = [*SMALL, "--max-steps", 30, "--results-dir"]
    run(*argv, tmp_path / "one")
    torchrun(2, tmp_path, *argv, tmp_path / "two")  # saving asserts that the ranks agree
    one, two = (tmp_path / name / "000-DiT-S-2" for name in ("one", "two"))
    for name in ("loss", "mse", "vb"):
        np.testing.assert_allclose(losses(two, name), losses(one, name), rtol=1e-4, atol=1e-4)
    weights = [
        checkpoints.load(folder / "checkpoints" / "0000030.pt").state_dict("raw") for folder in (one, two)
    ]
    for key in weights[0]:
        torch.testing.assert_close(weights[1][key], weights[0][key], atol=2e-4, rtol=1e-3)


def test_learned_timesteps_are_kept(tmp_path):
    run(*SMALL, "--max-steps", 2, "--timestep-sampler", "loss-second-moment", "--results-dir", tmp_path)
    contents = checkpoints.load(str(tmp_path / "000-DiT-S-2" / "checkpoints" / "0000002.pt")).contents
    assert contents["timestep_sampler"]["counts"].sum() == 32


def test_presets_without_classes(tmp_path, capsys):
    """The preset's guidance is not held against a model that cannot be guided."""
    run("--preset", "digits", "--num-classes", 0, "--dry-run")
    run("--preset", "digits", "--class-dropout-prob", 0, "--dry-run")
    assert capsys.readouterr().out.count("nothing was written") == 2


def test_two_runs_at_once_get_two_folders(tmp_path, monkeypatch):
    args = train.build_parser().parse_args([*SMALL, "--results-dir", str(tmp_path)])
    monkeypatch.setattr(os, "listdir", lambda path: [])  # both look before either has made its folder
    assert [os.path.basename(Experiment(args).folder) for _ in "ab"] == ["000-DiT-S-2", "001-DiT-S-2"]


def test_unconditional_training_from_a_flat_folder(tmp_path):
    for i in range(8):
        write_image(tmp_path / "images" / f"{i}.png", seed=i)
    run(
        "--data-path", tmp_path / "images", "--num-classes", 0, "--image-size", 8, "--vae", "none",
        "--depth", 1, "--hidden-size", 32, "--num-heads", 2, "--model", "DiT-S/2", "--global-batch-size", 4,
        "--max-steps", 3, "--num-sampling-steps", 2, "--num-workers", 1, "--results-dir",
        tmp_path / "results",
    )  # fmt: skip
    folder = tmp_path / "results" / "000-DiT-S-2"
    assert (folder / "samples" / "0000003.png").exists()
    sampler = Sampler.from_checkpoint(str(folder / "checkpoints" / "0000003.pt"), device="cpu")
    assert sampler.sample(2, steps=2).shape == (2, 3, 8, 8)


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of 2 classes and 6 images, in an otherwise empty working folder."""
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        write_image(tmp_path / "images" / "ab"[i % 2] / f"{i}.png", seed=i)
    (tmp_path / "flat").mkdir()
    write_image(tmp_path / "flat" / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "bad.png").write_bytes(b"junk")
    return tmp_path


PIXELS = "--data-path images --vae none --image-size 8 --global-batch-size 2 --model DiT-S/2"


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            "--data-path images --image-size 250 --global-batch-size 2",
            "--image-size 250: must be divisible by 16 (the VAE's 8 x patch 2)",
        ),
        (f"{PIXELS} --image-size 9", "--image-size 9: must be divisible by 2 (patch 2)"),
        ("--data-path images --model DiT-M/2", "argument --model: invalid choice: 'DiT-M/2' (choose from"),
        ("--data-path nowhere", "--data-path nowhere: no such folder"),
        ("--data-path empty", "--data-path empty: no images there"),
        ("", "--data-path: required"),
        (
            "--data-path images",
            "--global-batch-size 256: the data set has 6 images to train on, not enough for one batch",
        ),
        ("--data-path broken", "broken/a/bad.png: cannot be read as an image; mend or remove it"),
        ("--data-path images --num-classes 1", "--num-classes 1: the data set has 2; give at least that"),
        ("--data-path flat --num-classes 5", "--num-classes 5: flat has no classes; give 0 to train"),
        (
            "--data-path flat --cfg-scale 2 --global-batch-size 1",
            "--cfg-scale 2.0: in an unconditional model there",
        ),
        ("--dataset digits", "--image-size 256: the images of --dataset digits have 8 pixels a side"),
        ("--preset digits --vae ema", "--vae ema: takes images of 3 channels, these have 1; give --vae none"),
        ("--preset digits --vae nowhere/at/all", "--vae nowhere/at/all: "),
        (f"{PIXELS} --num-sampling-steps 0", "--num-sampling-steps 0: '0' steps: there must be at least 1"),
        (f"{PIXELS} --num-sampling-steps 5000", "5000 steps cannot be taken out of 1000"),
        (f"{PIXELS} --num-sampling-steps ddim13.5", "'ddim13.5' is not a number of steps"),
        (f"{PIXELS} --cfg-channels 4", "--cfg-channels 4: must be between 1 and 3, or all"),
        (f"{PIXELS} --init-from foo/bar", "--init-from foo/bar: no such file"),
        (f"{PIXELS} --cfg-scale -1", "--cfg-scale -1.0: must be 0 or more"),
        (
            f"{PIXELS} --hidden-size 100",
            "--model DiT-S/2: hidden_size 100: must be divisible by 4 and by num_heads 6",
        ),
        (
            f"{PIXELS} --class-dropout-prob 0 --cfg-scale 2",
            "--cfg-scale 2.0: without label dropout there is nothing",
        ),
        (f"{PIXELS} --global-seed {2**64}", "must be 0 or more, below 2^63"),
        (f"{PIXELS} --lr 0", "--lr 0.0: must be more than 0"),
        (f"{PIXELS} --ema-decay 1.5", "--ema-decay 1.5: must be in [0, 1)"),
        (f"{PIXELS} --max-steps 0", "--max-steps 0: must be at least 1"),
        (f"{PIXELS} --log-every 0", "--log-every 0: must be at least 1"),
        (f"{PIXELS} --class-dropout-prob 1", "--class-dropout-prob 1.0: must be in [0, 1)"),
        (f"{PIXELS} --precision tf32", "--precision tf32: cpu has none; use fp32"),
        (f"{PIXELS} --lr fast", "argument --lr: invalid float value: 'fast'"),
        (f"{PIXELS} --learning-rate 1", "unrecognized arguments: --learning-rate 1"),
        ("--preset photos", "--data-path: required; the folder of images"),
        (
            "--preset photos --data-path images",
            "--global-batch-size 32: the data set has 6 images to train on, not enough for one batch",
        ),
        (
            "--preset photos --data-path images --global-batch-size 2 --image-size 60",
            "--image-size 60: must be divisible by 8 (patch 8)",
        ),
        ("--preset nothing", "argument --preset: invalid choice: 'nothing'"),
    ],
)
def test_refused_before_any_work(images, capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        run(*argv.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("train.py: error: ") and message in error and error.count("\n") == 1
    assert not os.path.exists("results")


@pytest.mark.parametrize("more", [[], ["--eval-every", "1"]])
def test_images_that_must_not_be_mirrored(images, more):
    """--no-random-flip: none is, in the same order; by default half of a folder's are, of digits none."""

    def keys(*argv):
        args = train.build_parser().parse_args([*argv, *more])
        plan = resolve(args, ALONE)
        batches = DistributedBatchSampler(plan.training_set, args.global_batch_size, stop_step=40)
        return zip(*(key for batch in batches for key in batch))

    order, mirrored = keys(*PIXELS.split())
    assert 20 < sum(mirrored) < 60
    assert list(keys(*PIXELS.split(), "--no-random-flip")) == [order, (False,) * 80]
    assert not any(list(keys("--preset", "digits", "--global-batch-size", "2"))[1])


def test_results_that_cannot_be_written(images, capsys):
    (images / "file").write_text("")
    with pytest.raises(SystemExit):
        run(*PIXELS.split(), "--num-workers", 0, "--results-dir", "file/results")
    assert "--results-dir file/results: cannot be written to" in capsys.readouterr().err


def test_an_image_that_breaks_in_a_worker_is_named(images, capsys):
    for name in os.listdir(images / "images" / "a"):
        path = images / "images" / "a" / name
        path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(SystemExit) as stopped:
        run(*PIXELS.split(), "--num-workers", 1, "--max-steps", 4, "--depth", 1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and re.search(
        r"^train.py: error: images/a/\d.png: cannot be read as an image", last
    )


def test_dry_run_writes_nothing(images, capsys):
    run(*"--data-path images --global-batch-size 2 --dry-run".split())
    out = capsys.readouterr().out
    assert "DiT-XL/2: 673," in out and "6 images, 2 classes" in out and not os.path.exists("results")


def files_and_times(root):
    return {path: path.lstat().st_mtime_ns for path in [root, *root.rglob("*")]}


def test_dry_run_says_which_run_it_would_be(finished, tmp_path, capsys):
    results = tmp_path / "results"
    argv = [*SMALL, "--max-steps", 12, "--ckpt-every", 5, "--no-learn-sigma", "--results-dir", results]

    def plan(*more):
        before = files_and_times(tmp_path)
        run(*argv, "--dry-run", *more)
        assert files_and_times(tmp_path) == before
        line = re.search(r"^run {10}(.*)", capsys.readouterr().out, re.MULTILINE)[1]
        return line.replace(f"{results}/", "")

    assert plan() == "a new one, in 000-DiT-S-2"
    shutil.copytree(finished, results / "002-DiT-S-2")
    assert plan() == "a new one, in 003-DiT-S-2"  # that one is finished
    newest = "002-DiT-S-2/checkpoints/0000012.pt"
    longer = plan("--resume", results / "002-DiT-S-2", "--max-steps", 20, "--lr", 0.5)
    assert longer.startswith(f"continues after step 12 from {newest}; now ")
    assert "; now lr 0.5 (was 0.001)" in longer
    given = results / "002-DiT-S-2" / "checkpoints" / "0000005.pt"
    assert plan("--resume", given) == "continues after step 5 from 002-DiT-S-2/checkpoints/0000005.pt"
    (results / "002-DiT-S-2" / ".finished").unlink()
    assert plan() == f"continues after step 12 from {newest}"
    assert plan("--resume", "never") == "a new one, in 003-DiT-S-2"
    with FileLock(results / "002-DiT-S-2" / ".lock"):  # as while it runs
        (results / "002-DiT-S-2" / ".owner").unlink(missing_ok=True)
        assert plan() == "a new one, in 003-DiT-S-2"
    shutil.rmtree(results / "002-DiT-S-2" / "checkpoints")
    assert plan() == "begins 002-DiT-S-2 again, which has no checkpoint"


@pytest.mark.parametrize(
    "options, message",
    [
        ("--init-from missing.pt", "--init-from missing.pt: no such file"),
        ("--init-from junk.pt", "junk.pt: not a checkpoint, or cut short; give a complete"),
        ("--init-from RUN/checkpoints/0000012.pt --hidden-size 64", "0000012.pt: no block of it fits"),
        ("--resume missing", "missing: no run's folder (no args.json); give results/NNN-…"),
        ("--resume RUN/checkpoints/0000007.pt", "0000007.pt: no such checkpoint; give one of that folder's"),
        ("--resume RUN --hidden-size 64", "its hidden size is 32, by these options 64; give the run's own"),
        ("--resume RUN --max-steps 10", "RUN/checkpoints/0000012.pt is beyond that; give at least 12"),
        ("--results-dir junk.pt", "--results-dir junk.pt: cannot be written to (File exists)"),
        ("--results-dir junk.pt/a/b", "--results-dir junk.pt/a/b: cannot be written to (Not a directory)"),
        ("--vae brokenvae", "brokenvae: cannot be loaded; save it again with save_pretrained"),
    ],
)
def test_dry_run_refuses_what_a_start_would(finished, tmp_path, monkeypatch, capsys, options, message):
    """In the same words."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk.pt").write_text("junk")
    if "brokenvae" in options:
        vae = save_vae(tmp_path / "brokenvae", in_channels=1, out_channels=1)
        Path(vae, "diffusion_pytorch_model.safetensors").write_bytes(b"junk")
    shutil.copytree(finished, tmp_path / "RUN")
    argv = [*SMALL, "--max-steps", 12, "--no-learn-sigma", *options.split()]
    before, errors = files_and_times(tmp_path), []
    for more in (["--dry-run"], []):
        with pytest.raises(SystemExit) as stopped:
            run(*argv, *more)
        errors.append(capsys.readouterr().err.splitlines()[-1])
        assert stopped.value.code == 2
        assert more == [] or files_and_times(tmp_path) == before
    assert message in errors[0] and errors[0] == errors[1]


@pytest.mark.slow
def test_latents_of_a_real_vae_end_to_end(images):
    """The SD-VAE's configuration with random weights: train, checkpoint, sample to PNG by the command."""
    vae = save_vae(
        images / "vae", block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, norm_num_groups=32, sample_size=256,
    )  # fmt: skip
    run(
        "--data-path", "images", "--vae", vae, "--image-size", 64, "--model", "DiT-S/2",
        "--global-batch-size", 2, "--max-steps", 3, "--num-workers", 2, "--num-sampling-steps", 4,
    )  # fmt: skip
    path = images / "results" / "000-DiT-S-2" / "checkpoints" / "0000003.pt"
    config = checkpoints.load(str(path)).config
    assert config["autoencoder"] == dict(vae=vae, channels=4, factor=8, scale=0.18215, shift=0.0)
    assert config["model"]["input_size"] == [8, 8] and config["model"]["num_classes"] == 2
    done = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), "--ckpt", str(path), "--class-labels", "0", "1", "1"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open("sample.png") as picture:
        assert picture.size == (3 * 66 + 2, 66 + 2) and np.array(picture).std() > 10
