"""Pictures: images as bytes, grids, animations and files.

Images are float (N, C, H, W), of 1 or 3 channels.
"""

import errno
import os
import tempfile

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from runtime import UserError, whole_file


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
    with whole_file(path, "wb") as file:
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
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written to ({error.strerror})") from error


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
