"""TAEF2, a small autoencoder of FLUX.2's latents, which diffusers has no class for: added from outside.

    python tests/taef2.py save taef2.safetensors taef2
    python tests/taef2.py extract_features.py --vae taef2 --data-path /path/to/images
    torchrun --nproc_per_node=8 tests/taef2.py train.py --feature-path features

The first writes a folder for --vae, of the encoder and decoder of github.com/madebyollin/taesd in one file.
The others run a command after a row was added to AUTOENCODERS, as any script can."""

import functools
import runpy
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderTiny

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.autoencoder import AUTOENCODERS, Architecture, halved_between  # noqa: E402

# Blocks with a branch that sees the whole picture, the last of the encoder and the first of the decoder:
ENCODER_BLOCKS, DECODER_BLOCKS = (11, 12, 13), (2, 3, 4)


class PoolBlock(torch.nn.Module):
    """An AutoencoderTinyBlock whose input a branch of global statistics is added to first."""

    def __init__(self, block, width=64, inner=256):
        super().__init__()
        self.conv, self.skip, self.fuse = block.conv, block.skip, block.fuse
        self.pool = torch.nn.Sequential(
            torch.nn.Conv2d(width, inner, 1, bias=False), torch.nn.GroupNorm(4, inner), torch.nn.ReLU(),
            torch.nn.Conv2d(inner, width, 1, bias=False),
        )  # fmt: skip

    def forward(self, x):
        x = x + self.pool(x)
        return self.fuse(self.conv(x) + self.skip(x))


class TAEF2(AutoencoderTiny):
    """TAEF2's encoder and decoder: deterministic, 32 channels, 8 times smaller."""

    @functools.wraps(AutoencoderTiny.__init__)
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for layers, blocks in (
            (self.encoder.layers, ENCODER_BLOCKS),
            (self.decoder.layers, DECODER_BLOCKS),
        ):
            for i in blocks:
                layers[i] = PoolBlock(layers[i])


AUTOENCODERS["TAEF2"] = Architecture(
    "latents", halved_between("encoder_block_out_channels"), TAEF2.from_pretrained
)


def save(weights, folder):
    """Write a folder for --vae from a .safetensors of `encoder.N.…` and `decoder.N.…`."""
    from safetensors.torch import load_file

    state = {}
    for key, value in load_file(weights).items():
        part, layer, rest = key.split(".", 2)
        # The first layer of the original decoder, a clamp, is a line of diffusers' forward:
        state[f"{part}.layers.{int(layer) - (part == 'decoder')}.{rest}"] = value.float()
    model = TAEF2(latent_channels=32)
    model.load_state_dict(state)
    model.save_pretrained(folder)


if __name__ == "__main__":
    _, command, *arguments = sys.argv
    if command == "save":
        save(*arguments)
    else:
        sys.argv = sys.argv[1:]
        runpy.run_path(str(ROOT / command), run_name="__main__")
