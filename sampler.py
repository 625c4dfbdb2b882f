"""From labels and seeds to images: the one path that every command, and anyone who imports it, samples by.

    sampler = Sampler.from_checkpoint("results/000-DiT-S-2-digits/checkpoints/0002000.pt")
    images = sampler.sample([3, 1, 4])                  # (3, C, H, W) in [0, 1]
    images = sampler.sample_each_class(10, cfg_scale=2.0)

Every image has a seed of its own, from which its label (if random), its first noise and one noise a step are
drawn in this order, on the CPU. So an image depends on its seed alone, not on its batch, process or device
(but for rounding in matrix products, which changes with the shape of the batch).
"""

import math
import os
from numbers import Integral

import torch
from tqdm.auto import tqdm

import checkpoint
from autoencoder import Pixels, describe_vae, load_autoencoder
from diffusion import SAMPLERS, Guidance, create_diffusion, create_process, space_timesteps
from download import find_file
from models import null_label
from runtime import UserError, blame

# How the published scripts sample, where neither the caller nor the checkpoint says otherwise:
DEFAULTS = dict(cfg_scale=4.0, steps="250", sampler="ddpm")


class SampleNoise:
    """Randomness of a batch, row by row: each row has a generator, seeded by its own seed (modulo 2^32)."""

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(int(seed) % 2**32) for seed in seeds]

    def labels(self, num_classes):
        """A random label a row, (N,)."""
        return torch.stack([torch.randint(num_classes, (), generator=g) for g in self.generators])

    def randn(self, shape):
        """Normal noise (N, *shape), on the CPU."""
        noise = torch.empty(len(self.generators), *shape)
        for row, generator in zip(noise, self.generators):
            torch.randn(shape, generator=generator, out=row)
        return noise

    def randn_like(self, x):
        """Noise of the shape, device and type of x (N, …)."""
        return self.randn(x.shape[1:]).to(x.device, x.dtype)


class Sampler:
    """Samples a model.

    model        a DiT, conditional or not, of latents or pixels
    process      the process it was trained for; None for the paper's diffusion
    autoencoder  what decodes its latents; None where the model sees pixels
    device       None for a GPU where there is one
    defaults     cfg_scale, steps and sampler, for calls that do not give them
    """

    def __init__(self, model, process=None, autoencoder=None, device=None, defaults=None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self.process = process or create_diffusion(None, learn_sigma=model.learn_sigma)
        self.autoencoder = (autoencoder or Pixels(model.in_channels)).to(self.device)
        self.defaults = {**DEFAULTS, **(defaults or {})}

    @classmethod
    def from_checkpoint(cls, path, *, device=None, **options):
        """The sampler of a checkpoint file, or of published weights by name ("DiT-XL-2-256x256.pt").

        Options: weights, model, image_size, num_classes, vae; see Plan.
        """
        return Plan(path, **options).build(device)

    def sample(
        self,
        n_or_labels,
        *,
        seeds=None,
        cfg_scale=None,
        steps=None,
        sampler=None,
        batch_size=64,
        progress=False,
    ):
        """Images (N, C, H, W), float in [0, 1], on the CPU.

        n_or_labels   how many, with random labels; or the label of each, of 0 … num_classes-1
        seeds         one a sample, or the first of N consecutive ones; None for 0 … N-1
        cfg_scale     guidance: 1 for none; refused for a model that knows no null label
        steps         denoising steps, or a spacing as "10,15,20" or "ddim50"
        sampler       "ddpm" or "ddim"
        batch_size    images at a time; does not change them
        progress      show a bar
        Raises UserError, a ValueError, for anything out of range.
        """
        labels = None if isinstance(n_or_labels, Integral) else [int(label) for label in n_or_labels]
        count = int(n_or_labels) if labels is None else len(labels)
        if count < 1:
            raise UserError(f"{count} samples: ask for at least 1")
        first = 0 if seeds is None else seeds
        seeds = range(first, first + count) if isinstance(first, Integral) else list(seeds)
        if len(seeds) != count:
            raise UserError(f"{len(seeds)} seeds for {count} samples: give as many, or the first one")
        cfg_scale, steps, sampler = settle_request(
            self.model.config,
            self.process.original_num_steps,
            self.defaults,
            labels,
            cfg_scale,
            steps,
            sampler,
        )
        images, batches = [], math.ceil(count / batch_size)
        process = self.process.respaced(steps)
        with tqdm(
            total=batches * process.num_timesteps, disable=not progress, desc="Sampling", unit="step"
        ) as bar:
            for start in range(0, count, batch_size):
                rows = slice(start, start + batch_size)
                x = self._sample_batch(
                    process, seeds[rows], labels and labels[rows], cfg_scale, sampler, lambda _: bar.update()
                )
                images.append(((self.autoencoder.decode(x) + 1) / 2).clamp(0, 1).float().cpu())
        return torch.cat(images)

    def sample_each_class(self, n_per_class, classes=None, **options):
        """n_per_class images of every class in turn, or of the classes given. Options as sample's."""
        classes = range(self.model.num_classes) if classes is None else classes
        if not self.model.num_classes:
            raise UserError("sample_each_class: this model is unconditional; use sample(n)")
        return self.sample([label for label in classes for _ in range(n_per_class)], **options)

    def _sample_batch(self, process, seeds, labels, cfg_scale, sampler, callback):
        model, noise = self.model, SampleNoise(seeds)
        model_kwargs, guidance = {}, None
        if model.num_classes:
            y = noise.labels(model.num_classes) if labels is None else torch.tensor(labels)
            model_kwargs = dict(y=y.to(self.device))
            if cfg_scale != 1:
                # The published samples guide three of the four latent channels; anything else is guided
                # whole.
                channels = 3 if model.in_channels == 4 else None
                guidance = Guidance(cfg_scale, model.null_label, channels)
        z = noise.randn((model.in_channels, *model.input_size)).to(self.device)
        return process.sample(
            model, z, sampler=sampler, model_kwargs=model_kwargs, guidance=guidance,
            randn_like=noise.randn_like, clip_denoised=self.autoencoder.clip_denoised, callback=callback,
        )  # fmt: skip


class Plan:
    """A checkpoint of which only the small parts are read, so that requests can be checked before any work.

    weights                          "ema" or "raw"
    model, image_size, num_classes   what the caller holds it to be; None leaves it to the checkpoint
    vae                              another autoencoder than the checkpoint's, see load_autoencoder
    default_vae                      for a checkpoint that names none
    Raises UserError where the checkpoint is none, or another than the caller holds it to be.
    """

    def __init__(
        self,
        path,
        *,
        weights="ema",
        model=None,
        image_size=None,
        num_classes=None,
        vae=None,
        default_vae="mse",
    ):
        self.path, self.weights = find_file(path), weights
        self.checkpoint = checkpoint.load(self.path)
        kept = self.checkpoint.config
        self.vae = vae or kept.get("autoencoder", {}).get("vae") or default_vae
        # How many channels the images have shows in the model alone where there is no VAE:
        channels, factor, _ = describe_vae(self.vae, image_channels=None)
        self.model_config = self.checkpoint.model_config(
            model=model, image_size=image_size, num_classes=num_classes, factor=factor
        )
        in_channels = self.model_config["in_channels"]
        if channels not in (None, in_channels):
            raise UserError(
                f"--vae {self.vae}: its latents have {channels} channels, {self.path} takes {in_channels};"
                " give the one it was trained with, or none for pixels"
            )
        self.process = create_process(kept.get("process", dict(learn_sigma=self.model_config["learn_sigma"])))
        self.defaults = {**DEFAULTS, **kept.get("sampling", {})}

    def check(self, labels=None, cfg_scale=None, steps=None, sampler=None):
        """Raise UserError for a request that this checkpoint cannot serve."""
        num_timesteps = self.process.original_num_steps
        settle_request(self.model_config, num_timesteps, self.defaults, labels, cfg_scale, steps, sampler)

    def build(self, device=None):
        """The Sampler, with all weights loaded."""
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        network = checkpoint.build_model(
            self.model_config, self.checkpoint.state_dict(self.weights), self.path
        )
        autoencoder = load_autoencoder(self.vae, device, image_channels=network.in_channels)
        return Sampler(network, self.process, autoencoder, device, self.defaults)


def settle_request(
    model_config, num_timesteps, defaults, labels=None, cfg_scale=None, steps=None, sampler=None
):
    """What (cfg_scale, steps, sampler) come to with the defaults; UserError for what a model cannot do."""
    null, num_classes = null_label(model_config), model_config["num_classes"]
    if labels is not None:
        check_labels(labels, num_classes)
    if cfg_scale not in (None, 1) and null is None:
        why = "was trained without label dropout" if num_classes else "is unconditional"
        raise UserError(
            f"--cfg-scale {cfg_scale}: this model {why}, so there is nothing to guide; leave it out"
        )
    if cfg_scale is None:
        cfg_scale = defaults["cfg_scale"] if null is not None else 1.0
    if steps is None:
        steps = defaults["steps"]
    sampler = sampler or defaults["sampler"]
    if sampler not in SAMPLERS:
        raise UserError(f"--sampler {sampler}: choose one of {', '.join(SAMPLERS)}")
    check_sampling_options(cfg_scale, steps, num_timesteps)
    return cfg_scale, steps, sampler


def check_labels(labels, num_classes):
    """Raise UserError for a label that is not one of the model's classes."""
    for label in labels:
        if not num_classes:
            raise UserError(f"--class-labels {label}: this model is unconditional; leave it out")
        if not 0 <= label < num_classes:
            raise UserError(f"--class-labels {label}: must be between 0 and {num_classes - 1}")


def check_sampling_options(cfg_scale, steps, num_timesteps=1000):
    """Raise UserError for a guidance scale, or a number of steps out of num_timesteps, that cannot be; None
    is fine."""
    if cfg_scale is not None and not 0 <= cfg_scale < math.inf:
        raise UserError(f"--cfg-scale {cfg_scale}: must be 0 or more; 1 is without guidance")
    if steps is not None:
        with blame(f"--num-sampling-steps {steps}"):
            space_timesteps(num_timesteps, steps)


def add_sampling_arguments(parser):
    """--cfg-scale, --num-sampling-steps and --sampler, the same in every command."""
    parser.add_argument(
        "--cfg-scale", type=float, default=None, metavar="SCALE",
        help="classifier-free guidance: 1 for none, more for clearer and less varied images"
        " (default: the run's own; {cfg_scale} where it has none)".format(**DEFAULTS),
    )  # fmt: skip
    parser.add_argument(
        "--num-sampling-steps", type=str, default=None, metavar="STEPS",
        help="denoising steps: a number, sections as 10,15,20, or a stride as ddim50"
        " (default: the run's own; {steps} where it has none)".format(**DEFAULTS),
    )  # fmt: skip
    parser.add_argument(
        "--sampler", choices=list(SAMPLERS), default=None,
        help="ddpm, ancestral, or ddim, deterministic and good with fewer steps"
        " (default: the run's own; {sampler} where it has none)".format(**DEFAULTS),
    )  # fmt: skip


def save_grid(images, path, nrow):
    """Write images (N, C, H, W) in [0, 1] as one PNG, nrow a row; tiny ones enlarged for the eye."""
    from torchvision.utils import save_image

    enlarge = max(1, 64 // min(images.shape[-2:]))
    if enlarge > 1:
        images = torch.nn.functional.interpolate(images, scale_factor=enlarge, mode="bicubic").clamp(0, 1)
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    save_image(images, path, nrow=nrow, pad_value=0.25 if enlarge > 1 else 0)
