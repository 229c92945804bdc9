"""What is of images in an experiment: which part each is in, losses and drawings, and their place in the report."""
