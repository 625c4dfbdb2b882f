"""Published weights by name, fetched on first use."""

import hashlib
import http.client
import os
import re
import zipfile

import torch
from filelock import FileLock

from models import DiT_models
from runtime.cli import UserError, user_errors

PUBLISHED_SIZES = {"DiT-XL-2-256x256.pt": 256, "DiT-XL-2-512x512.pt": 512}  # pixels


def published_checkpoint(args):
    """The name of the published weights for these options; UserError where none exist."""
    if args.model not in (None, "DiT-XL/2"):
        raise UserError(f"--model {args.model}: only DiT-XL/2 is published; give --ckpt")
    image_size = 256 if args.image_size is None else args.image_size
    name = next((name for name, size in PUBLISHED_SIZES.items() if size == image_size), None)
    if name is None:
        raise UserError(f"--image-size {image_size}: published weights are for 256 and 512; give --ckpt")
    if args.num_classes not in (None, 1000):
        raise UserError(f"--num-classes {args.num_classes}: the published weights have 1000; give --ckpt")
    return name


def published_config(name):
    """The full arguments of DiT for published weights by name."""
    with torch.device("meta"):
        return DiT_models["DiT-XL/2"](input_size=PUBLISHED_SIZES[name] // 8).config


PRETRAINED_URL = "https://dl.fbaipublicfiles.com/DiT/models/"
PRETRAINED_MODELS = {"DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt"}
PRETRAINED_FOLDER = "pretrained_models"
# The network of the published FIDs, converted from TensorFlow by github.com/mseitzer/pytorch-fid:
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
INCEPTION_WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def find_file(name, flag="--ckpt"):
    """The path of a published checkpoint by name, or of a diffusers pipeline by hub id (owner/name), fetched
    where need be; of a local file, unchanged. Raises UserError where it cannot be fetched."""
    name = os.fspath(name)
    if os.path.exists(name):
        return name
    if name in PRETRAINED_MODELS:
        return download_model(name)
    return download_pipeline(name, flag) if _is_hub_id(name) else name


def find_local(name):
    """As find_file, but None for what would have to be fetched."""
    if name in PRETRAINED_MODELS and not os.path.exists(name):
        name = os.path.join(PRETRAINED_FOLDER, name)
        return name if os.path.exists(name) else None
    return None if _is_hub_id(name) else name


def _is_hub_id(name):
    is_one = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not name.endswith((".pt", ".safetensors"))
    return bool(is_one) and not os.path.exists(name)


def download_pipeline(name, flag="--ckpt"):
    """Fetch a diffusers pipeline by hub id, and return its folder; UserError, naming the flag."""
    from huggingface_hub import snapshot_download

    failed = "no such file or folder, and as a hub id it could not be fetched"
    with user_errors(f"{flag} {name}", failed, Exception):  # of many kinds, down to those of the HTTP library
        return snapshot_download(name, allow_patterns=["*.json", "transformer/*", "vae/*", "scheduler/*"])


def download_model(name, folder=PRETRAINED_FOLDER, url=None):
    """Fetch a published checkpoint, unless it is there, and return its path. Raises UserError as _fetch."""
    # The directory of a zip file stands at its end:
    return _fetch(url or PRETRAINED_URL + name, folder, name, zipfile.is_zipfile)


def download_inception(folder=PRETRAINED_FOLDER, url=None):
    """Fetch the weights of the Inception network, unless they are there, and return their path.

    Raises UserError as _fetch, also where what is fetched is not the published file, by its checksum. What
    was there before is for the one who loads it to check."""
    url = url or INCEPTION_URL + INCEPTION_WEIGHTS
    return _fetch(url, folder, INCEPTION_WEIGHTS, lambda path: sha256_of(path) == INCEPTION_SHA256)


def local_inception():
    """The path of the Inception network's weights, or None where they would have to be fetched."""
    path = os.path.join(PRETRAINED_FOLDER, INCEPTION_WEIGHTS)
    return path if os.path.exists(path) else None


def sha256_of(path):
    """The checksum of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(url, folder, name, is_complete):
    """Fetch a file into a folder, unless it is there, and return its path.

    Any number of processes may call this at once: one fetches, the others wait. The file appears under its
    name only when is_whole(path) says so. Raises UserError where it cannot be fetched."""
    from torch.hub import download_url_to_file

    path = os.path.join(folder, name)
    os.makedirs(folder, exist_ok=True)
    with FileLock(path + ".lock"):
        if not os.path.exists(path):
            print(f"Downloading {url} to {path}")
            remedy = f"could not be downloaded from {url}; check the network, or put the file at {path}"
            with user_errors(name, remedy, (OSError, http.client.HTTPException)):
                download_url_to_file(url, path + ".part")
                if not is_complete(path + ".part"):
                    raise OSError("the connection ended early, or it is another file")
                os.replace(path + ".part", path)
    return path
