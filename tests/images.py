"""Images of random pixels."""

import numpy as np
import torch
from PIL import Image

from runtime.image_io import to_float


def pictures(n, height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def write_image(path, size=(20, 16), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def stack(dataset, rows):
    """Some images of a data set, (N, C, H, W) in [-1, 1]."""
    return to_float(torch.stack([dataset[(i, False)][0] for i in rows]))
