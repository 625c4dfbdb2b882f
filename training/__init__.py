"""What stands behind training: options, data, the run's folder and log, resume, validation."""
