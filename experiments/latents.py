"""What an autoencoder keeps of images, how its latents are distributed, and what normalising channels does.

    python extract_features.py --data-path /path/to/images --image-size 64 --vae taesd
    python experiments/latents.py --data-path /path/to/images

PSNR is that of images which were encoded and decoded again. Small flows are trained on the cached latents by
either --latent-normalization. The Fréchet distance of their samples to the images is by means of pixels over
a grid of 16 x 16, beside that of one half of the images to the other.
"""

import os
import subprocess
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from evaluation.features import FEATURES, features_of
from evaluation.metrics import frechet_distance, mean_and_covariance
from experiments.digits import ROOT, SEEDS, write
from runtime.autoencoder import LATENT_NORMALIZATIONS, load_autoencoder
from runtime.cli import Parser, UserError, int_at_least, launch
from runtime.image_io import save_grid, to_float, to_uint8
from sampler import Sampler
from training.dataset import open_dataset
from training.latent_cache import LatentCache
from training.latent_statistics import require_channels

SIZE = "--model DiT-S/2 --depth 4 --hidden-size 192 --num-heads 3".split()
RECIPE = "--objective flow --global-batch-size 64 --lr 1e-3 --warmup-steps 100 --ema-decay 0.998 --ema-warmup"
SHOWN = 8  # images that are drawn over what comes back of them


def main(args):
    """Reconstruct, measure, train, sample, write the table and a picture."""
    cache = LatentCache(args.feature_path)
    images = open_dataset("folder", args.data_path, cache.image_size)
    os.makedirs(args.out, exist_ok=True)
    plain, by_channel = (load_autoencoder(cache.vae["vae"], "cpu") for _ in LATENT_NORMALIZATIONS)
    by_channel.normalize_channels(**require_channels(cache.statistics, args.feature_path))
    numbers = dict(psnr=reconstruct(plain, images, args))
    numbers["latents"] = {
        name: distribution(cache, vae, args.num_images)
        for name, vae in zip(LATENT_NORMALIZATIONS, (plain, by_channel))
    }
    network = FEATURES["pixels"]()
    real = features_of(torch.cat([to_uint8(image[None]) for image in rows(images, len(images))]), network)
    numbers["distances"] = dict(real=distance(real[::2], real[1::2]))
    for seed in range(args.seeds):
        for name in LATENT_NORMALIZATIONS:  # they take turns, so that noise affects both
            path = train(os.path.join(args.out, f"{name}-{seed}"), args, name, seed)
            samples = Sampler.from_checkpoint(path).sample(args.num_samples, seeds=SEEDS, progress=True)
            save_grid(samples[:40], os.path.join(args.out, f"{name}-{seed}.png"), nrow=10)
            found = distance(features_of(to_uint8(samples * 2 - 1), network), real)
            numbers["distances"].setdefault(name, []).append(found)
            print(f"{name}, seed {seed}: {found:.4f}", flush=True)
    write(args.out, "latents", table(numbers), numbers)


def rows(dataset, count):
    """The images (C, H, W) of some rows, evenly spread."""
    indices = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long()
    return [to_float(dataset[int(i), False][0]) for i in indices]


def reconstruct(vae, images, args):
    """PSNR in decibels of some images, encoded and decoded: a dict of mean, lowest and highest."""
    found, pairs = [], []
    for batch in torch.stack(rows(images, args.num_images)).split(32):
        again = vae.decode(vae.encode(batch, torch.zeros(1))).clamp(-1, 1)
        found.append(-10 * torch.log10(((batch - again) ** 2).mean((1, 2, 3)) / 4))
        pairs += [(batch[0], again[0])]
    pictures = [picture for side in zip(*pairs[:SHOWN]) for picture in side]
    save_grid(torch.stack(pictures) / 2 + 0.5, os.path.join(args.out, "again.png"), nrow=len(pairs[:SHOWN]))
    found = torch.cat(found)
    return dict(mean=found.mean().item(), lowest=found.min().item(), highest=found.max().item())


def distribution(cache, vae, count):
    """Of the latents of some images: by channel their mean, standard deviation and share beyond 3."""
    moments = torch.stack(rows(cache, count))
    generator = torch.Generator().manual_seed(0)
    side = (len(moments), vae.channels, *moments.shape[2:])
    x = vae.sample_posterior(moments, torch.randn(side, generator=generator)).transpose(0, 1).flatten(1)
    return dict(
        mean=x.mean(1).tolist(), std=x.std(1).tolist(), beyond_3=(x.abs() > 3).float().mean(1).tolist()
    )


def train(folder, args, normalization, seed):
    """Train a small flow in a folder; returns its checkpoint. Raises UserError where that fails."""
    os.makedirs(folder, exist_ok=True)
    cache = LatentCache(args.feature_path)
    options = (
        f"{RECIPE} --latent-normalization {normalization} --global-seed {seed} --max-steps {args.max_steps}"
    )
    options += f" --image-size {cache.image_size} --sample-every 0 --num-workers 0 --cfg-scale 1"
    command = [
        sys.executable,
        ROOT / "train.py",
        "--feature-path",
        args.feature_path,
        *SIZE,
        *options.split(),
    ]
    command += ["--results-dir", folder, "--num-sampling-steps", "50"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{normalization}: training failed ({done.stderr.strip()[-2000:]})")
    return os.path.join(folder, "000-DiT-S-2", "checkpoints", f"{args.max_steps:07d}.pt")


def distance(features, others):
    return frechet_distance(*mean_and_covariance(features), *mean_and_covariance(others))


def table(numbers):
    """The table in markdown."""
    psnr, distances = numbers["psnr"], numbers["distances"]
    lines = [
        f"PSNR {psnr['mean']:.1f} dB ({psnr['lowest']:.1f} to {psnr['highest']:.1f}); the two halves of the"
        f" images are {distances['real']:.3f} apart.",
        "",
        "| `--latent-normalization` | mean by channel | standard deviation | beyond 3 | samples' distance |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, found in numbers["latents"].items():
        mean, std = (f"{min(found[key]):.2f} to {max(found[key]):.2f}" for key in ("mean", "std"))
        beyond = sum(found["beyond_3"]) / len(found["beyond_3"])
        spread, samples = "not measured", distances.get(name)
        if samples:
            spread = f"{sum(samples) / len(samples):.3f} ({min(samples):.3f} to {max(samples):.3f})"
        lines.append(f"| `{name}` | {mean} | {std} | {beyond:.2%} | {spread} |")
    return "\n".join(lines)


def build_parser():
    """The command-line options."""
    # fmt: off
    parser = Parser(description=__doc__)
    parser.add_argument("--feature-path", default="features", metavar="FOLDER",
                        help="cache of extract_features.py (default: features)")
    parser.add_argument("--data-path", default=None, metavar="FOLDER",
                        help="the images that it was extracted from (default: none)")
    parser.add_argument("--num-images", type=int_at_least(2), default=500, metavar="N",
                        help="for PSNR and the latents' distribution (default: 500)")
    parser.add_argument("--seeds", type=int_at_least(0), default=3, metavar="N",
                        help="trainings of each kind; 0 for none (default: 3)")
    parser.add_argument("--max-steps", type=int_at_least(1), default=2000, metavar="STEPS",
                        help="of each training (default: 2000)")
    parser.add_argument("--num-samples", type=int_at_least(40), default=1000, metavar="N",
                        help="of each trained model (default: 1000)")
    parser.add_argument("--out", default="results/experiments", metavar="FOLDER",
                        help="where the trainings, the table (.md), its numbers (.json) and pictures go"
                        " (default: results/experiments)")
    # fmt: on
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
