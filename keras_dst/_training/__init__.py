"""Training: the update clock, the drivers, what a fit patches, backups, TensorBoard."""
