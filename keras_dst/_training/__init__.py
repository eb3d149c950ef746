"""Code that runs during `fit`: mask updates, patches of methods, backups, and TensorBoard logs."""
