"""Measure what the test suite catches: change one expression or statement at a time, and run the tests.

    python benchmarks/mutants.py --jobs 2

The mutants are sampled with a seed, about equally many for each subject. Each one is applied to a temporary copy of the
commit HEAD, and the tests run in three stages: the quick tests that map to the file, all other quick tests, and the
tests marked `exhaustive`. A mutant that one stage kills does not enter the next. A test kills a mutant if it fails
twice with the mutant and passes without it.

The result is `benchmarks/results/mutants.json`. The same command resumes where it was interrupted. To mark a mutant as
equivalent, write the reason into its `equivalent`. After new tests, `--again` tests the survivors once more.

The processes that run the tests are forked from one that has imported the libraries. (mutmut 3 has no seed and takes no
sample, and it skips most functions that have a decorator.)
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import types
from pathlib import Path
from typing import NoReturn

from mutations import apply, sample

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "mutants.json"
LIBRARIES = ["pytest", "torch", "accelerate", "datasets", "matplotlib.pyplot", "peft", "scipy.stats", "transformers"]
LIBRARIES += ["diffusers.optimization", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"]
TESTS = {
    "reslora/shortcuts/": ["test_shortcuts.py", "test_checkpointing.py"],
    "reslora/merges.py": ["test_merging.py"],
    "reslora/regression.py": ["test_merging.py", "test_calibration.py"],
    "reslora/tracing.py": ["test_chains.py"],
    "reslora/wiring.py": ["test_shortcuts.py", "test_state.py", "test_model.py", "test_guards.py"],
    "reslora/images/model/objective.py": ["images/model/test_flow_objective.py"],
    "reslora/images/model/loss.py": ["images/model/test_objective.py", "images/data/test_masks.py"],
    "reslora/images/data/plan.py": ["images/data/test_sources.py", "images/data/test_samples.py"],
    "reslora/ranks.py": ["test_checkpoint.py", "test_export.py", "test_merging.py"],
    "reslora/images/output/exports.py": ["images/output/test_merged_weights.py"],
    "reslora/images/model/lora_files/": ["images/test_conversion.py"],
    "reslora/experiment/statistics.py": ["experiment/test_verdicts.py"],
    "reslora/training/": ["images/training/test_checkpoints.py", "images/test_initial_lora.py"],
}
"""The tests that map to a file or to a folder, in addition to the file of the same name."""

STAGES = ("mapped", "quick", "exhaustive")
TEST_LIMITS = {"mapped": 300, "quick": 300, "exhaustive": 1500}
"""Seconds for one test; a mutant that makes a test hang is killed."""
RUN_LIMITS = {"mapped": 3600, "quick": 7200, "exhaustive": 6 * 3600}
"""Seconds for all tests of a stage, because pytest cannot end everything that hangs."""
MEMORY = 8 * 2**30
"""Bytes for each process, because an endless loop may append to a list."""
QUICK_TARGET = 0.85

# -- the tests ---------------------------------------------------------------------------------------------------------


def mapped_tests(tree: Path, file: str) -> list[str]:
    """Return the test files that map to a file: the one at its place in the tree or above, and those of `TESTS`."""
    path = Path(file).relative_to("reslora")
    own = (tree / "tests" / folder / f"test_{path.name}" for folder in path.parents)
    more = (tree / "tests" / name for prefix, names in TESTS.items() if file.startswith(prefix) for name in names)
    found = [*itertools.islice(filter(Path.exists, own), 1), *filter(Path.exists, more)]
    return [test.relative_to(tree).as_posix() for test in found]


def arguments(tree: Path, file: str, stage: str) -> list[str]:
    """Return pytest's arguments for one stage of a mutant of `file`: tests that map to it first, then their folder."""
    mapped = mapped_tests(tree, file)
    everything = [path.relative_to(tree) for path in tree.glob("tests/**/test_*.py")]
    everything.sort(key=lambda path: (path.parent != Path(mapped[0]).parent, path))
    rest = [test for test in map(Path.as_posix, everything) if test not in mapped]
    files = {"mapped": mapped, "quick": rest, "exhaustive": mapped + rest}[stage]
    return ["-m=exhaustive" if stage == "exhaustive" else "-m=not exhaustive", *files]


class Progress:
    """A pytest plugin that writes the test that runs, or the file that cannot be collected, to a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Write the test that starts."""
        self.file.write_text(nodeid)

    def pytest_collectreport(self, report) -> None:
        """Write the file that cannot be collected."""
        if report.failed:
            self.file.write_text(report.nodeid)


def run_pytest(tree: Path, folder: Path, stage: str, words: list[str]) -> tuple[int | None, str]:
    """Run pytest in a separate process, in `tree`, until a test fails.

    Return its exit status (negative for a signal, None if it hung), and the last test that ran. The tests write only to
    `folder`.
    """
    folder.mkdir()
    process, ended, end = os.fork(), (0, 0), time.monotonic() + RUN_LIMITS[stage]
    if process == 0:
        limit = f"--timeout={TEST_LIMITS[stage]}"
        _become_pytest(tree, folder, ["-n", "0", "-x", "-p", "no:cacheprovider", limit, *words])
    try:
        while not (ended := os.waitpid(process, os.WNOHANG))[0] and time.monotonic() < end:
            time.sleep(0.1)
    finally:  # ends all processes that it started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        if not ended[0]:
            os.waitpid(process, 0)
    status = os.waitstatus_to_exitcode(ended[1]) if ended[0] else None
    progress = folder / "test.txt"
    return status, progress.read_text() if progress.exists() else ""


def _become_pytest(tree: Path, folder: Path, words: list[str]) -> NoReturn:
    """Run pytest in this process, which was forked, as a shell would start it in `tree`, and end the process."""
    status = 3
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        for stream, file in ((0, os.devnull), (1, folder / "printed.txt"), (2, folder / "printed.txt")):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), stream)
        temporary = folder / "tmp"
        temporary.mkdir()
        tempfile.tempdir = None
        os.environ.update(TMPDIR=str(temporary), PYTHONPATH=str(tree))  # takes precedence over an installed copy
        sys.path[:] = [str(tree), *(path for path in sys.path if Path(path) not in (ROOT, ROOT / "benchmarks"))]
        sys.modules["__main__"] = types.ModuleType("__main__")  # child processes would import this file otherwise
        os.chdir(tree)
        import pytest

        status = int(pytest.main(words, plugins=[Progress(folder / "test.txt")]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def killer(trees: tuple[Path, Path], file: str, stage: str, failing: set[str]) -> str | None:
    """Return the test that fails twice with the mutant in `trees[0]` and passes in `trees[1]`, which has none.

    Add to `failing` the tests that fail in both. A test that fails once only (on a busy machine, by its time limit)
    kills nothing.
    """
    mutated, clean = trees
    marker, *files = arguments(clean, file, stage)
    skipped = set(failing)
    for attempt in itertools.count():
        words = [f"--deselect={test}" for test in sorted(skipped)] + [file for file in files if file not in skipped]
        status, test = run_pytest(mutated, mutated.parent / f"{attempt}", stage, [marker, *words])
        if status in (0, 5):  # 5: none of these files has a test of this stage
            return None
        how = {None: " (hangs)", 1: ""}.get(status, f" (status {status})")
        words = [marker, *([test] if "::" in test else ["--collect-only", *([test] if test else files)])]
        if run_pytest(clean, mutated.parent / f"{attempt}-clean", stage, words)[0] != 0:
            failing.add(test)
        elif run_pytest(mutated, mutated.parent / f"{attempt}-again", stage, words)[0] != 0:
            return f"{test or 'conftest.py'}{how}"
        if not test or test in skipped:
            raise RuntimeError(f"{stage}: pytest ends with status {status}, without a test that is to blame")
        skipped.add(test)
        files = files[files.index(test.partition("::")[0]) :]  # those before it have passed
    raise AssertionError


# -- all mutants -------------------------------------------------------------------------------------------------------


def main() -> int:
    """Run all pending stages; return 1 if too many mutants survive or some stages have not run."""
    args = parsed()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        clean = Path(folder) / "clean"
        record = opened(clean, extract(clean), args)
        if args.list:
            print("\n".join(line for mutant in record["mutants"] for line in (heading(mutant), *mutant["diff"])))
            return 0
        try:
            load_libraries(Path(folder))
            for stage in STAGES[: STAGES.index(args.until) + 1]:
                run_stage(record, stage, clean, args.jobs)
        except KeyboardInterrupt:
            print("interrupted; the same command resumes", flush=True)
            return 130
    return report(record)


def parsed() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--count", type=int, default=80, help="how many mutants are sampled")
    parser.add_argument("--jobs", type=int, default=1, help="how many mutants are tested at the same time")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage that runs")
    parser.add_argument("--again", action="store_true", help="test survivors again, with the tests of HEAD")
    parser.add_argument("--list", action="store_true", help="print the mutants and run no tests")
    args = parser.parse_args()
    for name in ("count", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    return args


def extract(folder: Path) -> str:
    """Write the files of HEAD to `folder`; return the commit."""
    git = ["git", "-C", str(ROOT)]
    if subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"]):
        print("warning: uncommitted changes are not tested", flush=True)
    archive = io.BytesIO(subprocess.check_output([*git, "archive", "HEAD"]))
    with tarfile.open(fileobj=archive) as files:
        files.extractall(folder, filter="data")
    return subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()


def opened(tree: Path, commit: str, args: argparse.Namespace) -> dict:
    """Return the record to continue, or a new one with a new sample."""
    if not RESULT.exists():
        record = {"seed": args.seed, "count": args.count, "commit": commit, "failing_without_mutant": []}
        record["mutants"] = sample(tree, args.count, args.seed)
    else:
        record = json.loads(RESULT.read_text())
        for name in ("seed", "count"):
            if record[name] != getattr(args, name):
                given = getattr(args, name)
                sys.exit(f"--{name} {given}: {RESULT.name} has {record[name]}; give that, or remove the file")
    if args.again:
        record["failing_without_mutant"] = []
        for mutant in record["mutants"]:
            if not any(stage["killed_by"] for stage in mutant["stages"].values()):
                mutant["stages"] = {}
    print(f"{len(record['mutants'])} mutants of {record['commit'][:12]}, seed {record['seed']}", flush=True)
    write(record)
    return record


def load_libraries(folder: Path) -> None:
    """Import what the tests import, once for all processes that are forked later."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    os.environ["HF_HOME"] = str(folder / "huggingface")  # keeps a mutant's files away from later runs
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def run_stage(record: dict, stage: str, clean: Path, jobs: int) -> None:
    """Run a stage for all mutants that survived the stages before, each in a separate process."""
    failing = record["failing_without_mutant"]
    queue = [mutant for mutant in record["mutants"] if is_due(mutant, stage)]
    running: dict[int, dict] = {}
    try:
        while queue or running:
            while queue and len(running) < jobs:
                mutant = queue.pop(0)
                folder = clean.parent / str(mutant["number"])
                folder.mkdir()
                if (process := os.fork()) == 0:
                    _work(folder, mutant, stage, clean, set(failing))
                running[process] = mutant
            process, _ = os.wait()
            mutant = running.pop(process)
            folder = clean.parent / str(mutant["number"])
            if (result := folder / "result.json").exists():
                mutant["stages"][stage] = found = json.loads(result.read_text())
                failing += [test for test in found.pop("failing") if test not in failing]
                outcome = f"killed by {found['killed_by']}" if found["killed_by"] else "survives"
                print(f"{stage}, {heading(mutant)}: {outcome} ({found['seconds']:.0f} s)", flush=True)
                write(record)
            else:
                print(f"warning: {stage}, {heading(mutant)}: no result", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        for process in running:
            os.kill(process, signal.SIGTERM)
            os.waitpid(process, 0)


def is_due(mutant: dict, stage: str) -> bool:
    """Return whether the earlier stages have run and have not killed the mutant, and this one has not run."""
    before = STAGES[: STAGES.index(stage)]
    survives = all(name in mutant["stages"] and not mutant["stages"][name]["killed_by"] for name in before)
    return survives and stage not in mutant["stages"] and not mutant["equivalent"]


def _work(folder: Path, mutant: dict, stage: str, clean: Path, failing: set[str]) -> NoReturn:
    """Run one stage of the tests with a mutant, in this process, which was forked, and end the process."""
    try:
        started, known, file = time.monotonic(), set(failing), mutant["file"]
        tree = folder / "tree"
        shutil.copytree(clean, tree, ignore=shutil.ignore_patterns("__pycache__"))
        (tree / file).write_text(apply(mutant["diff"], mutant["line"], (tree / file).read_text()))
        result = {"killed_by": killer((tree, clean), file, stage, failing)}
        result |= {"seconds": round(time.monotonic() - started, 1), "failing": sorted(failing - known)}
        (folder / "result.json").write_text(json.dumps(result))
    except KeyboardInterrupt:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def heading(mutant: dict) -> str:
    """Return a mutant's number, subject and line, for the log."""
    return f"mutant {mutant['number']} ({mutant['subject']}, {mutant['file']}:{mutant['line']})"


def write(record: dict) -> None:
    """Write the record atomically."""
    temporary = RESULT.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(RESULT)


def report(record: dict) -> int:
    """Print how many mutants each suite kills, and the survivors."""
    counted = [mutant for mutant in record["mutants"] if not mutant["equivalent"]]
    survivors = [mutant for mutant in counted if is_survivor(mutant, STAGES)]
    quick = sum(not is_survivor(mutant, STAGES[:2]) for mutant in counted)
    waiting = sum(any(is_due(mutant, stage) for stage in STAGES) for mutant in counted)
    for mutant in survivors:
        if mutant["stages"]:
            print("\n".join([f"{heading(mutant)} survives {', '.join(mutant['stages'])}", *mutant["diff"]]))
    total = len(counted)
    print(f"not equivalent: {total} of {len(record['mutants'])}; not finished: {waiting}")
    print(f"quick suite: kills {quick} of {total} ({quick / max(total, 1):.0%}; target {QUICK_TARGET:.0%})")
    print(f"quick and exhaustive suite: kill {total - len(survivors)} of {total}")
    return 0 if quick >= QUICK_TARGET * total and not survivors else 1


def is_survivor(mutant: dict, stages: tuple[str, ...]) -> bool:
    """Return whether no stage of `stages` has killed the mutant."""
    return not any(mutant["stages"].get(stage, {}).get("killed_by") for stage in stages)


if __name__ == "__main__":
    sys.exit(main())
