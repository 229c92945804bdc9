"""Options of kohya's and diffusers' scripts that have another name here, for error messages."""

from collections.abc import Iterable, Mapping

from .option import Option

DEFAULT = "the default"
# Options of kohya's and of diffusers' scripts that do not correspond to a single option here.
KOHYA = {
    "config_file": "--config",
    "dataset_config": "--train_data_dir, --train_data_repeats, --resolution and others",
    "reg_data_dir": "--class_data_dir, --class_prompt",
    "network_args": "--method, --target_modules, --rank_pattern",
    "bucket_no_upscale": DEFAULT,
    "cache_latents_to_disk": DEFAULT,
    "cache_text_encoder_outputs": DEFAULT,
    "save_state": DEFAULT,
    "sdpa": DEFAULT,
}
DIFFUSERS = {
    "instance_prompt": "captions in --train_data_dir: .txt files, or images in a subfolder named 1_PROMPT",
    "lora_layers": "--layers or --target_modules",
    "use_dora": "--method dora",
}


def foreign_names(table: Mapping[str, Option]) -> dict[str, tuple[str, str]]:
    """Return the options of other scripts by name: the script (kohya's or diffusers'), and the equivalent option here.

    The equivalent is an option, for some with a value.
    """
    found = {name: ("kohya's", here) for name, here in KOHYA.items()}
    found |= {name: ("diffusers'", here) for name, here in DIFFUSERS.items()}
    for option in table.values():
        for whose, names in (("kohya's", option.kohya), ("diffusers'", option.diffusers)):
            for entry in names:
                name, _, value = entry.partition(" ")
                found[name] = (whose, f"{option.flag} {value}".strip())
    return found


def foreign_in_words(words: Iterable[str], table: Mapping[str, Option]) -> str:
    """Return a message with the equivalents of all `words` that are options of other scripts; empty without any."""
    known = foreign_names(table)
    found = [(flag, *known[flag[2:]]) for flag in words if flag[:2] == "--" and flag[2:] in known]
    return ". ".join(
        f"{flag} is {whose} name; here it is {here}{', leave it out' if here is DEFAULT else ''}"
        for flag, whose, here in found
    )
