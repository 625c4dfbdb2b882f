"""The published weights, by name.

    python download.py                # fetch both published checkpoints into pretrained_models/
    python download.py --inception    # fetch the Inception network's weights, for evaluate.py

The checkpoints are the original authors', under CC BY-NC 4.0, the Inception weights under Apache 2.0; this
repository's own licence covers neither.
"""

from checkpointing.files import load
from checkpointing.published import PRETRAINED_MODELS, download_inception, download_model, find_file
from runtime.cli import Parser, launch


def find_model(model_name, weights="ema"):
    """The state dict of a published checkpoint by name (fetched where need be) or of a local file.

    weights: "ema" or "raw", of a training checkpoint that has both. Raises UserError where there is none.
    """
    return load(find_file(model_name)).state_dict(weights)


def main(args):
    """Fetch the published checkpoints, or the Inception weights, into pretrained_models/."""
    if args.inception:
        print(download_inception())
        return
    for name in sorted(PRETRAINED_MODELS):
        print(download_model(name))


def build_parser():
    """The command-line options."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--inception", action="store_true",
        help="fetch the Inception network's weights, which evaluate.py needs, in place of the checkpoints"
        " (default: off)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
