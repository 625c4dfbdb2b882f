"""Diffusion transformers (DiT) for images and latents.

Architecture, sizes and initialisation follow "Scalable Diffusion Models with Transformers"
(Peebles & Xie, arXiv 2212.09748); parameter names are those of the published weights.

    python models.py                       # the twelve models: parameters, multiply-adds, memory
    model = DiT_models["DiT-XL/2"](input_size=32, num_classes=1000)

Shapes: N batch, C channels, H W height and width, p patch size, T tokens, D width.
Names:  x images or latents, t time, y label, c conditioning vector.
"""

import contextlib
import math
from functools import partial

import numpy as np
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from runtime.cli import Parser, int_at_least, launch, require_parts
from runtime.flops import count_activation_bytes, count_macs

__all__ = [
    "DiT", "DiTBlock", "DiT_models", "FinalLayer", "LabelEmbedder", "TimestepEmbedder", "check_config",
    "get_2d_sincos_pos_embed", "modulate", "null_label",
]  # fmt: skip
POS_EMBEDS = ("sincos", "learned")


# ---------------------------------------------------------------------------------------------
# Embeddings of patches, time, label and position


class PatchEmbed(nn.Module):
    """Images (N, C, H, W) to tokens (N, T, D), a patch each, row by row: a convolution with stride p."""

    def __init__(self, input_size, patch_size, in_channels, hidden_size):
        super().__init__()
        self.grid_size = tuple(side // patch_size for side in input_size)  # patches (rows, columns)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        # Made contiguous once, since every later elementwise operation would keep the transposed layout
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """Time (N,), in steps of the full process (0 … 1000), to a conditioning vector (N, D)."""

    def __init__(self, hidden_size, frequency_embedding_size=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.frequency_embedding_size = frequency_embedding_size

    @staticmethod
    def timestep_embedding(t, dim, max_period=10000):
        """Sinusoidal features (N, dim) of t (N,): cosines, then sines, of geometrically spaced frequencies.
        Always float32: t reaches 1000, where neighbouring steps are the same number in bfloat16."""
        half = dim // 2
        ramp = torch.arange(half, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(max_period) * ramp / half)
        angles = t[:, None].float() * frequencies[None]
        features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        return nn.functional.pad(features, (0, dim % 2))  # an odd width ends in a zero

    def forward(self, t):
        features = self.timestep_embedding(t, self.frequency_embedding_size)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class ConditionEmbedder(nn.Module):
    """Conditions y (N, …) to vectors (N, D). In training a share of them becomes the null condition, which
    classifier-free guidance (Ho & Salimans, arXiv 2207.12598) reads as "none".

    A row of CONDITIONS, which data sets name as their `condition`, extends this by
    embed(y)             conditions to vectors (N, D)
    null_like(y)         null conditions of the shape and type of y
    from_labels(labels)  what integers (N,) of 0 … num_classes-1, by which the commands ask, stand for
    """

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def forward(self, y, train, force_drop_ids=None):
        if force_drop_ids is None and train and self.dropout_prob > 0:
            draws = torch.rand(y.shape[0], dtype=torch.float32, device=y.device)
            force_drop_ids = draws < self.dropout_prob
        if force_drop_ids is not None:
            drop = force_drop_ids.bool().view(-1, *[1] * (y.ndim - 1))
            y = torch.where(drop, self.null_like(y), y)
        return self.embed(y.to(next(self.parameters()).dtype) if y.is_floating_point() else y)


class LabelEmbedder(ConditionEmbedder):
    """Class labels (N,), of which `num_classes` is the null label. The table has its row only where
    dropout_prob > 0."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__(num_classes, hidden_size, dropout_prob)
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def embed(self, labels):
        return self.embedding_table(labels)

    def null_like(self, labels):
        return torch.full_like(labels, self.num_classes)

    def from_labels(self, labels):
        return labels


CONDITIONS = {"class": LabelEmbedder}


def get_2d_sincos_pos_embed(embed_dim, grid_size):
    """Fixed position embedding, float64 (T, embed_dim), of a grid given as its side or as (rows, columns).

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines.
    """
    rows, columns = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    if embed_dim % 4:
        raise ValueError(f"hidden_size {embed_dim}: must be divisible by 4 (two axes, sine and cosine)")
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    frequencies = 1.0 / 10000 ** (np.arange(embed_dim // 4, dtype=np.float64) / (embed_dim / 4))

    def encode(position):
        angles = np.outer(position.reshape(-1), frequencies)  # (T, embed_dim / 4)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    return np.concatenate([encode(column), encode(row)], axis=1)


# ---------------------------------------------------------------------------------------------
# Parts of blocks


def modulate(x, shift, scale):
    """Scale and shift every token of x (N, T, D) by its row's shift and scale (N, D), from 1 and 0."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def gelu():
    return nn.GELU(approximate="tanh")


class Attention(nn.Module):
    """Multi-head self-attention of tokens x (N, T, D). qk_norm: normalise each head's queries and keys."""

    def __init__(self, hidden_size, num_heads, qk_norm=False):
        super().__init__()
        self.num_heads, head_width = num_heads, hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(head_width) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_width) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (N, T, 3, heads, D / heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, D / heads)
        x = nn.functional.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value)
        return self.proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, hidden_size, hidden_features, grid_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, hidden_features)
        self.act = gelu()
        self.fc2 = nn.Linear(hidden_features, hidden_size)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class ConvFFN(nn.Module):
    """The same with a depth-wise 3x3 convolution over the patches behind the GELU (LocalViT, arXiv
    2104.05707). Tokens that are no patches pass it by."""

    def __init__(self, hidden_size, hidden_features, grid_size):
        super().__init__()
        self.grid_size, self.patches = grid_size, grid_size[0] * grid_size[1]
        self.fc1 = nn.Linear(hidden_size, hidden_features)
        self.act = gelu()
        self.conv = nn.Conv2d(hidden_features, hidden_features, 3, padding=1, groups=hidden_features)
        self.fc2 = nn.Linear(hidden_features, hidden_size)

    def forward(self, x):
        x = self.act(self.fc1(x))  # (N, T, 4D)
        patches, others = x.split([self.patches, x.shape[1] - self.patches], dim=1)
        image = patches.transpose(1, 2).unflatten(2, self.grid_size)  # (N, 4D, rows, columns)
        patches = self.conv(image).flatten(2).transpose(1, 2)
        return self.fc2(torch.cat([patches, others], dim=1))


class CrossAttention(nn.Module):
    """Attention of tokens x (N, T, D) to the tokens of a condition (N, M, D)."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x, condition):
        def heads(tokens):  # (N, T, D) to (N, heads, T, D / heads)
            return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

        key, value = self.kv(condition).chunk(2, dim=2)
        x = nn.functional.scaled_dot_product_attention(heads(self.q(x)), heads(key), heads(value))
        return self.proj(x.transpose(1, 2).flatten(2))


class Registers(nn.Module):
    """Learned tokens behind the patches, a place to keep what no patch holds (arXiv 2309.16588)."""

    def __init__(self, count, hidden_size):
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, count, hidden_size))

    def forward(self, x):
        return torch.cat([x, self.tokens.to(x.dtype).expand(len(x), -1, -1)], dim=1)


# Classes with __init__(hidden_size, hidden_features, grid_size) and forward(x) of tokens x (N, T, D):
FFNS = {"mlp": MLP, "conv": ConvFFN}


# ---------------------------------------------------------------------------------------------
# Final layers


class FinalLayer(nn.Module):
    """Tokens (N, T, D) to patches (N, T, p·p·C_out), modulated by c; zero at initialisation."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))

    def initialize_zero(self):
        for layer in (self.adaLN_modulation[-1], self.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class PlainFinalLayer(nn.Module):
    """The same with a plain affine norm, for blocks that condition in other ways."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x, c):
        return self.linear(self.norm_final(x))

    def initialize_zero(self):
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


# ---------------------------------------------------------------------------------------------
# The paper's four blocks (its figure 3), with one signature: forward(x, c) -> x


class Block(nn.Module):
    """What a row of BLOCKS has, beside __init__(hidden_size, num_heads, attention, ffn) and forward(x, c).
    Modulated blocks extend DiTBlock rather, whose c is (N, D)."""

    final_layer = PlainFinalLayer

    @staticmethod
    def condition(x, embeddings):
        """Of tokens x (N, T, D) and the embeddings of time and label, each (N, D): the tokens that enter the
        first block, those of x first, and the c that all blocks get."""
        return x, torch.stack(embeddings, dim=1)  # (N, 2, D)

    def initialize_zero(self):
        """Zero what lets the block start as the identity, if anything."""


class DiTBlock(Block):
    """Transformer block with adaLN-Zero conditioning: starts as the identity, since its gates start at 0."""

    final_layer = FinalLayer

    def __init__(self, hidden_size, num_heads, attention, ffn):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = ffn(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    @staticmethod
    def condition(x, embeddings):
        return x, sum(embeddings[1:], embeddings[0])  # (N, D)

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)  # six of (N, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x

    def initialize_zero(self):
        nn.init.zeros_(self.adaLN_modulation[-1].weight)
        nn.init.zeros_(self.adaLN_modulation[-1].bias)


class AdaLNBlock(DiTBlock):
    """The same without gates, and with an ordinary initialisation."""

    def __init__(self, hidden_size, num_heads, attention, ffn):
        super().__init__(hidden_size, num_heads, attention, ffn)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 4 * hidden_size))

    def forward(self, x, c):
        shift_msa, scale_msa, shift_mlp, scale_mlp = self.adaLN_modulation(c).chunk(4, dim=1)
        x = x + self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x

    initialize_zero = Block.initialize_zero  # there are no gates


class InContextBlock(Block):
    """A plain transformer block; time and label are tokens among the others."""

    def __init__(self, hidden_size, num_heads, attention, ffn):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = ffn(hidden_size)

    @staticmethod
    def condition(x, embeddings):
        tokens = torch.stack(embeddings, dim=1)  # (N, 2, D)
        return torch.cat([x, tokens.to(x.dtype)], dim=1), tokens

    def forward(self, x, c):
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class CrossAttentionBlock(Block):
    """A transformer block whose tokens also attend to those of time and label."""

    def __init__(self, hidden_size, num_heads, attention, ffn):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm3 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = ffn(hidden_size)

    def forward(self, x, c):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), c)
        x = x + self.mlp(self.norm3(x))
        return x


BLOCKS = {
    "adaln-zero": DiTBlock, "adaln": AdaLNBlock, "cross-attention": CrossAttentionBlock,
    "in-context": InContextBlock,
}  # fmt: skip


DRAW_NOTHING = {*BLOCKS.values(), *FFNS.values()}  # classes that need no random numbers


# ---------------------------------------------------------------------------------------------
# The model


def disable_autocast(x):
    """Turns off autocast on the device of x, for what keeps the weights' own precision."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class DiT(nn.Module):
    """Diffusion transformer.

    input_size     side of the input, or (H, W); divisible by patch_size
    patch_size     side p of a patch; tokens T = (H/p)(W/p)
    in_channels    channels C of the input: 4 for SD-VAE latents, 3 for RGB pixels
    hidden_size    width D; depth blocks of num_heads heads and an MLP mlp_ratio times as wide
    class_dropout_prob  share of labels dropped in training; 0 leaves no null label, hence no guidance
    num_classes    labels 0 … num_classes-1, the null label is num_classes; 0 or None for an unconditional
                   model
    condition      what y is: "class", or another of CONDITIONS, whose size num_classes then is
    learn_sigma    twice the channels out: the second half interpolates the variance
                   (improved DDPM, arXiv 2102.09672, eq. 15)
    block          how time and label enter: one of BLOCKS
    ffn            behind the attention, one of FFNS: "mlp", or "conv" with a convolution over the patches
    pos_embed      position embedding: "sincos", fixed, or "learned" from there
    registers      learned tokens beside the patches, dropped before the final layer
    qk_norm        normalise queries and keys, for the stability of long runs in bfloat16

    `config` is the plain dict that builds the same model again: DiT(**model.config).
    """

    def __init__(
        self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
        mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True, block="adaln-zero",
        ffn="mlp", pos_embed="sincos", registers=0, qk_norm=False, condition="class",
    ):  # fmt: skip
        super().__init__()
        input_size = [input_size] * 2 if isinstance(input_size, int) else [int(side) for side in input_size]
        num_classes = num_classes or 0
        self.config = dict(
            input_size=input_size, patch_size=patch_size, in_channels=in_channels, hidden_size=hidden_size,
            depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, class_dropout_prob=class_dropout_prob,
            num_classes=num_classes, learn_sigma=learn_sigma, block=block, ffn=ffn, pos_embed=pos_embed,
            registers=registers, qk_norm=qk_norm,
        )  # fmt: skip
        if condition != "class":  # configs that do not say so stay equal to those of earlier versions
            self.config["condition"] = condition
        check_config(self.config)
        self.input_size, self.patch_size = tuple(input_size), patch_size
        self.in_channels, self.out_channels = in_channels, in_channels * (2 if learn_sigma else 1)
        self.learn_sigma, self.num_heads, self.num_classes = learn_sigma, num_heads, num_classes
        self.grad_checkpointing = False  # set it to recompute every block in the backward pass, for memory
        self.residual_dtype = None  # set it for tokens of another type than the blocks' weights

        self.x_embedder = PatchEmbed(self.input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        embedder = CONDITIONS[condition]
        self.y_embedder = embedder(num_classes, hidden_size, class_dropout_prob) if num_classes else None
        # No buffer: the published weights and parameter counts hold it.
        self.pos_embed = nn.Parameter(
            torch.zeros(1, self.x_embedder.num_patches, hidden_size), requires_grad=pos_embed == "learned"
        )
        self.registers = Registers(registers, hidden_size) if registers else nn.Identity()
        attention = partial(Attention, qk_norm=qk_norm)
        grid_size = self.x_embedder.grid_size
        network = partial(FFNS[ffn], hidden_features=int(hidden_size * mlp_ratio), grid_size=grid_size)
        self.condition = BLOCKS[block].condition
        self.blocks = nn.ModuleList(
            [BLOCKS[block](hidden_size, num_heads, attention, network) for _ in range(depth)]
        )
        self._may_draw = not {BLOCKS[block], FFNS[ffn]} <= DRAW_NOTHING
        self.final_layer = BLOCKS[block].final_layer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    @property
    def null_label(self):
        """The label that stands for "no label", or None where the model knows none."""
        return null_label(self.config)

    def initialize_weights(self):
        """Initialise as the paper does; the order of the random draws is part of the contract."""

        def initialize(module):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        self.apply(initialize)  # children before their parents
        positions = get_2d_sincos_pos_embed(self.pos_embed.shape[-1], self.x_embedder.grid_size)
        self.pos_embed.data.copy_(torch.from_numpy(positions).float().unsqueeze(0))
        # The patch convolution is a Linear over the values of a patch, and initialised as one.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for module in self.modules():
            if isinstance(module, nn.Embedding):  # of labels
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for layer in [*self.blocks, self.final_layer]:
            layer.initialize_zero()
        for tokens in self.registers.parameters():
            nn.init.normal_(tokens, std=0.02)

    def store_bfloat16(self):
        """Keep the blocks' weights, nearly all there are, in bfloat16, and run them in it: for sampling.

        Embeddings, position, final layer and so the output stay float32, and so do weights in training."""
        self.blocks.bfloat16()
        return self

    def compile_blocks(self):
        """Compile the blocks, for every shape that they meet."""
        # A notebook tries more batch sizes than the eight shapes after which the compiler refuses another:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False)

    @property
    def block_dtype(self):
        """The type of the blocks' weights."""
        return next(self.blocks.parameters(), self.pos_embed).dtype

    def unpatchify(self, x):
        """Patches (N, T, p·p·C) back to images (N, C, H, W)."""
        p = self.patch_size
        rows, columns = self.x_embedder.grid_size
        x = x.reshape(x.shape[0], rows, columns, p, p, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), self.out_channels, rows * p, columns * p)

    def forward(self, x, t, y=None, force_drop_ids=None, features_of=None):
        """Predict from x (N, C, H, W) at times t (N,) with labels y (N,): (N, 2C or C, H, W).

        force_drop_ids (N,): rows whose label is dropped, train.py's draws; None lets a model draw its own.
        features_of: number of a block, from 1, whose output at the patches (N, T, D) is returned too."""
        if tuple(x.shape[1:]) != (self.in_channels, *self.input_size):
            raise ValueError(
                f"x {tuple(x.shape)}: this model takes (N, {self.in_channels}, %d, %d)" % self.input_size
            )
        x = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed  # (N, T, D)
        x = self.registers(x)
        with disable_autocast(x):
            embeddings = [self.t_embedder(t)]  # each (N, D)
            if self.y_embedder is not None:
                embeddings.append(self.y_embedder(y, self.training, force_drop_ids))
        x, c = self.condition(x, embeddings)
        # With weights stored or tokens asked for as bfloat16; otherwise these change nothing:
        x, c_blocks = x.to(self.residual_dtype or self.block_dtype), c.to(self.block_dtype)
        for number, block in enumerate(self.blocks, start=1):
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, c_blocks, use_reentrant=False, preserve_rng_state=self._may_draw)
            else:
                x = block(x, c_blocks)
            if number == features_of:
                features = x[:, : self.x_embedder.num_patches]
        with disable_autocast(x):
            # Drop register and condition tokens, which stand after the patches:
            x = self.final_layer(x[:, : self.x_embedder.num_patches].to(c.dtype), c)  # (N, T, p·p·C_out)
        x = self.unpatchify(x)  # (N, C_out, H, W)
        return x if features_of is None else (x, features)

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=3):
        """Classifier-free guidance as published, on 2N rows: labels in the first half, null in the second.

        The noise of the first half of x is used for both. Only the first cfg_channels channels are guided,
        as in the published samples; both halves of the result carry the guided prediction. The commands
        guide by diffusion/guidance.py instead."""
        cfg_channels = min(cfg_channels, self.in_channels)  # what lies beyond is the variance
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        guided, rest = out[:, :cfg_channels], out[:, cfg_channels:]
        conditional, unconditional = guided.chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


def null_label(config):
    """The label that stands for "no label" in a model of this config, or None where it knows none."""
    return config["num_classes"] if config["num_classes"] and config["class_dropout_prob"] > 0 else None


def check_config(config):
    """Raise ValueError, naming option and value, where a DiT cannot be built from these arguments."""
    height, width = config["input_size"]
    patch_size, hidden_size, num_heads = config["patch_size"], config["hidden_size"], config["num_heads"]
    for name in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
        if not config[name] >= 1:
            raise ValueError(f"{name} {config[name]}: must be at least 1")
    if min(height, width) < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"input_size {height}x{width}: must be divisible by patch_size {patch_size}")
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(f"hidden_size {hidden_size}: must be divisible by 4 and by num_heads {num_heads}")
    for name, known, parts in (
        ("block", BLOCKS, ("final_layer", "condition", "initialize_zero", "forward")),
        ("ffn", FFNS, ("forward",)),
        ("condition", CONDITIONS, ("embed", "null_like", "from_labels", "forward")),
        ("pos_embed", POS_EMBEDS, ()),
    ):
        choice = config.get(name, "class")
        if choice not in known:
            raise ValueError(f"{name} {choice!r}: choose one of {', '.join(known)}")
        if parts:
            require_parts(f"{name} {choice!r}", known[choice], *parts)
    if config["registers"] < 0:
        raise ValueError(f"registers {config['registers']}: must be 0 or more")
    if not 0 <= config["class_dropout_prob"] < 1:
        raise ValueError(f"class_dropout_prob {config['class_dropout_prob']}: must be in [0, 1)")


# ---------------------------------------------------------------------------------------------
# The registry: four sizes, three patches

_S = dict(depth=12, hidden_size=384, num_heads=6)
_B = dict(depth=12, hidden_size=768, num_heads=12)
_L = dict(depth=24, hidden_size=1024, num_heads=16)
_XL = dict(depth=28, hidden_size=1152, num_heads=16)
DiT_XL_2, DiT_XL_4, DiT_XL_8 = (partial(DiT, patch_size=side, **_XL) for side in (2, 4, 8))
DiT_L_2, DiT_L_4, DiT_L_8 = (partial(DiT, patch_size=side, **_L) for side in (2, 4, 8))
DiT_B_2, DiT_B_4, DiT_B_8 = (partial(DiT, patch_size=side, **_B) for side in (2, 4, 8))
DiT_S_2, DiT_S_4, DiT_S_8 = (partial(DiT, patch_size=side, **_S) for side in (2, 4, 8))
DiT_models = {
    "DiT-XL/2": DiT_XL_2, "DiT-XL/4": DiT_XL_4, "DiT-XL/8": DiT_XL_8,
    "DiT-L/2": DiT_L_2, "DiT-L/4": DiT_L_4, "DiT-L/8": DiT_L_8,
    "DiT-B/2": DiT_B_2, "DiT-B/4": DiT_B_4, "DiT-B/8": DiT_B_8,
    "DiT-S/2": DiT_S_2, "DiT-S/4": DiT_S_4, "DiT-S/8": DiT_S_8,
}  # fmt: skip


def main(args):
    """Print the table of all models at --image-size, and what training one image keeps in memory."""
    size, side = args.image_size, args.image_size // 8
    print(f"{size}x{size} images, latents {side}x{side}x4, one forward pass of one image")
    print(f"{'model':<10}{'tokens':>8}{'parameters':>14}{'GMACs':>9}{'GFLOPs':>9}{'activations, MiB':>18}")
    for name, build in DiT_models.items():
        with torch.device("meta"):
            model = build(input_size=side)
        parameters = sum(p.numel() for p in model.parameters())
        macs, activations = count_macs(model), count_activation_bytes(model)
        print(
            f"{name:<10}{model.x_embedder.num_patches:>8}{parameters:>14,}{macs / 1e9:>9.2f}"
            f"{macs / 5e8:>9.2f}{activations / 2**20:>18,.0f}"
        )
    print(
        '\nMACs are multiply-adds, the paper\'s "Gflops"; a FLOP count takes each for two operations.\n'
        "Guidance doubles a sampling step; a training step costs three forward passes.\n"
        "Activations: float32, kept for the backward pass of one image, without checkpointing."
    )


def build_parser():
    """The command-line options."""
    parser = Parser(description=main.__doc__)
    parser.add_argument(
        "--image-size", type=int_at_least(64, multiple_of=64), default=256, metavar="PIXELS",
        help="side of the images, a multiple of 64: the VAE's 8 x patch 8 (default: 256)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    launch(main, build_parser())
