"""The published weights, by name.

    python download.py          # fetch both published checkpoints into pretrained_models/

The weights are the original authors', under CC BY-NC 4.0; this repository's own licence does not cover them.
"""

import http.client
import os
import re
import zipfile

from filelock import FileLock

from runtime import Parser, UserError, launch

PRETRAINED_URL = "https://dl.fbaipublicfiles.com/DiT/models/"
PRETRAINED_MODELS = {"DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt"}
PRETRAINED_FOLDER = "pretrained_models"


def find_model(model_name, weights="ema"):
    """The state dict of a published checkpoint by name (fetched where need be) or of a local file.

    weights: "ema" or "raw", of a training checkpoint that has both. Raises UserError where there is none.
    """
    import checkpoint

    return checkpoint.load(find_file(model_name)).state_dict(weights)


def find_file(name):
    """The path of a published checkpoint by name, or of a diffusers pipeline by hub id (owner/name), fetched
    where need be; of a local file, unchanged. Raises UserError where it cannot be fetched."""
    if os.path.exists(name):
        return name
    if name in PRETRAINED_MODELS:
        return download_model(name)
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not name.endswith((".pt", ".safetensors"))
    return download_pipeline(name) if is_hub_id else name


def download_pipeline(name):
    """Fetch a diffusers pipeline by hub id, and return its folder."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "transformer/*", "vae/*", "scheduler/*"])
    except Exception as error:  # of many kinds, down to those of the HTTP library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--ckpt {name}: no such file or folder, and as a hub id it could not be fetched ({reason})"
        ) from error


def download_model(name, folder=PRETRAINED_FOLDER, url=None):
    """Fetch a published checkpoint, unless it is there, and return its path.

    Any number of processes may call this at once: one fetches, the others wait. The file appears under its
    name only when complete. Raises UserError where it cannot be fetched."""
    from torch.hub import download_url_to_file

    path, url = os.path.join(folder, name), url or PRETRAINED_URL + name
    os.makedirs(folder, exist_ok=True)
    with FileLock(path + ".lock"):
        if not os.path.exists(path):
            print(f"Downloading {url} to {path}")
            try:
                download_url_to_file(url, path + ".part")
                if not zipfile.is_zipfile(path + ".part"):  # its directory stands at the end
                    raise OSError("the connection ended early")
                os.replace(path + ".part", path)
            except (OSError, http.client.HTTPException) as error:
                raise UserError(
                    f"{name}: could not be downloaded from {url}; check the network, or put the file at"
                    f" {path} ({error})"
                ) from error
    return path


def main(args):
    """Fetch the published checkpoints into pretrained_models/."""
    for name in sorted(PRETRAINED_MODELS):
        print(download_model(name))


def build_parser():
    """The command-line options: none."""
    return Parser(description=__doc__)


if __name__ == "__main__":
    launch(main, build_parser())
