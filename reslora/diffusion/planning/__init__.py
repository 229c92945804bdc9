"""How much memory a run takes, before it has any weights: its phases are gone through on tensors without memory."""
