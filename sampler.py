"""From labels and seeds to images: the one path that every command, and anyone who imports it, samples by.

    sampler = Sampler.from_checkpoint("results/000-DiT-S-2-digits/checkpoints/0002000.pt")
    images = sampler.sample([3, 1, 4])                  # (3, C, H, W) in [0, 1]
    images = sampler.sample_each_class(10, cfg_scale=2.0)

Every image has a seed of its own, from which its first noise and one noise a step are drawn in this order, on
the CPU, and from another stream its label, if random. So an image depends on its seed and label alone, given
or drawn, not on its batch, process or device (but for rounding in matrix products, which changes with the
shape of the batch).
"""

import argparse
import contextlib
import math
import os
from functools import cached_property
from numbers import Integral, Real

import torch
from tqdm.auto import tqdm

import checkpoint
from autoencoder import Pixels, add_vae_argument, describe_vae, load_autoencoder
from diffusion import SAMPLERS, SCHEDULES, Guidance, create_diffusion, create_process
from download import PRETRAINED_MODELS, find_file
from graphs import Graphed
from images import to_unit
from models import DiT, DiT_models, null_label
from runtime import (
    LABEL,
    PRECISIONS,
    UserError,
    add_precision_argument,
    blame,
    derive_seed,
    fold_seed,
    torch_defaults,
)

# How the published script samples, where neither the caller nor the checkpoint says otherwise. The published
# samples guide three of the four latent channels; a model of another number of channels is guided whole.
# What a process is sampled by, it says itself.
FID_CFG_SCALE = 1.5  # with which the paper's best numbers were made
DEFAULTS = dict(cfg_scale=4.0, cfg_channels=None, cfg_interval=None, cfg_schedule="constant")
# Steps of a sampler that is asked for in place of the default one:
STEPS = {"ddpm": "250", "ddim": "50", "dpm++": "25", "euler": "50", "heun": "25", "sde": "250"}
PUBLISHED_SIZES = {"DiT-XL-2-256x256.pt": 256, "DiT-XL-2-512x512.pt": 512}  # pixels
FRAMES = 32  # of a trajectory, after the noise
DRAWS = 2  # the rule by which a seed becomes label and noise; see SampleNoise


class SampleNoise:
    """Randomness of a batch, row by row: each row has a generator, seeded by its own seed.

    draws   1 for the rule of earlier versions, by which the samples that they began are continued: a label
            comes first out of the generator of the noise, which is then another than under a given label,
            and seeds count modulo 2^32
    """

    def __init__(self, seeds, draws=DRAWS):
        self.seeds, self.draws = [int(seed) for seed in seeds], draws
        folded = [seed % 2**32 if draws == 1 else fold_seed(seed) for seed in self.seeds]
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in folded]

    def labels(self, num_classes):
        """A random label a row, (N,)."""
        if self.draws == 1:
            draws = [torch.randint(num_classes, (), generator=g, device="cpu") for g in self.generators]
            return torch.stack(draws)
        labels = [derive_seed(seed, LABEL) % num_classes for seed in self.seeds]
        return torch.tensor(labels, dtype=torch.int64, device="cpu")

    def randn(self, shape):
        """Normal noise (N, *shape), on the CPU."""
        noise = torch.empty(len(self.generators), *shape, dtype=torch.float32, device="cpu")
        for row, generator in zip(noise, self.generators):
            row.normal_(generator=generator)
        return noise

    def randn_like(self, x):
        """Noise of the shape, device and type of x (N, …)."""
        noise = self.randn(x.shape[1:])
        if x.is_cuda:  # from there it is copied without waiting for the GPU
            noise = noise.pin_memory()
        return noise.to(x.device, x.dtype, non_blocking=True)


class PublishedNoise:
    """Randomness of a batch of n as the published sample.py draws it: one generator, rows for the null half.

    On the CPU, the initialisation of the model, of this config, comes first out of the same generator.
    """

    def __init__(self, seed, n, device, model_config):
        self.n, self.device = n, device
        self.generator = torch.Generator(device).manual_seed(seed)
        if device.type == "cpu":
            with torch.random.fork_rng(devices=[]), torch_defaults():
                torch.manual_seed(seed)
                DiT(**model_config)
                self.generator.set_state(torch.get_rng_state())

    def randn(self, shape):
        return self._draw(self.n, *shape)

    def randn_like(self, x):
        return self._draw(2 * self.n, *x.shape[1:])[: self.n]

    def _draw(self, *shape):
        return torch.randn(shape, dtype=torch.float32, device=self.device, generator=self.generator)


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
            self.network, self.guide = Graphed(self.model), self.guide and Graphed(self.guide)
        else:
            self.network = self.model

    @classmethod
    def from_checkpoint(
        cls, path, *, device=None, precision=None, compile=False, cuda_graphs=False, **options
    ):
        """The sampler of a checkpoint file, or of published weights by name ("DiT-XL-2-256x256.pt").

        precision, compile, cuda_graphs: see Plan.build. Options: weights, model, image_size, num_classes,
        vae, guide; see Plan.
        """
        return Plan(path, **options).build(device, precision, compile, cuda_graphs)

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

        n_or_labels   how many, with random labels; or the label of each, of 0 … num_classes-1
        seeds         one a sample, or the first of N consecutive ones; None for 0 … N-1
        cfg_scale     guidance: 1 for none; refused for a model that knows no null label
        cfg_channels  how many channels are guided, or "all"
        cfg_interval  (low, high], the noise levels sigma / alpha that are guided
        cfg_schedule  "constant", or "power-cosine"
        steps         denoising steps; for ddpm and ddim also a spacing as "10,15,20" or "ddim50"
        sampler       of a diffusion: "ddpm", "ddim", "dpm++", "euler" or "heun"; of a flow: "euler", "heun",
                      "sde", "dpm++" or "ddim"
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
            labels=labels, cfg_scale=cfg_scale, cfg_channels=cfg_channels, cfg_interval=cfg_interval,
            cfg_schedule=cfg_schedule, steps=steps, sampler=sampler,
        )  # fmt: skip
        batch_size = _plain(batch_size)
        if not _is_whole(batch_size) or batch_size < 1:
            raise UserError(f"batch_size {_shown(batch_size)}: must be a whole number, at least 1")
        if published_draws:
            if labels is None and self.model.num_classes:
                raise UserError("published_draws: the published script draws no labels; give them")
            check_published_draws(seeds, options)
            batch_size = count
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
        n_per_class = _plain(n_per_class)
        if not _is_whole(n_per_class) or n_per_class < 1:
            raise UserError(f"n_per_class {_shown(n_per_class)}: must be a whole number, at least 1")
        if not self.model.num_classes:
            raise UserError("sample_each_class: this model is unconditional; use sample(n)")
        classes = range(self.model.num_classes) if classes is None else _integers(classes, "classes")
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
        old = None if labels is None else _integers(labels, "labels")
        new = old if new_labels is None else _integers(new_labels, "new_labels")
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
                guidance=None if new is None else make_guidance(options, self.model.config, self.guide),
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
        return settle_options(
            self.model.config, self.process, self.defaults, has_guide=self.guide is not None, **options
        )

    def generate(self, seeds, labels, options, callback=None, published_draws=False, kept=None):
        """One batch, decoded but not rounded or clamped: (images (N, C, H, W) in about [-1, 1], labels (N,)).

        seeds     one a sample
        labels    one a sample; None for random ones, or for an unconditional model
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
                guidance=make_guidance(options, model.config, self.guide), randn_like=noise.randn_like,
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
        labels = [self.model.null_label] * n if labels is None else labels
        return dict(y=torch.tensor(labels, dtype=torch.int64, device=self.device))

    @staticmethod
    def _settle_rows(n_or_labels, seeds):
        n_or_labels, seeds = _plain(n_or_labels), 0 if seeds is None else _plain(seeds)
        labels = None if _is_whole(n_or_labels) else _integers(n_or_labels, "labels")
        count = int(n_or_labels) if labels is None else len(labels)
        if count < 1:
            raise UserError(f"{count} samples: ask for at least 1")
        if _is_whole(seeds):
            seeds = range(seeds, seeds + count)
        elif not isinstance(seeds, range):
            seeds = _integers(seeds, "seeds")
        if min(seeds, default=0) < 0:
            raise UserError(f"--seed {min(seeds)}: must be 0 or more")
        if len(seeds) != count:
            raise UserError(f"--seed: {len(seeds)} seeds for {count} samples; give as many, or the first one")
        return count, labels, seeds


def _plain(value):
    """A number of numpy or torch as Python's; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _is_whole(value):
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool)


def _integers(values, name):
    """A list of ints, of whole numbers in any iterable, an array or a tensor; UserError for anything else."""
    try:
        values = [_plain(value) for value in values]
        wrong = [value for value in values if not _is_whole(value)]
    except TypeError:
        wrong = [values]
    if wrong:
        raise UserError(f"{name} {_shown(wrong[0])}: must be whole numbers, one an image")
    return [int(value) for value in values]


def _shown(value):
    """Any value in a line of an error."""
    line = " ".join(repr(value).split())
    return line if len(line) < 60 else f"{line[:59]}…"


def _path(value, flag):
    """The str of a path, a pathlib.Path say; UserError, naming the flag, for what is none."""
    try:
        return os.fsdecode(value)
    except TypeError:
        raise UserError(f"{flag} {_shown(value)}: must be the path of a file, or a name") from None


class Plan:
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
        self.path, self.weights, self.flag = _path(path, flag), weights, flag
        vae = vae and _path(vae, "--vae")
        if weights not in ("ema", "raw"):
            raise UserError(f"--weights {_shown(weights)}: must be ema or raw")
        if model not in (None, *DiT_models):
            raise UserError(f"--model {_shown(model)}: choose one of {', '.join(DiT_models)}")
        if self.path in PRETRAINED_MODELS and not os.path.exists(self.path):
            kept = {}
            described = checkpoint.Checkpoint(self.path, {}, dict(model=published_config(self.path)))
        else:
            self.checkpoint.state_dict(weights)  # which it may not have
            kept, described = self.checkpoint.config, self.checkpoint
        self.vae = vae or kept.get("autoencoder", {}).get("vae") or default_vae
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
        self.guide = guide and self._check_guide(Plan(guide, vae=self.vae, flag="--guide"))

    @cached_property
    def checkpoint(self):
        """The file itself, which published weights are fetched for."""
        return checkpoint.load(find_file(self.path, self.flag), self.flag)

    def _check_guide(self, guide):
        for name in ("input_size", "in_channels", "num_classes"):
            mine, other = self.model_config[name], guide.model_config[name]
            if mine != other:
                raise UserError(f"--guide {guide.path}: its {name} is {other}, and {mine} in {self.path}")
        if guide.process.config != self.process.config:
            raise UserError(f"--guide {guide.path}: was trained for another process than {self.path}")
        return guide

    def check(self, **options):
        """Raise UserError for labels, or options of sampling, that this checkpoint cannot serve."""
        return settle_options(
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
            raise UserError(f"--precision {_shown(precision)}: choose one of {', '.join(PRECISIONS)}")
        network = self._build_network(precision, compile)
        guide = self.guide and self.guide._build_network(precision, compile)
        autoencoder = load_autoencoder(self.vae, device, image_channels=network.in_channels)
        return Sampler(network, self.process, autoencoder, device, self.defaults, guide, cuda_graphs)

    def _build_network(self, precision, compile):
        network = checkpoint.build_model(
            self.model_config, self.checkpoint.state_dict(self.weights), self.path
        )
        if precision == "bf16":
            network.store_bfloat16()
        if compile:
            network.compile_blocks()
        return network


def settle_options(model_config, process, defaults, *, labels=None, has_guide=False, **given):
    """All options, for a model of this config and its process: those given, else the defaults.

    Raises UserError for labels or options that this model cannot serve.
    """
    given, defaults = plain_options(given), plain_options(defaults)
    null, num_classes = null_label(model_config), model_config["num_classes"]
    if labels is not None:
        check_labels(labels, num_classes)
    guidable = null is not None or has_guide
    if given.get("cfg_scale") not in (None, 1) and not guidable:
        why = "was trained without label dropout" if num_classes else "is unconditional"
        raise UserError(
            f"--cfg-scale {given['cfg_scale']}: this model {why}, so there is nothing to guide; leave it out"
        )
    options = {
        name: default if given.get(name) is None else given[name] for name, default in defaults.items()
    }
    if not guidable:
        options["cfg_scale"] = 1.0
    if has_guide and given.get("cfg_scale") is None and options["cfg_scale"] == 1:
        raise UserError("--guide: this run samples with --cfg-scale 1, where nothing guides; give another")
    if given.get("steps") is None and options["sampler"] != defaults["sampler"]:
        options["steps"] = STEPS.get(options["sampler"])
    channels = model_config["in_channels"]
    if options["cfg_channels"] is None:
        options["cfg_channels"] = 3 if channels == 4 else "all"
    if options["cfg_channels"] != "all" and not 1 <= options["cfg_channels"] <= channels:
        raise UserError(f"--cfg-channels {options['cfg_channels']}: must be between 1 and {channels}, or all")
    check_sampling_options(options, process)
    return options


def plain_options(options):
    """Options of sampling whose numbers are Python's; UserError for a value of another type than its option
    has."""
    options = {name: _plain(value) for name, value in options.items()}
    for name, is_right, what in (
        ("cfg_scale", _is_number, "a number"),
        ("cfg_channels", lambda value: _is_whole(value) or str(value) == "all", "a whole number, or all"),
        ("cfg_schedule", lambda value: isinstance(value, str), "a name"),
        ("sampler", lambda value: isinstance(value, str), "a name"),
        ("steps", lambda value: not isinstance(value, bool | float | bytes), "a whole number, or a spacing"),
    ):
        value = options.get(name)
        if value is not None and not is_right(value):
            flag = "num-sampling-steps" if name == "steps" else name.replace("_", "-")
            raise UserError(f"--{flag} {_shown(value)}: must be {what}")
    if options.get("cfg_interval") is not None:
        try:
            levels = [_plain(level) for level in options["cfg_interval"]]
        except TypeError:
            levels = [None]
        if not all(map(_is_number, levels)):
            raise UserError(f"--cfg-interval {_shown(options['cfg_interval'])}: must be two noise levels")
        options["cfg_interval"] = levels
    return options


def check_published_draws(seeds, options):
    """Raise UserError where the published script, with its one seed, could not have drawn so."""
    if not isinstance(seeds, range):
        raise UserError("--published-draws: takes one seed for all samples, a number rather than a list")
    if seeds[0] >= 2**63:
        raise UserError(f"--seed {seeds[0]}: must be below 2^63 for the published draws")
    if options["sampler"] != "ddpm":
        raise UserError(f"--published-draws: the published script samples by ddpm, not {options['sampler']}")


def make_guidance(options, model_config, guide=None):
    """The Guidance of settled options, or None where there is none."""
    if options["cfg_scale"] == 1:
        return None
    channels, interval = options["cfg_channels"], options["cfg_interval"]
    return Guidance(
        options["cfg_scale"],
        null_label(model_config),
        channels=None if channels == "all" else channels,
        interval=None if interval is None else tuple(interval),
        schedule=options["cfg_schedule"],
        guide=guide,
    )


def check_cuda_graphs(cuda_graphs, device=None):
    """The device to sample on, None for a GPU where there is one; UserError for --cuda-graphs without one."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device {_shown(device)}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device}: this machine has {torch.cuda.device_count()} GPUs; leave it out")
    if cuda_graphs and device.type != "cuda":
        raise UserError(f"--cuda-graphs: needs a GPU, this is the {device}; leave it out")
    return device


def check_labels(labels, num_classes):
    """Raise UserError for a label that is not one of the model's classes."""
    for label in labels:
        if not num_classes:
            raise UserError(f"--class-labels {label}: this model is unconditional; leave it out")
        if not 0 <= label < num_classes:
            raise UserError(f"--class-labels {label}: must be between 0 and {num_classes - 1}")


def check_sampling_options(options, process):
    """Raise UserError for options (a dict, None for not given) that this process cannot serve."""
    scale, interval, sampler = options["cfg_scale"], options["cfg_interval"], options["sampler"]
    if scale is not None and not 0 <= scale < math.inf:
        raise UserError(f"--cfg-scale {scale}: must be 0 or more; 1 is without guidance")
    if interval is not None:
        if len(interval) != 2:
            raise UserError(f"--cfg-interval {interval}: must be two noise levels")
        with blame("--cfg-interval"):
            Guidance(1.0, 0, interval=tuple(interval))
    with blame("--cfg-schedule"):
        Guidance(1.0, 0, schedule=options["cfg_schedule"] or "constant")
    if sampler not in process.samplers:
        raise UserError(f"--sampler {sampler}: this model has {', '.join(process.samplers)}")
    with blame(f"--num-sampling-steps {options['steps']}"):
        process.count_steps(sampler, options["steps"])


# ---------------------------------------------------------------------------------------------
# The options of sampling, the same in every command


def add_checkpoint_arguments(parser, default_vae="mse"):
    """--ckpt, what it must hold, --vae and --weights. default_vae: as Plan's."""
    # fmt: off
    parser.add_argument("--ckpt", default=None, metavar="FILE",
                        help="checkpoint: of train.py, weights as .pt or .safetensors, or a diffusers folder"
                        " (default: the published DiT-XL/2 of --image-size)")
    parser.add_argument("--model", choices=list(DiT_models), default=None,
                        help="what the checkpoint must hold (default: what it holds)")
    parser.add_argument("--image-size", type=int, default=None, metavar="PIXELS",
                        help="side of the images, which the checkpoint must be for"
                        " (default: the checkpoint's, or 256 for published weights)")
    parser.add_argument("--num-classes", type=int, default=None, metavar="N",
                        help="classes, which the checkpoint must have (default: the checkpoint's)")
    add_vae_argument(parser, default=None, unnamed=default_vae)
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema",
                        help="averaged weights, or those of the last step (default: ema)")
    # fmt: on


def published_checkpoint(args):
    """The name of the published weights for these options; UserError where none exist."""
    if args.model not in (None, "DiT-XL/2"):
        raise UserError(f"--model {args.model}: only DiT-XL/2 is published; give --ckpt")
    image_size = 256 if args.image_size is None else args.image_size
    name = next((name for name, size in PUBLISHED_SIZES.items() if size == image_size), None)
    if name is None:
        raise UserError(f"--image-size {image_size}: published weights are for 256 and 512; give --ckpt")
    if args.num_classes not in (None, 1000):
        raise UserError(f"--num-classes {args.num_classes}: the published weights have 1000; give --ckpt")
    return name


def published_config(name):
    """The full arguments of DiT for published weights by name."""
    with torch.device("meta"):
        return DiT_models["DiT-XL/2"](input_size=PUBLISHED_SIZES[name] // 8).config


def add_sampling_arguments(group, cfg_scale=DEFAULTS["cfg_scale"]):
    """--cfg-scale and its kin, --num-sampling-steps and --sampler. cfg_scale: for a run without its own."""
    # fmt: off
    group.add_argument("--cfg-scale", type=float, default=None, metavar="SCALE",
                       help="classifier-free guidance: 1 for none, more for clearer and less varied images"
                       f" (default: the run's own; {cfg_scale} where it has none)")
    group.add_argument("--cfg-channels", type=_channels, default=None, metavar="CHANNELS",
                       help="how many channels are guided, or all (default: 3 of 4 latent channels, as"
                       " published; else all)")
    group.add_argument("--cfg-interval", type=float, nargs=2, default=None, metavar=("LOW", "HIGH"),
                       help="guide only at noise levels sigma / alpha above LOW, up to HIGH; the other steps"
                       " cost half; 0.38 3.22 is a start (default: the run's own; all where it has none)")
    group.add_argument("--cfg-schedule", choices=SCHEDULES, default=None,
                       help="the same guidance at every step, or rising from none at pure noise"
                       " (default: the run's own; constant where it has none)")
    group.add_argument("--num-sampling-steps", type=str, default=None, metavar="STEPS",
                       help="denoising steps: a number; for ddpm and ddim also sections as 10,15,20, or a"
                       " stride as ddim50 (default: the run's own; with another --sampler than the run's, "
                       + ", ".join(f"{steps} for {name}" for name, steps in STEPS.items()) + ")")
    group.add_argument("--sampler", choices=list(SAMPLERS), default=None,
                       help="of a diffusion: ddpm, ancestral, or, deterministic, ddim, dpm++ (2M, best with"
                       " few steps), euler, heun (two evaluations a step); of a flow: euler, heun, dpm++, sde"
                       " (default: the run's own; ddpm, or euler for a flow, where it has none)")
    # fmt: on


def add_guide_argument(group):
    """--guide."""
    group.add_argument(
        "--guide", default=None, metavar="FILE",
        help="checkpoint of a weaker model, smaller or trained for less, that guides in place of the missing"
        " label: autoguidance (default: none)",
    )  # fmt: skip


def add_speed_arguments(group):
    """--precision, --compile and --cuda-graphs."""
    add_precision_argument(group)
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False,
        help="compile the blocks with torch.compile, which takes a minute first (default: off)",
    )  # fmt: skip
    group.add_argument(
        "--cuda-graphs", action=argparse.BooleanOptionalAction, default=False,
        help="record a step's work on a GPU and replay it, for small batches (default: off)",
    )  # fmt: skip


def _channels(text):
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, or all")
    return text if text == "all" else int(text)


def sampling_options(args):
    """The options that add_sampling_arguments read, as Sampler takes them; None for those not given."""
    return dict(
        cfg_scale=args.cfg_scale, cfg_channels=args.cfg_channels, cfg_interval=args.cfg_interval,
        cfg_schedule=args.cfg_schedule, steps=args.num_sampling_steps, sampler=args.sampler,
    )  # fmt: skip
