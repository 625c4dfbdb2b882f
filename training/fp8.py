"""Matrix products in eight-bit floating point (Micikevicius et al., arXiv 2209.05433): --precision fp8.

Weights stay float32, and checkpoints the same. In the large layers of the blocks torchao scales each tensor
by its own largest value, then rounds it: to e4m3 forward, gradients to e5m2. All else is as in bf16.
"""

from runtime.cli import UserError


def import_torchao():
    """torchao.float8; UserError where it is not there."""
    try:
        import torchao.float8
    except ImportError as error:
        raise UserError("--precision fp8: torchao is not installed; uv sync --group fp8") from error
    return torchao.float8


def convert_to_fp8(blocks, emulate=False):
    """Let the linear layers that every token passes multiply in fp8; the modulation's see a row an image.

    emulate: on devices without it, rounding as they would, for tests.
    """
    float8 = import_torchao()

    def is_large(layer, name):
        return "adaLN_modulation" not in name and not (layer.in_features % 16 or layer.out_features % 16)

    # Padded, since the rows that a weight's gradient sums over need not be a multiple of 16:
    config = float8.Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    float8.convert_to_float8_training(blocks, module_filter_fn=is_large, config=config)
