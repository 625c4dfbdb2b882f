"""Between images and what the model sees: the latents of a VAE (Rombach et al., arXiv 2112.10752), or pixels.

Both classes have the same interface: channels and factor (how many times smaller), image_channels, encode,
decode, and `config`, the plain dict that a checkpoint keeps. Images are float (N, C, H, W) in [-1, 1]."""

import os

import torch

from runtime.cli import UserError, torch_defaults, user_errors

# What --vae calls the two decoders that the paper's samples were made with:
PUBLISHED_VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
# The scale of the first Stable Diffusion VAEs, whose configs do not hold it:
SD_SCALE = 0.18215
PIXELS_AT_ONCE = 2**20  # that a VAE is given, for each of which it works in about 5 KB


class Pixels:
    """No autoencoder: the model sees the image itself."""

    factor = 1
    clip_denoised = True  # predictions of x_start are images, so they lie in [-1, 1]

    def __init__(self, channels):
        self.channels = self.image_channels = channels
        self.config = dict(vae="none", channels=channels, factor=1)

    def to(self, device):
        return self

    def encode(self, images, noise):
        return images

    def decode(self, x):
        return x


class VAE:
    """A diffusers AutoencoderKL, frozen; latents are (latent - shift) * scale, about unit variance.

    config, as `config` of another one gave it, stands in for the file's: the weights are then read on first
    use."""

    clip_denoised = False

    def __init__(self, name, config=None):
        self.name, self.device, self._model = name, torch.device("cpu"), None
        if config is None:
            found = self.model.config
            config = dict(
                channels=found.latent_channels,
                factor=2 ** (len(found.block_out_channels) - 1),
                scale=float(found.get("scaling_factor") or SD_SCALE),
                shift=float(found.get("shift_factor") or 0.0),
            )
        self.channels, self.factor = config["channels"], config["factor"]
        self.scale, self.shift = config["scale"], config["shift"]
        self.config = dict(
            vae=name, channels=self.channels, factor=self.factor, scale=self.scale, shift=self.shift
        )

    @property
    def model(self):
        if self._model is None:
            self._model = _load_autoencoder_kl(self.name).eval().requires_grad_(False).to(self.device)
        return self._model

    @property
    def image_channels(self):
        return self.model.config.in_channels

    def to(self, device):
        self.device = torch.device(device)
        if self._model is not None:
            self._model.to(device)
        return self

    @torch.no_grad()
    def moments(self, images):
        """Mean and log-variance, (N, 2 channels, H/factor, W/factor), of the posterior of each image."""
        posteriors = [self.model.encode(part).latent_dist for part in in_parts(images)]
        return torch.cat([torch.cat([one.mean, one.logvar], dim=1) for one in posteriors])

    def sample_posterior(self, moments, noise):
        """Latents (N, channels, h, w) drawn from posteriors (N, 2 channels, h, w) with this noise."""
        mean, logvar = moments.chunk(2, dim=1)
        return (mean + torch.exp(0.5 * logvar) * noise - self.shift) * self.scale

    def encode(self, images, noise):
        """Latents (N, channels, H/factor, W/factor), drawn from each image's posterior with this noise."""
        return self.sample_posterior(self.moments(images), noise)

    @torch.no_grad()
    def decode(self, x):
        """Images (N, 3, H, W) of latents."""
        x = x / self.scale + self.shift
        return torch.cat([self.model.decode(part).sample for part in in_parts(x, self.factor)])


def in_parts(x, factor=1):
    """Split a batch, of images or of latents factor times smaller, into parts of at most PIXELS_AT_ONCE."""
    return x.split(max(1, PIXELS_AT_ONCE // (x.shape[-2] * x.shape[-1] * factor**2)))


def resolve_vae(name):
    """A hub id, an absolute path or "none", of what --vae was given."""
    return os.path.abspath(name) if os.path.isdir(name) else PUBLISHED_VAES.get(name, name)


def describe_vae(name, image_channels):
    """(channels, factor, image channels) of a VAE, from its config alone; UserError where it has none."""
    name = resolve_vae(name)
    if name == "none":
        return image_channels, 1, image_channels
    if name in PUBLISHED_VAES.values():
        return 4, 8, 3  # known without a network
    with _loading_vae(name):
        from diffusers import AutoencoderKL

        config = AutoencoderKL.load_config(name)
        return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1), config["in_channels"]


def load_autoencoder(name, device, image_channels=3):
    """The VAE (on the device) of a published name ("ema", "mse"), hub id or folder; Pixels for "none".

    Raises UserError where it cannot be had.
    """
    name = resolve_vae(name)
    return (Pixels(image_channels) if name == "none" else VAE(name)).to(device)


def add_vae_argument(parser, default, pixels=", or none to work on pixels", unnamed="mse"):
    """--vae, the same in every command. unnamed: the default where a checkpoint names none."""
    parser.add_argument(
        "--vae", default=default, metavar="VAE",
        help="autoencoder: ema or mse (the published fine-tuned SD-VAEs), a hub id, or a folder saved by"
        f" diffusers{pixels}"
        f" (default: {default or f'the one of the checkpoint, or {unnamed} for published weights'})",
    )  # fmt: skip


def _loading_vae(name):
    """A context that turns what diffusers raises, where a VAE is not there or not one, into UserErrors."""
    is_folder = os.path.isdir(name)
    if is_folder and not os.path.isfile(os.path.join(name, "config.json")):
        raise UserError(
            f"--vae {name}: no config.json there; give the folder of a saved diffusers AutoencoderKL"
        )
    if not is_folder and (name.count("/") != 1 or name.startswith(("/", "."))):
        raise UserError(
            f"--vae {name}: no such folder; give ema, mse, a hub id as owner/name, a folder, or none"
        )
    remedy = "check the name and the network, or give a folder with a copy of it"
    if is_folder:
        remedy = "save it again with AutoencoderKL.save_pretrained"
    errors = (OSError, ValueError, RuntimeError, KeyError, TypeError)
    return user_errors(f"--vae {name}", f"cannot be loaded; {remedy}", errors)


def _load_autoencoder_kl(name):
    with _loading_vae(name):
        # Imported here, since it takes seconds that a pixel model need not wait:
        from diffusers import AutoencoderKL

        with torch_defaults():
            return AutoencoderKL.from_pretrained(name)
