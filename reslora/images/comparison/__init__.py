"""Compare LoRA files of any tool by their losses on the same images, timesteps and noise."""
