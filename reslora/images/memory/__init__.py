"""Estimate a run's memory before weights are loaded, by running its phases on fake tensors without storage."""
