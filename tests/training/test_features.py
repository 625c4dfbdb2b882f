"""extract_features.py: the same bytes however they are made, and training on them as on the images."""

import json
import os
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked import finish, rows, start, start_two
from images import write_image
from in_process import run
from networks import save_vae

import checkpoint
import extract_features
import sample
from checkpointing import files as checkpoints
from checkpointing.published import sha256_of
from extract_features import shard_size
from runtime.autoencoder import load_autoencoder
from runtime.cli import UserError, launch
from runtime.distributed import ALONE
from training.dataset import FolderImages, open_dataset
from training.latent_cache import MANIFEST, LatentCache

COUNT = 150  # images, in shards of three


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with images of two classes, and a VAE."""
    root = tmp_path_factory.mktemp("source")
    for i in range(COUNT):
        write_image(root / "images" / "ab"[i % 2] / f"{i:03d}.png", size=(24, 18), seed=i)
    save_vae(root / "vae")
    return root


def arguments(source, folder):
    return ["--data-path", source / "images", "--vae", source / "vae", "--image-size", 16, "--num-workers", 0,
            "--per-proc-batch-size", 2, "--features-path", folder]  # fmt: skip


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


@pytest.fixture(scope="module")
def cache(source, tmp_path_factory):
    """A cache made by one process."""
    folder = tmp_path_factory.mktemp("cache") / "features"
    run = start(arguments(source, folder), folder.parent / "out", command="extract_features")
    assert finish(run) == [0], (folder.parent / "out").read_text()
    assert f"Encoded {COUNT} images" in (folder.parent / "out").read_text()
    return folder


def test_what_is_in_it(source, cache):
    dataset, images = LatentCache(str(cache)), open_dataset("folder", str(source / "images"), 16)
    assert sorted(set(os.listdir(cache)) - {MANIFEST})[-1] == "moments-00049.npy" and shard_size(COUNT) == 3
    assert len(dataset) == len(images) and dataset.classes == ["a", "b"] and dataset.image_size == 16
    vae = load_autoencoder(str(source / "vae"), "cpu")
    for index, mirrored in [(0, False), (77, True), (149, False), (149, True)]:
        moments, label = dataset[(index, mirrored)]
        image, expected = images[(index, mirrored)]
        assert label == expected and moments.shape == (8, 4, 4)
        torch.testing.assert_close(moments.float(), vae.moments(image[None])[0], atol=2e-3, rtol=2e-3)
    manifest = json.loads((cache / MANIFEST).read_text())
    latents = torch.cat([
        vae.encode(images[(i, False)][0].expand(50, -1, -1, -1), torch.randn(50, 4, 4, 4)) for i in range(20)
    ])  # fmt: skip
    assert manifest["latents"]["mean"] == pytest.approx(latents.mean().item(), abs=0.05)
    assert manifest["latents"]["std"] == pytest.approx(latents.std().item(), rel=0.1)


@pytest.mark.parametrize("count", [2, 3])
def test_same_bytes_from_any_number_of_processes(source, cache, tmp_path, count):
    runs = start_two(
        arguments(source, tmp_path / "f"), tmp_path / "out", command="extract_features", count=count
    )
    assert set(finish(*runs)) == {0}
    assert contents(tmp_path / "f") == contents(cache)


def slow_down(seconds, rank=None):
    """Processes wait 3 s for one another; one, or all, sleeps in front of each of its first batches."""
    encode = extract_features.encode_shards

    def encode_slowly(shards, dataset, autoencoder, *more):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), dist.group.WORLD)
        moments, sleeps = autoencoder.moments, iter(seconds if os.environ["RANK"] == rank or not rank else [])
        autoencoder.moments = lambda images: (time.sleep(next(sleeps, 0)), moments(images))[1]
        return encode(shards, dataset, autoencoder, *more)

    extract_features.encode_shards = encode_slowly


def test_a_slow_process_keeps_the_others_from_nothing(source, cache, tmp_path):
    before = partial(slow_down, [8], rank="1")
    runs = start_two(arguments(source, tmp_path / "f"), tmp_path / "out", before, "extract_features")
    assert finish(*runs) == [0, 0]
    assert contents(tmp_path / "f") == contents(cache)
    times = sorted(os.stat(path).st_mtime for path in (tmp_path / "f").glob("moments-*"))
    assert times[-1] - times[30] > 1  # by then, one process had written more than half of the shards


def test_an_unreadable_image_stops_all_processes(source, tmp_path):
    os.system(f"cp -r {source / 'images'} {tmp_path / 'images'}")
    bad = tmp_path / "images" / "a" / "000.png"
    bad.write_bytes(bad.read_bytes()[:500])
    argv = [*arguments(source, tmp_path / "f"), "--data-path", tmp_path / "images"]
    before = partial(slow_down, [0.1] * 1000)
    assert finish(*start_two(argv, tmp_path / "out", before, "extract_features")) == [2, 2]
    for rank in range(2):
        assert "000.png: cannot be read as an image" in (tmp_path / f"out.{rank}").read_text()
    assert not (tmp_path / "f" / "moments-00049.npy").exists()  # the other did not go on to the end


def test_same_bytes_after_a_kill(source, cache, tmp_path):
    argv, folder = arguments(source, tmp_path / "f"), tmp_path / "f"
    run = start(argv, tmp_path / "out", command="extract_features")
    while not (folder / "shard-00020.json").exists():
        assert run.is_alive()
    run.kill()
    finish(run)
    with pytest.raises(UserError, match="unfinished; run the same extract_features.py command again"):
        LatentCache(str(folder))
    kept = {
        name: os.stat(folder / name).st_mtime_ns for name in os.listdir(folder) if name.endswith("010.npy")
    }
    runs = start_two(argv, tmp_path / "out", command="extract_features")
    assert set(finish(*runs)) == {0}
    assert contents(folder) == contents(cache)
    assert all(os.stat(folder / name).st_mtime_ns == time for name, time in kept.items()) and kept


def train(source, *argv):
    return [
        "--model", "DiT-S/2", "--depth", 1, "--hidden-size", 32, "--num-heads", 2, "--image-size", 16,
        "--num-workers", 0, "--global-batch-size", 10, "--max-steps", 20, "--log-every", 1,
        "--sample-every", 0, *argv,
    ]  # fmt: skip


def test_training_on_the_cache_is_training_on_the_images(source, cache, tmp_path):
    """The same draws and flips give the same losses, but for half precision."""
    online = ["--data-path", source / "images", "--vae", source / "vae", "--results-dir", tmp_path / "online"]
    cached = ["--feature-path", cache, "--results-dir", tmp_path / "cached"]
    runs = [start(train(source, *argv), tmp_path / f"out{i}") for i, argv in enumerate((online, cached))]
    assert finish(*runs) == [0, 0], (tmp_path / "out1").read_text()
    losses = [[row["loss"] for row in rows(tmp_path / name / "000-DiT-S-2")] for name in ("online", "cached")]
    assert len(losses[0]) == 20
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)


def test_every_draw_is_fresh(source, cache):
    """Over many draws, latents have the mean and variance that the cache holds."""
    vae, dataset = load_autoencoder(str(source / "vae"), "cpu"), LatentCache(str(cache))
    moments = dataset[(5, False)][0].float()
    draws = vae.sample_posterior(moments.expand(4000, -1, -1, -1), torch.randn(4000, 4, 4, 4)) / vae.scale
    mean, logvar = moments.chunk(2)
    torch.testing.assert_close(draws.mean(0), mean, atol=0.08, rtol=0)
    torch.testing.assert_close(draws.var(0), logvar.exp(), atol=0, rtol=0.2)
    assert not torch.equal(dataset[(5, True)][0].float(), moments)  # the mirror image is another


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--image-size", 32], "--image-size 32: {cache} was extracted at 16; give --image-size 16"),
        (["--num-classes", 1], "--num-classes 1: the data set has 2; give at least that"),
        (["--vae", "mse"], "--vae mse: {cache} was extracted with {vae}; leave it out"),
        (["--cache-images"], "--cache-images: --feature-path has latents in place of images; leave it out"),
        (["--data-path", "x"], "--data-path x: --feature-path stands in for it; leave one out"),
    ],
)
def test_a_cache_that_does_not_fit(source, cache, tmp_path, argv, message):
    argv = train(source, "--feature-path", cache, "--results-dir", tmp_path / "results", *argv)
    assert finish(start(argv, tmp_path / "out")) == [2]
    assert message.format(cache=cache, vae=source / "vae") in (tmp_path / "out").read_text()
    assert not (tmp_path / "results").exists()


def test_a_run_is_not_continued_on_another_cache(source, cache, tmp_path, capsys):
    os.system(f"cp -r {cache} {tmp_path}/cache")
    argv = train(source, "--feature-path", tmp_path / "cache", "--results-dir", tmp_path / "results")
    run(*argv, "--max-steps", 1)
    again = [*argv, "--max-steps", 2, "--resume", tmp_path / "results" / "000-DiT-S-2"]
    moments = tmp_path / "cache" / "moments-00007.npy"
    np.save(moments, np.load(moments) + 1)
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    manifest["shards"][7]["sha256"] = sha256_of(moments)
    (tmp_path / "cache" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SystemExit):
        run(*again)
    assert f"--feature-path {tmp_path}/cache: holds other images than" in capsys.readouterr().err
    run(*again, "--allow-changed-data")


def test_file_names_of_any_bytes(source, tmp_path, monkeypatch, capsys):
    """Of the folder, the class and the image: trained on, continued, sampled by name, cached, and refused."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/data\xff")
    for name in (b"/caf\xe9/im\xfe.png", b"/caf\xe9/2.png", b"/the/1.png"):
        write_image(Path(os.fsdecode(os.fsencode(folder) + name)), size=(16, 16))
    monkeypatch.chdir(tmp_path)
    argv = [*train(source), "--vae", "none", "--global-batch-size", 2,
            "--data-path", folder, "--results-dir", folder + "/../results\udcff"]  # fmt: skip
    run(*argv, "--max-steps", 1)
    ckpt = f"{tmp_path}/results\udcff/000-DiT-S-2"
    run(*argv, "--max-steps", 2, "--resume", ckpt)
    assert f"images ({tmp_path}/data\\udcff)" in capsys.readouterr().out

    def command(module, *argv):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        launch(module.main, module.build_parser())
        return capsys.readouterr().out

    ckpt += "/checkpoints/0000002.pt"
    sampled = command(sample, "--ckpt", ckpt, "--class-labels", "caf\udce9", "--num-sampling-steps", 2)
    assert "labels [0] (caf\\udce9)" in sampled
    command(checkpoint, "export", "--ckpt", ckpt, "--out", "out.safetensors")
    assert checkpoints.load("out.safetensors").config["data"]["classes"] == ["caf\udce9", "the"]
    os.rename("out.safetensors", "out\udcff.safetensors")
    with pytest.raises(UserError, match="safetensors reads names in UTF-8 only; rename it"):
        checkpoints.load("out\udcff.safetensors")
    extract = [*arguments(source, folder + "/../features\udcff"), "--data-path", folder]
    assert "Encoded 3 images" in command(extract_features, *extract)
    assert LatentCache(f"{tmp_path}/features\udcff").classes == ["caf\udce9", "the"]
    Path(folder, "caf\udce9", "im\udcfe.png").write_bytes(b"junk")
    with pytest.raises(SystemExit):
        command(extract_features, *extract)
    assert "im\\udcfe.png: cannot be read as an image" in capsys.readouterr().err


def test_caches_of_earlier_versions_keep_their_fingerprint(tmp_path):
    for name, size in (("a/1.png", 5), ("a/é.png", 3), ("b/in/1.png", 0)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    found = extract_features.fingerprint(FolderImages(str(tmp_path), 16).samples, ALONE)
    # By the first version of extract_features.py:
    assert found == "4808c9b5cb67e4a329695f9e930c977cc0573c05ba69934fafeccae072636217"


def test_damaged_caches(source, cache, tmp_path):
    folder = tmp_path / "f"
    os.system(f"cp -r {cache} {folder}")
    (folder / "moments-00003.npy").write_bytes(b"short")
    with pytest.raises(UserError, match="moments-00003.npy: missing or cut short"):
        LatentCache(str(folder))
    with pytest.raises(UserError, match="no cache of extract_features.py"):
        LatentCache(str(tmp_path))


def test_dry_run(source, cache, tmp_path, monkeypatch, capsys):
    """Says what the folder holds, refuses what an extraction would, and writes nothing."""

    def dry(folder, *argv):
        words = ["extract_features.py", *arguments(source, folder), *argv, "--dry-run"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        before = sorted(tmp_path.rglob("*"))
        try:
            launch(extract_features.main, extract_features.build_parser())
            said = capsys.readouterr().out
        except SystemExit:
            said = capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
        return said.splitlines()[-1]

    (tmp_path / "file").write_text("")
    assert "features, which holds none yet; nothing was written" in dry(tmp_path / "features")
    assert "which is complete; nothing was written" in dry(cache)
    assert "holds a cache of other image size" in dry(cache, "--image-size", 20)
    other = save_vae(tmp_path / "vae", scaling_factor=0.5)
    assert "holds a cache of other vae" in dry(cache, "--vae", other)
    assert dry(tmp_path / "file" / "f").endswith("file/f: cannot be written to (Not a directory)")


def test_refused_extractions(source, cache, tmp_path, monkeypatch, capsys):
    def refusal(*argv):
        words = ["extract_features.py", *arguments(source, tmp_path / "f"), *argv]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as stopped:
            launch(extract_features.main, extract_features.build_parser())
        assert stopped.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "must be divisible by 4 (the VAE's downsampling)" in refusal("--image-size", 18)
    assert "--vae none: pixels need no cache" in refusal("--vae", "none")
    assert "--num-workers -1: must be 0 or more" in refusal("--num-workers", -1)
    assert "--precision bf16: latents are kept more exactly" in refusal("--precision", "bf16")
    save_vae(tmp_path / "grey", in_channels=1, out_channels=1)
    assert "takes images of 1 channels, these have 3" in refusal("--vae", tmp_path / "grey")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    assert "manifest.json: cannot be read; remove the folder" in refusal(
        "--features-path", tmp_path / "damaged"
    )
    assert "holds a cache of other image size" in refusal("--features-path", cache, "--image-size", 20)
    os.system(f"cp -r {source / 'images'} {tmp_path / 'images'}")
    write_image(tmp_path / "images" / "a" / "000.png", size=(30, 30))
    others = refusal("--features-path", cache, "--data-path", tmp_path / "images")
    assert "holds a cache of other images; give another folder" in others  # as many, of as many classes
    bad = tmp_path / "images" / "a" / "100.png"
    bad.write_bytes(bad.read_bytes()[:500])
    assert "100.png: cannot be read as an image" in refusal("--data-path", tmp_path / "images")
