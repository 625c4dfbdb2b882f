"""How training draws its steps t: uniformly, or more often where the loss is large."""

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
        """Processes may give different numbers of rows, but each the same number every time."""
        ts, losses = local_ts.detach(), local_losses.detach().float()
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._rows = self._rows or _count_rows(ts)
            ts, losses = _gather_rows(ts, self._rows), _gather_rows(losses, self._rows)
        self.update_with_all_losses(ts, losses)

    _rows = None  # of every process

    @abstractmethod
    def update_with_all_losses(self, ts, losses):
        """Learn from steps (N,) and their losses (N,), the same on every process; wait for no GPU."""


class LossSecondMomentResampler(LossAwareSampler):
    """Steps in proportion to the root mean square of their last losses (improved DDPM, section 3.3).

    Uniform until every step has history_per_term losses; then a share uniform_prob stays uniform.
    """

    def __init__(self, diffusion, history_per_term=10, uniform_prob=0.001):
        super().__init__(diffusion)
        self.uniform_prob = uniform_prob
        self.steps, self.memory = diffusion.num_timesteps, history_per_term
        # A row more than there are steps, for losses that are not to be learnt from:
        self._losses = torch.zeros(self.steps + 1, self.memory, dtype=torch.float64, device="cpu")
        self._counts = torch.zeros(self.steps + 1, dtype=torch.int64, device="cpu")

    def weights(self):
        losses, counts = self._losses[: self.steps], self._counts[: self.steps]
        weights = losses.square().mean(dim=1).sqrt()
        weights = weights / weights.sum()
        weights = weights * (1 - self.uniform_prob) + self.uniform_prob / self.steps
        return torch.where((counts < self.memory).any(), torch.ones_like(weights), weights)

    def update_with_all_losses(self, ts, losses):
        self._losses, self._counts = self._losses.to(ts.device), self._counts.to(ts.device)
        # A loss that is not finite ends the training by itself:
        ts = torch.where(torch.isfinite(losses), ts.long(), self.steps)
        ts, order = ts.sort(stable=True)
        numbers = torch.arange(len(ts), device=ts.device)
        earlier = numbers - torch.searchsorted(ts, ts)  # rows of the same step before this one
        later = torch.searchsorted(ts, ts, right=True) - numbers - 1
        # Each takes the place of its step's oldest; of more than there are places for, the last ones stay:
        rows = torch.where(later < self.memory, ts, self.steps)
        places = (self._counts[ts] + earlier) % self.memory
        self._losses[rows, places] = losses[order].double()
        self._counts.index_add_(0, ts, torch.ones_like(ts))

    def state_dict(self):
        return dict(losses=self._losses[: self.steps], counts=self._counts[: self.steps])

    def load_state_dict(self, state):
        self._losses[: self.steps].copy_(state["losses"])
        self._counts[: self.steps].copy_(state["counts"])


def _count_rows(rows):
    """How many rows every process has, a list."""
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    return [int(count) for count in counts]


def _gather_rows(rows, counts):
    """The rows (N,) of all processes in order of rank, N by process as counted."""
    padded = torch.nn.functional.pad(rows, (0, max(counts) - len(rows)))
    gathered = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts)])


SCHEDULE_SAMPLERS = {
    "uniform": UniformSampler,
    "logit-normal": LogitNormalSampler,
    "loss-second-moment": LossSecondMomentResampler,
}
