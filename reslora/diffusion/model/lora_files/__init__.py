"""LoRA files of every tool: read into plain factors by layer, summed, reduced, and written in another tool's names."""
