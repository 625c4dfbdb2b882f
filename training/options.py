"""The options of train.py, and its presets."""

import argparse

from diffusion import PATHS
from diffusion.flow_matching import PREDICTIONS
from diffusion.schedules import NOISE_SCHEDULES
from diffusion.timestep_sampler import SCHEDULE_SAMPLERS
from evaluation.inception import add_inception_arguments
from models import BLOCKS, FFNS, POS_EMBEDS, DiT_models
from runtime.autoencoder import LATENT_NORMALIZATIONS, add_vae_argument
from runtime.cli import Parser, float_above, float_at_least, fraction, int_at_least, seed_number
from runtime.distributed import TRAINING_PRECISIONS, add_precision_argument
from sampling.options import (
    FID_CFG_SCALE,
    add_sampling_arguments,
)
from training.aux_losses import AUX_LOSSES
from training.dataset import DATASETS
from training.optimizers import OPTIMIZERS

# What --preset stands for; a flag given by hand wins. Behind each row: what it should give.
# fmt: off
PRESETS = {
    # Recognisable digits in two minutes on two CPU cores: at this size, the cosine schedule, a high constant
    # rate and a short average were measured best.
    "digits": dict(
        dataset="digits", image_size=8, vae="none", num_workers=0,
        model="DiT-S/2", depth=4, hidden_size=128, num_heads=4,
        noise_schedule="squaredcos_cap_v2", global_batch_size=64, max_steps=2000, lr=2e-3, warmup_steps=50,
        ema_decay=0.995, ema_warmup=True, cfg_scale=1.5, num_sampling_steps="50",
    ),
    # Clothes that a person recognises in a quarter of an hour on two CPU cores. Patches of 16 pixels want the
    # data predicted: with the noise predicted, samples were still blocks of grain after 600 steps.
    "fashion": dict(
        dataset="fashion-mnist", image_size=28, vae="none", num_workers=0, precision="auto",
        model="DiT-S/4", depth=4, hidden_size=192, num_heads=3,
        objective="flow", flow_prediction="data", timestep_sampler="logit-normal",
        global_batch_size=32, max_steps=2500, lr=1e-3, warmup_steps=100, ema_decay=0.998, ema_warmup=True,
        cfg_scale=2.5, sampler="heun", num_sampling_steps="12", ckpt_every=500, keep_checkpoints=1,
    ),
    # Anyone's folder of photographs in an hour on two CPU cores, without a VAE. Large patches want the data
    # predicted, photographs more noise than digits do, and the convolution hides the patches' edges.
    "photos": dict(
        image_size=64, vae="none", num_workers=0, cache_images=True, precision="auto",
        model="DiT-S/8", depth=6, hidden_size=256, num_heads=4, ffn="conv",
        objective="flow", flow_prediction="data", timestep_sampler="logit-normal", time_shift=2.0,
        global_batch_size=32, max_steps=4000, lr=2e-3, warmup_steps=100, ema_decay=0.999, ema_warmup=True,
        cfg_scale=2.0, sampler="heun", num_sampling_steps="12", ckpt_every=500, keep_checkpoints=1,
        sample_every=1000,
    ),
    # Just-a-DiT's recipe for CIFAR-10, with diffusion in place of flow matching.
    "cifar10": dict(
        dataset="cifar10", image_size=32, vae="none",
        model="DiT-S/2", learn_sigma=False, global_batch_size=128, max_steps=200_000, lr=1e-4,
        ema_decay=0.9999, ema_warmup=True, ckpt_every=10_000, cfg_scale=2.5,
    ),
    # The quick start as a flow.
    "digits-flow": dict(
        dataset="digits", image_size=8, vae="none", num_workers=0,
        model="DiT-S/2", depth=4, hidden_size=128, num_heads=4, objective="flow",
        global_batch_size=64, max_steps=2000, lr=2e-3, warmup_steps=50,
        ema_decay=0.995, ema_warmup=True, cfg_scale=1.5,
    ),
    # Just-a-DiT's recipe itself.
    "cifar10-flow": dict(
        dataset="cifar10", image_size=32, vae="none",
        model="DiT-S/2", objective="flow", timestep_sampler="logit-normal", registers=4,
        global_batch_size=128, max_steps=200_000, lr=1e-4, ema_decay=0.9999, ema_warmup=True,
        ckpt_every=10_000, sample_every=10_000, sample_cfg_scales=[1.0, 2.5, 5.0], sample_gif=True,
        cfg_scale=2.5,
    ),
    # The blog's DiT for robots' images (JulienRineau/diffusion-transformer): any folder, no labels.
    "unconditional-conv": dict(
        model="DiT-B/2", num_classes=0, ffn="conv", noise_schedule="squaredcos_cap_v2", learn_sigma=False,
        sigma_small=True, global_batch_size=256, lr=1e-4, weight_decay=1e-2, clip_grad=1.0,
    ),
    # The paper's two published models.
    "imagenet256": dict(model="DiT-XL/2", image_size=256, max_steps=7_000_000, cfg_scale=1.5),  # FID-50K 2.27
    "imagenet512": dict(model="DiT-XL/2", image_size=512, max_steps=3_000_000, cfg_scale=1.5),  # FID-50K 3.04
}
# fmt: on


# ---------------------------------------------------------------------------------------------
# Options


def build_parser(description=None):
    """The command-line options."""
    parser = PresetParser(description=description)
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        default=None,
        help="defaults for all other options; one given by hand wins (default: none)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all that a start would, show the plan and which run it would begin or"
        " continue, write nothing (default: off)",
    )
    parser.add_argument(
        "--world-size", type=int_at_least(1), default=None, metavar="PROCESSES",
        help="with --dry-run, processes to plan for (default: those that there are)",
    )  # fmt: skip
    parser.add_argument(
        "--device-memory", type=float_above(0), default=None, metavar="GIB",
        help="with --dry-run, memory of the device to plan for (default: this GPU's)",
    )  # fmt: skip
    _add_data_arguments(parser.add_argument_group("data"))
    _add_model_arguments(parser.add_argument_group("model"))
    _add_training_arguments(parser.add_argument_group("training"))
    _add_output_arguments(parser.add_argument_group("output"))
    add_sampling_arguments(parser.add_argument_group("samples at the end, and defaults kept for sample.py"))
    return parser


def _add_data_arguments(group):
    # fmt: off
    group.add_argument("--dataset", choices=list(DATASETS), default="folder",
                       help="a folder of images, or one of these sets (default: folder)")
    group.add_argument("--data-path", default=None, metavar="FOLDER",
                       help="images, one subfolder a class or all in one; for cifar10 and fashion-mnist,"
                       " where they are kept, or data (default: none)")
    group.add_argument("--feature-path", default=None, metavar="FOLDER",
                       help="latents cached by extract_features.py, in place of images (default: none)")
    group.add_argument("--allow-changed-data", action=argparse.BooleanOptionalAction, default=False,
                       help="continue a run although images of its classes were added, removed or renamed"
                       " since (default: off)")
    group.add_argument("--skip-bad-images", action=argparse.BooleanOptionalAction, default=False,
                       help="train on the next image in place of an unreadable one, and count them, rather"
                       " than save and stop (default: off)")
    group.add_argument("--random-flip", action=argparse.BooleanOptionalAction, default=True,
                       help="mirror half of the images, chosen anew in every epoch, except of data sets that"
                       " are never mirrored (default: on)")
    group.add_argument("--cache-images", action=argparse.BooleanOptionalAction, default=False,
                       help="keep images of a folder in memory once they are read and cropped, 12 KB each at"
                       " 64 pixels, in every process that reads them (default: off)")
    group.add_argument("--image-size", type=int_at_least(1), default=256, metavar="PIXELS",
                       help="side of the square that images are cropped to (default: 256)")
    group.add_argument("--num-classes", type=int_at_least(0), default=None, metavar="N",
                       help="rows of the label table, null label aside; 0 for an unconditional model"
                       " (default: as many as the data set has)")
    group.add_argument("--num-workers", type=int_at_least(0), default=4, metavar="N",
                       help="processes that read images, for each training process (default: 4)")
    add_vae_argument(group, default="ema")
    group.add_argument("--latent-normalization", choices=LATENT_NORMALIZATIONS, default="scale",
                       help="scale: latents are scaled by the VAE's own factor, as published; channel: each"
                       " channel to mean 0 and standard deviation 1 over the data, as the cache of"
                       " --feature-path says, or measured on 1024 images at the start (default: scale)")
    # fmt: on


def _add_model_arguments(group):
    # fmt: off
    group.add_argument("--model", choices=list(DiT_models), default="DiT-XL/2",
                       help="size S, B, L or XL, and side of a patch in latent pixels (default: DiT-XL/2)")
    group.add_argument("--depth", type=int_at_least(1), default=None, metavar="BLOCKS",
                       help="blocks, in place of the model's (default: the model's)")
    group.add_argument("--hidden-size", type=int_at_least(1), default=None, metavar="WIDTH",
                       help="channels of a token, in place of the model's (default: the model's)")
    group.add_argument("--num-heads", type=int_at_least(1), default=None, metavar="HEADS",
                       help="attention heads, in place of the model's (default: the model's)")
    group.add_argument("--patch-size", type=int_at_least(1), default=None, metavar="SIDE",
                       help="latent pixels a side of a patch, in place of the model's (default: the model's)")
    group.add_argument("--block", choices=list(BLOCKS), default="adaln-zero",
                       help="how time and label enter, in the paper's four ways (default: adaln-zero)")
    group.add_argument("--ffn", choices=list(FFNS), default="mlp",
                       help="behind the attention: two linear layers, or a 3x3 convolution over the patches"
                       " between them too (default: mlp)")
    group.add_argument("--pos-embed", choices=POS_EMBEDS, default="sincos",
                       help="position embedding: fixed sines and cosines, or learned from there"
                       " (default: sincos)")
    group.add_argument("--registers", type=int_at_least(0), default=0, metavar="N",
                       help="learned tokens beside the patches (default: 0)")
    group.add_argument("--qk-norm", action=argparse.BooleanOptionalAction, default=False,
                       help="normalise queries and keys, for stable long runs in bf16 (default: off)")
    group.add_argument("--class-dropout-prob", type=fraction, default=0.1, metavar="SHARE",
                       help="share of labels dropped, for guidance; 0 for none (default: 0.1)")
    group.add_argument("--learn-sigma", action=argparse.BooleanOptionalAction, default=True,
                       help="predict the variance too, with twice the channels (default: on)")
    group.add_argument("--sigma-small", action=argparse.BooleanOptionalAction, default=False,
                       help="without --learn-sigma, sample with the smaller of the two fixed variances"
                       " (default: off)")
    group.add_argument("--objective", choices=("diffusion", "flow"), default="diffusion",
                       help="the paper's diffusion, or flow matching (default: diffusion)")
    group.add_argument("--flow-path", choices=list(PATHS), default="linear",
                       help="how a flow leads from data to noise: in straight lines, on a circle (gvp), or as"
                       " diffusion does (default: linear)")
    group.add_argument("--flow-prediction", choices=list(PREDICTIONS), default="velocity",
                       help="what a flow's model predicts (default: velocity)")
    group.add_argument("--time-shift", type=float_above(0), default=1.0, metavar="FACTOR",
                       help="times t of a flow become FACTOR t / (1 + (FACTOR - 1) t): noisier above 1"
                       " (default: 1)")
    group.add_argument("--noise-schedule", choices=list(NOISE_SCHEDULES), default="linear",
                       help="how noise grows over the 1000 steps (default: linear)")
    # fmt: on


def _add_training_arguments(group):
    # fmt: off
    group.add_argument("--epochs", type=int_at_least(1), default=1400, metavar="N",
                       help="passes over the data (default: 1400)")
    group.add_argument("--max-steps", type=int_at_least(1), default=None, metavar="STEPS",
                       help="optimiser steps, in place of --epochs (default: none)")
    group.add_argument("--global-batch-size", type=int_at_least(1), default=256, metavar="IMAGES",
                       help="images a step, over all processes (default: 256)")
    group.add_argument("--global-seed", type=seed_number, default=0, metavar="SEED",
                       help="of initialisation, order and noise (default: 0)")
    group.add_argument("--lr", type=float_above(0), default=1e-4, metavar="RATE",
                       help="learning rate (default: 1e-4)")
    group.add_argument("--warmup-steps", type=int_at_least(0), default=0, metavar="STEPS",
                       help="over which the learning rate rises from 0 (default: 0)")
    group.add_argument("--weight-decay", type=float_at_least(0), default=0.0, metavar="RATE",
                       help="weight decay (default: 0)")
    group.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw",
                       help="what moves the weights (default: adamw)")
    group.add_argument("--aux-loss", choices=list(AUX_LOSSES), default=None, metavar="NAME",
                       help="auxiliary loss on an inner layer, of training/aux_losses.py (default: none)")
    group.add_argument("--aux-weight", type=float_above(0), default=0.5, metavar="WEIGHT",
                       help="of the auxiliary loss beside the other (default: 0.5)")
    group.add_argument("--aux-layer", type=int_at_least(1), default=None, metavar="BLOCK",
                       help="number, from 1, of the block whose output it sees"
                       " (default: a third of the blocks)")
    group.add_argument("--clip-grad", type=float_above(0), default=None, metavar="NORM",
                       help="scale gradients down to this norm where it is larger (default: none)")
    group.add_argument("--grad-accum-steps", type=int_at_least(1), default=1, metavar="PARTS",
                       help="parts that a batch is cut into, one after the other, for memory (default: 1)")
    group.add_argument("--grad-checkpointing", action=argparse.BooleanOptionalAction, default=False,
                       help="recompute blocks in the backward pass, for memory (default: off)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                       help="compile the blocks with torch.compile (default: off)")
    group.add_argument("--shard", action=argparse.BooleanOptionalAction, default=False,
                       help="share weights, average and optimiser state among the processes (FSDP), for"
                       " models that one GPU cannot hold (default: off)")
    group.add_argument("--init-from", default=None, metavar="FILE",
                       help="checkpoint whose weights to start from, as far as they fit (default: none)")
    group.add_argument("--ema-decay", type=fraction, default=0.9999, metavar="DECAY",
                       help="a step, of the averaged weights that are sampled (default: 0.9999)")
    group.add_argument("--ema-warmup", action=argparse.BooleanOptionalAction, default=False,
                       help="average over a tenth of the steps so far at most, for short runs (default: off)")
    group.add_argument("--timestep-sampler", choices=list(SCHEDULE_SAMPLERS), default="uniform",
                       help="how training times are drawn: uniform, logit-normal (for a flow), or by the loss"
                       " they had (for a diffusion) (default: uniform)")
    add_precision_argument(group, TRAINING_PRECISIONS)
    group.add_argument("--residual-dtype", choices=("fp32", "bf16"), default="fp32",
                       help="type of the tokens between the blocks' layers; bf16, beside --precision bf16 or"
                       " fp8, takes less memory and time, but rounds them at every layer (default: fp32)")
    group.add_argument("--grad-compression", choices=("none", "bf16"), default="none",
                       help="type in which processes exchange gradients, for slow networks between machines"
                       " (default: none; float32 then)")
    # fmt: on


def _add_output_arguments(group):
    # fmt: off
    group.add_argument("--results-dir", default="results", metavar="FOLDER",
                       help="where runs make their folders (default: results)")
    group.add_argument("--resume", default="auto", metavar="RUN",
                       help="auto: continue the newest unfinished run of --results-dir with the same"
                       " settings, or start one; never: start one; or the folder of a run to continue, or a"
                       " checkpoint of one to go back to (default: auto)")
    group.add_argument("--keep-checkpoints", type=int_at_least(0), default=0, metavar="N",
                       help="delete all but the last N; 0 keeps all (default: 0)")
    group.add_argument("--sample-every", type=int_at_least(0), default=None, metavar="STEPS",
                       help="steps between two pictures; 0 for none at all (default: only at the end)")
    group.add_argument("--sample-cfg-scales", type=float_at_least(0), nargs="+", default=None,
                       metavar="SCALE",
                       help="a picture for each of these guidance scales (default: --cfg-scale's alone)")
    group.add_argument("--sample-gif", action=argparse.BooleanOptionalAction, default=False,
                       help="show in a GIF beside every picture how it comes out of the noise (default: off)")
    group.add_argument("--eval-every", type=int_at_least(0), default=0, metavar="STEPS",
                       help="steps between two losses of the averaged weights on held-out images, a fiftieth"
                       " of the data, at most 1024; 0 holds none out (default: 0)")
    group.add_argument("--fid-ref", default=None, metavar="FILE",
                       help="statistics, of evaluate.py --save-stats or ADM's, that --eval-every compares"
                       " samples of the averaged weights with, guided by --cfg-scale or else"
                       f" {FID_CFG_SCALE}; the best are kept (default: none)")
    group.add_argument("--fid-samples", type=int_at_least(2), default=10_000, metavar="N",
                       help="samples for --fid-ref, by --num-sampling-steps each (default: 10000)")
    add_inception_arguments(group)
    group.add_argument("--wandb", action=argparse.BooleanOptionalAction, default=False,
                       help="log to Weights & Biases too (default: off)")
    group.add_argument("--log-every", type=int_at_least(1), default=100, metavar="STEPS",
                       help="steps between two lines of the log (default: 100)")
    group.add_argument("--ckpt-every", type=int_at_least(1), default=50_000, metavar="STEPS",
                       help="steps between two checkpoints; there is always one at the end (default: 50000)")
    # fmt: on


class PresetParser(Parser):
    """A parser whose --preset sets the other options' defaults; `by_hand` in its result names those given."""

    def parse_args(self, args=None, namespace=None):
        found = super().parse_args(args)
        # What a namespace already holds, argparse takes for the default; here a mark of what was not given:
        marked = super().parse_args(args, argparse.Namespace(**dict.fromkeys(vars(found), self)))
        by_hand = sorted(name for name, value in vars(marked).items() if value is not self)
        preset = dict(PRESETS[found.preset]) if found.preset else {}
        if "epochs" in by_hand:
            preset.pop("max_steps", None)
        if "model" in by_hand:  # whose sizes the preset may have changed
            for name in ("depth", "hidden_size", "num_heads", "patch_size"):
                preset.pop(name, None)
        return super().parse_args(args, argparse.Namespace(**preset, by_hand=by_hand))
