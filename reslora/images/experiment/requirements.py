"""Check the options of an experiment with images."""

from ...errors import InvalidArgument
from ...options.grid import Grid
from ...options.images import Options
from ...options.values import as_typed

OF_EXPERIMENTS = [name for name, option in Options.table().items() if option.group == "experiment"]
OF_RUNS = [name for name, option in Options.table().items() if option.in_experiments]  # options that experiments reject


BATCHES = ("train_batch_size", "gradient_accumulation_steps")


def check_batches(grid: Grid[Options]) -> None:
    """Raise `InvalidArgument` for several batch sizes with options that prepare the data for one batch size."""
    data, varied = grid.base.data, [name for name in BATCHES if name in grid.varied]
    rewrites = data.shuffle_caption or data.enable_wildcard or data.caption_tag_dropout_rate
    if varied and (data.class_data_dir or (rewrites and data.cache_text_embeddings)):
        what = "class images are balanced" if data.class_data_dir else "random captions are encoded beforehand"
        fix = "leave out --class_data_dir" if data.class_data_dir else "add --no-cache_text_embeddings"
        raise InvalidArgument(f"--vary {varied[0]}", f"{what} for one batch size", f"{fix}, or give one value")


def check_ranks(grid: Grid[Options]) -> None:
    """Raise `InvalidArgument` for several ranks together with --init_lora, because that LoRA has its own rank."""
    if "rank" in grid.varied and grid.base.adapter.init_lora:
        argument = f"--rank {as_typed(grid.varied['rank'])}"
        raise InvalidArgument(argument, "--init_lora has ranks of its own", "leave it out")
