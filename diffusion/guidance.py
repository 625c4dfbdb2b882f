"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598), and autoguidance (Karras et al., arXiv
2406.02507)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

# How the scale may depend on time:
SCHEDULES = ("constant", "power-cosine")


@dataclass(frozen=True)
class Guidance:
    """Turns a class-conditional model into a guided one: u + w (c - u) of conditional c and unconditional u.

    scale       w: 1 is the plain conditional model, 0 the unconditional one, above 1 is guidance
    null_label  the label that stands for "no label", or a function of conditions y that gives null ones like
                them; None with a guide
    channels    how many channels are guided, from the first; None for all. The paper's results guide 3 of 4.
    interval    (low, high]: the noise levels sigma / alpha that are guided, all where it is None
                (Kynkäänniemi et al., arXiv 2404.07724); elsewhere the conditional rows alone are run
    schedule    "constant", or "power-cosine" (MDT, arXiv 2303.14389): w rises from 1 at pure noise to scale
    power       of power-cosine; the higher, the later it rises
    guide       autoguidance: a weaker model, asked the same, in place of the unconditional one

    The state keeps its N rows; the model sees 2N where it is guided, conditional rows first.
    """

    scale: float
    null_label: int | Callable | None
    channels: int | None = None
    interval: tuple[float, float] | None = None
    schedule: str = "constant"
    power: float = 4.0
    guide: Callable | None = None

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels {self.channels}: must be at least 1")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            low, high = self.interval
            raise ValueError(
                f"interval {low} {high}: must be two noise levels, 0 or more, the lower one first"
            )

    def scale_at(self, noise_level, time):
        """w at a noise level sigma / alpha and a time in [0, 1], 1 for pure noise: plain numbers."""
        if self.interval is not None and not self.interval[0] < noise_level <= self.interval[1]:
            return 1.0
        if self.schedule == "power-cosine":
            return 1 + (self.scale - 1) * (1 - math.cos(math.pi * (1 - time) ** self.power)) / 2
        return self.scale

    def wrap(self, model, noise_level=1.0, time=1.0):
        """A function (x, t, y) that gives the guided prediction of this moment, told in plain
        numbers so that no device is asked. What lies beyond x's channels, a predicted variance, is the
        conditional's."""
        scale = self.scale_at(noise_level, time)
        if scale == 1:
            return model

        def both_labels(x, t, y):
            nulls = self.null_label(y) if callable(self.null_label) else torch.full_like(y, self.null_label)
            return model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, nulls])).chunk(2)

        def both_models(x, t, *labels, **model_kwargs):
            return model(x, t, *labels, **model_kwargs), self.guide(x, t, *labels, **model_kwargs)

        predict = both_labels if self.guide is None else both_models

        def guided(x, t, *labels, **model_kwargs):
            conditional, unconditional = predict(x, t, *labels, **model_kwargs)
            n = x.shape[1] if self.channels is None else min(self.channels, x.shape[1])
            c, u = conditional[:, :n], unconditional[:, :n]
            return torch.cat([u + scale * (c - u), conditional[:, n:]], dim=1)

        return guided
