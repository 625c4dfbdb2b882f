"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Guidance:
    """Turns a class-conditional model into a guided one: u + scale (c - u) of conditional c and unconditional
    u.

    scale       1 is the plain conditional model, 0 the unconditional one, above 1 is guidance
    null_label  the label that stands for "no label"
    channels    how many channels are guided, from the first; None for all. The paper's results guide 3 of 4.

    The state keeps its N rows; the model sees 2N, conditional rows first.
    """

    scale: float
    null_label: int
    channels: int | None = None

    def wrap(self, model):
        """A function (x, t, y) that gives the guided prediction; what lies beyond x's channels is the
        conditional's."""

        def guided(x, t, y):
            nulls = torch.full_like(y, self.null_label)
            out = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, nulls]))
            conditional, unconditional = out.chunk(2)
            n = x.shape[1] if self.channels is None else min(self.channels, x.shape[1])
            c, u = conditional[:, :n], unconditional[:, :n]
            return torch.cat([u + self.scale * (c - u), conditional[:, n:]], dim=1)

        return guided
