"""Fine-tune text-to-image models with LoRA and ResLoRA, and compare the two image by image.

    accelerate launch train_sd.py
    accelerate launch train_sd.py --pretrained_model_name_or_path MODEL --train_data_dir IMAGES

The first form trains the bundled 64x64 pipeline on the bundled images, in a few minutes on two CPU cores. The second
trains any model of the families in reslora/images/model/families. All options of diffusers'
`train_text_to_image_lora.py` are available; docs/migrate.md lists the defaults that differ.

On a CPU, the processes of a run share all cores; OMP_NUM_THREADS=N gives each process N threads. `accelerate launch`
and `torchrun` set it to 1 themselves, so with them only 2 or more has an effect. To train with one thread, start the
script without a launcher (OMP_NUM_THREADS=1 python train_sd.py), or give it one core per process (taskset -c 0
accelerate launch ...).
"""

import sys
from collections.abc import Sequence

from reslora.images.settings import parse_args
from reslora.options.grid import Grid
from reslora.runtime.script import limit_spinning, run_script
from reslora.runtime.signals import StopRequest


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the options say, and return the exit status; user errors are one line on stderr."""
    limit_spinning()
    return run_script("train_sd.py", start, argv)


def start(argv: Sequence[str] | None, stop: StopRequest) -> None:
    """Parse the options, and import heavy libraries only after they were checked."""
    asked = parse_args(argv, __doc__)
    if asked.flat()["plan"]:
        from reslora.images.planning import show_plan

        show_plan(asked, stop)
    elif isinstance(asked, Grid):
        from reslora.experiment.runner import run_experiment
        from reslora.images.experiment.run import open_study

        run_experiment(open_study, asked, stop)
    else:
        from reslora.images.run import run

        run(asked, stop)


if __name__ == "__main__":
    sys.exit(main())
