"""Who sees all options of a run: every other function takes the groups that it needs."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHOLE = {"Options", "Grid", "TextOptions", "LlmOptions", "GlueOptions"}
SEE_ALL = {
    "app/launcher.py": "the form becomes a command",
    "app/bases.py": "the form's model",
    "app/image_folders.py": "the form's folder, as the trainer reads it",
    "reslora/diffusion/settings.py": "resolution, without the model",
    "reslora/diffusion/checks.py with_rank": "resolution, with the model",
    "reslora/diffusion/training/start.py with_start": "resolution, with the LoRA to start from",
    "reslora/diffusion/refusals.py": "resolution: what contradicts",
    "reslora/diffusion/experiment/checks.py": "resolution: what contradicts in experiments",
    "reslora/diffusion/training/checkpoints.py": "a resumed run compares all options",
    "reslora/diffusion/context.py": "what a run holds",
    "reslora/diffusion/data/samples.py Material": "what a run holds",
    "reslora/diffusion/processes.py start_accelerator": "the start of a run",
    "reslora/diffusion/run.py": "a run",
    "reslora/diffusion/experiment/run.py": "the runs of an experiment",
    "reslora/experiment/arms.py": "the runs of an experiment",
    "reslora/experiment/run.py run_experiment": "the runs of an experiment",
    "reslora/experiment/course.py Course": "the runs of an experiment",
    "reslora/language/arguments.py": "resolution, without the model",
    "reslora/language/resuming.py free_on_resume": "a resumed run compares all options",
    "reslora/language/llm.py": "a run",
    "reslora/language/glue.py": "a run",
    "reslora/language/experiment.py": "the runs of an experiment",
}


def seen(path: Path) -> dict[str, set[str]]:
    """The functions and classes of a file whose parameters or fields are all options, with these."""
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
        names = {name.id for kind in kinds if kind for name in ast.walk(kind) if isinstance(name, ast.Name)}
        if names & WHOLE:
            found[node.name] = names & WHOLE
    return found


def test_only_resolution_and_runs_see_all_options():
    used = set()
    for path in (*ROOT.glob("reslora/**/*.py"), *ROOT.glob("app/**/*.py")):
        place = path.relative_to(ROOT).as_posix()
        if place.startswith("reslora/options/"):
            continue
        for name in seen(path):
            assert place in SEE_ALL or f"{place} {name}" in SEE_ALL, f"{place}: {name} takes all options"
            used |= {place, f"{place} {name}"} & SEE_ALL.keys()
    assert used == SEE_ALL.keys()


def test_no_signature_has_untyped_flags():
    for path in (*ROOT.glob("reslora/**/*.py"), *ROOT.glob("app/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert "flags" not in {argument.arg for argument in node.args.args}, f"{path}: {node.name}"
