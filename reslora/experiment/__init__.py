"""Experiments: several methods, learning rates and seeds in one run, and statistical comparison of the methods."""
