"""What stands behind sampling: options, noise by seed, the .npz writer, CUDA graphs."""
