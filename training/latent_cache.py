"""A cache of latents that extract_features.py wrote, as a data set."""

import hashlib
import json
import os
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Dataset

from runtime.cli import UserError, user_errors

MANIFEST = "manifest.json"


class LatentCache(Dataset):
    """Posterior moments that extract_features.py wrote, memory-mapped: items (float16 (2C, h, w), label); or
    latents (C, h, w), of a deterministic encoder.

    The mirrored item is of the mirrored image. `vae` is the config of the VAE they are of, `statistics` the
    mean and standard deviation of the latents, of all and of every channel; caches of earlier versions lack
    the latter.
    """

    channels, flips, condition = 3, True, "class"

    def __init__(self, folder):
        path = os.path.join(folder, MANIFEST)
        flag, errors = f"--feature-path {folder}", (OSError, ValueError)
        with user_errors(flag, "no cache of extract_features.py", errors), open(path) as file:
            manifest = json.load(file)
        if not manifest.get("complete"):
            raise UserError(
                f"--feature-path {folder}: unfinished; run the same extract_features.py command again"
            )
        self.folder, self.vae, self.classes = folder, manifest["vae"], manifest["classes"]
        self.statistics = manifest.get("latents", {})
        self.image_size, self.shard_size, self.count = (
            manifest[name] for name in ("image_size", "shard_size", "count")
        )
        self.shards = [os.path.join(folder, shard["moments"]) for shard in manifest["shards"]]
        self.checksums = [shard.get("sha256", "") for shard in manifest["shards"]]
        for shard, moments in zip(manifest["shards"], self.shards):
            if not os.path.exists(moments) or os.path.getsize(moments) != shard["bytes"]:
                raise UserError(f"{moments}: missing or cut short; remove {path} and extract again")
        with user_errors(flag, "its labels cannot be read", errors):
            self.labels = np.concatenate(
                [np.load(os.path.join(folder, s["labels"])) for s in manifest["shards"]]
            )
        if len(self.labels) != self.count:
            raise UserError(f"--feature-path {folder}: {len(self.labels)} labels for {self.count} images")
        self._maps = {}

    @cached_property
    def fingerprint(self):
        """A hash of the moments and labels, in order."""
        digest = hashlib.sha256("".join(self.checksums).encode())
        digest.update(np.asarray(self.labels, np.int64))
        return digest.hexdigest()

    def __getstate__(self):
        return dict(self.__dict__, _maps={})  # a worker maps the files itself

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        index, mirrored = key
        shard, row = divmod(index, self.shard_size)
        if shard not in self._maps:
            self._maps[shard] = np.load(self.shards[shard], mmap_mode="r")
        moments = torch.from_numpy(self._maps[shard][row, int(mirrored)].copy())
        return moments, int(self.labels[index])
