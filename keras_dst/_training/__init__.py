"""Training: drivers of mask updates, patches of a running fit, backups, and TensorBoard."""
