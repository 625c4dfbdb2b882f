"""Images: read, cropped, made bytes, grids, animations and files.

Images are float (N, C, H, W), of 1 or 3 channels, unless said.
"""

import contextlib
import errno
import os
import tempfile

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
    """A PIL image or uint8 (H, W, C) array to float (C, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


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


@contextlib.contextmanager
def open_image(path):
    """The PIL image of a file; what goes wrong with it there is a UserError that names it."""
    # What Pillow's decoders raise for a damaged file has no common class:
    reading = user_errors(path, "cannot be read as an image; mend or remove it", Exception)
    with reading, Image.open(path) as image:
        if image.mode[0] in "IF":  # which PIL would cut off at white
            raise ValueError(f"its pixels have more than 8 bits, mode {image.mode}; convert it")
        yield image
