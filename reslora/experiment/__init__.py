"""Several methods, learning rates and seeds in one run, and whether the difference is real."""
