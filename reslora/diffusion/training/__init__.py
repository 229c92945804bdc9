"""What is trained, on which loss, step by step, and its checkpoints."""
