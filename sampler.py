"""From labels and seeds to images: the one path that every command, and anyone who imports it, samples by.

    sampler = Sampler.from_checkpoint("results/000-DiT-S-2-digits/checkpoints/0002000.pt")
    images = sampler.sample([3, 1, 4])                  # (3, C, H, W) in [0, 1]
    images = sampler.sample_each_class(10, cfg_scale=2.0)

Every image has a seed of its own, from which its first noise and one noise a step are drawn in this order, on
the CPU, and from another stream its label, if random. So an image depends on its seed and label alone, given
or drawn, not on its batch, process or device (but for rounding in matrix products, which changes with the
shape of the batch).
"""

import contextlib
import math
import os
from functools import cached_property

import torch
from tqdm.auto import tqdm

from checkpointing import files as checkpoints
from checkpointing.published import PRETRAINED_MODELS, find_file, published_config
from diffusion import create_diffusion, create_process
from models import DiT_models
from runtime.autoencoder import Pixels, channel_statistics, describe_vae, load_autoencoder
from runtime.cli import UserError
from runtime.distributed import PRECISIONS
from runtime.image_io import to_unit
from sampling.cuda_graphs import GraphedModel
from sampling.noise import DRAWS, PublishedNoise, SampleNoise
from sampling.options import (
    DEFAULTS,
    as_integers,
    as_path,
    as_plain,
    check_cuda_graphs,
    check_published_draws,
    describe_value,
    is_whole_number,
    make_guidance,
    resolve_sampling_options,
)

FRAMES = 32  # of a trajectory, after the noise


class Sampler:
    """Samples a model.

    model        a DiT, conditional or not, of latents or pixels
    process      the process it was trained for; None for the paper's diffusion
    autoencoder  what decodes its latents; None where the model sees pixels
    device       None for a GPU where there is one
    defaults     options for calls that do not give them, see DEFAULTS
    guide        a weaker model of the same kind that guides in place of the null label (autoguidance)
    cuda_graphs  replay a recording of each forward pass, faster in small batches; on a GPU only
    """

    def __init__(
        self, model, process=None, autoencoder=None, device=None, defaults=None, guide=None, cuda_graphs=False
    ):
        self.device = check_cuda_graphs(cuda_graphs, device)
        self.model = model.to(self.device)
        self.process = process or create_diffusion(None, learn_sigma=model.learn_sigma)
        self.autoencoder = (autoencoder or Pixels(model.in_channels)).to(self.device)
        self.defaults = {**DEFAULTS, **self.process.sampling, **(defaults or {})}
        self.guide = guide and guide.to(self.device)
        self._modules = [part for network in (model, guide) if network for part in network.modules()]
        if cuda_graphs:
            self.network, self.guide = GraphedModel(self.model), self.guide and GraphedModel(self.guide)
        else:
            self.network = self.model

    @classmethod
    def from_checkpoint(
        cls, path, *, device=None, precision=None, compile=False, cuda_graphs=False, **options
    ):
        """The sampler of a checkpoint file, or of published weights by name ("DiT-XL-2-256x256.pt").

        precision, compile, cuda_graphs: see CheckpointSpec.build. Options: weights, model, image_size,
        num_classes, vae, guide; see CheckpointSpec.
        """
        return CheckpointSpec(path, **options).build(device, precision, compile, cuda_graphs)

    def sample(
        self,
        n_or_labels,
        *,
        seeds=None,
        cfg_scale=None,
        cfg_channels=None,
        cfg_interval=None,
        cfg_schedule=None,
        steps=None,
        sampler=None,
        batch_size=64,
        published_draws=False,
        return_trajectory=False,
        progress=False,
    ):
        """Images (N, C, H, W), float in [0, 1], on the CPU.

        n_or_labels   how many, with random labels; or the label of each, of 0 … num_classes-1; or, of a model
                      of another condition than classes, a tensor of conditions (N, …)
        seeds         one a sample, or the first of N consecutive ones; None for 0 … N-1
        cfg_scale     guidance: 1 for none; refused for a model that knows no null label
        cfg_channels  how many channels are guided, or "all"
        cfg_interval  (low, high], the noise levels sigma / alpha that are guided
        cfg_schedule  "constant", or "power-cosine"
        steps         denoising steps; for ddpm and ddim also a spacing as "10,15,20" or "ddim50"
        sampler       one of the process's `samplers`: "ddpm", of a diffusion alone, "ddim", "dpm++", "euler",
                      "heun", or "sde", of a flow alone
        batch_size    images at a time; does not change them
        published_draws    draw as the published sample.py does with the (one) seed: the same picture from
                           the same weights, but an image then depends on its place among the others
        return_trajectory  return (images, trajectory): at most 33 frames (F, N, C, H, W) from noise to image
        progress      show a bar
        None stands for the run's own default. Raises UserError, a ValueError, for anything out of
        range, or of another type.
        """
        count, labels, seeds = self._settle_rows(n_or_labels, seeds)
        options = self.settle(
            labels=None if isinstance(labels, torch.Tensor) else labels, cfg_scale=cfg_scale,
            cfg_channels=cfg_channels, cfg_interval=cfg_interval, cfg_schedule=cfg_schedule, steps=steps,
            sampler=sampler,
        )  # fmt: skip
        batch_size = as_plain(batch_size)
        if not is_whole_number(batch_size) or batch_size < 1:
            raise UserError(f"batch_size {describe_value(batch_size)}: must be a whole number, at least 1")
        if published_draws:
            if labels is None and self.model.num_classes:
                raise UserError("published_draws: the published script draws no labels; give them")
            check_published_draws(seeds, options)
            batch_size = count
        return self._sample_batches(
            seeds, labels, options, batch_size, published_draws, return_trajectory, progress
        )

    def _sample_batches(
        self, seeds, labels, options, batch_size, published_draws, return_trajectory, progress
    ):  # fmt: skip
        """What sample returns, of arguments that are checked."""
        count = len(seeds)
        total = self.process.count_steps(options["sampler"], options["steps"])
        shown = {round(i * total / FRAMES) for i in range(1, FRAMES + 1)} if return_trajectory else ()
        batches, images, trajectories = math.ceil(count / batch_size), [], []
        with tqdm(total=batches * total, disable=not progress, desc="Sampling", unit="step") as bar:
            for start in range(0, count, batch_size):
                rows, kept = slice(start, start + batch_size), []

                def callback(state, kept=kept):
                    bar.update()
                    if state["i"] in shown:
                        kept.append(state["x"])

                batch_labels = None if labels is None else labels[rows]
                x, _ = self.generate(seeds[rows], batch_labels, options, callback, published_draws, kept)
                images.append(to_unit(x))
                if return_trajectory:
                    frames = [to_unit(self.autoencoder.decode(state)) for state in kept[:-1]]
                    trajectories.append(torch.stack([*frames, images[-1]]))
        images = torch.cat(images)
        return (images, torch.cat(trajectories, dim=1)) if return_trajectory else images

    def sample_each_class(self, n_per_class, classes=None, **options):
        """n_per_class images of every class in turn, or of the classes given. Options as sample's."""
        n_per_class = as_plain(n_per_class)
        if not is_whole_number(n_per_class) or n_per_class < 1:
            raise UserError(f"n_per_class {describe_value(n_per_class)}: must be a whole number, at least 1")
        if not self.model.num_classes:
            raise UserError("sample_each_class: this model is unconditional; use sample(n)")
        classes = range(self.model.num_classes) if classes is None else as_integers(classes, "classes")
        return self.sample([label for label in classes for _ in range(n_per_class)], **options)

    def image_to_image(self, images, labels=None, new_labels=None, *, cfg_scale=None, steps=None):
        """Images (N, C, H, W), float in [0, 1], led back to noise by reverse DDIM, then to images of other
        labels.

        labels       what they show, one each; None for not known
        new_labels   what they should show; None for the same, which gives about the same images
        cfg_scale    guidance on the way to the new images alone; None for the run's own, and for none where
                     the labels stay
        steps        of each way
        """
        self._check_images(images)
        old = None if labels is None else as_integers(labels, "labels")
        new = old if new_labels is None else as_integers(new_labels, "new_labels")
        for given in (old, new):
            if given is not None and len(given) != len(images):
                raise UserError(f"{len(given)} labels for {len(images)} images: give as many")
        if new_labels is None and cfg_scale is None:
            cfg_scale = 1.0
        options = self.settle(
            labels=[*(old or []), *(new or [])] or None, cfg_scale=cfg_scale, steps=steps, sampler="ddim"
        )
        null = self.model.null_label
        if self.model.num_classes and None in (old, new) and null is None:
            raise UserError("labels: this model was trained with every label given; name those of the images")
        shape = (len(images), self.model.in_channels, *self.model.input_size)
        images = images.to(self.device, torch.float32)
        noise = torch.zeros(shape, dtype=torch.float32, device=self.device)
        x = self.autoencoder.encode(images * 2 - 1, noise)
        clip = self.autoencoder.clip_denoised
        with self._evaluating():
            noise = self.process.invert(
                self.network, x, steps=options["steps"], model_kwargs=self._model_kwargs(old, len(x)),
                clip_denoised=clip,
            )  # fmt: skip
            x = self.process.sample(
                self.network, noise, sampler="ddim", steps=options["steps"], clip_denoised=clip,
                model_kwargs=self._model_kwargs(new, len(x)),
                guidance=None if new is None else make_guidance(options, self.model, self.guide),
            )  # fmt: skip
        return to_unit(self.autoencoder.decode(x))

    def _check_images(self, images):
        if not isinstance(images, torch.Tensor) or not images.is_floating_point() or images.ndim != 4:
            raise UserError("images: must be a tensor (N, C, H, W) of values in [0, 1]")
        shape, factor = tuple(images.shape), self.autoencoder.factor
        expected = (self.autoencoder.image_channels, *(side * factor for side in self.model.input_size))
        if shape[1:] != expected or not shape[0]:
            raise UserError(f"images {shape}: must be (N, %d, %d, %d), and one or more" % expected)
        if not 0 <= images.min() <= images.max() <= 1:  # nor NaN
            raise UserError("images: must be a tensor (N, C, H, W) of values in [0, 1]")

    def settle(self, **options):
        """All sampling options, with the defaults for those left out; UserError for what cannot be."""
        return resolve_sampling_options(
            self.model.config, self.process, self.defaults, has_guide=self.guide is not None, **options
        )

    def generate(self, seeds, labels, options, callback=None, published_draws=False, kept=None):
        """One batch, decoded but not rounded or clamped: (images (N, C, H, W) in about [-1, 1], labels (N,)).

        seeds     one a sample
        labels    one a sample, or a tensor of conditions; None for random ones, or for an unconditional model
        options   as `settle` gave them; and draws, see SampleNoise, where it is not the present rule
        kept      a list that gets the noise sampling starts from
        """
        model, shape = self.model, (self.model.in_channels, *self.model.input_size)
        if published_draws:
            noise = PublishedNoise(seeds[0], len(seeds), self.device, model.config)
        else:
            noise = SampleNoise(seeds, options.get("draws", DRAWS))
        if labels is None and model.num_classes:
            labels = noise.labels(model.num_classes).tolist()
        z = noise.randn(shape).to(self.device)
        if kept is not None:
            kept.append(z)
        with self._evaluating():
            x = self.process.sample(
                self.network, z, sampler=options["sampler"], steps=options["steps"],
                model_kwargs=self._model_kwargs(labels, len(seeds)),
                guidance=make_guidance(options, model, self.guide), randn_like=noise.randn_like,
                clip_denoised=self.autoencoder.clip_denoised, callback=callback,
            )  # fmt: skip
        return self.autoencoder.decode(x), labels

    @contextlib.contextmanager
    def _evaluating(self):
        """Model and guide in evaluation mode, in training they would drop labels; then as they were, module
        by module, whatever is raised inside."""
        training = [module for module in self._modules if module.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True

    def _model_kwargs(self, labels, n):
        if not self.model.num_classes:
            return {}
        if isinstance(labels, torch.Tensor):
            return dict(y=labels.to(self.device))
        indices = torch.tensor([0] * n if labels is None else labels, dtype=torch.int64, device=self.device)
        y = self.model.y_embedder.from_labels(indices)
        return dict(y=self.model.y_embedder.null_like(y) if labels is None else y)

    def _as_conditions(self, values):
        """Conditions (N, …) of the type that the model takes; None where these are labels, or a number."""
        condition = self.model.config.get("condition", "class")
        if condition == "class" or not getattr(values, "ndim", 0):
            return None
        values = torch.as_tensor(values)
        if values.ndim == 1 and not values.is_floating_point():
            return None
        like = self.model.y_embedder.from_labels(torch.zeros(1, dtype=torch.int64, device=self.device))
        if values.shape[1:] != like.shape[1:] or not values.isfinite().all():
            shape = ", ".join(["N", *map(str, like.shape[1:])])
            raise UserError(f"conditions {tuple(values.shape)}: {condition!r} are ({shape}), and finite")
        return values.to(like.dtype)

    def _settle_rows(self, n_or_labels, seeds):
        n_or_labels, seeds = as_plain(n_or_labels), 0 if seeds is None else as_plain(seeds)
        labels = self._as_conditions(n_or_labels)
        if labels is None and not is_whole_number(n_or_labels):
            labels = as_integers(n_or_labels, "labels")
        count = int(n_or_labels) if labels is None else len(labels)
        if count < 1:
            raise UserError(f"{count} samples: ask for at least 1")
        if is_whole_number(seeds):
            seeds = range(seeds, seeds + count)
        elif not isinstance(seeds, range):
            seeds = as_integers(seeds, "seeds")
        if min(seeds, default=0) < 0:
            raise UserError(f"--seed {min(seeds)}: must be 0 or more")
        if len(seeds) != count:
            raise UserError(f"--seed: {len(seeds)} seeds for {count} samples; give as many, or the first one")
        return count, labels, seeds


class CheckpointSpec:
    """A checkpoint of which only the small parts are read, so that requests can be checked before any work;
    of published weights nothing, until they are needed.

    weights                          "ema" or "raw"
    model, image_size, num_classes   what the caller holds it to be; None leaves it to the checkpoint
    vae                              another autoencoder than the checkpoint's, see load_autoencoder
    guide                            the checkpoint of a weaker model, for autoguidance
    default_vae                      for a checkpoint that names none
    defaults                         of sampling options, for a checkpoint that keeps none; see DEFAULTS
    flag                             what names the path in errors
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
        guide=None,
        default_vae="mse",
        defaults=None,
        flag="--ckpt",
    ):
        self.path, self.weights, self.flag = as_path(path, flag), weights, flag
        vae = vae and as_path(vae, "--vae")
        if weights not in ("ema", "raw"):
            raise UserError(f"--weights {describe_value(weights)}: must be ema or raw")
        if model not in (None, *DiT_models):
            raise UserError(f"--model {describe_value(model)}: choose one of {', '.join(DiT_models)}")
        if self.path in PRETRAINED_MODELS and not os.path.exists(self.path):
            kept = {}
            described = checkpoints.Checkpoint(self.path, {}, dict(model=published_config(self.path)))
        else:
            self.checkpoint.state_dict(weights)  # which it may not have
            kept, described = self.checkpoint.config, self.checkpoint
        self.autoencoder_config = kept.get("autoencoder", {})
        self.vae = vae or self.autoencoder_config.get("vae") or default_vae
        # How many channels the images have shows in the model alone where there is no VAE:
        channels, factor, image_channels = describe_vae(self.vae, image_channels=None)
        self.model_config = described.model_config(
            model=model, image_size=image_size, num_classes=num_classes, factor=factor
        )
        in_channels = self.model_config["in_channels"]
        if channels not in (None, in_channels):
            raise UserError(
                f"--vae {self.vae}: its latents have {channels} channels, {self.path} takes {in_channels};"
                " give the one it was trained with, or none for pixels"
            )
        self.process = create_process(kept.get("process", dict(learn_sigma=self.model_config["learn_sigma"])))
        self.image_size = tuple(side * factor for side in self.model_config["input_size"])
        self.image_channels = image_channels or in_channels
        self.defaults = {**DEFAULTS, **self.process.sampling, **(defaults or {}), **kept.get("sampling", {})}
        self.classes = kept.get("data", {}).get("classes")  # their names
        self.guide = guide and self._check_guide(CheckpointSpec(guide, vae=self.vae, flag="--guide"))

    @cached_property
    def checkpoint(self):
        """The file itself, which published weights are fetched for."""
        return checkpoints.load(find_file(self.path, self.flag), self.flag)

    def _check_guide(self, guide):
        for name in ("input_size", "in_channels", "num_classes", "condition"):
            mine, other = self.model_config.get(name), guide.model_config.get(name)
            if mine != other:
                raise UserError(f"--guide {guide.path}: its {name} is {other}, and {mine} in {self.path}")
        mine, other = (channel_statistics(spec.autoencoder_config) for spec in (self, guide))
        if mine != other:
            raise UserError(
                f"--guide {guide.path}: its latents are normalised otherwise than those of {self.path}"
            )
        if guide.process.config != self.process.config:
            raise UserError(f"--guide {guide.path}: was trained for another process than {self.path}")
        return guide

    def check(self, **options):
        """Raise UserError for labels, or options of sampling, that this checkpoint cannot serve."""
        return resolve_sampling_options(
            self.model_config, self.process, self.defaults, has_guide=self.guide is not None, **options
        )

    def check_pictures(self):
        """Raise UserError where its images are neither grey nor RGB."""
        if self.image_channels not in (1, 3):
            raise UserError(
                f"{self.flag} {self.path}: images of {self.image_channels} channels make no pictures"
            )

    def build(self, device=None, precision=None, compile=False, cuda_graphs=False):
        """The Sampler, with all weights loaded.

        precision    "bf16" to store and multiply the blocks' weights in bfloat16
        compile      whether to compile the blocks
        cuda_graphs  whether to record forward passes and replay them, on a GPU
        """
        device = check_cuda_graphs(cuda_graphs, device)
        if precision not in (None, *PRECISIONS):
            raise UserError(f"--precision {describe_value(precision)}: choose one of {', '.join(PRECISIONS)}")
        network = self._build_network(precision, compile)
        guide = self.guide and self.guide._build_network(precision, compile)
        autoencoder = load_autoencoder(self.vae, device, network.in_channels, self.autoencoder_config)
        return Sampler(network, self.process, autoencoder, device, self.defaults, guide, cuda_graphs)

    def _build_network(self, precision, compile):
        network = checkpoints.build_model(
            self.model_config, self.checkpoint.state_dict(self.weights), self.path
        )
        if precision == "bf16":
            network.store_bfloat16()
        if compile:
            network.compile_blocks()
        return network
