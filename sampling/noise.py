"""Seeds to draws: the random numbers of every image."""

import torch

from models import DiT
from runtime.cli import torch_defaults
from runtime.distributed import LABEL, derive_seed, fold_seed

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
