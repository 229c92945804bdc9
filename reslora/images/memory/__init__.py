"""Estimate the memory of a run before loading weights: its phases run on fake tensors, which have no storage."""
