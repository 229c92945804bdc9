"""Convert LoRA files between tools: `python -m reslora.convert IN... OUT --to diffusers|kohya|comfyui|peft`."""

import sys

from .images.conversion import main

if __name__ == "__main__":
    sys.exit(main())
