"""Optimizers by name: --optimizer.

A row is a function (parameters, args) -> torch.optim.Optimizer, whose step(closure=None) is torch's. Nothing
else is asked of it: its state is saved by torch's state-dict functions, plain and sharded alike, and its
learning rate is set before every step.
"""

import torch

from runtime.cli import require_parts


def adamw(parameters, args):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), the paper's optimizer."""
    return torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)


OPTIMIZERS = {"adamw": adamw}


def build_optimizer(parameters, args):
    """The optimizer of --optimizer. Raises UserError for a row that makes none."""
    what, row = f"--optimizer {args.optimizer}", OPTIMIZERS[args.optimizer]
    require_parts(what, row, "__call__")
    optimizer = row(parameters, args)
    require_parts(what, optimizer, "param_groups", "step", "zero_grad", "state_dict", "load_state_dict")
    return optimizer
