"""What stands behind evaluation: metrics, the Inception network, readers of images."""
