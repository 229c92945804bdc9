"""The Gradio application, started by `python -m app`: train LoRA and ResLoRA, compare them, and generate images."""
