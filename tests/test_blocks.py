"""The paper's four blocks and the neighbours' options: sizes, gradients, identities, all of them alive."""

import itertools

import pytest
import torch
import torch.nn as nn
from conftest import build_tiny, rule_input

from checkpointing import files as checkpoints
from models import BLOCKS, FFNS, MLP, ConvFFN, CrossAttention, DiT, DiT_models
from runtime.flops import count_macs

OPTIONS = {
    **{f"block {name}": dict(block=name) for name in BLOCKS},
    "conv": dict(ffn="conv"),
    "learned": dict(pos_embed="learned"),
    "registers": dict(registers=3),
    "qk-norm": dict(qk_norm=True),
    "unconditional": dict(num_classes=0),
    "rectangular": dict(input_size=[8, 4], ffn="conv"),
    "all at once": dict(
        block="cross-attention", ffn="conv", pos_embed="learned", registers=2, qk_norm=True, in_channels=3,
        input_size=[4, 8], num_classes=0,
    ),
}  # fmt: skip
options = pytest.mark.parametrize("overrides", OPTIONS.values(), ids=OPTIONS)


def awake(**overrides):
    """A model of other than zero output, so that every part shows."""
    torch.manual_seed(0)
    model = build_tiny(**overrides)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def inputs(model, n=3):
    x = rule_input("block", n, model.in_channels, *model.input_size)
    return x, torch.tensor([1, 500, 999])[:n], torch.tensor([0, 3, 9])[:n] if model.num_classes else None


# ---------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize(
    "block, parameters, gmacs",
    [
        ("in-context", 449_162_528, 119.37),
        ("cross-attention", 597_991_712, 137.62),
        ("adaln", 600_452_384, 118.56),
        ("adaln-zero", 674_834_720, 118.64),
    ],
)
def test_the_paper_s_sizes(block, parameters, gmacs):
    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"](block=block)
    assert sum(p.numel() for name, p in model.named_parameters() if name != "pos_embed") == parameters
    assert count_macs(model) / 1e9 == pytest.approx(gmacs, rel=1e-3)


def test_the_convolution_s_size():
    count = {}
    for ffn in FFNS:
        with torch.device("meta"):
            count[ffn] = sum(p.numel() for p in DiT_models["DiT-B/2"](ffn=ffn).parameters())
    assert count["conv"] - count["mlp"] == 12 * 30_720


# ---------------------------------------------------------------------------------------------
# Every option


@options
def test_shapes_gradients_and_config(overrides):
    """Every trainable parameter matters, and the config builds the same model again."""
    model = awake(**overrides).train()
    x, t, y = inputs(model)
    out = model(x, t, y)
    assert out.shape == (3, model.out_channels, *model.input_size)
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == (
        [] if overrides.get("pos_embed") == "learned" else ["pos_embed"]
    )
    again = DiT(**model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x, t, y), model.eval()(x, t, y))
    inferred = checkpoints.infer_model_config(model.state_dict(), "x", "DiT-S/2")
    assert inferred["block"] == model.config["block"]


@options
def test_checkpointed_is_plain(overrides):
    model = awake(**{**overrides, "class_dropout_prob": 0.0}).train()
    x, t, y = inputs(model)
    gradients = []
    for model.grad_checkpointing in (False, True):
        model.zero_grad()
        out = model(x, t, y)
        out.square().sum().backward()
        gradients.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert all(map(torch.equal, *gradients))


def test_a_checkpointed_block_drops_the_same(monkeypatch):
    """One that draws random numbers draws them again."""

    class Dropping(MLP):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    monkeypatch.setitem(FFNS, "dropping", Dropping)
    model, gradients = awake(ffn="dropping", class_dropout_prob=0.0).train(), []
    for model.grad_checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        model(*inputs(model)).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_tokens_in_bfloat16(block, grad_checkpointing):
    """Tokens between the blocks; weights and output stay float32, and the error is of bfloat16's own size."""
    model = awake(block=block).train()
    model.grad_checkpointing = grad_checkpointing
    x, t, y = inputs(model)
    drop, seen = torch.zeros(3, dtype=torch.bool), []
    model.blocks[-1].register_forward_hook(lambda block, given, out: seen.append((given[0].dtype, out.dtype)))
    exact = model(x, t, y, drop)
    errors, gradients = [], []
    for model.residual_dtype in (None, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x, t, y, drop)
        out.square().mean().backward()
        gradients.append(model.blocks[0].mlp.fc1.weight.grad.clone())
        errors.append(((out - exact).norm() / exact.norm()).item())
        assert out.dtype == torch.float32
    assert seen[1] == (torch.float32, torch.float32) and (torch.bfloat16, torch.bfloat16) in seen
    assert errors[0] < errors[1] < 0.02
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


@options
def test_a_new_model_predicts_zero(overrides):
    model = build_tiny(**overrides).eval()
    assert model(*inputs(model)).abs().max() == 0


@options
def test_rows_do_not_mix(overrides):
    """An input, its time and its label, alone or among others: the same output."""
    model = awake(**overrides).eval()
    x, t, y = inputs(model)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y if y is None else y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x, t, y), alone, atol=1e-5, rtol=1e-5)
    other = model(x, t.flip(0), y)
    assert (other - model(x, t, y))[0].abs().max() > 1e-3  # time enters
    if y is not None:
        assert (model(x, t, y.flip(0)) - model(x, t, y))[0].abs().max() > 1e-3  # the label does


def test_the_default_is_what_it_was():
    """No option changes names, draws or sizes of the published model."""
    torch.manual_seed(0)
    plain = build_tiny()
    torch.manual_seed(0)
    spelt_out = build_tiny(block="adaln-zero", ffn="mlp", pos_embed="sincos", registers=0, qk_norm=False)
    for (name, value), (other, same) in zip(plain.state_dict().items(), spelt_out.state_dict().items()):
        assert name == other and torch.equal(value, same)
    assert not any(word in name for name in plain.state_dict() for word in ("registers", "conv", "norm"))


def test_zero_gates_are_the_identity():
    block = build_tiny().blocks[0]
    x, c = torch.randn(2, 16, 64), torch.randn(2, 64)
    assert torch.equal(block(x, c), x)
    for name in ("adaln", "in-context", "cross-attention"):
        model = build_tiny(block=name)
        x_in, c_in = model.condition(x, [c, c])
        assert not torch.allclose(model.blocks[0](x_in, c_in), x_in, atol=1e-2)


@pytest.mark.parametrize("bad, message", [
    (dict(block="film"), "block 'film': choose one of adaln-zero, adaln, cross-attention, in-context"),
    (dict(ffn="moe"), "ffn 'moe': choose one of mlp, conv"),
    (dict(pos_embed="rope"), "pos_embed 'rope': choose one of sincos, learned"),
    (dict(registers=-1), "registers -1: must be 0 or more"),
])  # fmt: skip
def test_impossible_options(bad, message):
    with pytest.raises(ValueError, match=message):
        build_tiny(**bad)


# ---------------------------------------------------------------------------------------------
# The parts


def test_convolution_is_over_the_patches():
    """A change of one patch reaches its eight neighbours, in rows and columns, and no other token."""
    torch.manual_seed(0)
    ffn = ConvFFN(8, 32, grid_size=(3, 5))
    x = torch.randn(1, 15 + 2, 8)
    moved = x.clone()
    moved[0, 6] += 1  # row 1, column 1
    changed = (ffn(moved) - ffn(x)).abs().amax(dim=2)[0] > 1e-6
    reached = [5 * row + column for row, column in itertools.product(range(3), range(3))]
    assert changed.nonzero().flatten().tolist() == reached
    moved = x.clone()
    moved[0, 16] += 1  # a register
    assert ((ffn(moved) - ffn(x)).abs().amax(dim=2)[0] > 1e-6).nonzero().flatten().tolist() == [16]
    # And it is the convolution of an image:
    hidden = ffn.act(ffn.fc1(x[:, :15])).transpose(1, 2).reshape(1, 32, 3, 5)
    expected = ffn.fc2(ffn.conv(hidden).reshape(1, 32, 15).transpose(1, 2))
    torch.testing.assert_close(ffn(x)[:, :15], expected)


def test_cross_attention_is_pytorch_s():
    torch.manual_seed(0)
    ours, peer = CrossAttention(32, 4), torch.nn.MultiheadAttention(32, 4, batch_first=True)
    peer.in_proj_weight.data.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
    peer.in_proj_bias.data.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
    peer.out_proj.load_state_dict(ours.proj.state_dict())
    x, condition = torch.randn(2, 7, 32), torch.randn(2, 3, 32)
    torch.testing.assert_close(ours(x, condition), peer(x, condition, condition)[0], atol=1e-5, rtol=1e-5)


def test_registers_and_conditions_are_dropped():
    """They take part, and leave the output's shape and place alone."""
    model = awake(registers=4).eval()
    x, t, y = inputs(model)
    before = model(x, t, y)
    model.registers.tokens.data += torch.randn_like(model.registers.tokens)
    assert (model(x, t, y) - before).abs().max() > 1e-3
    seen = []
    model.blocks[0].register_forward_hook(lambda block, args, out: seen.append(out.shape))
    model.final_layer.register_forward_hook(lambda layer, args, out: seen.append(args[0].shape))
    model(x, t, y)
    assert seen == [(3, 16 + 4, 64), (3, 16, 64)]


def test_learned_positions_begin_as_the_fixed_ones():
    fixed, learned = build_tiny(), build_tiny(pos_embed="learned")
    assert torch.equal(fixed.pos_embed, learned.pos_embed)
    assert learned.pos_embed.requires_grad and not fixed.pos_embed.requires_grad


@pytest.mark.slow
@options
def test_compiled_blocks(overrides):
    model = awake(**overrides).eval()
    x, t, y = inputs(model)
    with torch.no_grad():
        plain = model(x, t, y)
        model.compile_blocks()
        torch.testing.assert_close(model(x, t, y), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_take_many_shapes():
    model = awake().eval()
    model.compile_blocks()
    for n in range(1, 11):
        assert len(model(torch.randn(n, 4, 8, 8), torch.rand(n), torch.zeros(n, dtype=torch.long))) == n
