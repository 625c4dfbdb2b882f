"""How training draws its steps t: uniformly, or more often where the loss is large."""

import math
from abc import ABC, abstractmethod

import torch
import torch.distributed as dist

from runtime.cli import require_parts


def create_named_schedule_sampler(name, diffusion):
    """A ScheduleSampler over the times of a process: one of SCHEDULE_SAMPLERS that serves its objective."""
    serving = timestep_samplers_of(diffusion.objective)
    if name not in serving:
        raise ValueError(f"timestep sampler {name!r}: a {diffusion.objective} takes {' or '.join(serving)}")
    return SCHEDULE_SAMPLERS[name](diffusion)


def timestep_samplers_of(objective):
    """The names of the samplers that serve "diffusion" or "flow". Raises ValueError for an incomplete row."""
    parts = ("objectives", "sample", "update_with_local_losses", "state_dict", "load_state_dict")
    for name, row in SCHEDULE_SAMPLERS.items():
        require_parts(f"timestep sampler {name!r}", row, *parts)
        if "flow" in row.objectives and row.sample is ScheduleSampler.sample:
            raise ValueError(
                f"timestep sampler {name!r}: draws whole steps; for a flow, extend UniformSampler"
            )
    return tuple(name for name, row in SCHEDULE_SAMPLERS.items() if objective in row.objectives)


class ScheduleSampler(ABC):
    """A distribution over steps. Importance weights keep the expected loss what it is under uniform steps.

    A row of SCHEDULE_SAMPLERS says which objectives it serves. The times of a flow are no whole steps; one
    that serves it extends UniformSampler, with a `sample` of its own.
    """

    objectives = ("diffusion",)

    def __init__(self, diffusion):
        self.diffusion = diffusion

    @abstractmethod
    def weights(self):
        """Positive weights (T,), float64, not necessarily of sum 1."""

    def sample(self, batch_size, device, generator=None):
        """Steps (batch_size,) and what to multiply their losses by (batch_size,), on the device."""
        p = self.weights().to(device)
        p = p / p.sum()
        t = torch.multinomial(p, batch_size, replacement=True, generator=generator)
        return t, (1.0 / (len(p) * p[t])).float()

    def update_with_local_losses(self, local_ts, local_losses):
        """Learn from the losses of this process's rows; every process calls it, each with any number of
        rows."""

    def state_dict(self):
        """What a resumed run needs, as tensors."""
        return {}

    def load_state_dict(self, state):
        """Take up what state_dict gave."""


class UniformSampler(ScheduleSampler):
    """Every step as often as any other."""

    objectives = ("diffusion", "flow")

    def weights(self):
        return torch.ones(self.diffusion.num_timesteps, dtype=torch.float64, device="cpu")

    def sample(self, batch_size, device, generator=None):
        ones = torch.ones(batch_size, dtype=torch.float32, device=device)
        return self.diffusion.sample_t(batch_size, device, generator), ones


class LogitNormalSampler(UniformSampler):
    """A flow's own times, drawn from its logit-normal distribution (see FlowMatching)."""

    objectives = ("flow",)


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from losses. All processes see those of all, and so keep the same weights."""

    def update_with_local_losses(self, local_ts, local_losses):
        ts, losses = local_ts.detach(), local_losses.detach().float()
        if dist.is_initialized() and dist.get_world_size() > 1:
            ts, losses = _gather_rows(ts), _gather_rows(losses)
        self.update_with_all_losses(ts.tolist(), losses.tolist())

    @abstractmethod
    def update_with_all_losses(self, ts, losses):
        """Learn from lists of steps and their losses, the same on every process."""


class LossSecondMomentResampler(LossAwareSampler):
    """Steps in proportion to the root mean square of their last losses (improved DDPM, section 3.3).

    Uniform until every step has history_per_term losses; then a share uniform_prob stays uniform.
    """

    def __init__(self, diffusion, history_per_term=10, uniform_prob=0.001):
        super().__init__(diffusion)
        self.uniform_prob = uniform_prob
        steps, memory = diffusion.num_timesteps, history_per_term
        self._losses = torch.zeros(steps, memory, dtype=torch.float64, device="cpu")
        self._counts = torch.zeros(steps, dtype=torch.int64, device="cpu")

    def weights(self):
        if (self._counts < self._losses.shape[1]).any():
            return torch.ones_like(self._counts, dtype=torch.float64)
        weights = self._losses.square().mean(dim=1).sqrt()
        weights = weights / weights.sum()
        return weights * (1 - self.uniform_prob) + self.uniform_prob / len(weights)

    def update_with_all_losses(self, ts, losses):
        for t, loss in zip(ts, losses):
            if not math.isfinite(loss):  # the training loop will say so
                continue
            self._losses[t, self._counts[t] % self._losses.shape[1]] = loss  # the oldest makes room
            self._counts[t] += 1

    def state_dict(self):
        return dict(losses=self._losses, counts=self._counts)

    def load_state_dict(self, state):
        self._losses.copy_(state["losses"])
        self._counts.copy_(state["counts"])


def _gather_rows(rows):
    """The rows (N,) of all processes, N not necessarily the same, in order of rank."""
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    longest = int(max(counts))
    padded = torch.nn.functional.pad(rows, (0, longest - len(rows)))
    gathered = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(n)] for part, n in zip(gathered, counts)])


SCHEDULE_SAMPLERS = {
    "uniform": UniformSampler,
    "logit-normal": LogitNormalSampler,
    "loss-second-moment": LossSecondMomentResampler,
}
