"""What can be added from outside: of each kind a small one, in the few lines shown, that trains, resumes and
samples; and what a row lacks is refused by name."""

import inspect
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import build_tiny
from in_process import SMALL, run

import sample
from checkpointing import files as checkpoints
from diffusion import create_flow, create_process
from diffusion.flow_matching import PATHS
from diffusion.schedules import NOISE_SCHEDULES
from diffusion.solvers import SOLVERS, Solver
from diffusion.timestep_sampler import (
    SCHEDULE_SAMPLERS,
    LogitNormalSampler,
    ScheduleSampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from models import BLOCKS, CONDITIONS, FFNS, Block, ConditionEmbedder, DiT, FinalLayer, modulate
from runtime.cli import UserError, launch
from runtime.flops import count_macs
from sampler import Sampler
from training.dataset import DATASETS, ArrayImages, Digits

ARGV = [*SMALL, "--sample-every", "0", "--ckpt-every", 2]


def lines_of(*parts):
    """Lines of code and documentation that an addition takes, and one for its row."""
    return 1 + sum(len(textwrap.dedent(inspect.getsource(part)).splitlines()) for part in parts)


def train_and_resume(folder, *argv):
    """Train four steps at once, and two and again two; both end in the same bits. Returns the checkpoint's
    path."""
    argv = [*ARGV, *argv, "--max-steps", 4]
    weights = []
    for results in ("straight", "resumed"):
        run(*argv, "--results-dir", folder / results)
        path = folder / results / "000-DiT-S-2" / "checkpoints" / "0000004.pt"
        if results == "resumed":
            path.unlink()
            run(*argv, "--results-dir", folder / results, "--resume", folder / results / "000-DiT-S-2")
        contents = checkpoints.load(str(path)).contents
        weights.append({**contents["model"], **{f"ema.{key}": v for key, v in contents["ema"].items()}})
    assert all(torch.equal(weights[0][key], value) for key, value in weights[1].items())
    return str(path)


def assert_samples(path, *, of=3, **options):
    """Sample a checkpoint; an image depends on its own seed alone."""
    sampler = Sampler.from_checkpoint(path, device="cpu")
    images = sampler.sample(of, **options)
    assert torch.isfinite(images).all() and images.std() > 0.01
    alone = sampler.sample(of if isinstance(of, int) else of[:1], seeds=0, batch_size=1, **options)
    torch.testing.assert_close(alone[:1], images[:1], atol=1e-4, rtol=0)  # another batch's rounding
    return sampler, images


# ---------------------------------------------------------------------------------------------
# A solver


def churned(predict, x, points, randn_like):
    """DDIM with a half of each level's noise drawn anew."""
    for here, there in zip(points, points[1:]):
        x_start, noise = predict(x, here)
        noise = 0.75**0.5 * noise + 0.5 * randn_like(x)
        x = there.alpha * x_start + there.sigma * noise
        yield x, x_start


@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_a_solver(tmp_path, monkeypatch, objective):
    assert lines_of(churned) <= 25
    monkeypatch.setitem(SOLVERS, "churned", Solver(churned, steps=6, stochastic=True))
    argv = [word for word in ARGV if word not in ("--num-sampling-steps", "3")]
    argv += ["--objective", objective, "--max-steps", 2, "--results-dir", tmp_path]
    run(*argv, "--sampler", "churned")
    path = str(tmp_path / "000-DiT-S-2" / "checkpoints" / "0000002.pt")
    sampler, images = assert_samples(path)
    assert sampler.settle()["sampler"] == "churned" and sampler.settle()["steps"] == "6"
    assert not torch.equal(sampler.sample(3, steps=3), images)
    # The run's own choice of another sampler still gives way to this one, with its steps:
    assert sampler.settle(sampler="heun")["steps"] == "25"
    other = Sampler(sampler.model, sampler.process, device="cpu")
    assert other.settle(sampler="churned")["steps"] == "6"


def takes_no_noise(predict, x, points):
    yield x, x


def gives_a_list(predict, x, points):
    return [(x, x)]


def ends_early(predict, x, points):
    yield x, x


@pytest.mark.parametrize(
    "row, message",
    [
        (
            lambda: Solver(takes_no_noise, 9, stochastic=True),
            "takes_no_noise: is stochastic, so it must take",
        ),
        (lambda: Solver(churned, 9), "solver churned: is deterministic, so it must take"),
        (lambda: Solver(gives_a_list, 9), "solver gives_a_list: must yield"),
        (lambda: Solver(ends_early, 0), "solver ends_early: steps 0 must be a whole number"),
        (lambda: Solver(ends_early, 9, objectives=("ode",)), "solver ends_early: objectives"),
    ],
)
def test_a_solver_is_checked_when_its_row_is_written(row, message):
    with pytest.raises(ValueError, match=message):
        row()


def test_a_solver_is_checked_when_it_is_chosen(monkeypatch, capsys):
    process, x = create_process(dict(learn_sigma=False)), torch.zeros(1, 1, 2, 2)
    monkeypatch.setitem(SOLVERS, "early", Solver(ends_early, 9))
    with pytest.raises(ValueError, match="the solver ended after 1 of 4 steps"):
        process.sample(lambda x, t: x, x, sampler="early", steps=4)
    monkeypatch.setitem(SOLVERS, "early", Solver(ends_early, 9, objectives=("flow",)))
    with pytest.raises(ValueError, match="sampler 'early': a diffusion has ddpm, ddim"):
        process.sample(lambda x, t: x, x, sampler="early")
    with pytest.raises(SystemExit):
        run(*ARGV, "--sampler", "early")
    assert "--sampler early: this model has ddpm, ddim" in capsys.readouterr().err
    monkeypatch.setitem(SOLVERS, "early", ends_early)
    with pytest.raises(ValueError, match=r"solver early: its row must be a Solver\(function, steps\)"):
        run(*ARGV)


# ---------------------------------------------------------------------------------------------
# A noise schedule, a flow path, a timestep sampler


def sigmoid_schedule(steps):
    """Betas that rise as a sigmoid."""
    rising = 1 / (1 + np.exp(-np.linspace(-6, 6, steps)))
    return rising * 20 / steps + 1e-5


def test_a_noise_schedule(tmp_path, monkeypatch):
    assert lines_of(sigmoid_schedule) <= 15
    monkeypatch.setitem(NOISE_SCHEDULES, "sigmoid", sigmoid_schedule)
    path = train_and_resume(tmp_path, "--noise-schedule", "sigmoid")
    sampler, _ = assert_samples(path, sampler="dpm++")
    assert np.array_equal(sampler.process.original_betas, sigmoid_schedule(1000))


@pytest.mark.parametrize(
    "betas, message",
    [
        (lambda steps: [0.1] * (steps - 1), r"must give 1000 betas above 0, and gave \(999,\) from 0.1"),
        (
            lambda steps: np.linspace(0, 0.1, steps),
            r"must give 1000 betas above 0, and gave \(1000,\) from 0.0",
        ),
        (lambda steps: np.full(steps, np.nan), r"must give 1000 betas above 0, and gave \(1000,\) from nan"),
    ],
)
def test_a_noise_schedule_of_no_betas(monkeypatch, betas, message):
    monkeypatch.setitem(NOISE_SCHEDULES, "toy", betas)
    with pytest.raises(ValueError, match=f"noise schedule 'toy': {message}"):
        create_process(dict(noise_schedule="toy"))


class QuadraticPath:
    """Straight lines, slow near the data."""

    start, end = 1.0, 0.0

    def alpha(self, t):
        return 1 - t**2, -2 * t

    def sigma(self, t):
        return t**2, 2 * t


def test_a_flow_path(tmp_path, monkeypatch):
    assert lines_of(QuadraticPath) <= 15
    monkeypatch.setitem(PATHS, "quadratic", QuadraticPath)
    path = train_and_resume(tmp_path, "--objective", "flow", "--flow-path", "quadratic")
    sampler, _ = assert_samples(path)
    assert isinstance(sampler.process.path, QuadraticPath)


class WithoutSigma:
    start, end, alpha = 1.0, 0.0, QuadraticPath.alpha


class WithoutDerivative(QuadraticPath):
    def sigma(self, t):
        return t**2


@pytest.mark.parametrize(
    "row, message",
    [
        (WithoutSigma, "path 'toy': WithoutSigma lacks sigma"),
        (WithoutDerivative, r"path 'toy': sigma\(t\) must give its value and its derivative"),
    ],
)
def test_a_flow_path_that_lacks_something(monkeypatch, row, message):
    monkeypatch.setitem(PATHS, "toy", row)
    with pytest.raises(ValueError, match=message):
        create_flow(path="toy")


class EarlyStepsSampler(ScheduleSampler):
    """The clean half of the steps three times as often as the other."""

    def weights(self):
        half = self.diffusion.num_timesteps // 2
        return torch.cat([torch.full((half,), 3.0), torch.ones(half)]).double()


class ModeSampler(UniformSampler):
    """Stable Diffusion 3's times with heavy tails (arXiv 2403.03206, eq. 20), of scale 1."""

    objectives = ("flow",)

    def sample(self, batch_size, device, generator=None):
        u = torch.rand(batch_size, device=device, generator=generator)
        t = 1 - u - (torch.cos(torch.pi / 2 * u) ** 2 - 1 + u)
        return t, torch.ones_like(t)


@pytest.mark.parametrize("row, objective", [(EarlyStepsSampler, "diffusion"), (ModeSampler, "flow")])
def test_a_timestep_sampler(tmp_path, monkeypatch, row, objective):
    assert lines_of(row) <= 15
    monkeypatch.setitem(SCHEDULE_SAMPLERS, "toy", row)
    path = train_and_resume(tmp_path, "--objective", objective, "--timestep-sampler", "toy")
    sampler, _ = assert_samples(path)
    t, weights = create_named_schedule_sampler("toy", sampler.process).sample(20_000, "cpu")
    span = sampler.process.num_timesteps
    if row is EarlyStepsSampler:  # 3 of 4, reweighed; five standard deviations
        assert (t < span // 2).float().mean().item() == pytest.approx(0.75, abs=0.016)
        assert weights.mean().item() == pytest.approx(1, abs=0.025)
    else:
        assert 0 <= t.min() < 0.01 and 0.99 < t.max() <= 1 and (weights == 1).all()
    with pytest.raises(SystemExit):
        other = "flow" if objective == "diffusion" else "diffusion"
        run(*ARGV, "--objective", other, "--timestep-sampler", "toy")


class NoSampler:
    objectives = ("diffusion",)


class WithoutWeights(ScheduleSampler):
    pass


class WholeStepsOfAFlow(EarlyStepsSampler):
    objectives = ("flow",)


@pytest.mark.parametrize(
    "row, message",
    [
        (NoSampler, "NoSampler lacks sample, update_with_local_losses, state_dict, load_state_dict"),
        (WithoutWeights, "WithoutWeights lacks weights"),
        (WholeStepsOfAFlow, "draws whole steps; for a flow, extend UniformSampler"),
        (LogitNormalSampler, "a diffusion takes uniform or loss-second-moment"),
    ],
)
def test_a_timestep_sampler_that_lacks_something(monkeypatch, row, message):
    monkeypatch.setitem(SCHEDULE_SAMPLERS, "toy", row)
    with pytest.raises(ValueError, match=f"timestep sampler 'toy': {message}"):
        create_named_schedule_sampler("toy", create_process(dict(objective="diffusion")))


# ---------------------------------------------------------------------------------------------
# A block, a network behind the attention


class ParallelBlock(Block):
    """Attention and its network side by side (ViT-22B, arXiv 2302.05442), with adaLN-Zero."""

    final_layer = FinalLayer

    def __init__(self, hidden_size, num_heads, attention, ffn):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attention, self.network = attention(hidden_size, num_heads), ffn(hidden_size)
        self.modulation = nn.Linear(hidden_size, 3 * hidden_size)

    @staticmethod
    def condition(x, embeddings):
        return x, sum(embeddings[1:], embeddings[0])

    def forward(self, x, c):
        shift, scale, gate = self.modulation(nn.functional.silu(c)).chunk(3, dim=1)
        normed = modulate(self.norm(x), shift, scale)
        return x + gate.unsqueeze(1) * (self.attention(normed) + self.network(normed))

    def initialize_zero(self):
        nn.init.zeros_(self.modulation.weight)


class SwiGLU(nn.Module):
    """A gated network without biases (Shazeer, arXiv 2002.05202)."""

    def __init__(self, hidden_size, hidden_features, grid_size):
        super().__init__()
        self.enter = nn.Linear(hidden_size, 2 * hidden_features, bias=False)
        self.leave = nn.Linear(hidden_features, hidden_size, bias=False)

    def forward(self, x):
        x, gate = self.enter(x).chunk(2, dim=2)
        return self.leave(nn.functional.silu(gate) * x)


@pytest.fixture
def toy_network(monkeypatch):
    monkeypatch.setitem(BLOCKS, "parallel", ParallelBlock)
    monkeypatch.setitem(FFNS, "swiglu", SwiGLU)
    return dict(block="parallel", ffn="swiglu")


def test_a_block_and_an_ffn(tmp_path, toy_network, monkeypatch):
    """With registers, checkpointed activations and accumulation; sampled in bfloat16 too; started from."""
    assert lines_of(ParallelBlock) <= 30 and lines_of(SwiGLU) <= 30
    options = ["--block", "parallel", "--ffn", "swiglu", "--registers", 2]
    path = train_and_resume(tmp_path, *options, "--grad-checkpointing", "--grad-accum-steps", 2)
    sampler, images = assert_samples(path)
    assert sampler.model.config["block"] == "parallel" and isinstance(sampler.model.blocks[0].network, SwiGLU)
    stored = Sampler.from_checkpoint(path, device="cpu", precision="bf16")
    assert {p.dtype for p in stored.model.blocks.parameters()} == {torch.bfloat16}
    assert (stored.sample(3) - images).abs().mean() < 0.05
    run(*ARGV, *options, "--max-steps", 1, "--init-from", path, "--results-dir", tmp_path / "tuned")
    # Where its row is missing, its name is said:
    monkeypatch.delitem(BLOCKS, "parallel")
    with pytest.raises(UserError, match="block 'parallel': choose one of adaln-zero"):
        Sampler.from_checkpoint(path, device="cpu")


def test_a_block_s_and_an_ffn_s_start_gradients_and_cost(toy_network):
    torch.manual_seed(0)
    model, plain = build_tiny(**toy_network), build_tiny()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 2])
    block, tokens = model.blocks[0], torch.randn(2, 16, 64)
    assert torch.equal(block(tokens, torch.randn(2, 64)), tokens) and model(x, t, y).abs().max() == 0
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    gradients = []
    for model.grad_checkpointing in (False, True):
        model.zero_grad()
        model(x, t, y, force_drop_ids=torch.tensor([0, 1])).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients)) and all(g.abs().sum() > 0 for g in gradients[0])
    # A third more of the network's multiply-adds, and 3 rather than 6 vectors of modulation:
    tokens, width, depth = 16, 64, 2
    assert count_macs(model) - count_macs(plain) == depth * (tokens * 4 * width**2 - 3 * width**2)


@pytest.mark.slow
def test_a_compiled_block(toy_network):
    torch.manual_seed(0)
    model = build_tiny(**toy_network).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 2])
    with torch.no_grad():
        plain = model(x, t, y)
        model.compile_blocks()
        torch.testing.assert_close(model(x, t, y), plain, atol=1e-4, rtol=1e-4)


class NoBlock(nn.Module):
    final_layer = FinalLayer


class NoFFN(nn.Module):
    pass


@pytest.mark.parametrize(
    "rows, name, row, message",
    [
        (BLOCKS, "block", NoBlock, "block 'toy': NoBlock lacks condition, initialize_zero, forward"),
        (FFNS, "ffn", NoFFN, "ffn 'toy': NoFFN lacks forward"),
        (CONDITIONS, "condition", ConditionEmbedder, "lacks embed, null_like, from_labels"),
    ],
)
def test_a_part_of_the_network_that_lacks_something(monkeypatch, rows, name, row, message):
    monkeypatch.setitem(rows, "toy", row)
    with pytest.raises(ValueError, match=message):
        build_tiny(**{name: "toy"})


# ---------------------------------------------------------------------------------------------
# Another condition


class VectorEmbedder(ConditionEmbedder):
    """Vectors of num_classes numbers; a learned one stands for none."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__(num_classes, hidden_size, dropout_prob)
        self.mlp = nn.Sequential(
            nn.Linear(num_classes, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.none = nn.Parameter(torch.zeros(hidden_size))

    def embed(self, y):
        is_none = y.isnan().any(dim=1, keepdim=True)
        return torch.where(is_none, self.none, self.mlp(y.nan_to_num()))

    def null_like(self, y):
        return torch.full_like(y, torch.nan)

    def from_labels(self, labels):
        return torch.eye(self.num_classes, device=labels.device)[labels]


class QuarterInk(ArrayImages):
    """Digits that are conditioned by how much ink is in each quarter of the image."""

    condition = "vector"

    def __init__(self, data_path, image_size, dry_run):
        digits = Digits()
        names = ["upper left", "upper right", "lower left", "lower right"]
        super().__init__(digits.images, digits.labels, names, flips=False)

    def __getitem__(self, key):
        image, _ = super().__getitem__(key)
        return image, image.unfold(1, 4, 4).unfold(2, 4, 4).mean(dim=(0, 3, 4)).flatten().double()


@pytest.fixture
def vectors(monkeypatch):
    monkeypatch.setitem(CONDITIONS, "vector", VectorEmbedder)
    monkeypatch.setitem(DATASETS, "quarters", QuarterInk)
    return ["--dataset", "quarters"]


def test_a_condition(tmp_path, vectors, monkeypatch, capsys):
    """Trained, validated, pictured and resumed; sampled with guidance by vectors, and by labels."""
    assert lines_of(VectorEmbedder, QuarterInk) <= 40
    argv = "--eval-every 2 --sample-every 2 --grad-accum-steps 2 --block in-context --no-learn-sigma".split()
    path = train_and_resume(tmp_path, *vectors, *argv)
    assert torch.load(path, weights_only=True)["config"]["model"]["condition"] == "vector"
    y = torch.randn(3, 4)
    sampler, images = assert_samples(path, of=y, cfg_scale=2.0)
    for parameter in sampler.model.parameters():  # four steps have not taught it much
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    guided, plain, none = (sampler.sample(y, cfg_scale=scale) for scale in (2.0, 1.0, 0.0))
    assert (guided - plain).abs().max() > 1e-3 and (plain - none).abs().max() > 1e-3
    assert torch.equal(none, sampler.sample(y.numpy() + 1, cfg_scale=0.0))  # whatever the condition
    assert torch.equal(sampler.sample(torch.eye(4)[[2]]), sampler.sample([2]))
    assert len(sampler.sample_each_class(1)) == 4 and len(sampler.sample(5)) == 5
    back = sampler.image_to_image(images, None, [0, 1, 2], steps=2)
    assert torch.isfinite(back).all()
    for bad, message in (
        (torch.randn(3, 5), r"conditions \(3, 5\): 'vector' are \(N, 4\), and finite"),
        (torch.full((1, 4), torch.nan), r"conditions \(1, 4\): 'vector'"),
    ):
        with pytest.raises(UserError, match=message):
            sampler.sample(bad)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", path, "--class-labels", "upper right", "3"])
    launch(sample.main, sample.build_parser())
    assert "labels [1, 3] (upper right, lower right)" in capsys.readouterr().out


def test_a_condition_s_size_is_the_data_s(tmp_path, vectors, capsys):
    with pytest.raises(SystemExit):
        run(*ARGV, *vectors, "--num-classes", 7, "--results-dir", tmp_path)
    assert "--num-classes 7: the vector of the data has 4 entries; leave it out" in capsys.readouterr().err


def test_dropped_conditions_are_the_null_one(vectors):
    torch.manual_seed(0)
    embedder = VectorEmbedder(4, 8, dropout_prob=0.5)
    embedder.none.data.normal_()
    y = torch.randn(400, 4)
    out = embedder(y, train=True)
    dropped = (out == embedder.none).all(dim=1)
    assert 150 < dropped.sum() < 250  # five standard deviations
    assert torch.equal(out[~dropped], embedder(y, train=False)[~dropped])
    assert torch.equal(embedder(y, False, force_drop_ids=dropped), out)


def test_the_published_condition_is_not_in_the_config():
    model = build_tiny()
    assert "condition" not in model.config
    assert DiT(**model.config, condition="class").config == model.config
