"""Flags of the language scripts: one line and status 2 for what cannot work."""

import json
import os
from dataclasses import dataclass, field

import pytest
from conftest import assert_one_line

import train_glue
import train_llm
from reslora.common.errors import InvalidArgument
from reslora.common.script import run_script
from reslora.language import glue_arguments, llm_arguments
from reslora.language.arguments import (
    AdapterTrainingArguments,
    MethodArguments,
    build_parser,
    check_number,
    check_whole,
    parse_values,
    parsed,
    settings,
)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="bundled")
    data_dir: str | None = field(default=None)


def parse(*argv, **options):
    types = (ModelArguments, MethodArguments, AdapterTrainingArguments)
    parser = build_parser(types, "script.py")
    return parsed(parser, parse_values(parser, [*argv, "--report_to", "none"], **options))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"lora_r": 0}, "--lora_r 0"),
        ({"lora_r": -3}, "--lora_r -3"),
        ({"lora_alpha": float("nan")}, "--lora_alpha nan"),
        ({"lora_alpha": 0.0}, "--lora_alpha 0"),
        ({"lora_dropout": 1.0}, "--lora_dropout 1.0"),
        ({"lora_dropout": -0.1}, "--lora_dropout -0.1"),
        ({"pre_num": -2}, "--pre_num -2"),
        ({"calibration_examples": -1}, "--calibration_examples -1"),
        ({"merge": "lstsq", "calibration_examples": 0}, "--merge lstsq"),
    ],
)
def test_values_that_mean_nothing_are_refused(flags, word):
    with pytest.raises(InvalidArgument) as error:
        MethodArguments(**flags)
    assert_one_line(error, word, "give")


@pytest.mark.parametrize(
    ("flag", "value", "method", "other"),
    [
        ("shortcut", "block", "reslora", "lora"),
        ("shortcut", "block", "lora_matched", "is_placebo"),
        ("head", "none", "is_placebo", "lora"),
        ("merge", "weights", "reslora", "ms_placebo"),
        ("lora_alpha", 4, "loha", "oft"),
    ],
)
def test_what_the_method_does_not_read_is_told(capsys, flag, value, method, other):
    MethodArguments(method=other, **{flag: value}).tell_unread()
    assert capsys.readouterr().out == f"--{flag} {value}: nothing reads it with --method {other}\n"
    MethodArguments(method=method, **{flag: value}).tell_unread()
    MethodArguments(method=other, lora_r=3).tell_unread()
    assert capsys.readouterr().out == ""


def test_blocks_without_others_are_warned_of(capsys):
    MethodArguments(pre_num=0).tell_unread()
    line = "warning: --pre_num 0: no block takes part in another, so reslora trains as LoRA does\n"
    assert capsys.readouterr().out == line
    MethodArguments(pre_num=0, shortcut="none").tell_unread()
    assert "warning" not in capsys.readouterr().out


def test_the_defaults_are_the_papers():
    arguments = MethodArguments()
    assert (arguments.method, arguments.lora_r, arguments.lora_alpha, arguments.pre_num) == ("reslora", 4, 8, 4)
    assert isinstance(arguments.lora_alpha, int)  # adapter_config.json says 8, not 8.0
    assert MethodArguments(lora_alpha=2.5).lora_alpha == 2.5
    assert parse("--lora_r", "16")[1].lora_alpha == MethodArguments(lora_r=16).lora_alpha == 32
    MethodArguments(shortcut="block", merge="lstsq", calibration_examples=0)  # an exact merge needs none


def test_short_texts_are_calibrated_on_more_examples():
    """As many tokens for each input of a layer as where it was measured (`benchmarks/merge_limits.py`), or more."""
    counts = [module.read([])[1]["calibration_examples"] for module in (glue_arguments, llm_arguments)]
    assert counts == [256, 64]
    assert glue_arguments.read(["--calibration_examples", "8"])[1]["calibration_examples"] == 8


def test_flags_become_dataclasses(tmp_path):
    model, method, training = parse(
        "--target_modules", "q_proj", "k_proj", "--lora_alpha=16", "--output_dir", str(tmp_path), "--seed", "7"
    )
    assert model == ModelArguments()
    assert (method.target_modules, method.lora_alpha) == (["q_proj", "k_proj"], 16)
    assert (training.seed, training.output_dir, training.logging_steps) == (7, str(tmp_path), 1)


def test_bundled_defaults_hold_until_a_model_is_named():
    bundled = {"data_dir": "assets", "lora_r": 2}
    model, method, _ = parse(bundled=bundled)
    assert (model.data_dir, method.lora_r) == ("assets", 2)
    assert parse("--lora_r", "3", bundled=bundled)[1].lora_r == 3
    for named in (["--model_name_or_path", "x"], ["--model_name_or_path=x"], ["--model-name-or-path", "x"]):
        model, method, _ = parse(*named, bundled=bundled)
        assert (model.model_name_or_path, model.data_dir, method.lora_r) == ("x", None, 4)


@pytest.mark.parametrize("module", [glue_arguments, llm_arguments])
def test_a_number_of_steps_asks_for_steps(module):
    """The default, that of the bundled models among them, is an epoch, which would leave the number unread."""

    def strategies(*words):
        values = module.read(list(words))[1]
        return values["eval_strategy"], values["save_strategy"]

    assert strategies() == ("epoch", "epoch")
    assert strategies("--eval_steps", "5") == ("steps", "epoch")
    assert strategies("--save-steps=5") == ("epoch", "steps")
    assert strategies("--save_steps", "5", "--save_strategy", "no", "--eval_steps=5") == ("steps", "no")
    best = module.read(["--load_best_model_at_end", "--save_steps", "5"])[1]
    assert [best[f"{what}_{how}"] for what in ("eval", "save") for how in ("strategy", "steps")] == ["steps", 5] * 2


@pytest.mark.parametrize("module", [glue_arguments, llm_arguments])
def test_compiling_and_checkpointing_keep_no_activations_of_a_shortcut(module, tmp_path):
    """By the name that transformers calls deprecated as by the new one."""

    def settled(*words):
        return module.settled(*module.read(["--use_cpu", "--output_dir", str(tmp_path), *words]))

    for flag in ("--gradient_checkpointing", "--activation_checkpointing"):
        for shortcut in ("input", "middle"):
            with pytest.raises(InvalidArgument, match=f"^--torch_compile: .* cannot keep --shortcut {shortcut}; leave"):
                settled("--torch_compile", flag, "True", "--shortcut", shortcut)
        for others in (["--shortcut", "block"], ["--pre_num", "0"], ["--method", "lora"]):
            settled("--torch_compile", flag, "True", *others)
    settled("--torch_compile")
    settled("--gradient_checkpointing", "True")


def test_deepspeed_alone_means_the_bundled_configuration(monkeypatch):
    seen = []
    monkeypatch.setattr(AdapterTrainingArguments, "__post_init__", lambda self: seen.append(self.deepspeed))
    parse("--deepspeed", deepspeed_config="zero2.json")
    parse("--deepspeed", "mine.json", deepspeed_config="zero2.json")
    parse(deepspeed_config="zero2.json")
    assert seen == ["zero2.json", "mine.json", None]


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (["--lora_r", "0"], "--lora_r 0"),
        (["--lora_r", "1.5"], "--lora_r"),
        (["--method", "nothing"], "--method"),
        (["--rank", "4"], "--rank"),
        (["--weight_decay", "-1"], "--weight_decay -1"),
        (["--max_grad_norm", "nan"], "--max_grad_norm nan"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0"),
        (["--save_total_limit", "0"], "--save_total_limit 0"),
        (["--eval_steps", "-1"], "--eval_steps -1"),
        (["--eval_delay", "nan"], "--eval_delay nan"),
        (["--eval_accumulation_steps", "0"], "--eval_accumulation_steps 0"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers -1"),
        (["--data_seed", "99999999999999999999"], "--data_seed 99999999999999999999"),
        (["--neftune_noise_alpha", "inf"], "--neftune_noise_alpha inf"),
        (["--data_dir", ""], "--data_dir: is empty"),
        (["--output-dir="], "--output_dir: is empty"),
        (["--resume_from_checkpoint", ""], "--resume_from_checkpoint: is empty"),
        (["--target_modules", "q_proj", ""], "--target_modules: is empty"),
        (["--output_dir", os.fsdecode(b"caf\xe9")], "--output_dir caf\\udce9: is not UTF-8"),
        (["--adam_beta2", "1"], "--adam_beta2 1"),
        (["--label_smoothing_factor", "1"], "--label_smoothing_factor 1"),
        (["--lr_scheduler_type", "sawtooth"], "sawtooth"),
        (["--lr_scheduler_kwargs", "{foo"], "--lr_scheduler_kwargs {foo: "),
        (["--accelerator_config", '{"foo": 1}'], '--accelerator_config {"foo": 1}: '),
        (["--bf16_full_eval"], "--bf16_full_eval"),
        (["--fp16_full_eval"], "--fp16_full_eval"),
        (["--load_best_model_at_end"], "load_best_model_at_end"),
    ],
)
def test_a_bad_flag_is_one_line_and_status_2(capsys, bad, word):
    try:
        status = run_script("script.py", lambda argv, stop: parse(*bad))
    except SystemExit as stopped:  # argparse's own
        status = stopped.code
    output = capsys.readouterr()
    assert status == 2 and not output.out
    assert output.err.startswith("script.py: error: ") and output.err.count("\n") == 1
    assert word in output.err


@pytest.mark.parametrize(("module", "script"), [(glue_arguments, train_glue), (llm_arguments, train_llm)])
def test_help_keeps_the_examples_and_names_each_default_once(capsys, module, script):
    with pytest.raises(SystemExit) as end:
        module.read(["--help"], script.__doc__)
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith(script.__doc__)
    flat = " ".join(text.split())
    assert "one; default 1 --version" in flat and "--seed SEED [SEED ...]" in flat and "(default: 42)" in flat
    assert "(default: None)" not in flat and "(default: False)" not in flat


@pytest.mark.parametrize("value", [0, 1.0, True, "3", None])
def test_whole_numbers_are_whole(value):
    with pytest.raises(InvalidArgument, match="--steps"):
        check_whole("steps", value, 1)
    check_whole("steps", 1, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.0, "x", None])
def test_numbers_are_finite_and_within_their_bounds(value):
    with pytest.raises(InvalidArgument, match=r"--share .* give a finite number of at least 0 and below 1"):
        check_number("share", value, 0, below=1)
    check_number("share", 0, 0, below=1)
    with pytest.raises(InvalidArgument, match="above 0"):
        check_number("rate", 0, 0, exclusive=True)


def test_settings_hold_every_flag_but_no_secret(tmp_path):
    flags = settings(MethodArguments(), AdapterTrainingArguments(output_dir=str(tmp_path), hub_token="secret"))
    assert flags["lora_r"] == 4 and flags["learning_rate"] == 5e-5 and flags["output_dir"] == str(tmp_path)
    assert "secret" not in json.dumps(flags)
