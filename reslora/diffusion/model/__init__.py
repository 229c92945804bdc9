"""The model: its family, its parts, and weights in fewer bits."""
