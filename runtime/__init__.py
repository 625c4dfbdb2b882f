"""What every command needs: command line, processes, devices, images, the autoencoder, class names."""
