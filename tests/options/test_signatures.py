"""Functions that take all options of a run are listed here; others take the groups that they need."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHOLE = {"Options", "Grid", "TextOptions", "LlmOptions", "GlueOptions"}
SEE_ALL = {
    # resolution: defaults, files, what contradicts
    "reslora/images/settings.py": "parse_args resolve with_family",
    "reslora/images/refusals.py": "check_options check_places report_doubtful",
    "reslora/images/model_checks.py": "with_rank",
    "reslora/images/initial_lora.py": "with_start",
    "reslora/images/experiment/requirements.py": "check_batches check_ranks",
    "reslora/texts/arguments.py": "read resolve _checked_llm _checked_glue",
    # a run, which resumes with the same options or is refused
    "reslora/images/context.py": "ImageContext",
    "reslora/images/accelerator.py": "start_accelerator",
    "reslora/images/run.py": "run begin find_all resolve_context resolve_with check_folder",
    "reslora/images/data/class_images.py": "load_class_images",
    "reslora/images/planning.py": "show_plan",
    "reslora/training/checkpoints.py": "settings_of check_past past_of",
    "reslora/training/trackers.py": "note_settings",
    "reslora/texts/plan.py": "show_plan",
    "reslora/texts/run.py": "begin check_folder identity_of start_accelerator",
    "reslora/texts/study.py": "schedule_of plan_of adapted",
    "reslora/texts/experiment.py": "start_texts opened timed",
    # the examples, the model and the metrics of a run of texts
    "reslora/texts/llm.py": "model_of read parts prepare load empty frozen_bytes calibration validation figures "
    "_figures measured _evaluated facts",
    "reslora/texts/glue.py": "read_splits _read encode load_tokenizer load_model check_fit task_of model_of read take "
    "parts prepare load empty calibration logits all_logits evaluated validation figures measured predict "
    "predictions files facts",
    # the runs of an experiment
    "reslora/experiment/arms.py": "labels_of averages_of_labels check_evaluations others_of rates_of "
    "reference_of references_of options_of check_values",
    "reslora/experiment/schedule.py": "ArmSchedule",
    "reslora/experiment/runner.py": "run_experiment",
    "reslora/images/experiment/run.py": "open_study prepare_folder resumed_options with_varied check_folder check_same "
    "check_variants data_key data_of_variant identity_record",
    "reslora/images/experiment/first_steps.py": "time_first_steps",
    # the comparison of LoRA files
    "reslora/compare.py": "options_of",
    "reslora/images/comparison/run.py": "check_count compare_files folders_of settings_of",
    # the application's form
    "app/jobs.py": "command",
    "app/tabs/train.py": "given_in",
    "app/bases.py": "base_of check_sizes",  # here and in the studio: the options of a base model
    "app/studio.py": "_load",
    "app/estimates.py": "methods_of seconds_a_step training_time",
    "app/image_folders.py": "defaults",
}
"""Who may, by file; of `Arguments[LlmOptions]` and the like the whole is not seen, but a run's arguments."""


def seen(path: Path) -> dict[str, set[str]]:
    """Return the functions and classes of a file with a parameter or field that holds all options."""
    found: dict[str, set[str]] = {}
    text = path.read_text()
    if not any(f"options.{name} import" in text for name in ("images", "texts", "grid")):
        return found
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            kinds = [argument.annotation for argument in (*node.args.args, *node.args.kwonlyargs)] + [node.returns]
        elif isinstance(node, ast.ClassDef):
            kinds = [part.annotation for part in node.body if isinstance(part, ast.AnnAssign)]
        else:
            continue
        kinds = [kind for kind in kinds if kind and not ast.unparse(kind).startswith("Arguments[")]
        names = {name.id for kind in kinds for name in ast.walk(kind) if isinstance(name, ast.Name)}
        if names & WHOLE:
            found[node.name] = names & WHOLE
    return found


def test_only_resolution_runs_and_the_form_see_all_options():
    found = {}
    for path in (*ROOT.glob("reslora/**/*.py"), *ROOT.glob("app/**/*.py")):
        place = path.relative_to(ROOT).as_posix()
        if not place.startswith("reslora/options/") and (names := seen(path)):
            found[place] = sorted(names)
    assert found == {place: sorted(names.split()) for place, names in SEE_ALL.items()}


def test_no_signature_has_untyped_flags():
    for path in (*ROOT.glob("reslora/**/*.py"), *ROOT.glob("app/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert "flags" not in {argument.arg for argument in node.args.args}, f"{path}: {node.name}"
