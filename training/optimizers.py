"""Optimizers by name: --optimizer.

A row is a function (parameters, args) -> torch.optim.Optimizer, whose step(closure=None) is torch's. Nothing
else is asked of it: its state is saved by torch's state-dict functions, plain and sharded alike, and its
learning rate is set before every step.
"""

import torch


def adamw(parameters, args):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), the paper's optimizer."""
    return torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)


OPTIMIZERS = {"adamw": adamw}
