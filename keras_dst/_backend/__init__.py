"""What Keras leaves to each backend: compilation, devices, random numbers, top-k ranking."""
