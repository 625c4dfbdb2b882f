"""data.py: what the images are, and the order they come in."""

import gc
import gzip
import hashlib
import os
import pickle
import tarfile
import tracemalloc
import zlib
from functools import partial

import numpy as np
import PIL
import pytest
import torch
from forked import finish, start_two
from images import write_image
from PIL import Image
from torchvision.datasets import ImageFolder

import runtime.image_io
from runtime import image_io
from runtime.class_names import resolve_labels
from runtime.cli import UserError
from runtime.image_io import center_crop_arr, to_float
from training.dataset import (
    CIFAR10,
    DEBIAN_FASHION,
    Digits,
    DistributedBatchSampler,
    FashionMNIST,
    FolderImages,
    ReadableDataset,
    make_loader,
    open_dataset,
)

CROPS = ["375x500", "768x1024", "300x90", "256x257", "70x64"]


@pytest.fixture
def vertical_pass_first(monkeypatch):
    """Resizing in the order of Pillow 13, which made the golden, for versions before it.

    Between its two passes Pillow rounds to bytes, so that the order changes the result by 1."""
    resize = Image.Image.resize

    def in_two_passes(image, size, resample):
        return resize(resize(image, (image.width, size[1]), resample), size, resample)

    monkeypatch.setattr(Image.Image, "resize", in_two_passes)


@pytest.mark.parametrize("size", CROPS)
def test_crop_is_adm_s(golden, size, request):
    height, width = map(int, size.split("x"))
    rng = np.random.default_rng(zlib.crc32(f"image:{size}".encode()))
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.BILINEAR)
    if size == "300x90" and int(PIL.__version__.split(".")[0]) < 13:
        request.getfixturevalue("vertical_pass_first")
    crop = np.array(center_crop_arr(image, 64)).astype(int)
    difference = np.abs(crop - golden("scripts.npz")[f"crop64/{size}"])
    assert crop.shape == (64, 64, 3) and difference.max() <= 1 and (difference > 0).mean() <= 1e-3


def test_folder_with_classes(tmp_path):
    for i, name in enumerate(["cat/b.png", "cat/a.png", "dog/c.jpg", "bird/deep/d.webp"]):
        write_image(tmp_path / name, seed=i)
    dataset = open_dataset("folder", str(tmp_path), 16)
    assert dataset.classes == ["bird", "cat", "dog"] and len(dataset) == 4
    image, label = dataset[(1, False)]
    assert (image.shape, image.dtype, label) == ((3, 16, 16), torch.uint8, 1)
    assert image.float().std() > 38
    pixels = to_float(image)
    assert pixels.dtype == torch.float32 and torch.equal(pixels, image.float() / 127.5 - 1)
    assert torch.equal(dataset[(1, True)][0], image.flip(-1))


def test_images_kept_in_memory(tmp_path):
    """The same items, without a second look at the files; and none of an unreadable one."""
    for i in range(2):
        write_image(tmp_path / f"{i}.png", seed=i)
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    plain, kept = (open_dataset("folder", str(tmp_path), 16) for _ in "ab")
    kept.keep_in_memory()
    expected = plain[(0, False)][0]
    assert torch.equal(kept[(0, True)][0], expected.flip(-1))
    kept[(0, False)][0].zero_()  # what is done to an item leaves what is kept as it is
    (tmp_path / "0.png").unlink()
    assert torch.equal(kept[(0, False)][0], expected)
    for dataset, index in ((plain, 0), (kept, 2)):
        with pytest.raises(UserError, match=f"{index}.png"):
            dataset[(index, False)]


def test_pixels_survive(tmp_path):
    pixels = write_image(tmp_path / "a.png", size=(16, 16))
    image, label = open_dataset("folder", str(tmp_path), 16)[(0, False)]
    assert label == 0 and np.array_equal(image.permute(1, 2, 0), pixels)


def test_flat_folder_has_no_classes(tmp_path):
    write_image(tmp_path / "b.PNG")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")  # grey images count as RGB
    (tmp_path / "notes.txt").write_text("not an image")
    dataset = open_dataset("folder", str(tmp_path), 8)
    assert dataset.classes == [] and len(dataset) == 2 and dataset[(0, False)][0].shape == (3, 8, 8)


def test_hidden_files_and_folders_are_no_images(tmp_path):
    for path in ("a/1.png", "b/1.png", "a/.ipynb_checkpoints/1.png", "a/.1.png", ".git/1.png"):
        write_image(tmp_path / path)
    dataset = open_dataset("folder", str(tmp_path), 8)
    assert [path for path, _ in dataset.samples] == [str(tmp_path / name / "1.png") for name in "ab"]


def test_files_are_in_image_folder_s_order(tmp_path):
    """Runs begun with torchvision's list of the files continue in the same order."""
    names = ["b/2.png", "b/10.PNG", "b/in/1.jpeg", "b/in-2/1.png", "b/in/deep/1.png", "b/Z.png", "b/é.png",
             "a-b/1.png", "a/1.png", "Z/1.webp", "a/no image.txt", "b/ﬀ.png", "b/\udcff.png"]  # fmt: skip
    for name in names:
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    (tmp_path / "outside" / "inner").mkdir(parents=True)
    (tmp_path / "outside" / "inner" / "1.png").touch()
    (tmp_path / "root" / "linked class").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "a" / "linked").symlink_to(tmp_path / "outside" / "inner")
    (tmp_path / "root" / "a" / "linked.png").symlink_to(tmp_path / "outside" / "inner" / "1.png")
    (tmp_path / "root" / "a" / "loop").symlink_to("loop")
    expected = ImageFolder(str(tmp_path / "root"))
    dataset = FolderImages(str(tmp_path / "root"), 8)
    assert list(dataset.samples) == expected.samples and len(dataset) == 15
    assert dataset.classes == expected.classes and dataset.samples.labels.tolist() == expected.targets
    assert [f"{tmp_path}/root/{name}" for name in dataset.samples.relative_names()] == [
        path for path, _ in expected.samples
    ]
    assert dataset.samples[-1] == expected.samples[-1]
    with pytest.raises(IndexError):
        dataset.samples[15]


def test_a_file_takes_few_bytes(tmp_path):
    """Lists of paths and pairs take ten times as many: 2 GB of 14 million files, in every process."""
    for i in range(5000):
        if i % 500 == 0:
            (tmp_path / f"class{i}").mkdir()
        (tmp_path / f"class{i - i % 500}" / f"{i:016d}.JPEG").touch()
    tracemalloc.start()
    try:
        dataset = FolderImages(str(tmp_path), 8)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(dataset) == 5000 and taken / 5000 < 21 + 15


def test_names_and_classes_make_the_fingerprint(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        write_image(tmp_path / "one" / name)
    os.system(f"cp -r {tmp_path}/one {tmp_path}/two")

    def fingerprint(name):
        return FolderImages(str(tmp_path / name), 8).fingerprint

    before = fingerprint("one")
    assert fingerprint("two") == before
    (tmp_path / "two" / "b").rename(tmp_path / "two" / "c")
    assert fingerprint("two") != before
    (tmp_path / "one" / "a" / "2.png").rename(tmp_path / "one" / "b" / "0.png")
    assert fingerprint("one") != before


def test_processes_share_the_checks(tmp_path):
    """A file that only the second process looks at stops both, by the same line."""
    write_image(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").write_bytes(b"junk")
    argv = ["--data-path", tmp_path / "images", "--image-size", 16, "--vae", "none", "--dry-run"]
    assert finish(*start_two([*argv, "--global-batch-size", 2], tmp_path / "out")) == [2, 2]
    for rank in range(2):
        assert "b.png: cannot be read as an image" in (tmp_path / f"out.{rank}").read_text()


def in_a_folder_of_its_own(folder):
    os.chdir(folder / os.environ["RANK"])


def test_processes_with_other_images_are_refused(tmp_path):
    for name in ("0/images/a.png", "1/images/a.png", "1/images/b.png"):
        write_image(tmp_path / name)
    argv = ["--data-path", "images", "--image-size", 16, "--vae", "none", "--dry-run"]
    runs = start_two(argv, tmp_path / "out", before=partial(in_a_folder_of_its_own, tmp_path))
    assert finish(*runs) == [2, 2]
    assert "the processes see different files there, 1 to 2 of them" in (tmp_path / "out.1").read_text()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "no images there"),
        (lambda path: (path / "empty").mkdir(), "no images in the class folder empty"),
        (lambda path: write_image(path / "c" / ".a.png"), "no images in the class folder c"),
        (
            lambda path: (write_image(path / "a.png"), write_image(path / "c" / "a.png")),
            "both images and folders",
        ),
        (lambda path: (path / "bad.png").write_bytes(b"junk"), "bad.png: cannot be read as an image"),
        (lambda path: (path / "bad.png").write_bytes(b""), "bad.png: cannot be read as an image"),
        (
            lambda path: Image.fromarray(np.full((20, 20), 300, np.uint16)).save(path / "deep.png"),
            r"deep.png: .*more than 8 bits, mode I;16; convert it",
        ),
    ],
)
def test_refused_folders(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        open_dataset("folder", str(tmp_path), 16)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_missing_folder_and_path():
    with pytest.raises(UserError, match="--data-path nowhere: no such folder"):
        open_dataset("folder", "nowhere", 16)
    with pytest.raises(UserError, match="--data-path: required"):
        open_dataset("folder", None, 16)


def test_what_is_no_image(tmp_path):
    (tmp_path / "a.jpg").write_text("none")
    (tmp_path / "b.png").write_bytes(b"")
    for skip in (False, True):
        with pytest.raises(UserError, match="a.jpg: cannot be read as an image"):
            open_dataset("folder", str(tmp_path), 16, skip_bad_images=skip)
    write_image(tmp_path / "c.png")
    with pytest.raises(UserError, match="a.jpg: cannot be read as an image"):
        open_dataset("folder", str(tmp_path), 16)
    assert len(open_dataset("folder", str(tmp_path), 16, skip_bad_images=True)) == 3


def test_truncated_image_is_named_when_read(tmp_path):
    write_image(tmp_path / "cut.png", size=(64, 64))
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    dataset = open_dataset("folder", str(tmp_path), 16)  # its header is sound
    with pytest.raises(UserError, match="cut.png: cannot be read as an image; mend or remove it"):
        dataset[(0, False)]


def test_digits_are_the_real_ones():
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    digits = Digits()
    assert len(digits) == 1797 and digits.classes == list("0123456789") and not digits.flips
    images = torch.stack([digits[(i, False)][0] for i in range(len(digits))])
    np.testing.assert_array_equal((images[:, 0] + 1) * 8, sklearn.images)
    np.testing.assert_array_equal([digits[(i, False)][1] for i in range(len(digits))], sklearn.target)


def test_digits_of_another_size():
    with pytest.raises(UserError, match="--image-size 256: .* have 8 pixels a side; give --image-size 8"):
        open_dataset("digits", None, 256)
    with pytest.raises(UserError, match="--data-path elsewhere: the digits are embedded"):
        open_dataset("digits", "elsewhere", 8)


def make_cifar_archive(folder, per_file=6):
    """CIFAR-10's archive in its own format, with random images; returns them in order."""
    source = folder / "cifar-10-batches-py"
    source.mkdir(parents=True)
    rng, images, labels = np.random.default_rng(0), [], []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {
            "data": rng.integers(0, 256, (per_file, 3072), dtype=np.uint8),
            "labels": [int(v) for v in rng.integers(0, 10, per_file)],
        }
        (source / name).write_bytes(pickle.dumps(batch))
        if name != "test_batch":
            images.append(batch["data"].reshape(-1, 3, 32, 32))
            labels += batch["labels"]
    (source / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(source, arcname="cifar-10-batches-py")
    return np.concatenate(images), labels


def test_cifar10_from_its_archive(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10 as Torchvisions

    images, labels = make_cifar_archive(tmp_path / "source")
    root = tmp_path / "root"
    root.mkdir()
    archive = tmp_path / "source" / "cifar-10-python.tar.gz"
    (root / archive.name).write_bytes(archive.read_bytes())

    def md5(path):
        return hashlib.md5(path.read_bytes()).hexdigest()

    # torchvision checks the real archive's sums; the fabricated one has others:
    source = tmp_path / "source" / "cifar-10-batches-py"
    monkeypatch.setattr(Torchvisions, "tgz_md5", md5(archive))
    monkeypatch.setattr(
        Torchvisions,
        "train_list",
        [[f"data_batch_{i}", md5(source / f"data_batch_{i}")] for i in range(1, 6)],
    )
    monkeypatch.setattr(Torchvisions, "test_list", [["test_batch", md5(source / "test_batch")]])
    monkeypatch.setattr(Torchvisions, "meta", dict(Torchvisions.meta, md5=md5(source / "batches.meta")))
    cifar = CIFAR10(str(root))
    assert len(cifar) == 30 and cifar.flips and cifar.classes[3] == "class 3" and cifar.image_size == 32
    image, label = cifar[(7, False)]
    assert label == labels[7] and np.array_equal(image, images[7])


def test_cifar10_without_a_network(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "file:///no/such/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match="CIFAR-10 is not there and could not be downloaded") as refused:
        CIFAR10(str(tmp_path))
    assert "\n" not in str(refused.value)


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A folder with files as Fashion-MNIST's: eight images to train on, labels gzipped, and three to test on;
    their checksums are taken for the real ones."""
    import torchvision

    folder, rng, digests = tmp_path / "some" / "where", np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    for part, count in (("train", 8), ("t10k", 3)):
        for name, shape, opened, suffix in (
            (f"{part}-images-idx3-ubyte", (count, 28, 28), open, ""),
            (f"{part}-labels-idx1-ubyte", (count,), gzip.open, ".gz"),
        ):
            contents = idx_bytes(rng.integers(0, 10, shape, dtype=np.uint8))
            digests[name] = hashlib.sha256(contents).hexdigest()
            with opened(folder / (name + suffix), "wb") as file:
                file.write(contents)
    monkeypatch.setattr(FashionMNIST, "SHA256", digests)
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["file:///no/such/place/"])
    return folder


def test_fashion_mnist_from_a_folder(fashion, tmp_path):
    dataset, tests = open_dataset("fashion-mnist", str(tmp_path), 28), FashionMNIST(tmp_path, part="t10k")
    assert (len(dataset), len(tests), dataset.channels, dataset.flips) == (8, 3, 1, False)
    raw = (fashion / "train-images-idx3-ubyte").read_bytes()[16:]
    image, label = dataset[(7, False)]
    expected = np.frombuffer(raw, np.uint8).reshape(8, 1, 28, 28)[7]
    assert np.array_equal(image, expected)
    labels = gzip.decompress((fashion / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
    assert label == labels[7] and [dataset[(i, False)][1] for i in range(8)] == list(labels)
    assert resolve_labels(["Trouser", "ankle boot", "t-shirt"], 10, dataset.classes) == [1, 9, 0]


@pytest.mark.parametrize(
    "name, change, problem",
    [
        ("images-idx3-ubyte", None, "train-images-idx3-ubyte, gzipped or not, is not there and could not be"),
        ("images-idx3-ubyte", lambda b: b[:-1], "is truncated, 6,287 bytes for an array of 8 x 28 x 28"),
        ("images-idx3-ubyte", lambda b: b[:3], "is no IDX file of bytes"),
        ("images-idx3-ubyte", lambda b: b[:-1] + b"!", r"is not Fashion-MNIST's .* \(checksum"),
        ("labels-idx1-ubyte.gz", lambda b: b[:-9], "labels-idx1-ubyte.gz: cannot be read; fetch it again"),
        ("labels-idx1-ubyte.gz", lambda b: b"junk", "labels-idx1-ubyte.gz: cannot be read; fetch it again"),
        ("labels-idx1-ubyte.gz", lambda b: gzip.compress(idx_bytes(np.zeros(9, np.uint8))),
         "has 9 labels for the 8 images of .*train-images-idx3-ubyte"),
    ],
)  # fmt: skip
def test_fashion_mnist_of_damaged_files(fashion, tmp_path, name, change, problem):
    path = fashion / f"train-{name}"
    contents = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(contents))
    with pytest.raises(UserError, match=f"--data-path .*{problem}") as refused:
        open_dataset("fashion-mnist", str(tmp_path), 28)
    assert "\n" not in str(refused.value)


def test_fashion_mnist_is_not_downloaded_in_a_dry_run(fashion, tmp_path):
    (fashion / "train-images-idx3-ubyte").unlink()
    assert len(open_dataset("fashion-mnist", str(tmp_path), 28, dry_run=True)) == 60_000


@pytest.mark.skipif(not os.path.isdir(DEBIAN_FASHION), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_of_debian():
    """The images are the real ones, by their checksums; the counts of each class are the published ones."""
    for part, each in (("train", 6000), ("t10k", 1000)):
        dataset = FashionMNIST(part=part)
        assert np.bincount(dataset.labels).tolist() == [each] * 10


# ---------------------------------------------------------------------------------------------
# Order


class Numbers(torch.utils.data.Dataset):
    flips, classes = True, []

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        return torch.tensor([key[0], key[1]], dtype=torch.float32), 0


def test_an_epoch_holds_every_image_once():
    order = DistributedBatchSampler(Numbers(103), 10, seed=5, stop_step=25)
    batches = list(order)
    assert (
        order.steps_per_epoch == 10 and len(batches) == len(order) == 25 and {len(b) for b in batches} == {10}
    )
    first, second = ([index for batch in batches[i : i + 10] for index, _ in batch] for i in (0, 10))
    assert len(set(first)) == len(set(second)) == 100 and first != second


def test_flips_are_fair_and_change_with_the_epoch():
    batches = list(DistributedBatchSampler(Numbers(2000), 1000, seed=1, stop_step=4))
    share = np.mean([mirrored for batch in batches for _, mirrored in batch])
    assert share == pytest.approx(0.5, abs=0.04)
    epochs = [dict(batches[i] + batches[i + 1]) for i in (0, 2)]
    assert np.mean([epochs[0][i] == epochs[1][i] for i in range(2000)]) == pytest.approx(0.5, abs=0.05)
    assert not any(
        mirrored for batch in DistributedBatchSampler(Digits(), 100, stop_step=20) for _, mirrored in batch
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_global_batch(world_size):
    alone = list(DistributedBatchSampler(Numbers(50), 8, seed=3, stop_step=15))
    shares = [
        list(DistributedBatchSampler(Numbers(50), 8, rank=rank, world_size=world_size, seed=3, stop_step=15))
        for rank in range(world_size)
    ]
    assert alone == [sum(parts, []) for parts in zip(*shares)]


def test_order_can_start_anywhere():
    whole = list(DistributedBatchSampler(Numbers(50), 8, seed=3, stop_step=15))
    assert list(DistributedBatchSampler(Numbers(50), 8, seed=3, start_step=9, stop_step=15)) == whole[9:]
    assert list(DistributedBatchSampler(Numbers(50), 8, seed=4, stop_step=15)) != whole


def test_workers_change_nothing():
    order = DistributedBatchSampler(Numbers(50), 8, seed=3, stop_step=12)
    alone = [
        images
        for images, _, _ in make_loader(ReadableDataset(Numbers(50), False), order, 0, torch.device("cpu"))
    ]
    workers = [
        images
        for images, _, _ in make_loader(ReadableDataset(Numbers(50), False), order, 2, torch.device("cpu"))
    ]
    assert all(torch.equal(a, b) for a, b in zip(alone, workers)) and len(workers) == 12


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_data_sets_can_be_sent_to_spawned_workers(tmp_path, name):
    write_image(tmp_path / "a" / "a.png")
    dataset = open_dataset(name, str(tmp_path) if name == "folder" else None, 8)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[(0, True)][0], dataset[(0, True)][0])


def test_only_a_share_of_a_large_folder_is_checked(tmp_path, monkeypatch):
    for i in range(20):
        write_image(tmp_path / f"{i:02d}.png")
    (tmp_path / "19.png").write_bytes(b"junk")
    (tmp_path / "18.png").write_bytes(b"junk")
    monkeypatch.setattr(runtime.image_io, "CHECKED_FILES", 3)
    with pytest.raises(UserError, match="19.png"):  # the first, a middle one and the last
        open_dataset("folder", str(tmp_path), 8)


def test_image_names_are_torchvision_s():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(image_io.IMG_EXTENSIONS) == set(IMG_EXTENSIONS)
