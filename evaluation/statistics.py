"""Features of many images by any network: computed by any number of processes, kept as statistics."""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from evaluation.image_reader import names_in, read_arrays
from evaluation.metrics import Moments
from runtime.cli import UserError

# What an .npz in ADM's format calls the mean and covariance of the two kinds of features:
STATISTICS = dict(pooled=("mu", "sigma"), spatial=("mu_s", "sigma_s"))


@dataclass
class Features:
    """Of all images: features themselves and their moments, each None where not asked for.

    rows     pooled (N, D), float32, in order; on the main process only
    pooled   Moments of the pooled features
    spatial  Moments of the spatial ones
    """

    rows: torch.Tensor | None = None
    pooled: Moments | None = None
    spatial: Moments | None = None


def share_of(count, batch_size, dist):
    """This process's part, (start, stop), of count images in order: whole batches, but for the last."""
    batches = -(-count // batch_size)
    bounds = [min(count, batches * rank // dist.world_size * batch_size)
              for rank in (dist.rank, dist.rank + 1)]  # fmt: skip
    return tuple(bounds)


def compute_features(batches, share, network, dist, wanted, desc):
    """The Features that wanted names, of the images that all processes' batches hold.

    network  images to features, a tuple of a tensor for each kind of network.sizes, in their order
    batches  this process's, uint8 (n, 3, H, W), in order
    share    (start, stop) of them among all
    Raises the UserError, or Stopped, of any process's batches on all of them.
    """
    start, stop = share
    moments = {kind: Moments(size, dist.device) for kind, size in network.sizes.items() if kind in wanted}
    rows = None
    if "rows" in wanted:
        rows = torch.empty(stop - start, network.sizes["pooled"], dtype=torch.float32, device="cpu")
    filled = 0
    with (
        dist.agreeing(),
        tqdm(total=stop - start, desc=desc, unit="image", disable=not dist.is_main) as bar,
    ):
        for images in batches:
            features = dict(zip(network.sizes, network(images)))
            for kind in moments:
                moments[kind].add(features[kind])
            if rows is not None:
                rows[filled : filled + len(images)] = features["pooled"]
            filled += len(images)
            bar.update(len(images))
    for kind in moments:
        moments[kind].merge(dist)
    return Features(dist.join_rows(rows) if rows is not None else None, **moments)


def read_statistics(path, kind, network, flag):
    """The mean (D,) and covariance (D, D) of "pooled" or "spatial" features in an .npz, None where it has
    none.

    network: whose they must be; its name and sizes count. Raises UserError for another's, other shapes, and
    values that are not finite.
    """
    names, there = STATISTICS[kind], names_in(path, flag)
    if not set(names) <= there:
        return None
    stated = str(read_arrays(path, ["features"], flag)["features"]) if "features" in there else "inception"
    if stated != network.name:  # ADM's files state none
        raise UserError(
            f"{flag} {path}: its statistics are of the features {stated}, not {network.name}; give images, or"
            " make it again"
        )
    arrays, size = read_arrays(path, names, flag), network.sizes[kind]
    for name, shape in zip(names, ((size,), (size, size))):
        if arrays[name].shape != shape:
            raise UserError(f"{flag} {path}: {name} has the shape {arrays[name].shape}, expected {shape}")
        if arrays[name].dtype.kind != "f" or not np.isfinite(arrays[name]).all():
            raise UserError(f"{flag} {path}: {name} has values that are not finite numbers")
    return tuple(arrays[name] for name in names)


def describe_network(network):
    """What a file of statistics keeps of the network that they are of."""
    return {"features": network.name, f"{network.name}_sha256": network.sha256}


def check_same_weights(path, network, flag):
    """Raise UserError where an .npz says that its statistics were made with other weights; ADM's do not
    say."""
    name = f"{network.name}_sha256"
    if name in names_in(path, flag):
        made_with, now = str(read_arrays(path, [name], flag)[name]), network.sha256
        if made_with != now:
            raise UserError(
                f"{flag} {path}: its statistics were made with other {network.name.capitalize()} weights, of"
                f" sha256 {made_with[:16]}… rather than {now[:16]}…; give those, or make the file again"
            )
