"""Backend-specific code: compilation, devices, random numbers, and top-k ranking."""
