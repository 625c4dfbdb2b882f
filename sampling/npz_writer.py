"""Samples on disk: one .npz that ADM's evaluation suite reads, written in place by any number of processes.

The file holds arr_0, uint8 (N, H, W, C), and arr_1, labels (N,), uncompressed, so that a memory map can read
it. Until it is whole it is called .npz.part, where every image already has its place, and nothing but the
images at hand is ever in memory. What is there is known by notes, a line a batch with its checksum.
"""

import contextlib
import io
import json
import os
import shutil
import zipfile
import zlib

import numpy as np
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from runtime.cli import UserError, is_locked

CHUNK = 2**24  # bytes read at a time
# What zipfile and numpy raise for a file that is damaged, or something else:
DAMAGED = (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)


class NpzWriter:
    """The .npz of samples at a path, and the notes of its batches in a folder.

    shape       (N, H, W, C) of all samples; batch_size: of which the last batch may have fewer
    has_labels  whether a whole file has arr_1
    """

    def __init__(self, path, folder, shape, batch_size, has_labels=False):
        self.path, self.part, self.folder = path, f"{path}.part", folder
        self.shape, self.batch_size, self.has_labels = tuple(shape), batch_size, has_labels
        self.image_bytes = int(np.prod(self.shape[1:]))
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive, _member(archive, "arr_0.npy") as file:
            _write_header(file, self.shape)
            self.offset = buffer.tell()  # where the images begin
        self.notes = None
        self.lock = FileLock(os.path.join(folder, ".lock"))  # held, once acquired, while this object lives

    def rows(self, batch):
        """The samples of a batch, a range."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.shape[0]))

    @property
    def batches(self):
        return range(-(-self.shape[0] // self.batch_size))

    def acquire(self):
        """Keep other runs out of the folder, which must exist; called by one process alone.

        Raises UserError where another run is at it."""
        with contextlib.suppress(Timeout):
            self.lock.acquire(timeout=0)
            return
        self._refuse()

    def check_free(self):
        """Raise UserError as acquire does, without making a file."""
        if is_locked(self.lock.lock_file):
            self._refuse()

    def _refuse(self):
        raise UserError(
            f"{self.folder}: another run is writing there; wait for it, or give another --sample-dir"
        )

    def is_complete(self):
        """Whether the .npz is there, has the shape of all samples, and every byte the zip's checksum.

        It needs no notes, so the folder may be gone."""
        if not os.path.exists(self.path):
            return False
        try:
            with zipfile.ZipFile(self.path) as archive:
                return self._has_images(archive) and (not self.has_labels or self._has_labels(archive))
        except PermissionError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        except DAMAGED:
            return False

    def _has_images(self, archive):
        if "arr_0.npy" not in archive.namelist():
            return False
        expected, size = io.BytesIO(), self.shape[0] * self.image_bytes
        _write_header(expected, self.shape)
        with archive.open("arr_0.npy") as member:
            if member.read(expected.tell()) != expected.getvalue():
                return False
            with tqdm(total=size, desc="Checking", unit="B", unit_scale=True) as bar:
                while data := member.read(CHUNK):  # at whose end the checksum is compared
                    size -= len(data)
                    bar.update(len(data))
        return size == 0

    def _has_labels(self, archive):
        if "arr_1.npy" not in archive.namelist():
            return False
        labels = np.lib.format.read_array(io.BytesIO(archive.read("arr_1.npy")), allow_pickle=False)
        return labels.shape == self.shape[:1] and labels.dtype.kind in "iu"

    def begin(self):
        """Make room for all samples, or take up what an earlier run left; called by one process alone.

        Returns ({batch: its labels} of those that are there and intact, whether the .npz is whole; none of a
        whole one).
        Raises UserError where another run is at it, or the disk has not enough room.
        """
        self.acquire()
        if self.is_complete():
            return {}, True
        if os.path.exists(self.path):  # damaged by something else
            os.replace(self.path, self.part)
        size = self.offset + self.shape[0] * self.image_bytes
        there = os.stat(self.part).st_blocks * 512 if os.path.exists(self.part) else 0  # it may have holes
        free = shutil.disk_usage(self.folder).free
        if size - there > free:
            raise UserError(
                f"{self.path}: needs {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room, or give"
                " another --sample-dir"
            )
        found = self._intact() if there else {}
        with open(self.part, "r+b" if os.path.exists(self.part) else "wb") as file:
            file.truncate(size)
        return found, False

    def _intact(self):
        """{batch: labels} of the noted batches whose bytes have the noted checksum."""
        noted = {}
        for name in sorted(os.listdir(self.folder)):
            if name.startswith(".batches-"):
                with open(os.path.join(self.folder, name)) as file:
                    for line in file:
                        with contextlib.suppress(ValueError):  # a line cut short by a kill
                            note = json.loads(line)
                            noted[note["batch"]] = note
        intact = {}
        with open(self.part, "rb") as file:
            for batch, note in tqdm(sorted(noted.items()), desc="Checking", unit="batch", disable=not noted):
                rows = self.rows(batch)
                file.seek(self.offset + rows.start * self.image_bytes)
                if zlib.crc32(file.read(len(rows) * self.image_bytes)) == note["crc32"]:
                    intact[batch] = note["labels"]
        return intact

    def write(self, batch, images, labels, writer):
        """Put a batch's images, bytes (n, H, W, C), in their place, then note it.

        labels: n of them, or None; writer: the process's rank."""
        if self.notes is None:
            self.notes = open(os.path.join(self.folder, f".batches-{writer:03d}"), "a")
            self.file = os.open(self.part, os.O_WRONLY)
        data = np.ascontiguousarray(images).tobytes()
        position, view = self.offset + self.rows(batch).start * self.image_bytes, memoryview(data)
        while view:
            written = os.pwrite(self.file, view, position)
            view, position = view[written:], position + written
        os.fdatasync(self.file)
        labels = None if labels is None else [int(label) for label in labels]
        note = json.dumps(dict(batch=batch, crc32=zlib.crc32(data), labels=labels))
        self.notes.write(f"\n{note}\n")  # on a line of its own, whatever an earlier run left
        self.notes.flush()

    def close(self):
        """End this process's writing."""
        if self.notes is not None:
            self.notes.close()
            os.close(self.file)
            self.notes = None

    def finish(self):
        """Make the .npz of what all processes wrote, in place; called by one process alone."""
        found = self._intact()
        missing = [batch for batch in self.batches if batch not in found]
        if missing:
            raise UserError(f"{self.path}: batch {missing[0]} is missing; run the same command again")
        with open(self.part, "r+b") as file, open(self.part, "rb") as source:
            target = SkipWriter(file)
            with zipfile.ZipFile(target, "w") as archive:
                with _member(archive, "arr_0.npy") as member:
                    _write_header(member, self.shape)
                    source.seek(self.offset)
                    left = self.shape[0] * self.image_bytes
                    target.passing = True
                    with tqdm(total=left, desc="Finishing", unit="B", unit_scale=True) as bar:
                        while left:
                            data = source.read(min(CHUNK, left))
                            member.write(data)
                            left -= len(data)
                            bar.update(len(data))
                    target.passing = False
                if found[0] is not None:
                    labels = [label for batch in self.batches for label in found[batch]]
                    with _member(archive, "arr_1.npy") as member:
                        np.lib.format.write_array(member, np.array(labels, dtype=np.int64))
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.part, self.path)


def _member(archive, name):
    # A ZipInfo of its own has no date, so that the same samples are the same file:
    return archive.open(zipfile.ZipInfo(name), "w", force_zip64=True)


def _write_header(file, shape):
    header = dict(descr="|u1", fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(file, header)


class SkipWriter:
    """A file that, while `passing`, steps over what is written to it: the same bytes are there already, and
    the zip format is only to take their checksum."""

    def __init__(self, file):
        self.file, self.passing = file, False

    def write(self, data):
        if not self.passing:
            return self.file.write(data)
        self.file.seek(len(data), os.SEEK_CUR)
        return len(data)

    def __getattr__(self, name):
        return getattr(self.file, name)
