"""Networks of random weights: diffusers' autoencoders, Inception, and a tiny one in its place."""

from unittest.mock import patch

import torch


def write_random_weights(path):
    """Save 472 tensors that keep activations at one size from layer to layer, so that features differ by
    image."""
    import torch_fidelity.feature_extractor_inceptionv3 as library

    network = library.FeatureExtractorInceptionV3
    with (
        patch.object(library, "load_state_dict_from_url", lambda *_, **__: {}),
        patch.object(network, "load_state_dict", lambda *_: None),
        torch.device("meta"),
    ):
        shapes = {k: v.shape for k, v in network("inception", ["2048"]).state_dict().items()}
    generator, state = torch.Generator().manual_seed(0), {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if key.endswith("num_batches_tracked"):  # which the published file lacks
            continue
        elif key.endswith("running_var") or key.endswith("bn.weight"):
            state[key] = 1 + 0.1 * noise.abs()
        elif len(shape) > 1:
            state[key] = noise * (2 / shape[1:].numel()) ** 0.5
        else:
            state[key] = 0.1 * noise
    assert len(state) == 472
    torch.save(state, path)
    return path


class Tiny:
    """Stands in for Inception where only what is around it matters: features are means over the image."""

    name, sizes = "inception", dict(pooled=6, spatial=4)
    sha256, is_published, device = "0" * 64, False, torch.device("cpu")

    def __call__(self, images):
        x = images[:, :, ::2, ::2].double()
        halves = x[..., : x.shape[-1] // 2].mean((2, 3)), x[:, :, : x.shape[-2] // 2].mean((2, 3))
        pooled = torch.cat(halves, 1) / 255
        return pooled.float(), pooled[:, :4].float() ** 2

    def logits(self, pooled):
        return pooled * 20


def use_tiny():
    """Make evaluate.py and train.py of this process take the tiny network, and statistics of its size."""
    from evaluation import inception

    def load(path, device, any_weights=False):
        return Tiny()

    inception.load_inception = load
    inception.Inception.sizes = Tiny.sizes


def save_vae(folder, **options):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    defaults = dict(
        block_out_channels=[8, 8, 16], down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=4, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    AutoencoderKL(**{**defaults, **options}).save_pretrained(folder)
    return str(folder)


def save_tiny(folder, **options):
    """A deterministic autoencoder of random weights: 4 channels and factor 4, or as the options say."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    defaults = dict(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
    )  # fmt: skip
    AutoencoderTiny(**{**defaults, **options}).save_pretrained(folder)
    return str(folder)


def save_dc(folder, **options):
    """Another one, of 8 channels and factor 8."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    per_coder = dict(block_types="ResBlock", block_out_channels=(8, 8, 16, 16), layers_per_block=(1, 1, 1, 1))
    options = {
        f"{coder}_{name}": value for coder in ("encoder", "decoder") for name, value in per_coder.items()
    }
    AutoencoderDC(
        **options, latent_channels=8, encoder_qkv_multiscales=((),) * 4, decoder_qkv_multiscales=((),) * 4,
        scaling_factor=0.25,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)
