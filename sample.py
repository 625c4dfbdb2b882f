"""Sample images from a trained diffusion transformer into one picture, sample.png.

From a training run, with nothing to repeat from its command:

    python sample.py --ckpt results/000-DiT-S-2-digits/checkpoints/0002000.pt --class-labels 0 1 2 3

From the published weights, fetched on first use:

    python sample.py --image-size 512 --seed 1
"""

from autoencoder import add_vae_argument
from download import PRETRAINED_MODELS
from models import DiT_models
from runtime import Parser, UserError, add_precision_argument, launch, set_precision, start_processes
from sampler import Plan, add_sampling_arguments, check_labels, check_sampling_options, save_grid

# The eight classes of the published picture: golden retriever, otter, red panda, geyser, macaw, valley,
# balloon, Arctic fox.
PUBLISHED_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]


def main(args):
    """Sample images into sample.png."""
    # Check the options:
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: must be 0 or more, below 2^63")
    check_sampling_options(args.cfg_scale, args.num_sampling_steps)
    if args.ckpt is None:
        args.ckpt = published_checkpoint(args)
    if args.dry_run and args.ckpt in PRETRAINED_MODELS:
        print(f"Would sample {args.ckpt} to sample.png; options are sound, nothing was written.")
        return
    plan = Plan(
        args.ckpt, weights=args.weights, model=args.model, image_size=args.image_size,
        num_classes=args.num_classes, vae=args.vae,
    )  # fmt: skip
    num_classes = plan.model_config["num_classes"]
    labels = args.class_labels or default_labels(num_classes)
    plan.check(
        args.class_labels, cfg_scale=args.cfg_scale, steps=args.num_sampling_steps, sampler=args.sampler
    )
    if args.dry_run:
        print(f"Would sample {args.ckpt} to sample.png; options are sound, nothing was written.")
        return

    # Load the model:
    processes = start_processes()
    set_precision(args.precision, processes.device)
    sampler = plan.build(processes.device)

    # Sample:
    images = sampler.sample(
        labels, seeds=args.seed, cfg_scale=args.cfg_scale, steps=args.num_sampling_steps,
        sampler=args.sampler, progress=True,
    )  # fmt: skip
    save_grid(images, "sample.png", nrow=4)
    print(f"Saved {len(images)} samples to sample.png" + (f", labels {labels}" if num_classes else ""))


def published_checkpoint(args):
    """The name of the published weights for these options; UserError where none exist."""
    if args.model not in (None, "DiT-XL/2"):
        raise UserError(f"--model {args.model}: only DiT-XL/2 is published; give --ckpt")
    image_size = 256 if args.image_size is None else args.image_size
    name = f"DiT-XL-2-{image_size}x{image_size}.pt"
    if name not in PRETRAINED_MODELS:
        raise UserError(f"--image-size {image_size}: published weights are for 256 and 512; give --ckpt")
    if args.num_classes not in (None, 1000):
        raise UserError(f"--num-classes {args.num_classes}: the published weights have 1000; give --ckpt")
    check_labels(args.class_labels or [], 1000)
    return name


def default_labels(num_classes):
    """What is drawn without --class-labels: the published eight for ImageNet, else the first eight
    classes."""
    if not num_classes:
        return 8
    return PUBLISHED_LABELS if num_classes == 1000 else list(range(min(8, num_classes)))


def build_parser():
    """The command-line options."""
    # fmt: off
    parser = Parser(description=__doc__)
    parser.add_argument("--ckpt", default=None, metavar="FILE",
                        help="checkpoint: of train.py, or weights as .pt or .safetensors"
                        " (default: the published DiT-XL/2 of --image-size)")
    parser.add_argument("--model", choices=list(DiT_models), default=None,
                        help="what the checkpoint must hold (default: what it holds)")
    parser.add_argument("--image-size", type=int, default=None, metavar="PIXELS",
                        help="side of the images, which the checkpoint must be for"
                        " (default: the checkpoint's, or 256 for published weights)")
    parser.add_argument("--num-classes", type=int, default=None, metavar="N",
                        help="classes, which the checkpoint must have (default: the checkpoint's)")
    add_vae_argument(parser, default=None)
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema",
                        help="averaged weights, or those of the last step (default: ema)")
    parser.add_argument("--class-labels", type=int, nargs="+", default=None, metavar="LABEL",
                        help="classes to draw, one image each"
                        " (default: the published eight for ImageNet, else the first eight)")
    parser.add_argument("--seed", type=int, default=0, metavar="SEED",
                        help="of the first image; the next ones count on from it (default: 0)")
    add_sampling_arguments(parser)
    add_precision_argument(parser)
    parser.add_argument("--dry-run", action="store_true",
                        help="check the options, load and write nothing (default: off)")
    # fmt: on
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
