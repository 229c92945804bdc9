"""Experiments with images: the split, losses and samples, and their sections of the report."""
