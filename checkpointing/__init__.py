"""Weights on disk: our checkpoints, sharded ones, published ones, diffusers' folders."""
