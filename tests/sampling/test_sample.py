"""sample.py: what a command writes, and what it refuses first."""

import os
import re
import sys

import numpy as np
import pytest
import torch
from conftest import build_tiny, load_rule_weights
from PIL import Image

import sample
from checkpointing import files as checkpoints
from diffusion import create_diffusion
from download import find_model
from runtime.cli import UserError, launch
from runtime.image_io import save_grid
from sampler import Sampler


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load_rule_weights(build_tiny(in_channels=1, learn_sigma=False), 0.1)
    raw = {key: value * 0 for key, value in model.state_dict().items()}
    checkpoints.save("run.pt", dict(
        model=raw, ema=model.state_dict(), step=3, config=dict(
            model=model.config, process=create_diffusion(None, learn_sigma=False).config,
            autoencoder=dict(vae="none", channels=1), sampling=dict(cfg_scale=2.0, steps="4", sampler="ddim"),
        ),
    ))  # fmt: skip
    return "run.pt"


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, argv)])
    launch(sample.main, sample.build_parser())


def test_checkpoints_by_path(ckpt, tmp_path):
    """A pathlib.Path is a path; what is none, or names no file, is refused as sample.py refuses it."""
    path = tmp_path / ckpt
    images = Sampler.from_checkpoint(path, guide=path).sample(2, cfg_scale=2)
    assert torch.equal(images, Sampler.from_checkpoint(str(path), guide=str(path)).sample(2, cfg_scale=2))
    assert torch.equal(find_model(path)["pos_embed"], torch.load(path)["ema"]["pos_embed"])
    for call, message in (
        (dict(path=tmp_path / "nowhere.pt"), "nowhere.pt: no such file"),
        (dict(path=tmp_path / "a" / "b"), "a/b: no such file"),
        (dict(path=None), "--ckpt None: must be the path of a file, or a name"),
        (dict(path=3.0), "--ckpt 3.0: must be"),
        (dict(path=[path]), "must be the path of a file, or a name"),
        (dict(path=path, guide=tmp_path / "nowhere.pt"), "--guide"),
        (dict(path=path, vae=tmp_path / "nowhere"), "nowhere: no such folder"),
        (dict(path=path, vae=3), "--vae 3: must be the path"),
        (dict(path=path, weights="best"), "--weights 'best': must be ema or raw"),
        (dict(path=path, model="DiT-M/2"), "--model 'DiT-M/2': choose one of DiT-XL/2"),
        (dict(path=path, precision="fp8"), "--precision 'fp8': choose one of fp32, tf32, bf16"),
        (dict(path=path, device="gpu"), "device 'gpu': "),
        (dict(path=path, device="cuda"), "device cuda: this machine has 0 GPUs; leave it out"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            Sampler.from_checkpoint(**call)


def test_sample_repeats_nothing_of_the_training_command(ckpt, monkeypatch, capsys):
    run(monkeypatch, "--ckpt", ckpt, "--class-labels", *range(10), "--seed", 3)
    assert "Saved 10 samples to sample.png, labels [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" in capsys.readouterr().out
    with Image.open("sample.png") as picture:
        assert picture.size == (4 * 66 + 2, 3 * 66 + 2)
        first = np.array(picture)
    expected = Sampler.from_checkpoint(ckpt).sample(
        list(range(10)), seeds=3, cfg_scale=2.0, steps=4, sampler="ddim"
    )
    save_grid(expected, "expected.png", nrow=4)
    assert np.array_equal(first, np.array(Image.open("expected.png")))
    run(monkeypatch, "--ckpt", ckpt, "--class-labels", *range(10), "--seed", 3, "--weights", "raw")
    assert not np.array_equal(first, np.array(Image.open("sample.png")))


def test_names_gif_and_files(ckpt, monkeypatch, capsys):
    """Labels by the data's own names, one picture a file with its seed and label, an animation that opens."""
    contents = torch.load("run.pt", weights_only=True)
    contents["config"]["data"] = dict(classes=[*"abcdefghi", "Golden Retriever"])
    torch.save(contents, "run.pt")
    labels = ["--class-labels", "golden retriever", "C", 4, "--num-samples", 5]
    more = ["--gif", "--out", "new/folder", "--seed", 7, "--num-sampling-steps", 6]
    run(monkeypatch, "--ckpt", ckpt, *labels, *more)
    assert "Saved 5 samples to sample.png and sample.gif and new/folder, labels [9, 2, 4, 9, 2]" in (
        capsys.readouterr().out
    )
    expected = Sampler.from_checkpoint(ckpt).sample([9, 2, 4, 9, 2], seeds=7, steps=6)
    for i, label in enumerate([9, 2, 4, 9, 2]):
        with Image.open(f"new/folder/{i:06d}.png") as picture:
            assert picture.info == dict(seed=str(7 + i), label=str(label)) and picture.mode == "L"
            difference = np.array(picture).astype(int) - (expected[i, 0] * 255).round().int().numpy()
            assert abs(difference).max() <= 1
    with Image.open("sample.gif") as animation, Image.open("sample.png") as picture:
        assert animation.n_frames == 7 and animation.size == picture.size
        animation.seek(6)
        last, whole = np.array(animation.convert("L")).astype(int), np.array(picture.convert("L"))
        assert abs(last - whole).mean() < 8  # its colours are 256 at most


def test_one_seed_a_sample(ckpt, monkeypatch):
    run(monkeypatch, "--ckpt", ckpt, "--class-labels", 3, 3, "--seed", 5, 99, "--out", "a")
    run(monkeypatch, "--ckpt", ckpt, "--class-labels", 3, "--seed", 99, "--out", "b")
    one, other = (np.array(Image.open(name)).astype(int) for name in ("a/000001.png", "b/000000.png"))
    assert abs(one - other).max() <= 1


def test_out_never_mixes_two_runs(ckpt, tmp_path, monkeypatch, capsys):
    """The same command again replaces its images; where others would be left beside them it is refused."""
    run(monkeypatch, "--ckpt", ckpt, "--num-samples", 3, "--out", "files")
    first = {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}
    assert sorted(first) == ["000000.png", "000001.png", "000002.png"]
    (tmp_path / "files" / "notes.txt").write_text("no image")
    run(monkeypatch, "--ckpt", ckpt, "--num-samples", 3, "--out", "files", "--seed", 7)
    assert (tmp_path / "files" / "000002.png").read_bytes() != first["000002.png"]
    run(monkeypatch, "--ckpt", ckpt, "--num-samples", 3, "--out", "files")
    assert all((tmp_path / "files" / name).read_bytes() == data for name, data in first.items())
    os.remove("sample.png")
    capsys.readouterr()
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit):
            run(monkeypatch, "--ckpt", ckpt, "--num-samples", 1, "--out", "files", *more)
        assert capsys.readouterr().err == (
            "sample.py: error: --out files: holds 000001.png and 1 more, which the images of this run would"
            " not replace; remove them, or give another folder\n"
        )
    save_grid(torch.zeros(1, 1, 64, 64), "files/cat.JPG", nrow=1)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--ckpt", ckpt, "--num-samples", 3, "--out", "files")
    assert "--out files: holds cat.JPG, which the images of this" in capsys.readouterr().err
    assert not os.path.exists("sample.png")
    assert {path.name for path in (tmp_path / "files").iterdir()} == {*first, "notes.txt", "cat.JPG"}


def test_dry_run_refuses_where_nothing_could_be_written(ckpt, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "sample.gif").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for options, message in (
        (["--out", "file/files"], "--out file/files: cannot be written to (Not a directory)"),
        (["--out", "file"], "--out file: cannot be written to (File exists)"),
        (["--gif"], "sample.gif: is a folder; remove it, or sample elsewhere"),
        (["--precision", "tf32"], "--precision tf32: cpu has none; use fp32"),
    ):
        for dry in (["--dry-run"], []):
            with pytest.raises(SystemExit):
                run(monkeypatch, "--ckpt", ckpt, *options, *dry)
            assert message in capsys.readouterr().err
    run(monkeypatch, "--ckpt", ckpt, "--out", "new/files", "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before


def test_published_draws_by_command(ckpt, monkeypatch):
    options = ["--class-labels", 3, 4, "--published-draws", "--sampler", "ddpm", "--num-sampling-steps", 4]
    run(monkeypatch, "--ckpt", ckpt, *options, "--seed", 7, "--out", "files")
    sampler = Sampler.from_checkpoint(ckpt, device="cpu")
    expected = sampler.sample([3, 4], seeds=7, sampler="ddpm", steps=4, published_draws=True)
    for i in range(2):
        with Image.open(f"files/{i:06d}.png") as picture:
            assert picture.info["seed"] == "7"
            difference = np.array(picture).astype(int) - (expected[i, 0] * 255).round().int().numpy()
            assert abs(difference).max() <= 1


def test_unconditional_images_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = load_rule_weights(build_tiny(num_classes=0, in_channels=3, learn_sigma=False), 0.1)
    config = dict(model=model.config, autoencoder=dict(vae="none"), sampling=dict(steps="3"))
    config["process"] = create_diffusion(None, learn_sigma=False).config
    checkpoints.save("free.pt", dict(ema=model.state_dict(), config=config))
    run(monkeypatch, "--ckpt", "free.pt", "--num-samples", 3, "--out", "files")
    assert "Saved 3 samples to sample.png and files" in capsys.readouterr().out
    assert len(list((tmp_path / "files").iterdir())) == 3


def test_labels_by_default(ckpt, monkeypatch, capsys):
    run(monkeypatch, "--ckpt", ckpt)
    assert "Saved 8 samples to sample.png, labels [0, 1, 2, 3, 4, 5, 6, 7]" in capsys.readouterr().out
    assert sample.default_labels(1000) == [207, 360, 387, 974, 88, 979, 417, 279]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--ckpt", "run.pt", "--class-labels", "10"], "--class-labels 10: must be between 0 and 9"),
        (
            ["--ckpt", "run.pt", "--model", "DiT-S/2"],
            "--model DiT-S/2: run.pt holds a DiT of depth 2, width 64",
        ),
        (["--ckpt", "run.pt", "--image-size", "16"], "--image-size 16: run.pt is for 8x8"),
        (
            ["--ckpt", "run.pt", "--num-sampling-steps", "0"],
            "--num-sampling-steps 0: '0' steps: there must be at least 1",
        ),
        (
            ["--ckpt", "run.pt", "--num-sampling-steps", "5000"],
            "--num-sampling-steps 5000: '5000': 5000 steps cannot",
        ),
        (["--ckpt", "run.pt", "--num-sampling-steps", "ddim13.5"], "'ddim13.5' is not a number of steps"),
        (["--ckpt", "run.pt", "--cfg-scale", "-2"], "--cfg-scale -2.0: must be 0 or more"),
        (["--ckpt", "run.pt", "--seed", "-2"], "--seed -2: must be 0 or more"),
        (["--ckpt", "nowhere.pt"], "--ckpt nowhere.pt: no such file"),
        (["--ckpt", "run.pt", "--class-labels", "otter"], "--class-labels 'otter': no such class"),
        (["--class-labels", "goldn retriever"], 'did you mean "golden retriever" or'),
        (["--num-sampling-steps", "0"], "--num-sampling-steps 0: '0' steps: there must be at least 1"),
        (
            ["--class-labels", "crane"],
            "--class-labels 'crane': 2 classes are called that; give one of 134, 517",
        ),
        (
            ["--ckpt", "run.pt", "--class-labels", "1", "2", "--seed", "1", "2", "3"],
            "--seed: 3 seeds for 2 samples; give as many, or the first one",
        ),
        (
            ["--ckpt", "run.pt", "--published-draws"],
            "--published-draws: the published script samples by ddpm",
        ),
        (["--ckpt", "run.pt", "--cfg-channels", "1.5"], "--cfg-channels: '1.5': give a whole number, or all"),
        (["--ckpt", "run.pt", "--num-samples", "0"], "--num-samples 0: must be at least 1"),
        (["--ckpt", "run.pt", "--cfg-interval", "2", "1"], "--cfg-interval: interval 2.0 1.0: must be"),
        (["--ckpt", "run.pt", "--out", "run.pt/a"], "--out run.pt/a: cannot be written to (Not a directory)"),
        (["--model", "DiT-M/2"], "argument --model: invalid choice: 'DiT-M/2' (choose from"),
        (["--model", "DiT-B/2"], "--model DiT-B/2: only DiT-XL/2 is published"),
        (["--image-size", "300"], "--image-size 300: published weights are for 256 and 512"),
        (["--num-classes", "10"], "--num-classes 10: the published weights have 1000"),
        (["--class-labels", "1000"], "--class-labels 1000: must be between 0 and 999"),
        # Of published weights, before they are fetched:
        (["--dry-run", "--seed", "1", "2", "3"], "--seed: 3 seeds for 8 samples"),
        (["--dry-run", "--sampler", "sde"], "--sampler sde: this model has ddpm, ddim, dpm++, euler, heun"),
        (["--dry-run", "--cfg-channels", "9"], "--cfg-channels 9: must be between 1 and 4, or all"),
        (["--dry-run", "--published-draws", "--sampler", "ddim"], "the published script samples by ddpm"),
        (["--dry-run", "--guide", "no.pt"], "--guide no.pt: no such file"),
        (["--dry-run", "--vae", "nosuch"], "--vae nosuch: no such folder"),
        (["--ckpt", "DiT-XL-2-512x512.pt", "--image-size", "256"], "DiT-XL-2-512x512.pt is for 512x512"),
        (["--ckpt", "DiT-XL-2-512x512.pt", "--num-classes", "7"], "DiT-XL-2-512x512.pt has 1000"),
        (
            ["--ckpt", "DiT-XL-2-512x512.pt", "--model", "DiT-S/8"],
            "--model DiT-S/8: DiT-XL-2-512x512.pt holds",
        ),
        (["--ckpt", "run.pt", "--class-labels", "+-5"], "--class-labels '+-5': no such class"),
        (["--cuda-graphs"], "--cuda-graphs: needs a GPU, this is the cpu"),
    ],
)
def test_refused_commands(ckpt, monkeypatch, capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("sample.py: error: ") and message in error and error.count("\n") == 1


def test_the_picture_s_name(ckpt, tmp_path, monkeypatch, capsys):
    """--out NAME.png is the picture itself, not a folder; the GIF lies beside it."""
    run(monkeypatch, "--ckpt", ckpt, "--num-samples", "3", "--gif", "--out", "new/digits.PNG")
    assert "Saved 3 samples to new/digits.PNG and new/digits.gif, labels" in capsys.readouterr().out
    assert sorted(os.listdir("new")) == ["digits.PNG", "digits.gif"] and not os.path.exists("sample.png")
    os.mkdir("folder.png")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--ckpt", ckpt, "--out", "folder.png")
    assert "folder.png: is a folder; remove it" in capsys.readouterr().err


def test_what_makes_no_picture(ckpt, tmp_path, monkeypatch, capsys):
    model = build_tiny(in_channels=4, learn_sigma=False)
    config = dict(model=model.config, process=create_diffusion(None, learn_sigma=False).config,
                  autoencoder=dict(vae="none", channels=4))  # fmt: skip
    checkpoints.save("four.pt", dict(ema=model.state_dict(), config=config))
    os.mkdir("sample.png")
    for argv, message in (
        (["--ckpt", "four.pt"], "--ckpt four.pt: images of 4 channels make no pictures"),
        (["--ckpt", ckpt], "sample.png: is a folder; remove it"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, *argv)
        assert message in capsys.readouterr().err
    os.rmdir("sample.png")
    best = checkpoints.load(ckpt).contents
    checkpoints.save("best.pt", dict(ema=best["ema"], config=best["config"]))
    with pytest.raises(SystemExit):
        run(monkeypatch, "--ckpt", "best.pt", "--weights", "raw", "--dry-run")
    assert "--weights raw: best.pt holds averaged weights alone" in capsys.readouterr().err
