"""models.py: sizes, options, invariances, and a peer implementation."""

import re

import pytest
import torch
from conftest import build_tiny, load_rule_weights, rule_input

import models
from checkpointing.diffusers_format import to_diffusers
from models import DiT, DiT_models, TimestepEmbedder
from runtime.flops import count_activation_bytes, count_macs

# Parameters (frozen position embedding included) and the paper's "Gflops" (multiply-adds, 256x256):
PAPER = {
    "DiT-S/8": (33_148_160, 0.36), "DiT-S/4": (32_945_024, 1.41), "DiT-S/2": (32_963_360, 6.06),
    "DiT-B/8": (130_881_536, 1.42), "DiT-B/4": (130_475_648, 5.56), "DiT-B/2": (130_512_416, 23.01),
    "DiT-L/8": (458_594_816, 5.01), "DiT-L/4": (458_053_760, 19.70), "DiT-L/2": (458_102_816, 80.71),
    "DiT-XL/8": (675_683_072, 7.39), "DiT-XL/4": (675_074_432, 29.05), "DiT-XL/2": (675_129_632, 118.64),
}  # fmt: skip


def closed_form_macs(input_size, patch_size, hidden_size, depth, in_channels=4, **_):
    d, tokens, patch = hidden_size, (input_size // patch_size) ** 2, patch_size**2 * in_channels
    block = 12 * tokens * d**2 + 2 * tokens**2 * d + 6 * d**2
    return tokens * patch * d + 256 * d + d**2 + depth * block + 2 * d**2 + tokens * d * 2 * patch


def test_sizes_and_costs(capsys):
    """The table that the command prints: parameters and multiply-adds of all twelve are the paper's."""
    models.main(models.build_parser().parse_args([]))
    table = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("DiT")
    )
    assert set(table) == set(DiT_models) == set(PAPER)
    for name, row in table.items():
        tokens, parameters, gmacs, gflops, _ = (float(number.replace(",", "")) for number in row.split())
        expected_parameters, expected_gmacs = PAPER[name]
        macs = closed_form_macs(input_size=32, **DiT_models[name].keywords)
        assert (
            parameters == expected_parameters
            and tokens == (32 // DiT_models[name].keywords["patch_size"]) ** 2
        )
        assert gmacs == round(macs / 1e9, 2) and gflops == pytest.approx(2 * macs / 1e9, abs=0.006)
        assert gmacs == pytest.approx(expected_gmacs, abs=0.02)  # the paper rounds, and counts a little more


@pytest.mark.parametrize("name", ["DiT-S/8", "DiT-XL/2"])
def test_counted_multiply_adds_are_exact(name):
    with torch.device("meta"):
        model = DiT_models[name]()
    assert count_macs(model) == closed_form_macs(**dict(model.config, input_size=32))


def test_cost_at_512():
    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"](input_size=64)
    assert count_macs(model) == closed_form_macs(**dict(model.config, input_size=64))
    assert count_macs(model) / 1e9 == pytest.approx(524.60, abs=0.1)


def test_activation_bytes_are_those_of_a_real_pass():
    model = build_tiny(hidden_size=128).eval()
    kept, weights = {}, {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.tensor([1]))
    assert out.requires_grad
    assert count_activation_bytes(model) == pytest.approx(sum(kept.values()), rel=0.02)


@pytest.mark.parametrize(
    "options, out_channels",
    [
        ({}, 8),
        (dict(learn_sigma=False), 4),
        (dict(input_size=[8, 12]), 8),
        (dict(in_channels=1, learn_sigma=False), 1),
        (dict(in_channels=16, patch_size=4), 32),
        (dict(num_classes=0), 8),
        (dict(num_classes=None), 8),
        (dict(num_classes=3, class_dropout_prob=0.0), 8),
        (dict(hidden_size=72, num_heads=3, depth=1, mlp_ratio=2.0), 8),
    ],
)
def test_options(options, out_channels):
    model = build_tiny(**options)
    for p in model.parameters():  # away from zero initialisation, where the output is 0
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(2, model.in_channels, *model.input_size)
    y = torch.tensor([0, 2]) if model.num_classes else None
    out = model(x, torch.tensor([3, 700]), y)
    assert out.shape == (2, out_channels, *model.input_size)
    out.square().mean().backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or (p.grad is not None and p.grad.abs().sum() > 0), name
    rebuilt = DiT(**model.config)
    rebuilt.load_state_dict(model.state_dict())
    assert rebuilt.config == model.config
    torch.testing.assert_close(
        rebuilt.eval()(x, torch.tensor([3, 700]), y), model.eval()(x, torch.tensor([3, 700]), y)
    )


def test_a_new_model_predicts_zero():
    out = build_tiny()(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 1]))
    assert (out == 0).all()


def test_state_dict_names():
    expected = {"pos_embed", "y_embedder.embedding_table.weight"}
    expected |= {f"{layer}.{kind}" for kind in ("weight", "bias") for layer in (
        "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear",
        "final_layer.adaLN_modulation.1",
        *(f"blocks.{i}.{part}" for i in range(2) for part in (
            "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")),
    )}  # fmt: skip
    assert set(build_tiny().state_dict()) == expected


def test_label_table_and_null_label():
    assert build_tiny().y_embedder.embedding_table.weight.shape[0] == 11
    assert build_tiny().null_label == 10
    assert build_tiny(class_dropout_prob=0.0).y_embedder.embedding_table.weight.shape[0] == 10
    assert build_tiny(class_dropout_prob=0.0).null_label is None
    assert build_tiny(num_classes=0).null_label is None


def test_dropped_labels_are_the_null_label(tiny):
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])
    dropped = torch.tensor([True, False, True, False])
    expected = tiny(x, t, torch.tensor([10, 6, 10, 8]))
    torch.testing.assert_close(tiny(x, t, y, force_drop_ids=dropped), expected)
    tiny.train()  # a given choice takes the place of a drawn one
    torch.testing.assert_close(tiny(x, t, y, force_drop_ids=dropped), expected)


def test_share_of_dropped_labels():
    embedder = build_tiny().y_embedder
    torch.manual_seed(0)
    out = embedder(torch.zeros(20_000, dtype=torch.long), train=True)
    share = (out == embedder.embedding_table.weight[10]).all(dim=1).float().mean()
    assert share == pytest.approx(0.1, abs=0.01)


def test_guidance_with_scale_one_and_on_all_channels(tiny):
    x, t = rule_input("x8", 4, 4, 8, 8), torch.full((8,), 333)
    y = torch.tensor([0, 3, 9, 5] + [10] * 4)
    plain = tiny(x, t[:4], y[:4])
    torch.testing.assert_close(
        tiny.forward_with_cfg(torch.cat([x, x]), t, y, 1.0)[:4], plain, atol=1e-5, rtol=1e-5
    )
    three = tiny.forward_with_cfg(torch.cat([x, x]), t, y, 2.0)
    four = tiny.forward_with_cfg(torch.cat([x, x]), t, y, 2.0, cfg_channels=4)
    torch.testing.assert_close(three[:, :3], four[:, :3])
    torch.testing.assert_close(three[:4, 3:], plain[:, 3:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(three[:, 3], four[:, 3], atol=1e-3)


def test_rectangle_places_patches_and_positions():
    """A patch of the input comes out where it went in, rows and columns not exchanged."""
    model = build_tiny(input_size=[8, 12], hidden_size=64)
    positions = model.pos_embed[0].reshape(4, 6, 64)
    assert (positions[0, :, 32:] == positions[0, :1, 32:]).all()  # one row: the row's half is constant
    assert (positions[:, 0, :32] == positions[:1, 0, :32]).all()  # one column: the column's half is
    patches = torch.zeros(1, 24, 2 * 2 * 8)
    patches[0, 1 * 6 + 4] = 1  # second row, fifth column of patches
    image = model.unpatchify(patches)
    assert image.shape == (1, 8, 8, 12) and image.sum() == 32 and image[:, :, 2:4, 8:10].sum() == 32


def test_token_stream_is_contiguous(tiny):
    seen = []
    tiny.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    tiny(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert seen == [True]


def test_bfloat16_model_keeps_its_sense_of_time(tiny):
    t = torch.arange(990, 1000)
    assert len(t.bfloat16().unique()) < 10
    features = TimestepEmbedder.timestep_embedding(t, 256)
    assert features.dtype == torch.float32 and len(features.unique(dim=0)) == 10
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    full = tiny(x, torch.tensor([7, 993]), y)
    half = tiny.to(torch.bfloat16)(x.bfloat16(), torch.tensor([7, 993]), y)
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(half.float().flatten(), full.flatten(), dim=0) > 0.999


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(input_size=9), "input_size 9x9: must be divisible by patch_size 2"),
        (dict(hidden_size=66), "hidden_size 66: must be divisible by 4"),
        (dict(num_heads=5), "divisible by 4 and by num_heads 5"),
        (dict(class_dropout_prob=1.0), "class_dropout_prob 1.0: must be in [0, 1)"),
        (dict(depth=0), "depth 0: must be at least 1"),
    ],
)
def test_impossible_models(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_tiny(**options)


def test_input_of_another_size(tiny):
    with pytest.raises(ValueError, match=re.escape("x (2, 4, 8, 10): this model takes (N, 4, 8, 8)")):
        tiny(torch.randn(2, 4, 8, 10), torch.tensor([1, 2]), torch.tensor([1, 2]))


def test_same_output_as_diffusers():
    """diffusers' DiT with the same weights, but for its timestep frequencies: it divides the exponent by
    half - 1 = 127, the published DiT by half = 128. The test sets that one difference to DiT's."""
    from diffusers import DiTTransformer2DModel

    model = load_rule_weights(build_tiny(input_size=16, hidden_size=96, depth=3, num_heads=3), 0.1).eval()
    peer = DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=3,
        sample_size=16, patch_size=2, num_embeds_ada_norm=10, norm_eps=1e-6,
    ).eval()  # fmt: skip
    missing, unexpected = peer.load_state_dict(to_diffusers(model.state_dict(), 3), strict=False)
    assert not unexpected and all("pos_embed.pos_embed" in key for key in missing)
    x, t, y = rule_input("peer", 4, 4, 16, 16), torch.tensor([0, 50, 500, 999]), torch.tensor([0, 5, 9, 10])
    with torch.no_grad():
        ours = model(x, t, y)
        assert not torch.allclose(peer(x, t, y).sample, ours, atol=1e-3)
        for block in peer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        torch.testing.assert_close(peer(x, t, y).sample, ours, atol=1e-4, rtol=1e-4)
