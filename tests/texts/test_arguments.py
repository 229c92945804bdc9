"""Options of the language scripts: one line and exit status 2 for what cannot work."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from core_models import assert_one_line
from transformers import TrainingArguments
from waiting import LIMIT

import train_glue
import train_llm
from reslora.errors import InvalidArgument
from reslora.options.contradictions import check_method
from reslora.options.grid import Grid
from reslora.options.texts import GLUE_TASK, INSTEAD, LLM_TASK, NEAREST, ZERO2_OFFLOAD, GlueOptions, LlmOptions
from reslora.options.unused import report_unused
from reslora.runtime.script import run_script
from reslora.texts.arguments import TextParser, read, resolve

SCRIPTS = [(LlmOptions, "train_llm.py"), (GlueOptions, "train_glue.py")]


def parse(*argv, kind=LlmOptions):
    """Return the options of a run."""
    return read(kind, "script.py", [*argv, "--report_to", "none"])


def test_a_merge_that_reads_examples_has_some():
    with pytest.raises(InvalidArgument) as error:
        resolve(LlmOptions, {"merge": "lstsq", "calibration_examples": 0})
    assert_one_line(error, "--merge lstsq", "give")
    exact = {"shortcut": "block", "merge": "lstsq", "calibration_examples": 0}
    check_method(resolve(LlmOptions, exact).adapter, "calibration_examples")  # an exact merge needs none


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ("--warmup_steps 2 --lr_scheduler_type constant", "--lr_scheduler_type linear"),
        ("--eval_steps 1 --eval_strategy epoch", ""),
    ],
)
def test_steps_without_effect_are_told(capsys, words, read):
    flag, value, *other = words.split()
    report_unused(parse(flag, value, *read.split()))
    assert capsys.readouterr().out == ""
    report_unused(parse(flag, value, *other))
    assert capsys.readouterr().out == f"{flag} {value}: it has no effect with {' '.join(other)}\n"


def test_the_defaults_are_the_papers():
    adapter = resolve(LlmOptions, {}).adapter
    assert (adapter.name, adapter.rank, adapter.lora_alpha, adapter.pre_num) == ("reslora", 4, 8, 4)
    assert isinstance(adapter.lora_alpha, int)  # adapter_config.json says 8, not 8.0
    given = [read(LlmOptions, "x", ["--lora_alpha", text]).adapter.lora_alpha for text in ("16", "2.5")]
    assert given == [16, 2.5] and isinstance(given[0], int)
    assert resolve(LlmOptions, {"lora_r": [16]}).adapter.lora_alpha == 32


def test_short_texts_are_calibrated_on_more_examples():
    """With at least as many tokens per layer input as in the table of RESULTS.md."""
    counts = [resolve(kind, {}).adapter.merge_calibration_samples for kind, _ in SCRIPTS]
    assert counts == [64, 256]
    assert read(GlueOptions, "x", ["--calibration_examples", "8"]).adapter.merge_calibration_samples == 8


def test_what_is_given_arrives_where_it_is_read(tmp_path):
    words = ["--target_modules", "q_proj", "k_proj", "--lora_alpha=16", "--output_dir", str(tmp_path), "--seed", "7"]
    found = parse(*words)
    assert (found.adapter.target_modules, found.adapter.lora_alpha) == (["q_proj", "k_proj"], 16)
    assert (found.training.seed, found.output.output_dir, found.output.logging_steps) == (7, str(tmp_path), 1)


def test_bundled_defaults_hold_until_a_model_is_named():
    bundled = read(LlmOptions, "x", ["--steps", "3"])
    assert (bundled.task.data_dir, bundled.task.max_new_tokens, bundled.optimizer.learning_rate) == (
        str(LLM_TASK), 24, 5e-3,
    )  # fmt: skip
    assert read(LlmOptions, "x", ["--lr", "1e-3"]).optimizer.learning_rate == 1e-3
    for named in (["--model_name_or_path", "x"], ["--model=x"], ["--model-name-or-path", "x"]):
        found = read(LlmOptions, "x", named)
        assert (found.task.model_name_or_path, found.task.data_dir, found.optimizer.learning_rate) == ("x", None, 1e-4)
    assert resolve(GlueOptions, {}).data.data_dir == str(GLUE_TASK)


@pytest.mark.parametrize(("kind", "prog"), SCRIPTS)
def test_a_number_of_steps_asks_for_steps(kind, prog):
    """The default strategy, also of bundled models, is an epoch, which would leave the number of steps unused."""

    def strategies(*words):
        found = read(kind, prog, list(words))
        return found.validation.eval_strategy, found.output.save_strategy

    assert strategies() == ("epoch", "epoch")
    assert strategies("--eval_steps", "5") == ("steps", "epoch")
    assert strategies("--save-steps=5") == ("epoch", "steps")
    assert strategies("--save_steps", "5", "--save_strategy", "no", "--eval_steps=5") == ("steps", "no")


@pytest.mark.parametrize(("kind", "prog"), SCRIPTS)
def test_compiling_and_checkpointing_keep_no_activations_of_a_shortcut(kind, prog, tmp_path):
    def options(*words):
        return read(kind, prog, ["--use_cpu", "--output_dir", str(tmp_path), *words])

    both = ("--torch_compile", "--gradient_checkpointing", "True")
    for shortcut in ("input", "middle"):
        with pytest.raises(InvalidArgument, match=f"^--torch_compile: .* would lose .* --shortcut {shortcut}; leave"):
            options(*both, "--shortcut", shortcut)
    for others in (["--shortcut", "block"], ["--pre_num", "0"], ["--method", "lora"]):
        options(*both, *others)
    options("--torch_compile")
    options("--gradient_checkpointing", "True")


def test_what_contradicts_the_lora_to_start_from_is_refused(tmp_path):
    start = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["v_proj", "q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(start))
    (tmp_path / "adapter_model.safetensors").touch()
    more = ("--init_lora", str(tmp_path), "--output_dir", str(tmp_path / "run"))
    adapter = parse("--method", "lora_x2", "--lora_r", "2", "--target_modules", "q_proj", "v_proj", *more).adapter
    assert (adapter.rank, adapter.lora_alpha, adapter.target_modules) == (2, 6, ["q_proj", "v_proj"])
    for words, problem in (
        ("--pre_num 1", "with --shortcut input its blocks would also enter their neighbors"),
        ("--method lora_matched", "--method lora_matched can only start from zero"),
        ("--method lora --lora_r 16", "--lora_r 16: --init_lora has 2; leave it out"),
        ("--method lora --lora_alpha 4", "--lora_alpha 4: --init_lora has 6"),
        ("--method lora --rank_pattern q_proj=4", "--rank_pattern q_proj=4: --init_lora has its own"),
        ("--method lora --target_modules q_proj", "--target_modules q_proj: its layers are others"),
    ):
        with pytest.raises(InvalidArgument, match=problem):
            parse(*words.split(), *more)
    for setting, problem in (
        (
            {"init_lora_weights": "pissa_niter_4"},
            "its init_lora_weights, pissa_niter_4, has changed the base model, too",
        ),
        ({"lora_alpha": 0}, "its alpha is 0, so it cannot be trained"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(start | setting))
        with pytest.raises(InvalidArgument, match=problem):
            parse("--method", "lora", *more)


def test_deepspeed_alone_means_the_bundled_configuration():
    def given(*words) -> dict:
        return vars(TextParser("train_llm.py", LlmOptions).parse_args(words))

    assert given("--deepspeed") == {"deepspeed": str(ZERO2_OFFLOAD)}
    assert given("--deepspeed", "mine.json", "--bf16") == {"deepspeed": "mine.json", "bf16": True}


OTHERS = {
    "output_dir", "learning_rate", "num_train_epochs", "eval_strategy", "save_strategy", "save_total_limit",
    "logging_steps", "report_to", "optim", "max_steps", "warmup_steps", "gradient_checkpointing",
}  # fmt: skip
"""Options whose defaults are others here, or are said otherwise: no limit of steps is None and not -1."""


@pytest.mark.parametrize("kind", [LlmOptions, GlueOptions])
def test_options_of_transformers_have_its_defaults_and_others_are_refused_by_the_nearest(kind, capsys):
    theirs, table = {part.name: part for part in fields(TrainingArguments) if part.init}, kind.table()
    for name in table.keys() & theirs.keys() - OTHERS:
        assert table[name].default == theirs[name].default, name
    refused = {other: near for near, others in NEAREST.items() for other in others.split()}
    assert table.keys() >= set(refused.values())
    refused = {other: f"the nearest option is --{near}" for other, near in refused.items()}
    refused |= {other: instead for others, instead in INSTEAD.items() for other in others.split()}
    assert theirs.keys() <= table.keys() | refused.keys()
    for other in refused.keys() - table.keys():
        with pytest.raises(SystemExit):
            read(kind, "script.py", [f"--{other.replace('_', '-')}", "1"])
        assert capsys.readouterr().err == f"script.py: error: --{other}: not supported; {refused[other]}\n"


def test_optimizers_have_transformers_names_too():
    name = "adamw_torch"
    for flag in ("--optim", "--optimizer"):
        assert read(LlmOptions, "x", [flag, name]).optimizer.optimizer == "adamw"
    grid = read(LlmOptions, "x", ["--vary", f"optim=adafactor,{name}"])
    assert grid.varied == {"optimizer": ["adafactor", "adamw"]}


def test_nothing_heavy_is_imported_before_the_options_make_sense():
    """Of both scripts, in one process: its last line is what has been imported by then."""
    code = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import train_glue, train_llm\n"
        "for main in (train_llm.main, train_glue.main):\n"
        "    for words in (['--help'], ['--lora_rank', '4'], ['--model', '/no/such']):\n"
        "        try:\n"
        "            print('status', main(words))\n"
        "        except SystemExit as end:\n"
        "            print('status', end.code)\n"
        "print({'torch', 'transformers', 'datasets', 'peft'} & {*sys.modules})"
    )
    words = [sys.executable, "-c", code, str(Path(train_llm.__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT)
    *printed, imported = done.stdout.splitlines()
    statuses = [line for line in printed if line.startswith("status")]
    assert statuses == ["status 0", "status 2", "status 2"] * 2 and imported == "set()", (done.stdout, done.stderr)


@pytest.mark.parametrize(
    "bad",
    [
        "--lora_r 0",
        "--lora_r -3",
        "--lora_alpha nan",
        "--lora_alpha 0.0",
        "--lora_dropout 1.0",
        "--pre_num -2",
        "--calibration_examples -1",
        ("--lora_r 1.5", "--lora_r"),
        ("--method nothing", "--method"),
        ("--rank 4", "--rank"),
        "--weight_decay -1",
        "--max_grad_norm nan",
        "--num_train_epochs 0",
        "--save_total_limit 0",
        "--eval_steps -1",
        "--dataloader_num_workers -1",
        ("--data_dir=", "--data_dir: is empty"),
        ("--output-dir=", "--output_dir: is empty"),
        ("--resume_from_checkpoint=", "--resume_from_checkpoint: is empty"),
        ("--target_modules q_proj ", "--target_modules: is empty"),
        ("--output_dir caf\udce9", "--output_dir caf\\udce9: is not UTF-8"),
        "--adam_beta2 1",
        ("--lr_scheduler_type sawtooth", "sawtooth"),
        ("--load_best_model_at_end", "--save_best"),
        ("--save_best --eval_strategy no", "--save_best: nothing is validated; add --eval_strategy epoch"),
        ("--warmup_ratio 0.1 --warmup_steps 3", "--warmup_ratio 0.1"),
        ("--bf16 --fp16", "--fp16: contradicts --bf16"),
        ("--optim paged_adamw", "--optim paged_adamw"),
        ("--optimizer_args lr=0.5", "--optimizer_args lr=0.5: --learning_rate sets it"),
        ("--save_best --average_checkpoints last:5 --save_total_limit 2", "2 retains fewer; give --save_total_limit 5"),
        ("--lr_scheduler_type piecewise_constant", "--lr_step_rules: --lr_scheduler_type piecewise_constant needs"),
        ("--lr_scheduler_type piecewise_constant --lr_step_rules 1:x,1", "--lr_step_rules 1:x,1: "),
        ("--lr_scheduler_type polynomial --learning_rate 1e-7", "--lr_scheduler_type polynomial ends at 1e-07"),
    ],
)
def test_a_bad_flag_is_one_line_and_status_2(capsys, bad):
    words, part = (bad, bad) if isinstance(bad, str) else bad
    try:
        status = run_script("script.py", lambda argv, stop: parse(*words.split(" ")))
    except SystemExit as stopped:  # argparse's own
        status = stopped.code
    output = capsys.readouterr()
    assert status == 2 and not output.out
    assert output.err.startswith("script.py: error: ") and output.err.count("\n") == 1
    assert part in output.err


@pytest.mark.parametrize(("kind", "script"), [(GlueOptions, train_glue), (LlmOptions, train_llm)])
def test_help_keeps_the_examples_and_names_each_default_once(capsys, kind, script):
    with pytest.raises(SystemExit) as end:
        read(kind, "script.py", ["--help-all"], script.__doc__)
    text = capsys.readouterr().out
    assert end.value.code == 0 and script.__doc__.strip() in text
    flat = " ".join(text.split())
    assert (
        "several GPUs are divided evenly (default: 1)" in flat
        and "--seed SEED [SEED ...]" in flat
        and "(default: 42)" in flat
    )
    assert "(default: None)" not in flat and "(default: False)" not in flat


def test_several_values_make_an_experiment():
    grid = read(LlmOptions, "x", ["--method", "lora", "reslora", "--lora_r", "2", "4", "--lr", "1e-3"])
    assert isinstance(grid, Grid) and dict(grid.varied) == {"rank": [2, 4]} and grid.methods == ["lora", "reslora"]
    assert isinstance(read(LlmOptions, "x", ["--method", "lora", "reslora"]), Grid)
    assert isinstance(read(LlmOptions, "x", ["--method", "lora"]), LlmOptions)
    with pytest.raises(InvalidArgument, match=r"^--lora_r 4 4: one value is given twice"):
        read(LlmOptions, "x", ["--lora_r", "4", "4"])
