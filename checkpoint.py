"""Write a checkpoint in another form.

    python checkpoint.py export --ckpt results/000-DiT-XL-2/checkpoints/0050000.pt --out dit.safetensors
    python checkpoint.py export --ckpt DiT-XL-2-256x256.pt --out dit-pipeline
    python checkpoint.py export --ckpt results/000-DiT-XL-2/checkpoints/0050000 --out 0050000.pt

The first holds the averaged weights and all that sampling needs to know; the second is a folder for
diffusers' DiTPipeline; the third is the ordinary file of a folder of shards, which train.py --shard writes.
--ckpt takes whatever sample.py takes.

Published weights of SiT are told from DiT's by nothing but their name: exported with --sit, they are sampled
as the flow they are.
"""

import os

from checkpointing.files import export, load, save
from checkpointing.published import find_file
from diffusion import create_flow
from runtime.autoencoder import add_vae_argument, channel_statistics
from runtime.cli import Parser, UserError, launch

__all__ = ["export", "load", "save"]


def main(args):
    """Write another form of a checkpoint."""
    if not args.ckpt or not args.out:
        raise UserError("--ckpt and --out: both are required")
    if os.path.exists(args.out):
        raise UserError(f"--out {args.out}: exists; remove it, or give another name")
    found = load(find_file(args.ckpt))
    if args.sit:
        found.config["process"] = create_flow(time_scale=1.0, published_sit=True).config
    if args.vae is not None:
        kept = channel_statistics(found.config.get("autoencoder", {}))
        found.config["autoencoder"] = dict(kept, vae=args.vae)
    differences = export(found, args.out, args.weights, args.any_classes)
    print(f"Wrote {args.out}")
    if differences:
        print("Samples of diffusers' DiTPipeline are others than sample.py's:")
        for line in differences:
            print(f"- {line}")


def build_parser():
    """The command-line options."""
    # fmt: off
    parser = Parser(description=__doc__)
    parser.add_argument("command", choices=("export",), help="what to do: write another form of a checkpoint")
    parser.add_argument("--ckpt", default=None, metavar="PATH",
                        help="a checkpoint, as sample.py takes it, or a folder of shards (default: none)")
    parser.add_argument("--out", default=None, metavar="PATH",
                        help="what to write: FILE.pt, FILE.safetensors, or a folder for diffusers"
                        " (default: none)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema",
                        help="averaged weights, or those of the last step (default: ema)")
    parser.add_argument("--any-classes", action="store_true",
                        help="write a folder for diffusers also of a model of other than 1000 classes, which"
                        " its DiTPipeline cannot guide (default: off)")
    parser.add_argument("--sit", action="store_true",
                        help="the weights are published ones of SiT; what is written says so (default: off)")
    add_vae_argument(parser, default=None)
    # fmt: on
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
