"""Images to evaluate, as uint8 at their own size: an .npz in ADM's format, or a folder of pictures.

ADM's .npz holds arr_0, images uint8 (N, H, W, 3), and may hold arr_1, their labels, and mu, sigma, mu_s,
sigma_s, the statistics of a larger set that the images were taken from. Neither kind is read into memory
whole, whatever its size.
"""

import contextlib
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from runtime.cli import UserError, atomic_write, user_errors
from runtime.image_io import (
    IMG_EXTENSIONS,
    ImageFiles,
    center_crop_arr,
    is_image,
    open_image,
    share_to_check,
)

# What np.load and zipfile raise for a file that is damaged or something else:
DAMAGED = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass
class Images:
    """Images (N, H, W, 3), uint8, in the order of their file or names."""

    path: str
    count: int
    size: tuple | None  # (H, W)
    labels: np.ndarray | None = None  # (N,)

    @property
    def is_sorted_by_class(self):
        """Whether the labels say that all images of one class come before those of the next."""
        if self.labels is None or self.labels.ndim != 1:
            return False
        classes, numbers = np.unique(self.labels, return_inverse=True)
        return len(classes) > 1 and bool((np.diff(numbers) >= 0).all())

    def batches(self, start, stop, batch_size, num_workers=0):
        """Yield images start … stop in batches (n, 3, H, W), uint8 tensors."""
        raise NotImplementedError

    def pick(self, indices):
        """Yield the images at these ascending indices, uint8 arrays (H, W, 3)."""
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------
# ADM's .npz


class NpzReader(Images):
    """Images of an .npz: mapped to memory a batch at a time, or unpacked on the way where compressed."""

    def __init__(self, path, flag):
        with reading(path, flag), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "arr_0.npy" not in names:
                raise UserError(f"{flag} {path}: no arr_0 in it; images are arr_0, uint8 (N, H, W, 3)")
            member = archive.getinfo("arr_0.npy")
            with archive.open(member) as file:
                shape, in_fortran_order, dtype = _read_npy_header(file)
                header = file.tell()
        if dtype != np.uint8:
            raise UserError(f"{flag} {path}: arr_0 is {dtype}; images are uint8, 0 … 255")
        if len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise UserError(
                f"{flag} {path}: arr_0 has the shape {shape}; images are (N, H, W, 3), height and width"
                " before three colours"
            )
        if in_fortran_order:
            raise UserError(f"{flag} {path}: arr_0 is in Fortran order; save np.ascontiguousarray(arr_0)")
        if member.file_size != header + np.prod(shape, dtype=np.int64):
            raise UserError(f"{flag} {path}: arr_0 is cut short; write the file again")
        super().__init__(path, shape[0], shape[1:3])
        self.member, self.header, self.flag = member, header, flag
        if "arr_1.npy" in names:
            with reading(path, flag), contextlib.suppress(ValueError), np.load(path) as file:
                self.labels = file["arr_1"]  # a ValueError is for objects, which labels never are

    def batches(self, start, stop, batch_size, num_workers=0):
        for images in _ahead(self._read(start, stop, batch_size)):
            yield torch.from_numpy(images).permute(0, 3, 1, 2)

    def pick(self, indices):
        wanted = set(indices)
        for index, images in enumerate(self._read(0, max(wanted, default=-1) + 1, batch_size=1)):
            if index in wanted:
                yield images[0]

    def _read(self, start, stop, batch_size):
        read = self._unpacked if self.member.compress_type else self._mapped
        with reading(self.path, self.flag):
            yield from read(start, stop, batch_size)

    def _mapped(self, start, stop, batch_size):
        with open(self.path, "rb") as file:  # the member's own header may differ from the directory's
            file.seek(self.member.header_offset + 26)
            name, extra = np.frombuffer(file.read(4), "<u2").tolist()
        first = self.member.header_offset + 30 + name + extra + self.header
        bytes_each = 3 * self.size[0] * self.size[1]
        for row in range(start, stop, batch_size):
            shape = (min(batch_size, stop - row), *self.size, 3)
            yield np.array(np.memmap(self.path, np.uint8, "r", first + row * bytes_each, shape))

    def _unpacked(self, start, stop, batch_size):
        bytes_each = 3 * self.size[0] * self.size[1]
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
            file.seek(self.header + start * bytes_each)  # unpacks what is before, in pieces
            for row in range(start, stop, batch_size):
                count = min(batch_size, stop - row)
                packed = file.read(count * bytes_each)
                yield np.frombuffer(bytearray(packed), np.uint8).reshape(count, *self.size, 3)


def _ahead(batches):
    """The same batches, each read by a thread while the one before it is in use."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch


def _read_npy_header(file):
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def reading(path, flag):
    """A context that turns what a damaged or missing .npz raises into a UserError that names it."""
    if not os.path.exists(path):
        raise UserError(f"{flag} {path}: no such file")
    return user_errors(f"{flag} {path}", "cannot be read as an .npz file; write it again", DAMAGED)


def names_in(path, flag):
    """The names of the arrays in an .npz."""
    with reading(path, flag), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def read_arrays(path, names, flag):
    """Small arrays of an .npz, by name."""
    with reading(path, flag), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names}


# ---------------------------------------------------------------------------------------------
# Folders


class ImageFolderReader(Images):
    """Images in a folder and its subfolders, by name; a subfolder of the folder counts as a class.

    crop: the side that ADM's centre crop brings them to; None takes them as they are, all of one size.
    """

    def __init__(self, path, flag, crop=None):
        classes = []  # of the folders with images

        def listings():
            for folder, inner, _ in os.walk(path, followlinks=True):
                inner[:] = sorted(name for name in inner if not name.startswith("."))
                found = sorted(entry.name for entry in os.scandir(folder) if is_image(entry))
                if found:
                    inside = os.path.relpath(folder, path)
                    classes.append(inside.split(os.sep)[0])
                    yield [os.path.join(inside, name) for name in found] if inside != "." else found

        files = ImageFiles(path, [], listings())
        if not len(files):
            raise UserError(f"{flag} {path}: no images there ({', '.join(IMG_EXTENSIONS)})")
        labels = np.unique(classes, return_inverse=True)[1][files.labels]
        super().__init__(path, len(files), (crop, crop) if crop else None, labels)
        self.files = _Files(files, crop)
        self.files.check()
        self.size = self.size or self.files.size[::-1]  # (width, height) there

    def batches(self, start, stop, batch_size, num_workers=0):
        order = [range(row, min(row + batch_size, stop)) for row in range(start, stop, batch_size)]
        for images in DataLoader(self.files, batch_sampler=order, num_workers=num_workers):
            yield images.permute(0, 3, 1, 2)

    def pick(self, indices):
        return (self.files[index].numpy() for index in indices)


class _Files(Dataset):
    """Image files, each uint8 (H, W, 3)."""

    def __init__(self, files, crop):
        self.files, self.crop, self.size = files, crop, None

    def __getitem__(self, index):
        path, _ = self.files[index]
        with open_image(path) as image:
            image = image.convert("RGB")
            image = center_crop_arr(image, self.crop) if self.crop else image
        if self.size is not None:
            self._compare(path, image.size)
        return torch.from_numpy(np.array(image))

    def check(self):
        """Raise UserError for a file that is no image, or of another size, by the headers of all of them, or
        of an even share of very many. Sets size, where they are not cropped."""
        for path, _ in share_to_check(self.files):
            with open_image(path) as image:
                size = image.size
            if not self.crop:
                self.size = self.size or size
                self._compare(path, size)

    def _compare(self, path, size):
        if size != self.size:
            first, sizes = self.files[0][0], ["x".join(map(str, sides)) for sides in (size, self.size)]
            raise UserError(
                f"{path}: is {sizes[0]} where {first} is {sizes[1]}; all must be of one size; for REF,"
                " --image-size crops them"
            )


# ---------------------------------------------------------------------------------------------
# Writing


def write_reference(path, images, indices, **arrays):
    """Write an .npz in ADM's format: arrays, and the images at these indices as arr_0, one at a time."""
    with atomic_write(path, "wb") as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(array))
        if len(indices):
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                shape = (len(indices), *images.size, 3)
                header = dict(descr="|u1", fortran_order=False, shape=shape)
                np.lib.format.write_array_header_1_0(member, header)
                for image in images.pick(indices):
                    member.write(image.tobytes())
