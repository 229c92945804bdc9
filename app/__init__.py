"""The Gradio application: watch LoRA and ResLoRA learn side by side, then use the result. Start it: `python -m app`."""
