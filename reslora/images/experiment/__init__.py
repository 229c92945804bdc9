"""The image side of experiments: the split, losses and samples, and their sections of the report."""
