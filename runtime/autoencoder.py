"""Between images and what the model sees: latents of an autoencoder (Rombach et al., 2112.10752), or pixels.

Both classes have the same interface: channels and factor (how many times smaller), image_channels, encode,
decode, and `config`, the plain dict that a checkpoint keeps. Images are float (N, C, H, W) in [-1, 1]; what
is encoded may be uint8 too."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.cli import UserError, torch_defaults, user_errors
from runtime.distributed import uses_bfloat16
from runtime.image_io import to_float

# What --vae calls the two decoders that the paper's samples were made with, and a tiny one of their latents:
PUBLISHED_VAES = {
    "ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse", "taesd": "madebyollin/taesd",
}  # fmt: skip
# The scale of the first Stable Diffusion VAEs, whose configs do not hold it:
SD_SCALE = 0.18215
# How train.py makes latents about unit variance: by the VAE's shift and scale, or by channel besides:
LATENT_NORMALIZATIONS = ("scale", "channel")
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

    def encode_in(self, precision, compile=False):
        """Nothing is encoded."""

    def encode(self, images, noise):
        return to_float(images)

    def decode(self, x):
        return x


@dataclass(frozen=True)
class Architecture:
    """How autoencoders of one class are read: of diffusers, or with its interface, from a folder or the hub.

    latents   the attribute of what `encode` returns: "latent_dist", a posterior with mean and logvar; or the
              name of the latents of a deterministic encoder
    factor    a function config -> how many times smaller the latents are, height and width
    load      a function name -> module, of a folder or hub id; None for the class of diffusers
    scale     that of configs which hold none

    config.json has the class (`_class_name`), latent_channels, in_channels and, unless they are `scale` and
    0, scaling_factor and shift_factor."""

    latents: str
    factor: Callable[[dict], int]
    load: Callable | None = None
    scale: float = 1.0

    @property
    def is_deterministic(self):
        return self.latents != "latent_dist"

    def describe(self, config):
        """The `config` of a VAE, but its name, of what config.json holds."""
        described = dict(
            channels=config["latent_channels"], factor=self.factor(config),
            scale=float(config.get("scaling_factor") or self.scale),
            shift=float(config.get("shift_factor") or 0.0),
        )  # fmt: skip
        return dict(described, deterministic=True) if self.is_deterministic else described


def halved_between(widths):
    """The factor of an encoder that halves the image between any two of the stages whose widths this entry of
    its config lists."""
    return lambda config: 2 ** (len(config[widths]) - 1)


# By the class that config.json names. A row added from outside serves every command.
AUTOENCODERS = {
    "AutoencoderKL": Architecture("latent_dist", halved_between("block_out_channels"), scale=SD_SCALE),
    "AsymmetricAutoencoderKL": Architecture(
        "latent_dist", halved_between("down_block_out_channels"), scale=SD_SCALE
    ),
    "AutoencoderKLFlux2": Architecture("latent_dist", halved_between("block_out_channels")),
    "AutoencoderTiny": Architecture("latents", halved_between("encoder_block_out_channels")),
    "AutoencoderDC": Architecture("latent", halved_between("encoder_block_out_channels")),
}


class VAE:
    """An autoencoder of AUTOENCODERS, frozen; latents are (latent - shift) * scale, about unit variance.

    config, as `config` of another one gave it, stands in for the file's: the weights are then read on first
    use. is_deterministic: its encoder gives latents, no posterior."""

    clip_denoised = False

    def __init__(self, name, config=None):
        self.name, self.device, self._model = name, torch.device("cpu"), None
        self._architecture = AUTOENCODERS["AutoencoderKL"]
        self._autocast, self._mean, self._std = False, None, None
        if config is None:
            with _loading_vae(name):
                found = self.model.config
                config = self._architecture.describe(found)
        self.channels, self.factor = config["channels"], config["factor"]
        self.scale, self.shift = config["scale"], config["shift"]
        self.is_deterministic = config.get("deterministic", False)
        self.config = dict(
            vae=name, channels=self.channels, factor=self.factor, scale=self.scale, shift=self.shift
        )
        if self.is_deterministic:
            self.config["deterministic"] = True
        if "channel_std" in config:
            self.normalize_channels(**channel_statistics(config))

    def normalize_channels(self, channel_mean, channel_std):
        """Normalise the latents by channel: mean and standard deviation of each, after shift and scale."""
        self.config |= dict(channel_mean=list(channel_mean), channel_std=list(channel_std))
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=self.device)[:, None, None]
            for values in (channel_mean, channel_std)
        )

    @property
    def model(self):
        if self._model is None:
            self._architecture, model = _load_model(self.name)
            self._model = model.eval().requires_grad_(False)
            self.to(self.device)
        return self._model

    @property
    def image_channels(self):
        return self.model.config["in_channels"]

    def to(self, device):
        self.device = torch.device(device)
        if self._model is not None:
            # Convolutions of GPUs run faster on channels that lie side by side in memory:
            layout = torch.channels_last if self.device.type == "cuda" else torch.preserve_format
            self._model.to(device, memory_format=layout)
        if self._std is not None:
            self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def encode_in(self, precision, compile=False):
        """Encode at a --precision, compiled if asked: for training, since sampling does not encode."""
        self._autocast = uses_bfloat16(precision)
        if compile:
            getattr(self.model, "encoder", self.model).compile(dynamic=False)

    @torch.no_grad()
    def moments(self, images):
        """Mean and log-variance, (N, 2 channels, H/factor, W/factor), of the posterior of each image; of a
        deterministic encoder its latents, (N, channels, H/factor, W/factor)."""
        images = to_float(images)
        if images.is_cuda:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._autocast):
            return torch.cat([self._moments(part) for part in in_parts(images)]).float()

    def _moments(self, images):
        latents = getattr(self.model.encode(images), self._architecture.latents)
        moments = latents if self.is_deterministic else torch.cat([latents.mean, latents.logvar], dim=1)
        return moments.contiguous()

    def sample_posterior(self, moments, noise):
        """Latents (N, channels, h, w), normalised, of what `moments` gave: drawn with this noise from
        posteriors; of a deterministic encoder they are what they are."""
        latents = to_float(moments)
        if not self.is_deterministic:
            mean, logvar = latents.chunk(2, dim=1)
            latents = mean + torch.exp(0.5 * logvar) * noise
        x = (latents - self.shift) * self.scale
        return x if self._std is None else (x - self._mean) / self._std

    def encode(self, images, noise):
        """Latents (N, channels, H/factor, W/factor), drawn from each image's posterior with this noise."""
        return self.sample_posterior(self.moments(images), noise)

    @torch.no_grad()
    def decode(self, x):
        """Images (N, 3, H, W) of latents."""
        x = x if self._std is None else x * self._std + self._mean
        x = x / self.scale + self.shift
        return torch.cat([self.model.decode(part).sample for part in in_parts(x, self.factor)])


def channel_statistics(config):
    """What a `config` says of the channels' statistics: channel_mean and channel_std, or nothing."""
    return {name: config[name] for name in ("channel_mean", "channel_std") if name in config}


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
    architecture, config = _read_config(name)
    with _loading_vae(name):
        described = architecture.describe(config)
        return described["channels"], described["factor"], config["in_channels"]


def is_deterministic(name):
    """Whether a VAE's encoder gives latents, no posterior; from its config alone, as describe_vae."""
    name = resolve_vae(name)
    if name in PUBLISHED_VAES.values():
        return name == PUBLISHED_VAES["taesd"]
    return _read_config(name)[0].is_deterministic


def is_copy(name, config):
    """Whether a folder holds an autoencoder such as this `config` is of, whose own folder is gone."""
    is_gone = os.path.isabs(config["vae"]) and not os.path.exists(config["vae"])
    if not is_gone or not os.path.isdir(name):
        return False
    architecture, found = _read_config(name)
    return dict(architecture.describe(found), vae=config["vae"]) == config


def load_autoencoder(name, device, image_channels=3, kept=None):
    """The VAE (on the device) of a name of PUBLISHED_VAES, a hub id or a folder; Pixels for "none".

    kept: a checkpoint's config of the autoencoder that it was trained with, whose channels' statistics are
    taken. Raises UserError where it cannot be had.
    """
    name = resolve_vae(name)
    autoencoder = Pixels(image_channels) if name == "none" else VAE(name)
    if name != "none" and channel_statistics(kept or {}):
        autoencoder.normalize_channels(**channel_statistics(kept))
    return autoencoder.to(device)


def add_vae_argument(parser, default, pixels=", or none to work on pixels", unnamed="mse"):
    """--vae, the same in every command. unnamed: the default where a checkpoint names none."""
    parser.add_argument(
        "--vae", default=default, metavar="VAE",
        help="autoencoder: ema or mse (the published fine-tuned SD-VAEs), taesd (a tiny one of the same"
        f" latents), a hub id, or a folder saved by diffusers{pixels}"
        f" (default: {default or f'the one of the checkpoint, or {unnamed} for published weights'})",
    )  # fmt: skip


def _loading_vae(name):
    """A context that turns what diffusers raises, where a VAE is not there or not one, into UserErrors."""
    is_folder = os.path.isdir(name)
    if is_folder and not os.path.isfile(os.path.join(name, "config.json")):
        raise UserError(
            f"--vae {name}: no config.json there; give the folder of an autoencoder saved by diffusers"
        )
    if not is_folder and (name.count("/") != 1 or name.startswith(("/", "."))):
        raise UserError(
            f"--vae {name}: no such folder; give ema, mse, taesd, a hub id as owner/name, a folder, or none"
        )
    remedy = "check the name and the network, or give a folder with a copy of it"
    if is_folder:
        remedy = "save it again with save_pretrained"
    errors = (OSError, ValueError, RuntimeError, KeyError, TypeError)
    return user_errors(f"--vae {name}", f"cannot be loaded; {remedy}", errors)


def _read_config(name):
    """(Architecture, contents) of a VAE's config.json; UserError where there is none, or of another class."""
    with _loading_vae(name):
        # Imported here, since it takes seconds that a pixel model need not wait:
        from diffusers import AutoencoderKL

        config = AutoencoderKL.load_config(name)
        found = config.get("_class_name", "AutoencoderKL")
    if found not in AUTOENCODERS:
        raise UserError(
            f"--vae {name}: its class is {found}; give one of {', '.join(AUTOENCODERS)}, or add a row to"
            " AUTOENCODERS in runtime/autoencoder.py"
        )
    return AUTOENCODERS[found], dict(config, _class_name=found)


def _load_model(name):
    """(Architecture, module with its weights) of a VAE."""
    architecture, config = _read_config(name)
    with _loading_vae(name):
        import diffusers

        found = config["_class_name"]
        if architecture.load is None and not hasattr(diffusers, found):
            raise ValueError(f"diffusers {diffusers.__version__} has no {found}, a newer one may")
        load = architecture.load or getattr(diffusers, found).from_pretrained
        with torch_defaults():
            model = load(name)
    if architecture.is_deterministic:  # convolutions of 64 channels take half the time so, on a CPU too
        model.to(memory_format=torch.channels_last)
    return architecture, model
