"""LoRA files of one tool for another: `python -m reslora.convert IN... OUT --to diffusers|kohya|comfyui|peft`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Converts as the flags say and returns the exit status; what the user can mend is one line on stderr."""
    try:
        from .diffusion.conversion import main  # not of the core, which this is only called with
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("reslora.diffusion"):
            raise
        problem = "reslora-core does not have the converter; install reslora-sd instead"
        print(f"reslora-convert: error: {problem}", file=sys.stderr)
        return 2
    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
