"""The diffusion model: its family, its parts, quantized weights, and LoRA files."""
