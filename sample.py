"""Sample images from a trained diffusion transformer into one picture, sample.png.

From a training run, with nothing to repeat from its command:

    python sample.py --ckpt results/000-DiT-S-2-digits/checkpoints/0002000.pt --class-labels 0 1 2 3

From the published weights, fetched on first use; classes by name, few steps, an animation:

    python sample.py --image-size 512 --seed 1
    python sample.py --class-labels "golden retriever" otter --sampler dpm++ --gif
"""

import os
from itertools import cycle, islice

from checkpointing.published import published_checkpoint
from runtime.class_names import class_names, resolve_labels
from runtime.cli import Parser, UserError, int_at_least, launch, seed_number, user_errors
from runtime.distributed import init_distributed, set_precision
from runtime.image_io import check_folder, is_image, make_folder, save_gif, save_grid, save_image, to_uint8
from sampler import CheckpointSpec
from sampling.options import (
    add_checkpoint_arguments,
    add_guide_argument,
    add_sampling_arguments,
    add_speed_arguments,
    check_cuda_graphs,
    check_published_draws,
    sampling_options,
)

# The eight classes of the published picture: golden retriever, otter, red panda, geyser, macaw, valley,
# balloon, Arctic fox.
PUBLISHED_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]


def main(args):
    """Sample images into sample.png."""
    # Check the options:
    check_cuda_graphs(args.cuda_graphs)
    options = sampling_options(args)
    if args.ckpt is None:
        args.ckpt = published_checkpoint(args)
    plan = CheckpointSpec(
        args.ckpt, weights=args.weights, model=args.model, image_size=args.image_size,
        num_classes=args.num_classes, vae=args.vae, guide=args.guide,
    )  # fmt: skip
    labels = choose_labels(args, plan.model_config["num_classes"], plan.classes)
    count = labels if isinstance(labels, int) else len(labels)
    if len(args.seed) not in (1, count):
        raise UserError(f"--seed: {len(args.seed)} seeds for {count} samples; give as many, or the first one")
    seeds = args.seed if len(args.seed) > 1 else range(args.seed[0], args.seed[0] + count)
    settled = plan.check(**options)
    plan.check_pictures()
    if args.published_draws:
        check_published_draws(seeds, settled)
    picture, folder = where_to_save(args.out)
    animation = f"{os.path.splitext(picture)[0]}.gif"
    if folder:
        check_out(folder, count)
    for name in (picture, *([animation] if args.gif else [])):
        if os.path.isdir(name):
            raise UserError(f"{name}: is a folder; remove it, or sample elsewhere")
    dist = init_distributed()
    precision = set_precision(args.precision, dist.device)
    prepare_folder = check_folder if args.dry_run else make_folder
    prepare_folder(os.path.dirname(os.path.abspath(picture)), "--out" if args.out else "working folder")
    if folder:
        prepare_folder(folder, "--out")
    if args.dry_run:
        print(f"Would sample {args.ckpt} to {picture}; options are sound, nothing was written.")
        return

    # Load the model:
    sampler = plan.build(dist.device, precision, args.compile, args.cuda_graphs)

    # Sample:
    images = sampler.sample(
        labels, seeds=seeds, published_draws=args.published_draws, return_trajectory=args.gif,
        progress=True, **options,
    )  # fmt: skip
    if args.published_draws:  # all from the first one's stream
        seeds = [seeds[0]] * count
    with user_errors(picture, "could not be written; make room", OSError):
        if args.gif:
            images, trajectory = images
            save_gif(trajectory, animation, nrow=4)
        save_grid(images, picture, nrow=4)
        for i, (pixels, seed) in enumerate(zip(to_uint8(2 * images - 1).numpy(), seeds) if folder else ()):
            label = None if isinstance(labels, int) else labels[i]
            save_image(os.path.join(folder, file_name(i)), pixels, seed, label)
    names = class_names(sampler.model.num_classes, plan.classes)
    shown = "" if isinstance(labels, int) else f", labels {labels}"
    if not isinstance(labels, int) and names[0] != "0":
        shown += " (" + ", ".join(names[label].split(",")[0] for label in dict.fromkeys(labels)) + ")"
    also = [name for name, wanted in ((animation, args.gif), (folder, folder)) if wanted]
    print(f"Saved {len(images)} samples to {' and '.join([picture, *also])}{shown}")


def where_to_save(out):
    """The picture of all images, and the folder for each of them, or None, that --out stands for."""
    if out and out.lower().endswith(".png"):
        return out, None
    return "sample.png", out


def file_name(i):
    """The name, in --out, of image i."""
    return f"{i:06d}.png"


def check_out(folder, count):
    """Raise UserError for an --out where other images would be left beside these: an earlier run's say, that
    had more, and that whoever reads the folder would take for this one's."""
    if not os.path.isdir(folder):
        return
    mine = {file_name(i) for i in range(count)}
    with os.scandir(folder) as entries:
        others = sorted(entry.name for entry in entries if entry.name not in mine and is_image(entry))
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"--out {folder}: holds {others[0]}{more}, which the images of this run would not replace;"
            " remove them, or give another folder"
        )


def choose_labels(args, num_classes, classes=None):
    """The label of every image, or how many images of an unconditional model."""
    if args.class_labels:
        labels = resolve_labels(args.class_labels, num_classes, classes)
    else:
        labels = default_labels(num_classes)
    if args.num_samples is None:
        return labels
    return list(islice(cycle(labels), args.num_samples)) if num_classes else args.num_samples


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
    add_checkpoint_arguments(parser)
    parser.add_argument("--class-labels", nargs="+", default=None, metavar="LABEL",
                        help="classes to draw, one image each: numbers, or names of the data's or ImageNet's"
                        " classes, as \"golden retriever\""
                        " (default: the published eight for ImageNet, else the first eight)")
    parser.add_argument("--num-samples", type=int_at_least(1), default=None, metavar="N",
                        help="images; the labels take turns (default: one a label, or 8)")
    parser.add_argument("--seed", type=seed_number, nargs="+", default=[0], metavar="SEED",
                        help="of the first image, from which the next ones count on; or of each (default: 0)")
    parser.add_argument("--published-draws", action="store_true",
                        help="draw noise as the published script does, from one generator: the same"
                        " weights and --seed then give its picture on the same kind of device (default: off)")
    group = parser.add_argument_group("sampling")
    add_sampling_arguments(group)
    add_guide_argument(group)
    group = parser.add_argument_group("output")
    group.add_argument("--gif", action="store_true",
                       help="show how the images come out of the noise, in sample.gif (default: off)")
    group.add_argument("--out", default=None, metavar="FOLDER",
                       help="write every image as a PNG of its own there too, 000000.png and so on, its seed"
                       " and label in the file's metadata; refused where other images would be left among"
                       " them. A name that ends in .png is that of the picture of all (default: none, and"
                       " sample.png)")
    add_speed_arguments(parser.add_argument_group("speed"))
    parser.add_argument("--dry-run", action="store_true",
                        help="check the options, load and write nothing (default: off)")
    # fmt: on
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
