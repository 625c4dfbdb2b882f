"""Transformer blocks: the paper's four ways to condition (Peebles & Xie, arXiv 2212.09748, section 3.2).

Shapes: N batch, T tokens, D width, M tokens of a condition.
"""

import torch
import torch.nn as nn
from timm.layers.mlp import Mlp


def modulate(x, shift, scale):
    """Scale and shift every token of x (N, T, D) by its row's shift and scale (N, D); zeros change
    nothing."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


# ---------------------------------------------------------------------------------------------
# Parts of blocks


def gelu():
    return nn.GELU(approximate="tanh")


class MLP(Mlp):
    """Two linear layers with a GELU between them."""

    def __init__(self, hidden_size, hidden_features, grid_size):
        super().__init__(hidden_size, hidden_features, act_layer=gelu)


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
# The paper's four blocks (its figure 3), with one signature: forward(x, c) -> x. `condition` makes, of tokens
# and the embeddings of time and label, the tokens that enter the first block and the c that all blocks get.


class DiTBlock(nn.Module):
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

    def initialize_zero(self):
        pass


class InContextBlock(nn.Module):
    """A plain transformer block; time and label are tokens among the others."""

    final_layer = PlainFinalLayer

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

    def initialize_zero(self):
        pass


class CrossAttentionBlock(nn.Module):
    """A transformer block whose tokens also attend to those of time and label."""

    final_layer = PlainFinalLayer

    def __init__(self, hidden_size, num_heads, attention, ffn):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm3 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = ffn(hidden_size)

    @staticmethod
    def condition(x, embeddings):
        return x, torch.stack(embeddings, dim=1)  # (N, 2, D)

    def forward(self, x, c):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), c)
        x = x + self.mlp(self.norm3(x))
        return x

    def initialize_zero(self):
        pass


BLOCKS = {
    "adaln-zero": DiTBlock,
    "adaln": AdaLNBlock,
    "cross-attention": CrossAttentionBlock,
    "in-context": InContextBlock,
}
