"""evaluate.py: the network against its library, files of all forms, processes, memory, what is refused."""

import json
import os
import resource
import zipfile
from functools import partial

import forked
import numpy as np
import pytest
import torch
from conftest import ROOT
from images import pictures, write_image
from in_process import assert_refused, command, record_of
from networks import Tiny, use_tiny, write_random_weights
from PIL import Image

import evaluate
from evaluation import inception
from evaluation.image_reader import ImageFolderReader, NpzReader
from evaluation.inception import load_inception
from evaluation.statistics import compute_features, share_of
from runtime.cli import UserError
from runtime.distributed import ALONE, Distributed

run, refuse = partial(command, evaluate), partial(assert_refused, evaluate)


@pytest.fixture
def tiny(monkeypatch):
    """evaluate.py with the tiny network."""
    monkeypatch.setattr(inception, "load_inception", inception.load_inception)
    monkeypatch.setattr(inception.Inception, "sizes", inception.Inception.sizes)
    use_tiny()


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return write_random_weights(tmp_path_factory.mktemp("inception") / "random.pth")


# ---------------------------------------------------------------------------------------------
# The network


@pytest.fixture(scope="module")
def network(weights):
    return load_inception(weights, "cpu", any_weights=True)


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(pictures(3, 20, 30)).permute(0, 3, 1, 2)


def test_features_are_the_library_s(network, weights, images):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    library = FeatureExtractorInceptionV3(
        "library", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    inputs = []
    library.Mixed_6d.branch1x1.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    expected, logits = library(images)
    pooled, spatial = network(images)
    assert torch.equal(pooled, expected) and pooled.shape == (3, 2048) and pooled.std(0).mean() > 1e-3
    torch.testing.assert_close(network.logits(pooled), logits, rtol=1e-5, atol=1e-5)

    unit = library.Mixed_6d.branch1x1
    x = torch.nn.functional.conv2d(inputs[0], unit.conv.weight)
    scale = unit.bn.weight / (unit.bn.running_var + 1e-3).sqrt()
    shift = unit.bn.bias - unit.bn.running_mean * scale
    x = (x * scale[:, None, None] + shift[:, None, None]).relu()
    assert spatial.shape == (3, 2023)
    for row, column, channel in ((0, 0, 0), (3, 16, 6), (16, 5, 2)):  # the order of the stored mu_s
        torch.testing.assert_close(spatial[:, (row * 17 + column) * 7 + channel], x[:, channel, row, column])


def test_images_are_resized_as_by_tensorflow_1(network, images):
    """Its bilinear resize, written down: no half-pixel centres; PyTorch's own is another."""
    seen = []
    hook = network.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network(images[:1])
    hook.remove()

    def places(size):
        place = np.arange(299, dtype=np.float32) * np.float32(size / 299)
        low = place.astype(int)
        return low, np.minimum(low + 1, size - 1), place - low

    (top, bottom, down), (left, right, along) = places(20), places(30)
    x = images[0].float().numpy()
    x = x[:, :, left] + (x[:, :, right] - x[:, :, left]) * along
    x = x[:, top] + (x[:, bottom] - x[:, top]) * down[:, None]
    np.testing.assert_allclose(seen[0][0], (x - 128) / 128, atol=1e-5)
    ordinary = torch.nn.functional.interpolate(images[:1].float(), (299, 299), mode="bilinear")
    assert ((ordinary - 128) / 128 - seen[0]).abs().max() > 0.1


def test_weights_are_checked(weights, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"random.pth: its sha256 is [0-9a-f]{16}…, .* 6726825d0af5f729…; "):
        load_inception(weights, "cpu")
    monkeypatch.setattr(inception, "INCEPTION_SHA256", inception.hashlib.sha256(b"junk").hexdigest())
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(UserError, match="junk.pth: not weights of this network, the 472 tensors"):
        load_inception(tmp_path / "junk.pth", "cpu")
    torch.save(dict(a=torch.ones(1)), tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: not weights of this network") as refused:
        load_inception(tmp_path / "other.pth", "cpu", any_weights=True)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_weights_cannot_execute_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save(dict(fc=Payload()), tmp_path / "evil.pth")
    with pytest.raises(UserError, match="not weights of this network"):
        load_inception(tmp_path / "evil.pth", "cpu", any_weights=True)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------
# Files


def read(images, start=0, stop=None, batch_size=4):
    batches = list(images.batches(start, images.count if stop is None else stop, batch_size))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    return torch.cat(batches).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    """In pieces, from anywhere, with what else it holds."""
    expected, path = pictures(11, 5, 7), str(tmp_path / "images.npz")
    save(path, expected, np.arange(11) % 3, mu=np.zeros(3))  # arr_0, arr_1
    images = NpzReader(path, "REF")
    assert images.count == 11 and images.size == (5, 7) and not images.is_sorted_by_class
    np.testing.assert_array_equal(read(images), expected)
    np.testing.assert_array_equal(read(images, 3, 9), expected[3:9])
    np.testing.assert_array_equal(list(images.pick([0, 4, 10])), expected[[0, 4, 10]])


@pytest.mark.parametrize(
    "labels, is_sorted",
    [
        ([0, 0, 1, 2], True),
        ([2, 0, 1, 1], False),
        ([1, 1, 1, 1], False),
        (list("abbc"), True),
        ([None] * 4, False),
    ],
)
def test_sorted_labels(tmp_path, labels, is_sorted):
    np.savez(tmp_path / "x.npz", pictures(4), np.array(labels, dtype=object if None in labels else None))
    assert NpzReader(str(tmp_path / "x.npz"), "SAMPLES").is_sorted_by_class == is_sorted


def test_folder(tmp_path):
    """By name, subfolders as classes, in any mode; cropped as for training where asked."""
    expected = pictures(6, 8, 8)
    for i, name in enumerate(("a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/2.png", "b/c/0.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(expected[i]).save(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    images = ImageFolderReader(str(tmp_path), "REF")
    assert images.count == 6 and images.size == (8, 8) and images.is_sorted_by_class
    np.testing.assert_array_equal(read(images), expected)
    np.testing.assert_array_equal(list(images.pick([1, 5])), expected[[1, 5]])

    flat = tmp_path / "flat"
    write_image(flat / "0.png", size=(40, 20), seed=1)
    Image.fromarray(expected[0]).convert("L").save(flat / "1.png")
    with pytest.raises(UserError, match=r"1.png: is 8x8 where .*0.png is 40x20; all must be of one size"):
        ImageFolderReader(str(flat), "REF")
    cropped = ImageFolderReader(str(flat), "REF", crop=8)
    assert not cropped.is_sorted_by_class
    assert [(image == image[..., :1]).all() for image in read(cropped)] == [False, True]
    (flat / "2.png").write_bytes(b"junk")
    with pytest.raises(
        UserError, match="2.png: cannot be read as an image"
    ):  # before the others are computed
        ImageFolderReader(str(flat), "REF", crop=8)


def test_shares_are_whole_batches_in_order():
    for count, size, world in ((100, 8, 3), (5, 8, 2), (64, 8, 8), (1, 1, 4)):
        shares = [share_of(count, size, Distributed(rank, world, None)) for rank in range(world)]
        assert [i for share in shares for i in range(*share)] == list(range(count))
        assert all(start % size == 0 or start == count for start, _ in shares)


# ---------------------------------------------------------------------------------------------
# Memory


def save_huge(path, compressed, count):
    """An .npz of 1 MB images, the last of which is white, in little memory."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind, compresslevel=1) as archive, archive.open("arr_0.npy", "w") as file:
        header = dict(descr="|u1", fortran_order=False, shape=(count, 512, 683, 3))
        np.lib.format.write_array_header_1_0(file, header)
        for i in range(count):
            file.write((b"\xff" if i == count - 1 else b"\0") * (512 * 683 * 3))


def read_within_limit(path, room, output):
    """In a process that may not have more memory than it has, but for room."""
    torch.set_num_threads(1)
    network, images = Tiny(), NpzReader(path, "SAMPLES")
    network(torch.zeros(8, 3, 512, 683, dtype=torch.uint8))  # what needs memory once
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        np.load(path)["arr_0"]
        raise AssertionError("the limit does not bite")
    except MemoryError:
        pass
    batches, wanted = images.batches(0, images.count, 4), {"rows", "pooled"}
    found = compute_features(batches, (0, images.count), network, ALONE, wanted, "SAMPLES")
    assert found.rows.sum() == len(found.rows[0]) and found.pooled.n == images.count
    with open(output, "w") as file:
        file.write("streamed")


@pytest.mark.parametrize("compressed", [False, True])
def test_files_larger_than_memory_are_streamed(tmp_path, compressed):
    path, room = str(tmp_path / "huge.npz"), 300 * 2**20
    save_huge(path, compressed, count=320)
    process = forked._context.Process(target=read_within_limit, args=(path, room, str(tmp_path / "out")))
    process.start()
    assert forked.finish(process) == [0]
    assert (tmp_path / "out").read_text() == "streamed"


# ---------------------------------------------------------------------------------------------
# The command, with Inception's network and random weights


def write_digits(folder, rows, noise=False):
    """Handwritten digits, or noise of their size, enlarged to 32 pixels."""
    folder.mkdir()
    digits = np.load(ROOT / "assets" / "digits.npz")["images"][rows].astype(np.float32) * 255 / 16
    if noise:
        digits = np.random.default_rng(0).uniform(0, 255, digits.shape)
    for i, digit in enumerate(digits):
        Image.fromarray(digit.astype(np.uint8)).resize((32, 32), Image.BICUBIC).save(folder / f"{i:04d}.png")
    return folder


def start(root, weights, samples, name, runs):
    """Start evaluate.py on the folders one and samples in root; returns the processes."""
    options = ["--inception-weights", weights, "--any-weights", "--batch-size", 8, "--num-workers", 0]
    argv = [root / "one", root / samples, *options, "--out", root / f"{name}.json"]
    found = runs(argv, root / f"{name}.log", command="evaluate")
    return found if isinstance(found, list) else [found]


COUNT = 10  # a batch of 8 and a rest


@pytest.fixture(scope="module")
def numbers(weights, tmp_path_factory):
    """The records of digits against other digits by one process and by two, and what the one printed."""
    root = tmp_path_factory.mktemp("numbers")
    write_digits(root / "one", range(COUNT))
    write_digits(root / "other", range(900, 900 + COUNT))
    runs = start(root, weights, "other", "alone", forked.start)
    runs += start(root, weights, "other", "two", forked.start_two)
    assert set(forked.finish(*runs)) == {0}, (root / "alone.log").read_text()
    records = [json.loads((root / f"{name}.json").read_text()) for name in ("alone", "two")]
    return *records, (root / "alone.log").read_text()


def test_two_processes_are_one(numbers):
    """Features, and what is counted from them, to the bit; what is summed over processes to 1e-9."""
    alone, two, _ = numbers
    assert alone["settings"]["processes"] == 1 and two["settings"]["processes"] == 2
    for name, value in alone["metrics"].items():
        if name in ("FID", "sFID"):
            assert two["metrics"][name] == pytest.approx(value, rel=1e-9)
        else:
            assert two["metrics"][name] == value


@pytest.mark.slow
def test_digits_are_closer_to_digits_than_to_noise(weights, tmp_path):
    """The arithmetic as a whole, on real images; with random weights no number is a published one."""
    write_digits(tmp_path / "one", range(0, 200))
    write_digits(tmp_path / "other", range(900, 1100))
    write_digits(tmp_path / "noise", range(0, 200), noise=True)
    runs = [
        *start(tmp_path, weights, "other", "digits", forked.start),
        *start(tmp_path, weights, "noise", "noise", forked.start),
    ]
    assert forked.finish(*runs, timeout=400) == [0, 0]
    digits, noise = (
        json.loads((tmp_path / f"{name}.json").read_text())["metrics"] for name in ("digits", "noise")
    )
    print(digits, noise)
    assert 0 < digits["FID"] < noise["FID"] / 2 and 0 < digits["sFID"] < noise["sFID"] / 2
    assert digits["Precision"] > noise["Precision"] and digits["Recall"] > noise["Recall"]
    assert digits["Inception Score"] > noise["Inception Score"] >= 1


def test_what_is_printed_and_recorded(numbers, weights):
    record, _, printed = numbers
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("Inception Score: "))
    shown = dict(line.split(": ") for line in lines[first : first + 5])
    assert list(shown) == ["Inception Score", "FID", "sFID", "Precision", "Recall"]  # ADM's order
    assert {name: float(value) for name, value in shown.items()} == record["metrics"]
    assert record["name"] == f"FID-{COUNT}" and f"N = {COUNT}, 32x32 pixels; FID is FID-{COUNT}" in printed
    assert not record["comparable_to_published"] and "not comparable to published numbers" in printed
    assert f"{COUNT} images are no more than the 2,048 dimensions" in printed
    settings = record["settings"]
    assert (
        settings["inception_weights"]["sha256"] == inception.hashlib.sha256(weights.read_bytes()).hexdigest()
    )
    assert settings["k"] == 3 and settings["device"] == "cpu" and "torch-fidelity" in settings["versions"]
    assert record["samples"]["N"] == record["reference"]["N"] == COUNT
    assert record["samples"]["path"].endswith("other")


# ---------------------------------------------------------------------------------------------
# The command, with a tiny network


def test_saved_statistics_stand_for_the_images(tiny, tmp_path, capsys):
    folder, samples, reference = tmp_path / "real", tmp_path / "samples.npz", tmp_path / "ref.npz"
    for i in range(30):
        write_image(folder / "ab"[i % 2] / f"{i}.png", size=(20 + i, 24), seed=i)
    np.savez(samples, pictures(25))
    run(folder, samples, "--image-size", 16, "--num-workers", 0)
    of_images = record_of(samples)["metrics"]
    run(folder, "--image-size", 16, "--save-stats", reference, "--num-workers", 0)
    run(reference, samples)
    assert record_of(samples)["metrics"] == pytest.approx(of_images, rel=1e-9)
    assert record_of(samples)["reference"]["statistics"] == dict(pooled="stored", spatial="stored")
    with np.load(reference) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0"} <= set(file)
        assert file["arr_0"].shape == (30, 16, 16, 3) and file["sigma"].dtype == np.float64
        pooled, _ = Tiny()(torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2))
        np.testing.assert_allclose(file["mu"], pooled.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(pooled.double().T), rtol=1e-9)

    # Of fewer images, and of none, which is enough for all but precision and recall:
    run(folder, "--image-size", 16, "--save-stats", tmp_path / "few.npz", "--stats-images", 7)
    run(tmp_path / "few.npz", samples, "--metrics", "sfid", "fid")
    assert (
        list(record_of(samples)["metrics"]) == ["FID", "sFID"] and record_of(samples)["reference"]["N"] == 7
    )
    assert record_of(samples)["metrics"]["FID"] == pytest.approx(of_images["FID"], rel=1e-9)
    run(folder, "--image-size", 16, "--save-stats", tmp_path / "none.npz", "--stats-images", 0)
    run(tmp_path / "none.npz", samples, "--metrics", "is", "fid")
    assert record_of(samples)["metrics"]["FID"] == pytest.approx(of_images["FID"], rel=1e-9)
    refuse(capsys, "none.npz: no arr_0 in it, and its statistics do not give precision and recall; ",
           tmp_path / "none.npz", samples)  # fmt: skip

    # Statistics of other weights are none of these:
    stored = dict(np.load(tmp_path / "few.npz"), inception_sha256="f" * 64)
    np.savez(tmp_path / "other.npz", **stored)
    refuse(capsys, "other.npz: its statistics were made with other Inception weights", tmp_path / "other.npz",
           samples)  # fmt: skip


def test_names_and_warnings(tiny, tmp_path, capsys):
    reference, samples = tmp_path / "ref.npz", tmp_path / "samples.npz"
    np.savez(reference, pictures(40, seed=1))
    np.savez(samples, pictures(2000, 8, 8), np.arange(2000) // 100)
    run(reference, samples)
    printed = capsys.readouterr().out
    assert "FID is FID-2K" in printed and record_of(samples)["name"] == "FID-2K"
    assert "samples.npz: sorted by class; the Inception Score is the mean over chunks of 5,000" in printed
    assert "REF has images of 16x16 pixels, SAMPLES of 8x8" in printed
    assert "dimensions" not in printed  # six of them
    assert record_of(samples)["warnings"] == [
        line.removeprefix("Warning: ") for line in printed.splitlines() if line.startswith("Warning: ")
    ]
    run(samples, samples, "--out", tmp_path / "self.json")
    found = json.loads((tmp_path / "self.json").read_text())["metrics"]
    assert found["FID"] == pytest.approx(0, abs=1e-9) and found["Precision"] == found["Recall"] == 1


def test_bad_input_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inception, "load_inception", lambda *_: pytest.fail("work was begun"))
    np.savez("good.npz", pictures(9))
    np.savez("named.npz", images=pictures(9))
    np.savez("floats.npz", pictures(9) / 255)
    np.savez("grey.npz", pictures(9)[..., :1])
    np.savez("channels_first.npz", pictures(9).transpose(0, 3, 1, 2))
    np.savez("three.npz", pictures(3))
    np.savez("empty.npz", pictures(0))
    np.savez("objects.npz", np.array([None] * 3))
    np.savez("fortran.npz", np.asfortranarray(pictures(9)))
    np.savez("shapes.npz", pictures(9), mu=np.zeros(5), sigma=np.zeros((5, 5)))
    np.savez("nan.npz", pictures(9), mu=np.full(2048, np.nan), sigma=np.zeros((2048, 2048)))
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "junk.npz").write_bytes(b"junk")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    (tmp_path / "weights.pth").write_bytes(b"junk")
    write_image(tmp_path / "pictures" / "0.png", size=(8, 8))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "0.png").write_bytes(b"junk")

    for argv, message in (
        (["good.npz"], "SAMPLES: required, unless --save-stats is given"),
        (["no.npz", "good.npz"], "REF no.npz: no such file or folder"),
        (["good.npz", "no.npz"], "SAMPLES no.npz: no such file or folder"),
        (["good.npz", "named.npz"], "SAMPLES named.npz: no arr_0 in it; "),
        (["named.npz", "good.npz"], "REF named.npz: no arr_0 in it; "),
        (["good.npz", "floats.npz"], "SAMPLES floats.npz: arr_0 is float64; images are uint8, 0 … 255"),
        (["good.npz", "grey.npz"], "SAMPLES grey.npz: arr_0 has the shape (9, 16, 16, 1); "),
        (["good.npz", "channels_first.npz"], "arr_0 has the shape (9, 3, 16, 16); "),
        (["good.npz", "three.npz"], "SAMPLES three.npz: 3 images; these metrics need at least 4"),
        (["good.npz", "empty.npz"], "arr_0 has the shape (0, 16, 16, 3); "),
        (["good.npz", "objects.npz"], "objects.npz: arr_0 is object; "),
        (["good.npz", "fortran.npz"], "fortran.npz: arr_0 is in Fortran order; "),
        (["shapes.npz", "good.npz"], "REF shapes.npz: mu has the shape (5,), expected (2048,)"),
        (["nan.npz", "good.npz"], "REF nan.npz: mu has values that are not finite numbers"),
        (["good.npz", "cut.npz"], "SAMPLES cut.npz: cannot be read as an .npz file; "),
        (["good.npz", "junk.npz"], "SAMPLES junk.npz: cannot be read as an .npz file; "),
        (["folder", "good.npz"], "REF folder: no images there (.jpg, "),
        (["damaged", "good.npz"], "damaged/0.png: cannot be read as an image; "),
        (["good.npz", "good.npz", "--image-size", "8"], "--image-size 8: crops the images of a folder, "),
        (["good.npz", "good.npz", "--inception-weights", "weights.pth"], "weights.pth: its sha256 is "),
        (["good.npz", "good.npz", "--inception-weights", "no.pth"], "no.pth: cannot be read (No such file"),
        (["good.npz", "good.npz", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["good.npz", "good.npz", "--out", "no/x.json"], "--out no/x.json: cannot be written there; "),
        (["good.npz", "good.npz", "--save-stats", "x.npz"], "SAMPLES: --save-stats is of REF alone"),
        (["pictures", "--save-stats", "x.npz"], "--save-stats: of a folder needs --image-size"),
        (["good.npz", "--save-stats", "named.npz"], "--save-stats named.npz: exists; "),
    ):
        refuse(capsys, message, *argv)
    before = sorted(os.listdir())
    run("good.npz", "good.npz", "--dry-run")
    assert "nothing was written" in capsys.readouterr().out and sorted(os.listdir()) == before


def test_an_unreadable_image_stops_all_processes(tmp_path):
    for i in range(8):
        write_image(tmp_path / "images" / f"{i}.png", size=(8, 8), seed=i)
    path = tmp_path / "images" / "7.png"
    path.write_bytes(path.read_bytes()[:-30])  # its header is whole
    argv = [tmp_path / "images", tmp_path / "images", "--batch-size", 2, "--num-workers", 0]
    runs = forked.start_two(argv, tmp_path / "out", before=use_tiny, command="evaluate")
    assert forked.finish(*runs, timeout=60) == [2, 2]
    for rank in range(2):
        assert "7.png: cannot be read as an image" in (tmp_path / f"out.{rank}").read_text().splitlines()[-1]


# ---------------------------------------------------------------------------------------------
# The published numbers


def test_published_batches(tmp_path):
    """ADM's own two files: DIT_ADM_BATCHES=folder, which must hold them and the published weights. Hours, as
    tests run on the CPU."""
    folder = os.environ.get("DIT_ADM_BATCHES")
    if not folder:
        pytest.skip("DIT_ADM_BATCHES is not set: the folder of ADM's published batches and Inception weights")
    names = "VIRTUAL_imagenet256_labeled.npz", "admnet_guided_upsampled_imagenet256.npz"
    reference, samples = (os.path.join(folder, name) for name in names)
    inception_weights = os.path.join(folder, "pt_inception-2015-12-05-6726825d.pth")
    run(reference, samples, "--inception-weights", inception_weights, "--out", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())["metrics"]
    assert found["Inception Score"] == pytest.approx(215.84, rel=1e-3)
    assert found["FID"] == pytest.approx(3.943, abs=2e-3)
    assert found["sFID"] == pytest.approx(6.140, abs=1e-3)
    assert found["Precision"] == pytest.approx(0.8265, abs=3e-3)
    assert found["Recall"] == pytest.approx(0.5309, abs=3e-3)
