"""LoRA files of all tools: read them as plain factors by layer, sum and reduce them, write them in another format."""
