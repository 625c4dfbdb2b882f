"""sample_ddp.py: one .npz whatever the processes, batches and kills; what it finds is checked first."""

import gc
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import ROOT, build_tiny, load_rule_weights
from filelock import FileLock
from PIL import Image

import sample
import sample_ddp
from checkpointing import files as checkpoints
from diffusion import create_diffusion, create_flow
from models import DiT_models
from runtime.cli import UserError, launch
from sampler import CheckpointSpec, Sampler
from sampling import npz_writer
from sampling.npz_writer import NpzWriter

COUNT = 64


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("run") / "run.pt")
    model = load_rule_weights(build_tiny(in_channels=3, learn_sigma=False), 0.1)
    process = create_diffusion(None, learn_sigma=False).config
    pixels = dict(vae="none", channels=3)
    config = dict(
        model=model.config, process=process, autoencoder=pixels, sampling=dict(cfg_scale=2.0, steps="8")
    )
    checkpoints.save(path, dict(model=model.state_dict(), ema=model.state_dict(), config=config))
    return path


def argv(ckpt, folder, *more, count=COUNT, batch=7):
    options = ["--ckpt", ckpt, "--sample-dir", folder, "--num-fid-samples", count, "--no-png"]
    return [*map(str, [*options, "--per-proc-batch-size", batch, *more])]


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["sample_ddp.py", *map(str, args)])
    launch(sample_ddp.main, sample_ddp.build_parser())


def npz_of(folder):
    (path,) = folder.glob("*.npz")
    return path


@pytest.fixture(scope="module")
def undisturbed(ckpt, tmp_path_factory):
    """The bytes of the .npz that one process wrote at a stretch."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert forked.finish(forked.start(argv(ckpt, folder), folder / "out", command="sample_ddp")) == [0]
    return npz_of(folder).read_bytes()


# ---------------------------------------------------------------------------------------------
# The same samples


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes(ckpt, tmp_path, undisturbed, count):
    runs = forked.start_two(argv(ckpt, tmp_path), tmp_path / "out", command="sample_ddp", count=count)
    assert forked.finish(*runs) == [0] * count
    assert npz_of(tmp_path).read_bytes() == undisturbed


@pytest.mark.parametrize("batch", [1, 64])
def test_any_batch_size(ckpt, tmp_path, monkeypatch, undisturbed, batch):
    (tmp_path / "expected.npz").write_bytes(undisturbed)
    run(monkeypatch, *argv(ckpt, tmp_path / "samples", batch=batch))
    found, expected = np.load(npz_of(tmp_path / "samples")), np.load(tmp_path / "expected.npz")
    assert np.array_equal(found["arr_1"], expected["arr_1"]) and len(set(found["arr_1"])) > 5
    difference = np.abs(found["arr_0"].astype(int) - expected["arr_0"])
    assert (difference <= 1).mean() >= 0.999
    assert expected["arr_0"].std() > 20  # not merely black


def test_samples_are_the_sampler_s(ckpt, tmp_path, monkeypatch):
    """Seed and label of sample i, and published rounding, in the .npz and in the PNGs."""
    folder = tmp_path / "samples"
    run(monkeypatch, *argv(ckpt, folder, "--png", "--global-seed", 100, "--labels", "balanced", count=12))
    found = np.load(npz_of(folder))
    assert found["arr_1"].tolist() == [*range(10), 0, 1]
    expected = Sampler.from_checkpoint(ckpt, device="cpu").sample([*range(10), 0, 1], seeds=100, batch_size=7)
    rounded = np.floor(expected.double().numpy().transpose(0, 2, 3, 1) * 255 + 0.5)
    assert (found["arr_0"] == rounded).mean() > 0.999
    pictures = sorted(folder.rglob("*.png"))
    assert [picture.name for picture in pictures] == [f"{i:06d}.png" for i in range(12)]
    for i in (0, 11):
        with Image.open(pictures[i]) as picture:
            assert np.array_equal(np.array(picture), found["arr_0"][i])
            assert picture.info["seed"] == str(100 + i) and picture.info["label"] == str(found["arr_1"][i])


def test_a_random_label_s_image_is_sample_py_s(ckpt, tmp_path, monkeypatch):
    """Number i of a random label is what sample.py makes of seed and label, on both sides of seed 2^32."""
    monkeypatch.chdir(tmp_path)
    first = 2**32 - 3
    run(monkeypatch, *argv(ckpt, "samples", "--png", "--global-seed", first, count=6))
    labels = np.load(npz_of(tmp_path / "samples"))["arr_1"].tolist()
    assert len(set(labels)) > 1
    for i, label in enumerate(labels):
        words = ["sample.py", "--ckpt", ckpt, "--seed", first + i, "--class-labels", label, "--out", "one"]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        launch(sample.main, sample.build_parser())
        (path,) = (tmp_path / "samples").rglob(f"{i:06d}.png")
        with Image.open(path) as mine, Image.open(tmp_path / "one" / "000000.png") as other:
            assert mine.info == other.info == dict(seed=str(first + i), label=str(label))
            assert abs(np.array(mine).astype(int) - np.array(other)).max() <= 1  # another batch's rounding


class FormerNoise:
    """The draws of versions whose .json says nothing of them: one generator, the label first."""

    def __init__(self, seeds, draws=None):
        self.generators = [torch.Generator().manual_seed(seed % 2**32) for seed in seeds]

    def labels(self, num_classes):
        return torch.stack([torch.randint(num_classes, (), generator=g) for g in self.generators])

    def randn(self, shape):
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def randn_like(self, x):
        return self.randn(x.shape[1:])


def test_samples_begun_by_an_earlier_version_are_continued_by_its_rule(ckpt, tmp_path, monkeypatch, capsys):
    options = ["--global-seed", 2**32 - 5]
    run(monkeypatch, *argv(ckpt, tmp_path / "now", *options, count=14))
    with monkeypatch.context() as former:
        former.setattr("sampler.SampleNoise", FormerNoise)
        run(former, *argv(ckpt, tmp_path / "former", *options, count=14))
        former.setattr(NpzWriter, "finish", lambda self: None)  # stopped just before
        run(former, *argv(ckpt, tmp_path / "half", *options, count=14))
    (settings,) = (tmp_path / "half").glob("*.json")
    contents = json.loads(settings.read_text())
    assert contents["settings"].pop("draws") == 2
    settings.write_text(json.dumps(contents))
    (path,) = (tmp_path / "half").rglob(".batches-*")
    path.write_text("".join(line for line in path.read_text().splitlines() if '"batch": 0' in line))
    capsys.readouterr()
    run(monkeypatch, *argv(ckpt, tmp_path / "half", *options, count=14))
    assert "1 of 2 batches are there" in capsys.readouterr().out
    assert npz_of(tmp_path / "half").read_bytes() == npz_of(tmp_path / "former").read_bytes()
    assert npz_of(tmp_path / "half").read_bytes() != npz_of(tmp_path / "now").read_bytes()
    assert json.loads(settings.read_text())["settings"]["draws"] == 1  # also when it is stopped again
    run(monkeypatch, *argv(ckpt, tmp_path / "half", *options, count=14))
    assert "is complete" in capsys.readouterr().out


def notes(folder):
    return sum(path.read_text().count("}") for path in folder.rglob(".batches-*"))


def test_killed_five_times(ckpt, tmp_path, undisturbed):
    """Killed outright once another batch or more is done, with one process and with two."""
    generator = np.random.default_rng(0)
    for kill in range(5):
        before = notes(tmp_path)
        if kill % 2:
            runs = forked.start_two(argv(ckpt, tmp_path), tmp_path / "out", slowly, command="sample_ddp")
        else:
            runs = [forked.start(argv(ckpt, tmp_path), tmp_path / "out", before=slowly, command="sample_ddp")]
        deadline = time.monotonic() + 60
        while notes(tmp_path) <= before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(generator.random() * 0.05)
        for process in runs:
            os.kill(process.pid, signal.SIGKILL)
        for process in runs:
            process.join()
        assert not list(tmp_path.glob("*.npz")), "the run was over before it was killed"
    assert before < notes(tmp_path) < 10
    assert forked.finish(forked.start(argv(ckpt, tmp_path), tmp_path / "out", command="sample_ddp")) == [0]
    assert "batches are there" in (tmp_path / "out").read_text()
    assert npz_of(tmp_path).read_bytes() == undisturbed


def slowly():
    """Give the test time to kill between two batches."""
    original = sample_ddp.commit

    def commit(*args):
        original(*args)
        time.sleep(0.2)

    sample_ddp.commit = commit


def test_a_truncated_npz_is_continued(ckpt, tmp_path, monkeypatch, undisturbed, capsys):
    run(monkeypatch, *argv(ckpt, tmp_path))
    path = npz_of(tmp_path)
    assert path.read_bytes() == undisturbed
    os.truncate(path, len(undisturbed) // 2)
    capsys.readouterr()
    run(monkeypatch, *argv(ckpt, tmp_path))
    assert "Continuing" in capsys.readouterr().out
    assert path.read_bytes() == undisturbed


def test_a_complete_npz_needs_no_folder(ckpt, tmp_path, monkeypatch, undisturbed, capsys):
    """Its PNGs removed, to save room, it is complete as before, and its settings still count."""
    run(monkeypatch, *argv(ckpt, tmp_path, "--png"))
    path = npz_of(tmp_path)
    shutil.rmtree(path.with_suffix(""))
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    monkeypatch.setattr(CheckpointSpec, "build", None)  # nothing is sampled
    run(monkeypatch, *argv(ckpt, tmp_path, "--png"))
    assert f"{path} is complete, its PNGs are removed and not made again" in capsys.readouterr().out
    assert path.read_bytes() == undisturbed and path.stat().st_mtime_ns == before
    assert not list(tmp_path.rglob("*.png"))
    message = refusal(monkeypatch, capsys, *argv(ckpt, tmp_path, "--png", batch=5))
    assert "holds samples with other per-proc-batch-size (7)" in message
    gc.collect()  # what was refused in this process, whose traceback holds the folder's lock
    path.with_suffix(".json").unlink()
    message = refusal(monkeypatch, capsys, *argv(ckpt, tmp_path, "--png"))
    assert message.startswith(f"{path}: is there without its .json") and path.read_bytes() == undisturbed


def test_what_is_whole(tmp_path):
    """The right arrays, with the right checksums, by whomever; nothing else."""
    images = np.random.default_rng(0).integers(0, 256, (11, 6, 4, 3), np.uint8)
    path, labels = tmp_path / "a.npz", list(range(11))
    store = write_archive(path, images, labels, batch_size=4)
    store.has_labels = True
    assert store.is_complete() and store.begin() == ({}, True)
    whole = path.read_bytes()
    for at in range(0, len(whole) - 1, 97):  # a bit anywhere, but in what no reader looks at
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        if store.is_complete():
            loaded = np.load(path)
            assert np.array_equal(loaded["arr_0"], images) and loaded["arr_1"].tolist() == labels
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not store.is_complete()
    for arrays, verdict in (
        ([images], False), ([images, labels], True), ([images[:10], labels], False),
        ([images, labels[:10]], False), ([images, np.zeros(11)], False), ([images / 255, labels], False),
        ([images.reshape(11, 4, 6, 3), labels], False),
    ):  # fmt: skip
        for save in (np.savez, np.savez_compressed):
            save(path, *arrays)
            assert store.is_complete() is verdict
    path.unlink()
    assert not store.is_complete()


def test_damaged_bytes_are_sampled_again(ckpt, tmp_path, monkeypatch, undisturbed, capsys):
    run(monkeypatch, *argv(ckpt, tmp_path))
    path = npz_of(tmp_path)
    with open(path, "r+b") as file:
        file.seek(3000)
        file.write(b"damage")
    run(monkeypatch, *argv(ckpt, tmp_path))
    assert "9 of 10 batches are there" in capsys.readouterr().out
    assert path.read_bytes() == undisturbed
    run(monkeypatch, *argv(ckpt, tmp_path))
    assert "is complete" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# The file


def read_by_adm_s_rules(path):
    """Stream arr_0 out of the zip as the evaluation suite does: header, then rows, no random access."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        assert not fortran_order and dtype == np.uint8 and len(shape) == 4
        rows = []
        for _ in range(shape[0]):
            rows.append(np.frombuffer(file.read(int(np.prod(shape[1:]))), dtype).reshape(shape[1:]))
        assert not file.read(1)
    return np.stack(rows)


def write_archive(path, images, labels, batch_size):
    folder = f"{path}.notes"
    os.makedirs(folder, exist_ok=True)
    store = NpzWriter(str(path), folder, images.shape, batch_size)
    store.begin()
    for batch in reversed(store.batches):  # in any order
        rows = store.rows(batch)
        store.write(batch, images[rows.start : rows.stop], labels and labels[rows.start : rows.stop], 0)
    store.close()
    store.finish()
    return store


@pytest.mark.parametrize("labels", [None, list(range(11))])
def test_npz_is_read_by_all(tmp_path, labels):
    images = np.random.default_rng(0).integers(0, 256, (11, 6, 4, 3), np.uint8)
    path = tmp_path / "a.npz"
    store = write_archive(path, images, labels, batch_size=4)
    loaded = np.load(path)
    assert np.array_equal(loaded["arr_0"], images)
    assert loaded.files == (["arr_0"] if labels is None else ["arr_0", "arr_1"])
    assert labels is None or loaded["arr_1"].tolist() == labels
    assert np.array_equal(read_by_adm_s_rules(path), images)
    assert np.array_equal(np.memmap(path, np.uint8, "r", store.offset, images.shape), images)
    with zipfile.ZipFile(path) as whole:
        assert whole.testzip() is None
    np.savez(tmp_path / "b.npz", images)
    assert read_by_adm_s_rules(tmp_path / "b.npz").shape == images.shape


def test_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_writer.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=10**6)))
    store = NpzWriter(str(tmp_path / "a.npz"), str(tmp_path), (50_000, 256, 256, 3), 32)
    with pytest.raises(ValueError, match=r"a.npz: needs 9.8 GB and 0.0 GB are free; make room"):
        store.begin()
    assert not list(tmp_path.glob("*.npz*"))
    with open(tmp_path / "a.npz.part", "wb") as file:  # an earlier run's, of which nothing is written yet
        file.truncate(store.offset + 50_000 * store.image_bytes)
    store.lock.release()
    with pytest.raises(ValueError, match=r"needs 9.8 GB and 0.0 GB are free"):
        store.begin()


def sample_random_images():
    """In place of a model: random images, so that only the writer works."""

    class Random:
        model = build_tiny()

        def generate(self, seeds, labels, options):
            generator = torch.Generator().manual_seed(seeds[0])
            x = torch.rand(1, 3, 256, 256, generator=generator).expand(len(seeds), -1, -1, -1) * 2 - 1
            x = x + torch.tensor(seeds).view(-1, 1, 1, 1) % 100 / 1000
            return x, [seed % 1000 for seed in seeds]

    sample_ddp.CheckpointSpec.build = lambda *args: Random()
    sample_ddp.CheckpointSpec.image_size = property(lambda self: (256, 256), lambda self, value: None)

    def report():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"\npeak memory {peak:.2f} GiB", flush=True)

    leave = sample_ddp.NpzWriter.close
    finish = sample_ddp.NpzWriter.finish
    sample_ddp.NpzWriter.close = lambda self: (leave(self), report())
    sample_ddp.NpzWriter.finish = lambda self: (finish(self), report())


@pytest.mark.slow
def test_fifty_thousand_images(ckpt, tmp_path):
    """The whole file of an FID-50K at 256: below 1 GB on each process, and what every reader takes."""
    start = time.monotonic()
    runs = forked.start_two(
        argv(ckpt, tmp_path, count=50_000, batch=32), tmp_path / "out", sample_random_images, "sample_ddp"
    )
    assert forked.finish(*runs, timeout=900) == [0, 0]
    seconds = time.monotonic() - start
    peaks = []
    for rank in (0, 1):
        lines = (tmp_path / f"out.{rank}").read_text().splitlines()
        peaks.append(max(float(line.split()[2]) for line in lines if line.startswith("peak memory")))
    print(f"\n50,000 images of 256x256: {seconds:.0f} s, peak memory by process {peaks} GiB")
    assert max(peaks) < 1
    path = npz_of(tmp_path)
    with zipfile.ZipFile(path) as whole, whole.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        assert np.lib.format.read_array_header_1_0(file)[0] == (50_000, 256, 256, 3)
        first = np.frombuffer(file.read(256 * 256 * 3), np.uint8)
    loaded = np.load(path)
    mapped = np.memmap(path, np.uint8, "r", NpzWriter(str(path), "", (50_000, 256, 256, 3), 32).offset,
                       (50_000, 256, 256, 3))  # fmt: skip
    assert np.array_equal(mapped[0].ravel(), first)
    images = loaded["arr_0"]
    assert images.shape == mapped.shape and np.array_equal(images[49_999], mapped[49_999])
    assert np.array_equal(loaded["arr_1"], np.arange(50_000) % 1000)


# ---------------------------------------------------------------------------------------------
# Bad input


def refusal(monkeypatch, capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *args)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("sample_ddp.py: error: ")
    return error.removeprefix("sample_ddp.py: error: ")


@pytest.mark.parametrize(
    "more, message",
    [
        (["--num-fid-samples", 0], "--num-fid-samples 0: must be at least 1"),
        (["--per-proc-batch-size", 0], "--per-proc-batch-size 0: must be at least 1"),
        (["--global-seed", -1], "--global-seed -1: must be 0 or more"),
        (["--cfg-scale", -1], "--cfg-scale -1.0: must be 0 or more"),
        (["--cfg-interval", 3, 1], "--cfg-interval: interval 3.0 1.0: must be two noise levels"),
        (["--cfg-channels", 4], "--cfg-channels 4: must be between 1 and 3, or all"),
        (
            ["--sampler", "dpm++", "--num-sampling-steps", "ddim50"],
            "--num-sampling-steps ddim50: 'ddim50' is not",
        ),
        (["--no-tf32", "--precision", "tf32"], "--no-tf32: contradicts --precision tf32"),
        (["--no-tf32", "--precision", "bf16"], "--no-tf32: contradicts --precision bf16"),
        (["--ckpt", "DiT-XL-2-256x256.pt", "--dry-run", "--sampler", "sde"], "--sampler sde: this model has"),
        (["--ckpt", "DiT-XL-2-256x256.pt", "--dry-run", "--cfg-channels", 0], "--cfg-channels 0: must be"),
        (["--labels", "sorted"], "argument --labels: invalid choice: 'sorted'"),
        (["--image-size", 16], "--image-size 16: "),
    ],
)
def test_refused_before_any_work(ckpt, tmp_path, monkeypatch, capsys, more, message):
    assert refusal(monkeypatch, capsys, *argv(ckpt, tmp_path / "samples"), *more).startswith(message)
    assert not (tmp_path / "samples").exists()


def test_options_are_judged_by_the_checkpoint_s_process(tmp_path, monkeypatch, capsys):
    model = build_tiny(in_channels=3, learn_sigma=False, num_classes=0)
    config = dict(model=model.config, process=create_flow().config, autoencoder=dict(vae="none", channels=3))
    checkpoints.save(str(tmp_path / "flow.pt"), dict(ema=model.state_dict(), config=config))
    dry = ["--dry-run", "--ckpt", tmp_path / "flow.pt"]
    run(monkeypatch, *dry, "--num-sampling-steps", 2000)
    assert "options are sound" in capsys.readouterr().out
    assert refusal(monkeypatch, capsys, *dry, "--labels", "balanced").startswith(
        "--labels balanced: this model"
    )


@pytest.mark.parametrize(
    "more, name",
    [
        (["--num-fid-samples", 20], "num-fid-samples (14)"),
        (["--cfg-channels", 2], "cfg-channels (all)"),
        (["--per-proc-batch-size", 5], "per-proc-batch-size (7)"),
    ],
)
def test_other_settings_never_mix(ckpt, tmp_path, monkeypatch, capsys, more, name):
    run(monkeypatch, *argv(ckpt, tmp_path, count=14))
    before = npz_of(tmp_path).read_bytes()
    capsys.readouterr()
    for dry in (["--dry-run"], []):
        message = refusal(monkeypatch, capsys, *argv(ckpt, tmp_path, count=14), *more, *dry)
        assert f"holds samples with other {name}; remove it, or give another --sample-dir" in message
    assert npz_of(tmp_path).read_bytes() == before


def test_other_weights_of_the_same_name_never_mix(ckpt, tmp_path, monkeypatch, capsys):
    mine = str(tmp_path / "run.pt")
    contents = torch.load(ckpt, weights_only=True)
    torch.save(contents, mine)
    run(monkeypatch, *argv(mine, tmp_path / "samples", count=14))
    contents["ema"]["blocks.0.mlp.fc1.bias"][0] += 1e-6
    torch.save(contents, mine)
    message = refusal(monkeypatch, capsys, *argv(mine, tmp_path / "samples", count=14))
    assert "holds samples with other weights" in message


def test_folders_of_other_settings_have_other_names(ckpt, tmp_path, monkeypatch, capsys):
    for more in ([], ["--cfg-scale", 3], ["--sampler", "dpm++"], ["--num-sampling-steps", 5],
                 ["--labels", "balanced"], ["--global-seed", 7], ["--cfg-interval", 0.3, 3]):  # fmt: skip
        run(monkeypatch, *argv(ckpt, tmp_path / "samples", *more), "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert len(set(lines)) == 7 and not (tmp_path / "samples").exists()
    name = "DiT-2x64p2-run-size-8-vae-none-cfg-2.0-steps-8-sampler-ddpm-seed-0-labels-random"
    assert name in lines[0]


def test_dry_run(ckpt, tmp_path, monkeypatch, capsys):
    """Says whether samples would be added to what is there, refuses what a run would, and writes nothing."""
    dry = [*argv(ckpt, tmp_path / "samples", count=14), "--dry-run"]
    run(monkeypatch, *dry)
    assert "Would sample to DiT-2x64p2-run-" in capsys.readouterr().out and not list(tmp_path.iterdir())
    run(monkeypatch, *dry[:-1])
    before = sorted(tmp_path.rglob("*"))
    run(monkeypatch, *dry)
    assert "Would continue DiT-2x64p2-run-" in capsys.readouterr().out
    (folder,) = filter(Path.is_dir, (tmp_path / "samples").iterdir())
    with FileLock(folder / ".lock"):
        assert "another run is writing there; wait for it" in refusal(monkeypatch, capsys, *dry)
    assert sorted(tmp_path.rglob("*")) == before
    folder.with_name(f"{folder.name}.json").unlink()
    assert "is there without its .json" in refusal(monkeypatch, capsys, *dry)


def test_two_runs_in_one_folder(ckpt, tmp_path, monkeypatch, capsys):
    first = forked.start(argv(ckpt, tmp_path), tmp_path / "out", before=slowly, command="sample_ddp")
    while not notes(tmp_path):
        time.sleep(0.01)
    message = refusal(monkeypatch, capsys, *argv(ckpt, tmp_path))
    assert message.endswith("another run is writing there; wait for it, or give another --sample-dir")
    assert forked.finish(first) == [0]


def test_two_runs_that_start_at_once(ckpt, tmp_path, capsys):
    """One goes on, the other is told so, and not that the folder is of something else."""
    args = sample_ddp.build_parser().parse_args(argv(ckpt, tmp_path))
    plan = CheckpointSpec(args.ckpt, weights=args.weights)
    options = plan.check()
    outcomes = multiprocessing.get_context("fork").SimpleQueue()

    def begin(index, wait):
        for number in range(20):
            folder = str(tmp_path / str(number) / "samples")
            archive = NpzWriter(f"{folder}.npz", folder, (COUNT, 8, 8, 3), 7)
            wait()
            try:
                sample_ddp.begin(args, plan, options, "fp32", archive)
                outcomes.put("began")
            except UserError as error:
                outcomes.put(str(error).removeprefix(folder))
            wait()

    assert forked.at_once(begin) == [0, 0]
    found = [outcomes.get() for _ in range(40)]
    busy = ": another run is writing there; wait for it, or give another --sample-dir"
    assert sorted(found) == [busy] * 20 + ["began"] * 20


def test_unwritable_folder(ckpt, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for dry in ([], ["--dry-run"]):
        message = refusal(monkeypatch, capsys, *argv(ckpt, tmp_path / "file" / "samples"), *dry)
    assert message == f"--sample-dir {tmp_path}/file/samples: cannot be written to (Not a directory)"


def test_a_folder_of_something_else(ckpt, tmp_path, monkeypatch, capsys):
    run(monkeypatch, *argv(ckpt, tmp_path, count=14))
    (settings,) = tmp_path.glob("*.json")
    assert json.loads(settings.read_text())["settings"]["cfg_scale"] == 2.0
    settings.unlink()
    assert "is there without its .json" in refusal(monkeypatch, capsys, *argv(ckpt, tmp_path, count=14))


def test_published_weights_are_decoded_as_published(tmp_path, monkeypatch, capsys):
    """By the ema VAE, where sample.py's default is mse; also of a file, or an export, that names none."""
    state = build_tiny(**DiT_models["DiT-S/8"].keywords, input_size=32, num_classes=1000).state_dict()
    torch.save(state, tmp_path / "bare.pt")
    checkpoints.export(checkpoints.load(str(tmp_path / "bare.pt")), str(tmp_path / "bare.safetensors"))
    for more in ([], ["--ckpt", tmp_path / "bare.pt"], ["--ckpt", tmp_path / "bare.safetensors"]):
        run(monkeypatch, *more, "--dry-run")
        assert "-vae-ema-" in capsys.readouterr().out
        run(monkeypatch, *more, "--vae", "mse", "--dry-run")
        assert "-vae-mse-" in capsys.readouterr().out
    for command, vae in ((sample_ddp, "ema"), (sample, "mse")):
        shown = " ".join(command.build_parser().format_help().split())
        assert f"(default: the one of the checkpoint, or {vae} for published weights)" in shown
    assert (
        CheckpointSpec("DiT-XL-2-256x256.pt").vae
        == CheckpointSpec(str(tmp_path / "bare.safetensors")).vae
        == "mse"
    )


def test_official_flags_are_taken():
    args = sample_ddp.build_parser().parse_args(
        "--model DiT-XL/2 --vae ema --sample-dir s --per-proc-batch-size 4 --num-fid-samples 8"
        " --image-size 512 --num-classes 1000 --cfg-scale 1.5 --num-sampling-steps 250 --global-seed 0"
        " --no-tf32 --ckpt x".split()
    )
    assert (args.tf32, args.num_fid_samples, args.vae) == (False, 8, "ema")
    assert (ROOT / "sample_ddp.py").exists()
