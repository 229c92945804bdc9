"""Options with all defaults, from the command line, a TOML file or a run's config.json."""

import json
import os
from pathlib import Path

import pytest

from images.runs import refused
from reslora.errors import InvalidArgument
from reslora.images.settings import ASSETS, parse_args


def test_the_bundled_pipeline_has_defaults_of_its_own(data):
    """Values that depend on the model's family stay open until it is known."""
    bundled = parse_args([])
    assert (bundled.adapter.method, bundled.data.resolution, bundled.training.max_train_steps) == (
        ["lora", "reslora"],
        [64],
        200,
    )
    assert Path(*bundled.data.train_data_dir).name == "twemoji" and bundled.validation.validation_prompt
    assert parse_args(["--pretrained_model_name_or_path", bundled.model.pretrained_model_name_or_path]) == bundled
    named = parse_args(["--pretrained_model_name_or_path", "somebody/model", "--train_data_dir", str(data)])
    assert (named.adapter.method, named.data.resolution, named.training.max_train_steps) == (["lora"], [], None)
    assert named.training.num_train_epochs == 100 and named.validation.validation_prompt == []


@pytest.mark.parametrize(
    ("more", "methods"),
    [
        ("", ["lora"]),
        ("--shortcut input", ["reslora"]),
        ("--shortcut input block", ["reslora"]),
        ("--pre_num 4", ["reslora"]),
        ("--head repeat", ["reslora"]),
        ("--merge auto", ["reslora"]),
        ("--merge_calibration_samples 64", ["reslora"]),
        ("--shortcut input --method lora_matched", ["lora_matched"]),
    ],
)
def test_who_sets_up_shortcuts_means_reslora(data, model, tmp_path, more, methods):
    """On the command line or in a file, also if the value is the default."""
    flags = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data)]
    assert parse_args([*flags, *more.split()]).flat()["method"] == methods
    config = tmp_path / "flags.toml"
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in in_pairs(more.split())))
    assert parse_args([*flags, "--config", str(config)]).flat()["method"] == methods


def test_a_lora_to_start_from_means_lora_where_no_method_is_given(capsys, tmp_path):
    """With the bundled model too, of whose two default methods one cannot start from a LoRA.

    A missing file is named first.
    """
    lora = ["--init_lora", str(ASSETS.parent / "app" / "example" / "lora")]
    assert parse_args(lora).adapter.method == ["lora"]
    assert parse_args([*lora, "--method", "lora_x2"]).adapter.method == ["lora_x2"]
    with pytest.raises(InvalidArgument, match="with --shortcut block"):
        parse_args([*lora, "--shortcut", "block"])
    for more in ([], ["--method", "reslora"]):
        line = refused(capsys, "--init_lora", tmp_path / "none.safetensors", *more)
        assert f"error: --init_lora {tmp_path / 'none.safetensors'}: no such file or folder" in line


SHARES = {"0.99": True, "0.5": False, "0.1": False}


@pytest.mark.parametrize("share", SHARES)
def test_a_validation_split_of_most_images_is_warned_of(capsys, share):
    assert parse_args(["--validation_split", share]).validation.validation_split == float(share)
    line = f"warning: --validation_split {share} holds out more images than it trains on\n"
    assert (line in capsys.readouterr().out) is SHARES[share]


WIRED = {
    "--method reslora": "reslora",
    "--method lora reslora lora_matched": "reslora and lora_matched",
    "--method lora_matched --shortcut block": "lora_matched",
    "--method reslora --shortcut none": "",
    "--method lora": "",
}


@pytest.mark.parametrize("words", WIRED)
def test_blocks_without_others_are_warned_of(capsys, words):
    """As one of several methods it is an intended control."""
    parse_args([*words.split(), "--pre_num", "0"])
    line = f"warning: --pre_num 0: blocks get no shortcut terms, so {WIRED[words]} trains as LoRA does\n"
    assert (line in capsys.readouterr().out) is bool(WIRED[words])
    parse_args([*words.split(), "--pre_num", "1"])
    parse_args(["--method", "lora", "reslora", "--shortcut", "block", "--pre_num", "0", "4"])
    assert "warning" not in capsys.readouterr().out


def test_a_folder_given_twice_is_refused(data, capsys, tmp_path):
    (tmp_path / "link").symlink_to(data)
    for other in (data, f"{data}/.", tmp_path / "link"):
        line = refused(capsys, "--train_data_dir", data, other)
        problem = f"{data} is given twice; give it once, with --train_data_repeats"
        assert line.endswith(f"error: --train_data_dir {data} {other}: {problem}")


def test_a_folder_next_to_a_dataset_is_a_part_of_it(data, capsys, tmp_path):
    """As in diffusers' script. A separate folder would be ignored."""
    line = refused(capsys, "--dataset_name", "someone/images", "--train_data_dir", data)
    assert f"error: --train_data_dir {data}: with --dataset_name, it must be a folder in that dataset" in line
    (tmp_path / "set" / "part").mkdir(parents=True)
    for dataset, part in (("someone/images", "part"), ("set", "part"), ("set", str(tmp_path / "set" / "part"))):
        flags = parse_args(["--dataset_name", dataset, "--train_data_dir", part])
        assert (flags.data.dataset_name, flags.data.train_data_dir) == (dataset, [part])
        warning = f"warning: --train_data_dir {part}: the folder of that name in --dataset_name {dataset}\n"
        assert warning in capsys.readouterr().out


def in_pairs(flags: list[str]) -> list[tuple[str, str | list[str]]]:
    """Return each flag with its value, or its values."""
    split = [part.split() for part in " ".join(flags).split("--")[1:]]
    return [(name, values if len(values) > 1 else values[0]) for name, *values in split]


def test_config_file_gives_flags_and_the_command_line_wins(run, data, model, tmp_path):
    toml = tmp_path / "run.toml"
    lines = [f'train_data_dir = "{data}"', f'pretrained_model_name_or_path = "{model}"', "rank = 7", "resolution = 32"]
    lines += ['method = ["lora", "loha"]', "random_flip = true", "cache_latents = false"]
    toml.write_text("\n".join(lines))
    args = parse_args(["--config", str(toml), "--rank", "3"])
    assert (args["rank"], args["lora_alpha"], args["method"]) == (3, 6, ["lora", "loha"])
    assert (args["random_flip"], args["cache_latents"]) == (True, False)
    more = ["--num_train_epochs", "5", "--validation_epochs", "3", "--rank", "5", "--no-random_flip"]
    args = parse_args(["--config", str(run / "config.json"), *more])
    assert (args["max_train_steps"], args["num_train_epochs"], args["lora_alpha"], args["random_flip"]) == (
        None,
        5,
        10,
        False,
    )
    assert args["validation_epochs"] == 3 and args["validation_steps"] is None


def test_the_home_folder_is_meant_where_no_shell_has_said_so(tmp_path, data, monkeypatch):
    """Nobody wants a folder named `~`, and removing it would be dangerous."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.toml").write_text('output_dir = "~/runs/own"\ncache_dir = "~/cache"\n')
    (tmp_path / "images").symlink_to(data)
    flags = parse_args(["--config=~/own.toml", "--train_data_dir", "~/images", "--caption_prefix=~/images"])
    assert (flags.output.output_dir, flags.model.cache_dir) == (f"{tmp_path}/runs/own", f"{tmp_path}/cache")
    assert (flags.data.train_data_dir, flags.data.caption_prefix) == ([f"{tmp_path}/images"], "~/images")
    assert parse_args(["--output_dir=~/other", "--config", "~/own.toml"]).output.output_dir == f"{tmp_path}/other"


def test_a_runs_own_config_gives_the_run_again(run):
    again = parse_args(["--config", str(run / "config.json")]).flat()
    config = json.loads((run / "config.json").read_text())
    assert config == {name: again[name] for name in config}


def test_an_alpha_of_the_config_stays_when_the_rank_is_given(tmp_path, data):
    toml = tmp_path / "run.toml"
    toml.write_text(f"\ufefflora_alpha = 64\ntrain_data_dir = '{data}'\n", encoding="utf-8")
    assert parse_args(["--config", str(toml), "--rank", "4"]).adapter.lora_alpha == 64


def test_malformed_config_values_are_refused(tmp_path, capsys):
    (tmp_path / "run.toml").write_text("rank = [[4]]")
    assert "--config" in refused(capsys, "--config", tmp_path / "run.toml")


def test_the_bundled_transformer_has_a_learning_rate_and_a_guidance_of_its_own():
    """Its pipeline adds 1 to the guidance, so that 3 is 4 in other pipelines; flows have no SNR weights."""
    for name, expected in (("pipeline", (5e-4, 1.0, 4.0)), ("pipeline-flow", (1e-3, None, 3.0))):
        flags = parse_args(["--pretrained_model_name_or_path", str(ASSETS / name)])
        assert (flags.optimizer.learning_rate, flags.training.snr_gamma, flags.validation.guidance_scale) == expected


def test_the_bundled_unet_can_be_trained_without_weights_by_snr(tmp_path):
    """A run's own configuration says so, too."""
    model = ["--pretrained_model_name_or_path", str(ASSETS / "pipeline")]
    flags = parse_args([*model, "--snr_gamma", "0"])
    assert flags.training.snr_gamma == 0
    (tmp_path / "config.json").write_text(json.dumps({"snr_gamma": flags.training.snr_gamma}))
    assert parse_args([*model, "--config", str(tmp_path / "config.json")]).training.snr_gamma == 0


def test_a_validation_that_steers_is_by_fixed_noises():
    """A resumed run is compared by the number of noises, so that losses of different kinds are not compared."""
    assert parse_args([]).validation.validation_noises is None
    for words in (["--save_best"], ["--early_stopping_patience", "3"]):
        assert parse_args(words).validation.validation_noises == 4
        assert parse_args([*words, "--validation_noises", "2"]).validation.validation_noises == 2


def test_samples_come_by_epochs_where_these_are_given(run, tmp_path):
    """For a bundled pipeline the default is every 50 steps, which must not take precedence."""
    assert (parse_args([]).validation.validation_steps, parse_args([]).validation.validation_epochs) == (50, 1)
    toml = tmp_path / "run.toml"
    toml.write_text("validation_epochs = 1")
    bundled = str(ASSETS / "pipeline")
    own = ["--config", str(run / "config.json"), "--pretrained_model_name_or_path", bundled]
    for words in (["--validation_epochs", "1"], ["--config", str(toml)], [*own, "--validation_epochs", "1"]):
        flags = parse_args(words)
        assert (flags.validation.validation_steps, flags.validation.validation_epochs) == (None, 1)
    assert parse_args(own).validation.validation_steps == 2
    assert parse_args(["--validation_epochs", "3", "--validation_steps", "7"]).validation.validation_steps == 7


UNREAD = {  # and with what it is read
    "--dataset_config_name x.toml": "--dataset_name someone/images",
    "--keep_tokens 1": "--shuffle_caption",
    "--aspect_ratio_buckets 32,32": "--use_aspect_ratio_buckets",
    "--bucket_upscale": "--use_aspect_ratio_buckets",
    "--bucket_upscale --use_aspect_ratio_buckets --aspect_ratio_buckets 32,32": "--aspect_ratio_buckets ''",
    "--masked_loss_normalised": "--masked_loss",
    "--output_preservation_prompt box": "--output_preservation_weight 1",
    "--prior_loss_weight 0.5": "--class_data_dir class --class_prompt disc",
    "--num_class_images 7": "--class_data_dir class --class_prompt disc",
    "--metric_model someone/dino": "--validation_prompt disc",
    "--metric_model someone/dino --validation_prompt disc --num_validation_images 0": "--num_validation_images 1",
}


@pytest.mark.parametrize("words", UNREAD)
def test_what_nothing_reads_is_refused(words, model, data):
    flags = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), *words.split()]
    with pytest.raises(InvalidArgument, match=f"^{words.split()[0]}.*: it has no effect; .*{UNREAD[words].split()[0]}"):
        parse_args(flags)
    if "--dataset_name" in UNREAD[words]:
        flags = [*flags[:2], *words.split()]  # in place of the folder
    if "''" not in UNREAD[words]:
        parse_args([*flags, *UNREAD[words].split()])


def test_a_name_that_no_repository_can_have_is_refused_by_the_flag_that_has_it(capsys):
    name = "--hub_model_id my style"
    flags = name.split(maxsplit=1)
    line = refused(capsys, *flags, "--push_to_hub")
    assert f"error: {name}: " in line and line.endswith("; give --hub_model_id you/my-style")
    parse_args([*flags, "--push_to_hub", "--hub_model_id", "me/my-style"])


OF_SHORTCUTS = {"--shortcut block": "reslora", "--pre_num 2": "lora_matched", "--head none": "reslora"}


@pytest.mark.parametrize("words", [*OF_SHORTCUTS, "--merge weights"])
def test_what_no_method_reads_is_told(words, model, data, capsys):
    flags = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), *words.split(), "--method"]
    parse_args([*flags, "lora", "lora_x2"])
    assert capsys.readouterr().out == f"{words}: it has no effect with --method lora lora_x2\n"
    parse_args([*flags, "lora", OF_SHORTCUTS.get(words, "reslora")])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "reads"),
    [
        ("--lr_warmup_steps 3", "--lr_scheduler cosine"),
        ("--adam_beta1 0.5", "--optimizer adamw"),
        ("--adam_weight_decay 0.5", "--optimizer adamw"),
        ("--max_validation_images 3", "--validation_split 0.1"),
    ],
)
def test_what_the_other_flags_leave_unread_is_told(words, reads, model, data, capsys):
    """They are not refused, because commands for diffusers' scripts contain them."""
    flags = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), *words.split()]
    parse_args([*flags, "--optimizer", "torch.optim.SGD", "--validation_split", "0"])
    assert capsys.readouterr().out.startswith(f"{words}: it has no effect with")
    parse_args([*flags, *reads.split()])
    assert capsys.readouterr().out == ""


def test_what_nothing_reads_may_be_given_as_it_is_without(model, data):
    """As in commands for diffusers' and kohya's scripts; `parse_args` exits if it refuses an option."""
    words = ["--prior_loss_weight", "1.0", "--num_class_images", "100", "--keep_tokens", "0", "--no-bucket_upscale"]
    parse_args(["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), *words])
    parse_args(["--metric_model", "someone/dino", "--num_validation_images", "0", "--seed", "0", "1"])  # an experiment


def test_prodigy_takes_one_rate(capsys, tmp_path):
    """Otherwise it would end the first step with an error, after everything is encoded."""
    name = "prodigy"
    flags = ["--optimizer", name, "--learning_rate", "1", "--train_text_encoder", "--output_dir", str(tmp_path / "out")]
    line = refused(capsys, *flags, "--text_encoder_lr", "0.5")
    assert "--text_encoder_lr 0.5" in line and f"--optimizer {name}" in line
    assert parse_args([*flags, "--text_encoder_lr", "1"]).optimizer.text_encoder_lr == 1


def test_what_is_not_utf_8_is_refused(capsys, tmp_path):
    """Exports and the rows of images would fail with them after everything is encoded."""
    name = "output_dir"
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    assert f"--{name} {tmp_path}" in refused(capsys, "--output_dir", tmp_path / "out", f"--{name}", odd)
    assert not list(tmp_path.iterdir())
