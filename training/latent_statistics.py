"""Mean and standard deviation of latents over the data, of all together and of every channel."""

import math

import numpy as np
import torch
from tqdm.auto import tqdm

from runtime.cli import UserError
from training.dataset import make_loader

SUMS = ("values", "sum", "square")  # what channel_sums gives
MEASURED = 1024  # images, where there is no cache; in batches of
BATCH_SIZE = 32


def channel_sums(moments, autoencoder):
    """Sums over latents, after shift and scale, of what VAE.moments gave, an array (…, 2C or C, h, w).

    values: of each channel, how many; sum and square: lists, a float a channel, of the values and of their
    squares, expected over the posterior."""
    sums = dict(values=moments.size // moments.shape[-3], sum=0.0, square=0.0)
    for start in range(0, len(moments), 64):  # a float64 copy of all takes gigabytes
        mean, variance = moments[start : start + 64].astype(np.float64), 0.0
        if not autoencoder.is_deterministic:
            mean, logvar = np.split(mean, 2, axis=-3)
            variance = np.exp(logvar) * autoencoder.scale**2
        mean = (mean - autoencoder.shift) * autoencoder.scale
        others = (*range(mean.ndim - 3), -2, -1)
        sums["sum"] += mean.sum(axis=others)
        sums["square"] += (mean**2 + variance).sum(axis=others)
    return dict(sums, sum=sums["sum"].tolist(), square=sums["square"].tolist())


def summarize(sums):
    """Mean and standard deviation of latents, of all and of every channel, of several parts' channel_sums."""
    n = sum(part["values"] for part in sums)
    means, squares = (
        [math.fsum(column) / n for column in zip(*(part[name] for part in sums))] for name in SUMS[1:]
    )
    stds = [math.sqrt(max(0.0, square - mean**2)) for mean, square in zip(means, squares)]
    mean = math.fsum(means) / len(means)
    std = math.sqrt(max(0.0, math.fsum(squares) / len(squares) - mean**2))
    return dict(mean=mean, std=std, channel_mean=means, channel_std=stds)


def measure(dataset, autoencoder, num_workers, dist):
    """`summarize` of the latents of MEASURED images of a ReadableDataset, evenly spread; the processes share
    the work. Raises UserError for an unreadable image, unless those are skipped."""
    rows = torch.linspace(0, len(dataset) - 1, min(MEASURED, len(dataset))).long().tolist()
    batches = [[(row, False) for row in rows[i : i + BATCH_SIZE]] for i in range(0, len(rows), BATCH_SIZE)]
    batches, sums = batches[dist.rank :: dist.world_size], []
    loader = make_loader(dataset, batches, num_workers, dist.device)
    bar = tqdm(loader, "Measuring latents", len(batches), unit="batch", disable=not dist.is_main)
    with dist.agreeing():
        for images, _, problems in bar:
            if problems and not dataset.skip:
                raise UserError(problems[0])
            moments = autoencoder.moments(images.to(dist.device))
            sums.append(channel_sums(moments.float().cpu().numpy(), autoencoder))
    return summarize([part for parts in dist.gather(sums) for part in parts])


def require_channels(statistics, source):
    """What VAE.normalize_channels takes, of what `summarize` gave for a source, named in errors; UserError
    where that cannot be."""
    flag = "--latent-normalization channel"
    if "channel_std" not in statistics:
        raise UserError(
            f"{flag}: {source} was extracted before statistics of the channels were kept; run the same"
            " extract_features.py command again, which adds them"
        )
    for channel, std in enumerate(statistics["channel_std"]):
        if not 0 < std < math.inf:
            raise UserError(
                f"{flag}: over {source}, channel {channel} of the latents has standard deviation {std}; give"
                " scale"
            )
    return {name: statistics[name] for name in ("channel_mean", "channel_std")}
