"""Code below Keras: compilation, devices, random numbers, and top-k ranking."""
