"""Data sets of images, and the order in which training reads them.

To add one: a class of ImageDataset, or of ArrayImages where the images fit into memory, and a row of
DATASETS."""

import gzip
import hashlib
import os
import signal
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from runtime.cli import UserError, require_parts, user_errors
from runtime.distributed import ALONE, HOLD_OUT, ORDER, generator_for
from runtime.image_io import (
    IMG_EXTENSIONS,
    ImageFiles,
    center_crop_arr,
    is_image,
    is_visible,
    open_image,
    share_to_check,
    to_tensor,
)

DIGITS = Path(__file__).resolve().parent.parent / "assets" / "digits.npz"
DEBIAN_FASHION = "/usr/share/datasets/fashion-mnist"  # of the package dataset-fashion-mnist


class ImageDataset(Dataset):
    """What a data set of images offers. All is required but check and condition.

    Name(data_path, image_size, dry_run)  as --data-path, None where not given, --image-size in pixels and
                     --dry-run, which downloads nothing, say; raises UserError for what it cannot do
    len(it)          how many images
    it[(index, mirrored)]  (image, label): (channels, image_size, image_size), uint8, or float in [-1, 1], and
                     a class index, 0 where there are no classes; or what `condition` takes. The order decides
                     which are mirrored, so an item is the same in whichever process reads it. Raises
                     UserError for an unreadable image.
    channels         1, grey, or 3
    image_size       pixels a side
    classes          the classes' names in the order of their labels, [] for none
    flips            whether a mirrored image is as good as another; then half are trained on mirrored
    fingerprint      of the images and labels, a hash: a run is continued on the same alone
    condition        what the labels are, a row of models.CONDITIONS: tensors of another shape say, whose
                     entries `classes` names
    """

    condition = "class"

    def check(self, skip=False, dist=ALONE):
        """Raise UserError for images that cannot be read, before any work; where skip, only for all of them.
        All processes call it."""

    def keep_in_memory(self):
        """Keep what is read from now on, where reading takes time: --cache-images."""


class FolderImages(ImageDataset):
    """Images in a folder: one subfolder a class, or all in one flat folder without classes.

    Every image is centre-cropped to image_size. Unreadable ones raise UserError, naming the file.
    """

    channels, flips = 3, True

    def __init__(self, root, image_size, dry_run=False):
        if not root:
            raise UserError("--data-path: required; the folder of images, one subfolder a class")
        self.image_size, self.samples, self.cache = image_size, list_images(root), None
        self.classes = self.samples.classes

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        index, mirrored = key
        path, label = self.samples[index]
        pixels = None if self.cache is None else self.cache.get(index)
        if pixels is None:
            with open_image(path) as image:
                pixels = np.asarray(center_crop_arr(image.convert("RGB"), self.image_size))
            if self.cache is not None:
                self.cache[index] = pixels
        image = to_tensor(pixels)
        return image.flip(-1) if mirrored else image, label

    def keep_in_memory(self):
        """Keep the crops, uint8, each from when it is first read on; in every process those that it reads."""
        self.cache = {}

    @cached_property
    def fingerprint(self):
        """A hash of the images' names and classes, in order."""
        return self.samples.fingerprint()

    def check(self, skip=False, dist=ALONE):
        """Raise UserError for a file that is no image, by its header: of all of them, or of an even share of
        very many. skip: only where none is one. All processes call it, and each looks at a part."""
        readable, problem = False, None
        files = share_to_check(self.samples)
        for place in range(dist.rank, len(files), dist.world_size):
            try:
                with open_image(files[place][0]):
                    readable = True
            except UserError as error:
                problem = problem or (place, str(error))
                if not skip:
                    break
        found = dist.gather((readable, problem))
        problems = [problem for _, problem in found if problem]
        if problems and not (skip and any(readable for readable, _ in found)):
            raise UserError(min(problems)[1])


def list_images(root):
    """The ImageFiles of --data-path, in the order of torchvision's ImageFolder, but for what is hidden.

    Raises UserError where there are none, or a class has none.
    """
    if not os.path.isdir(root):
        raise UserError(f"--data-path {root}: no such folder")
    folders, flat = [], []
    try:
        with os.scandir(root) as entries:
            for entry in filter(is_visible, entries):
                if _is_folder(entry):
                    folders.append(entry.name)
                elif is_image(entry):
                    flat.append(entry.name)
        if flat and folders:
            raise UserError(
                f"--data-path {root}: holds both images and folders; give one folder a class, or images alone"
            )
        if flat:
            return ImageFiles(root, [], [sorted(flat)])
        if not folders:
            raise UserError(f"--data-path {root}: no images there ({', '.join(IMG_EXTENSIONS)})")
        folders.sort()
        return ImageFiles(root, folders, (_list_class(root, name) for name in folders))
    except OSError as error:
        raise UserError(f"--data-path {error.filename}: cannot be listed ({error.strerror})") from error


def _list_class(root, name):
    """The image files in a class's folder and in folders inside it, relative to it: by folder, then by
    name."""
    listings, waiting = [], [""]
    while waiting:
        inner = waiting.pop()
        names = []
        with os.scandir(os.path.join(root, name, inner)) as entries:
            for entry in filter(is_visible, entries):
                if _is_folder(entry):
                    waiting.append(os.path.join(inner, entry.name))
                elif entry.name.lower().endswith(IMG_EXTENSIONS):
                    names.append(entry.name)
        listings.append((inner, sorted(names)))
    files = [
        os.path.join(inner, name) if inner else name for inner, names in sorted(listings) for name in names
    ]
    if not files:
        raise UserError(
            f"--data-path {root}: no images in the class folder {name} ({', '.join(IMG_EXTENSIONS)});"
            " put some there, or remove it"
        )
    return files


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


class ArrayImages(ImageDataset):
    """Images in memory: float (N, C, H, W) in [-1, 1] or uint8 (N, H, W, C)."""

    def __init__(self, images, labels, classes, flips):
        self.images, self.labels, self.classes, self.flips = images, labels, list(classes), flips
        self.channels = images.shape[-1] if self._is_uint8 else images.shape[1]
        self.image_size = images.shape[2]

    @property
    def _is_uint8(self):
        return self.images.dtype == np.uint8

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        index, mirrored = key
        image = to_tensor(self.images[index]) if self._is_uint8 else torch.from_numpy(self.images[index])
        return image.flip(-1) if mirrored else image, int(self.labels[index])

    @cached_property
    def fingerprint(self):
        """A hash of the images and labels, in order."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images))
        digest.update(np.asarray(self.labels, np.int64))
        return digest.hexdigest()


class Digits(ArrayImages):
    """1,797 handwritten digits of 8x8 pixels, embedded in the repository; never mirrored."""

    def __init__(self, data_path=None, image_size=8, dry_run=False):
        if data_path:
            raise UserError(f"--data-path {data_path}: the digits are embedded; leave it out")
        with np.load(DIGITS) as file:
            images = file["images"][:, None].astype(np.float32) / 8 - 1  # values 0 … 16
            super().__init__(images, file["labels"], [str(digit) for digit in range(10)], flips=False)


class CIFAR10(ArrayImages):
    """The 50,000 training images of CIFAR-10, 32x32, downloaded to data_path where they are not there yet.

    dry_run: nothing is downloaded; where they are not there, black images stand in for them.
    """

    def __init__(self, data_path=None, image_size=32, dry_run=False):
        root = data_path or "data"
        if dry_run and not os.path.isdir(os.path.join(root, "cifar-10-batches-py")):
            stand_in = np.broadcast_to(np.zeros((), np.uint8), (50_000, 32, 32, 3))
            super().__init__(stand_in, np.arange(50_000) % 10, [str(i) for i in range(10)], flips=True)
            return
        remedy = "put cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html there"
        cifar = _download("CIFAR10", root, f"CIFAR-10 is not there and could not be downloaded; {remedy}")
        super().__init__(cifar.data, np.array(cifar.targets), cifar.classes, flips=True)


def _download(name, root, problem):
    """torchvision's data set of this name, its training part, in a folder; UserError with the problem where
    it is not there and cannot be fetched."""
    import torchvision  # here, since importing it takes seconds
    from filelock import FileLock

    with user_errors(f"--data-path {root}", problem, (OSError, RuntimeError)):
        os.makedirs(root, exist_ok=True)
        with FileLock(os.path.join(root, f".{name.lower()}.lock")):  # one process downloads, the others wait
            return getattr(torchvision.datasets, name)(root, train=True, download=True)


class FashionMNIST(ArrayImages):
    """Fashion-MNIST, 28x28 grey pixels (Xiao, Rasul and Vollgraf 2017): 60,000 photographs of clothes, or
    with part "t10k" the 10,000 of its test part. Never mirrored: its shoes all point to the left.

    data_path: a folder with its IDX files somewhere below, gzipped or not; None for Debian's, or data.
    What is not there is downloaded, except by dry_run: then black images stand in.
    """

    CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
               "ankle boot")  # fmt: skip
    # Of the contents: archives of the same files differ among those who hand them out.
    SHA256 = {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    }

    def __init__(self, data_path=None, image_size=28, dry_run=False, part="train"):
        root = data_path or (DEBIAN_FASHION if os.path.isdir(DEBIAN_FASHION) else "data")
        names = [name for name in self.SHA256 if name.startswith(part)]
        found = _find_files(root, names)
        absent = [name for name in names if name not in found]
        if absent and dry_run:
            stand_in = np.broadcast_to(np.zeros((), np.uint8), (60_000, 28, 28, 1))
            super().__init__(stand_in, np.arange(60_000) % 10, self.CLASSES, flips=False)
            return
        if absent:
            remedy = "put its four files there, or install Debian's package dataset-fashion-mnist"
            problem = f"{absent[0]}, gzipped or not, is not there and could not be downloaded; {remedy}"
            _download("FashionMNIST", root, problem)
            found = _find_files(root, names)
        contents = [_read_idx(found[name]) for name in names]
        (images, _), (labels, _) = contents
        if len(images) != len(labels):
            raise UserError(
                f"--data-path {found[names[1]]}: has {len(labels):,} labels for the {len(images):,} images of"
                f" {found[names[0]]}; put there the files that belong together"
            )
        for name, (_, digest) in zip(names, contents):
            if digest != self.SHA256[name]:
                raise UserError(
                    f"--data-path {found[name]}: is not Fashion-MNIST's {name} (checksum {digest[:12]}, not"
                    f" {self.SHA256[name][:12]}); fetch it again"
                )
        super().__init__(images[..., None], labels, self.CLASSES, flips=False)


def _find_files(root, names):
    """{name: path} of the files below a folder that have these names, or these with .gz."""
    found = {}
    for folder, _, files in sorted(os.walk(root)):
        for name in names:
            for file in {name, f"{name}.gz"} & set(files):
                found.setdefault(name, os.path.join(folder, file))
    return found


def _read_idx(path):
    """The uint8 array of an IDX file, gzipped if its name ends in .gz, and its contents' SHA-256."""
    with user_errors(
        f"--data-path {path}", "cannot be read; fetch it again", (OSError, EOFError, zlib.error)
    ):
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            contents = file.read()
    # Two zeros, the type, 8 for uint8, the number of sides, each in four bytes, the largest first:
    if len(contents) < 8 or contents[:3] != b"\0\0\x08":
        raise UserError(f"--data-path {path}: is no IDX file of bytes; fetch it again")
    start = 4 + 4 * contents[3]
    shape = tuple(np.frombuffer(contents[4:start], ">u4").tolist())
    if len(contents) != start + np.prod(shape, dtype=np.int64):
        raise UserError(
            f"--data-path {path}: is truncated, {len(contents):,} bytes for an array of"
            f" {' x '.join(map(str, shape))}; fetch it again"
        )
    array = np.frombuffer(contents, np.uint8, offset=start).reshape(shape)
    return array, hashlib.sha256(contents).hexdigest()


class Rows(Dataset):
    """Some of the items of a data set, by index."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices, self.flips = dataset, indices, dataset.flips

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        index, mirrored = key
        return self.dataset[(int(self.indices[index]), mirrored)]


def held_out_count(size):
    """How many of this many images are held out to validate on."""
    return min(1024, max(1, size // 50))


def hold_out(dataset, seed):
    """Split a data set into (Rows to train on, Rows to validate on): a fiftieth, at most 1024, by the
    seed."""
    order = torch.randperm(len(dataset), generator=generator_for("cpu", seed, HOLD_OUT)).numpy()
    count = held_out_count(len(dataset))
    return Rows(dataset, np.sort(order[count:])), Rows(dataset, order[:count])


class ReadableDataset(Dataset):
    """A data set whose unreadable items do not raise: items (image, label, problem), the last "" or one line.

    skip: the next readable image stands in for an unreadable one; else zeros do, and training must stop.
    """

    def __init__(self, dataset, skip):
        self.dataset, self.skip, self.flips = dataset, skip, dataset.flips

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        index, mirrored = key
        problem = ""
        for offset in range(len(self.dataset)):
            try:
                return *self.dataset[((index + offset) % len(self.dataset), mirrored)], problem
            except UserError as error:
                problem = problem or str(error)
                if not self.skip:
                    break
        return torch.zeros(1), 0, problem


# --dataset: classes of ImageDataset.
DATASETS = {"folder": FolderImages, "digits": Digits, "cifar10": CIFAR10, "fashion-mnist": FashionMNIST}


def open_dataset(name, data_path, image_size, dry_run=False, skip_bad_images=False, dist=ALONE):
    """The data set that --dataset, --data-path and --image-size (pixels) name, checked; raises UserError.

    dry_run: download nothing. skip_bad_images: some of them may be damaged. dist: the processes, which all
    call it.
    """
    dataset = DATASETS[name](data_path, image_size, dry_run)
    parts = ("__len__", "__getitem__", "channels", "image_size", "classes", "flips", "fingerprint")
    require_parts(f"--dataset {name}", dataset, *parts)
    if dataset.image_size != image_size:
        raise UserError(
            f"--image-size {image_size}: the images of --dataset {name} have {dataset.image_size} pixels a"
            f" side; give --image-size {dataset.image_size}"
        )
    require_same_data(dataset, dist, f"--data-path {data_path}" if data_path else f"--dataset {name}")
    dataset.check(skip_bad_images, dist)
    return dataset


def require_same_data(dataset, dist, flag):
    """Raise UserError unless all processes, which may be on several machines, see the same data set."""
    counts, fingerprints = zip(*dist.gather((len(dataset), dataset.fingerprint)))
    if len(set(fingerprints)) > 1:
        raise UserError(
            f"{flag}: the processes see different files there, {min(counts):,} to {max(counts):,} of them;"
            " give all machines the same, and wait until all are there"
        )


class DistributedBatchSampler:
    """Which images make which batch: keys (index, mirrored) of this process's share of every global batch.

    Every epoch is a new permutation that depends on the seed and epoch alone, cut into global batches (a rest
    too small for one is left out) and those into equal consecutive shares, one a rank. So the global batch of
    a step is the same for any number of processes, and a run can start at any step."""

    def __init__(self, dataset, global_batch_size, *, rank=0, world_size=1, seed=0, start_step=0, stop_step):
        self.size, self.flips = len(dataset), dataset.flips
        self.global_batch_size, self.batch_size = global_batch_size, global_batch_size // world_size
        self.rank, self.seed, self.start_step, self.stop_step = rank, seed, start_step, stop_step

    @property
    def steps_per_epoch(self):
        return self.size // self.global_batch_size

    def __len__(self):
        return self.stop_step - self.start_step

    def __iter__(self):
        epoch = None
        for step in range(self.start_step, self.stop_step):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                generator = generator_for("cpu", self.seed, ORDER, epoch)
                order = torch.randperm(self.size, generator=generator)
                mirrored = torch.rand(self.size, generator=generator) < (0.5 if self.flips else 0.0)
            start = step % self.steps_per_epoch * self.global_batch_size + self.rank * self.batch_size
            rows = slice(start, start + self.batch_size)
            yield list(zip(order[rows].tolist(), mirrored[rows].tolist()))


def make_loader(dataset, order, num_workers, device):
    """Yield batches (images, labels, problems) in this order, read by num_workers processes ahead of time.

    dataset: a ReadableDataset. problems: lines that say what could not be read. Close it to end the workers.
    """
    yield from DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_main_process,
    )


def _collate(items):
    images, labels, problems = zip(*items)
    problems = [problem for problem in problems if problem]
    shapes = {image.shape for image in images}
    if len(shapes) > 1:  # zeros stand in for an unreadable image; training stops before it looks at them
        return torch.zeros(len(images)), torch.zeros(len(images)), problems
    return torch.stack(images), default_collate(labels), problems


def _leave_signals_to_the_main_process(worker):
    """Signals reach every process of a terminal or job; a worker goes on while its main process saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_in_a_minute)


def _end_in_a_minute(number, frame):
    signal.alarm(60)  # should the main process be gone by then without a word
