"""A block, a network behind the attention and a condition, added from outside in the few lines shown: they
train, resume and sample; and what a row lacks is refused by name."""

import sys

import pytest
import torch
import torch.nn as nn
from conftest import build_tiny
from in_process import run
from seams import ARGV, assert_samples, lines_of, train_and_resume

import sample
from models import BLOCKS, CONDITIONS, FFNS, Block, ConditionEmbedder, DiT, FinalLayer, modulate
from runtime.cli import UserError, launch
from runtime.flops import count_macs
from sampler import Sampler
from training.dataset import DATASETS, ArrayImages, Digits

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
