"""Training: the loop, the loss, and checkpoints."""
