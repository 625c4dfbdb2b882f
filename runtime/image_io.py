"""Images: listed, read, cropped, made bytes, grids, animations and files.

Images are float (N, C, H, W), of 1 or 3 channels, unless said.
"""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from runtime.cli import UserError, atomic_write, user_errors


def to_unit(x):
    """Images in [-1, 1], somewhat beyond say, to float32 in [0, 1] on the CPU."""
    return ((x.float() + 1) / 2).clamp(0, 1).cpu()


def to_uint8(x):
    """Images (N, C, H, W) in [-1, 1] to bytes (N, H, W, C), rounded as the published script rounds them."""
    return (127.5 * x.float() + 128.0).clamp(0, 255).permute(0, 2, 3, 1).to("cpu", torch.uint8)


def save_grid(images, path, nrow):
    """Write images (N, C, H, W) in [0, 1] as one PNG, whole or not at all, nrow a row; tiny ones enlarged for
    the eye."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with atomic_write(path, "wb") as file:
        _grid(images, nrow).save(file, "PNG")


def save_gif(trajectory, path, nrow):
    """Write a trajectory (F, N, C, H, W) in [0, 1] as an animation of grids, nrow a row, that rests at the
    end."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    frames = [_grid(images, nrow) for images in trajectory]
    durations = [60] * (len(frames) - 1) + [2500]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def save_image(path, pixels, seed, label=None):
    """Write one image, bytes (H, W, C) of 1 or 3 channels, as a PNG that knows its seed and label."""
    info = PngInfo()
    info.add_text("seed", str(seed))
    if label is not None:
        info.add_text("label", str(label))
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(path, pnginfo=info)


def _grid(images, nrow):
    from torchvision.utils import make_grid

    enlarge = max(1, 64 // min(images.shape[-2:]))
    if enlarge > 1:
        images = torch.nn.functional.interpolate(images, scale_factor=enlarge, mode="bicubic").clamp(0, 1)
    grid = make_grid(images, nrow=nrow, pad_value=0.25 if enlarge > 1 else 0)
    return Image.fromarray((grid * 255 + 0.5).clamp(0, 255).permute(1, 2, 0).to("cpu", torch.uint8).numpy())


def make_folder(path, flag):
    """Make a folder, unless it is there, that can be written to. Raises UserError, naming the flag."""
    with user_errors(f"{flag} {path}", "cannot be written to", OSError):
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def check_folder(path, flag):
    """Raise UserError as make_folder would, as far as that shows without anything being written."""
    place = os.path.abspath(path)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        code = errno.EEXIST if place == os.path.abspath(path) else errno.ENOTDIR
        raise UserError(f"{flag} {path}: cannot be written to ({os.strerror(code)})")
    try:
        # A file without a name, which leaves nothing, on file systems that have such:
        os.close(os.open(place, os.O_TMPFILE | os.O_WRONLY))
    except (AttributeError, OSError) as error:
        unknown = getattr(error, "errno", None) in (None, errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
        if not unknown or not os.access(place, os.W_OK | os.X_OK):
            reason = os.strerror(errno.EACCES) if unknown else error.strerror
            raise UserError(f"{flag} {path}: cannot be written to ({reason})") from error


# What counts as an image, by its name: torchvision's list, whose import takes seconds.
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Up to this many files are looked at before training; of more, as many, evenly spread:
CHECKED_FILES = 10_000


def center_crop_arr(pil_image, image_size):
    """ADM's crop: a PIL image scaled so that its shorter side is image_size, then the square in its middle.

    Halved by averaging while it is at least twice too large, then resized bicubically. Returns a PIL image.
    """
    while min(pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize(tuple(side // 2 for side in pil_image.size), resample=Image.BOX)
    scale = image_size / min(pil_image.size)
    pil_image = pil_image.resize(
        tuple(round(side * scale) for side in pil_image.size), resample=Image.BICUBIC
    )
    left, top = ((side - image_size) // 2 for side in pil_image.size)
    return pil_image.crop((left, top, left + image_size, top + image_size))


def to_tensor(image):
    """A PIL image or uint8 (H, W, C) array to uint8 (C, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_float(images):
    """uint8 images as float32 in [-1, 1]; values of another type as float32."""
    return images.float() / 127.5 - 1.0 if images.dtype == torch.uint8 else images.float()


def is_visible(entry):
    """Whether a folder's entry, of os.scandir, is not hidden."""
    return not entry.name.startswith(".")


def share_to_check(files):
    """All of these, or an even share of very many."""
    indices = np.linspace(0, len(files) - 1, min(len(files), CHECKED_FILES)).astype(int)
    return [files[i] for i in np.unique(indices)]


def is_image(entry):
    """Whether a folder's entry, of os.scandir, is an image file by its name."""
    return entry.is_file() and is_visible(entry) and entry.name.lower().endswith(IMG_EXTENSIONS)


class ImageFiles(Sequence):
    """The image files of a folder: pairs (path, label), in order.

    Held as the bytes of their names and four more a file, where strings and pairs take some 220. Processes
    that read images share arrays; of objects they copy each that they count a reference to.
    """

    def __init__(self, root, classes, listings):
        """classes: the subfolders, or [] for images without classes; listings: for each of them, or for the
        root, the names of its files, relative to it."""
        self.root, self.classes = root, classes
        names, lengths, firsts = bytearray(), array("H"), [0]
        for listing in listings:
            part = _to_bytes("".join(f"{name}\0" for name in listing))
            ends = np.flatnonzero(np.frombuffer(part, np.uint8) == 0)
            lengths.frombytes(np.diff(ends, prepend=-1).astype(np.uint16).tobytes())
            names += part
            firsts.append(len(lengths))
        self._names, self._firsts = np.frombuffer(names, np.uint8), np.array(firsts)
        offset_type = np.uint32 if len(names) < 2**32 else np.uint64
        self._ends = np.cumsum(np.frombuffer(lengths, np.uint16), dtype=offset_type)

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, index):
        index = range(len(self))[index]
        label = int(np.searchsorted(self._firsts, index, side="right")) - 1
        start, end = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        name = _to_text(self._names[start : end - 1])
        return os.path.join(self.root, *self.classes[label : label + 1], name), label

    def relative_names(self):
        """Yield the paths relative to the root, in order."""
        for label, (first, last) in enumerate(pairwise(self._firsts.tolist())):
            start, end = int(self._ends[first - 1]) if first else 0, int(self._ends[last - 1])
            prefix = f"{self.classes[label]}{os.sep}" if self.classes else ""
            for name in _to_text(self._names[start : end - 1]).split("\0"):
                yield prefix + name

    @property
    def labels(self):
        """The label of every file, int64 (N,)."""
        return np.repeat(np.arange(len(self._firsts) - 1), np.diff(self._firsts))

    def fingerprint(self):
        """A hash of the names and classes, in order: hexadecimal."""
        digest = hashlib.sha256(json.dumps([self.classes, self._firsts.tolist()]).encode())
        digest.update(self._names)
        return digest.hexdigest()


# File names are bytes of any kind; those that are not UTF-8, Python's strings hold as surrogates.
def _to_bytes(text):
    return text.encode("utf-8", "surrogateescape")


def _to_text(names):
    return names.tobytes().decode("utf-8", "surrogateescape")


@contextlib.contextmanager
def open_image(path):
    """The PIL image of a file; what goes wrong with it there is a UserError that names it."""
    # What Pillow's decoders raise for a damaged file has no common class:
    reading = user_errors(path, "cannot be read as an image; mend or remove it", Exception)
    with reading, Image.open(path) as image:
        if image.mode[0] in "IF":  # which PIL would cut off at white
            raise ValueError(f"its pixels have more than 8 bits, mode {image.mode}; convert it")
        yield image
