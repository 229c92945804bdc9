"""Experiments on the page: in the list, started and extended by the form, and their report."""

import json
import os
from pathlib import Path

import gradio as gr
import pytest
from app_runs import HOSTILE, write_run
from experiment import examples

from app import experiments
from app.jobs import Entry, Jobs
from app.library import Experiment, Library
from app.runs import RunError
from app.studio import Studio
from app.tabs.base import Parts
from app.tabs.report import ReportTab
from reslora.experiment.report import write_report
from reslora.images.experiment.report_sections import IMAGES
from reslora.images.experiment.run import identity_record
from reslora.images.settings import parse_args
from reslora.training.study import Identity


@pytest.fixture
def library(tmp_path) -> Library:
    """A library with a run and a finished experiment."""
    write_run(tmp_path / "runs" / "run")
    folder = tmp_path / "runs" / "which"
    folder.mkdir()
    write_experiment(folder, examples.experiment(None))
    (folder / "config.json").write_text(json.dumps({"learning_rate": [1e-4, 2e-4], "seed": 0}))
    return Library(tmp_path / "runs")


def write_experiment(folder, content: dict) -> None:
    (folder / "experiment.json").write_text(json.dumps(content))
    write_report(content, folder, IMAGES)


def test_experiments_and_runs_are_listed_apart(library):
    assert list(library.runs()) == ["run"] and list(library.experiments()) == ["which"]
    found = library.find("which", Experiment)
    assert found.status == "finished" and found.progress == (60, 60)
    for name in ("run", *HOSTILE):
        with pytest.raises(RunError, match="no experiment"):
            library.find(name, Experiment)


@pytest.mark.parametrize("content", [None, {"arms": [None, 7, {"status": []}]}])
def test_a_damaged_record_is_no_error(library, content):
    found = library.find("which", Experiment)
    (found.folder / "experiment.json").write_text(json.dumps(content))
    assert found.status == "stopped" and experiments.summary(found, found.status)


def test_how_far_it_is(library):
    found, content = library.find("which", Experiment), examples.unfinished()
    write_experiment(found.folder, content)
    (found.folder / ".lock").write_text(str(os.getpid()))  # which may be any process: it is stopped
    assert found.status == "stopped" and found.progress == (7, 60)
    told = experiments.summary(found, "running")
    each = sum(arm["seconds"] for arm in content["arms"][:7]) / 7
    assert "7 of 60 runs finished" in told and f"about {each * 53 / 3600:.1f} h left" in told
    assert "Resume trains the rest" in experiments.summary(found, "stopped")


def test_the_report_can_do_nothing_to_the_page(library):
    found = library.find("which", Experiment)
    (found.folder / "report.html").write_text('"><script>parent.hacked = 1</script> ${1} {{2}}')
    frame = experiments.report(found)
    assert 'sandbox="allow-scripts"' in frame and "<script>" not in frame and "${" not in frame and "{{" not in frame
    outside = found.folder.parent / "outside.html"
    outside.write_text("secret")
    (found.folder / "report.html").unlink()
    (found.folder / "report.html").symlink_to(outside)
    assert found.report() == ""


def test_a_plan_is_counted_by_the_trainers_own_parser(library):
    form = {"method": ["lora", "reslora"], "learning_rate": "1e-4, 3e-4", "seed": "0 1 2"}
    assert "8 runs: 2 methods, 2 learning rates, 3 seeds." in plan(library, form)
    assert "Fewer than three seeds" in plan(library, form | {"seed": "0"})
    wired = form | {"shortcut": ["input", "middle"], "pre_num": "1 4"}
    assert "16 runs: 4 methods" in plan(library, wired)
    assert "12 runs" in plan(library, form | {"learning_rate": "1e-4", "seed": "0", "rank": "2 4 8 16 32 64"})
    assert "A model from the hub needs training images" in plan(library, form | {"model": "owner/model"})
    for wrong in ({"seed": "x"}, {"learning_rate": "-1"}, {"blocks_to_swap": "0.5"}):
        assert "argument" in plan(library, form | wrong)
    assert "method none: choose from lora" in plan(library, form | {"method": ["none"]})
    assert "--keep_tokens 2: it has no effect" in plan(library, form | {"keep_tokens": "2"})


def plan(library: Library, form: dict) -> str:
    return told(Jobs(library), "new", form)


def told(*asked) -> str:
    """Return the text next to the button: the number of runs, or what is wrong."""
    try:
        return experiments.plan(*asked)[0]
    except RunError as error:
        return str(error)


def test_a_new_experiment_has_all_flags_and_one_that_is_there_keeps_its_own(library):
    """Methods, rates and seeds may be added; what belongs to another experiment is refused as the trainer does."""
    jobs, folder = Jobs(library), library.folder / "which"
    form = {"method": ["lora", "loha"], "learning_rate": "1e-4 3e-4", "seed": "0 1", "extend_rates": True, "model": ""}
    words, _ = jobs.command("new", form)
    assert words[1:3] == ["--output_dir", str(library.folder / "new")]
    assert words[3:] == [
        *("--method", "lora", "loha", "--seed", "0", "1", "--learning_rate", "1e-4", "3e-4", "--extend_rates")
    ]
    grid = parse_args([*words[1:], "--rank", "16", "--train_data_dir", str(library.folder)])
    (folder / "config.json").write_text(json.dumps(grid.flat()))
    identity = Identity("model", "images", "", "")
    content = examples.experiment(None) | {"identity": identity_record(grid, identity)}
    write_experiment(folder, content)
    more, found = jobs.command("which", form | {"seed": "0 1 2"})
    assert more[1:5] == ["--output_dir", str(folder), "--config", str(folder / "config.json")]
    assert found.varied["seed"] == [0, 1, 2] and found.base.data.train_data_dir == [str(library.folder)]
    assert "runs" in told(jobs, "which", form | {"seed": "0 1 2"}, "a folder that is not on the list")
    assert "--rank 8" in told(jobs, "which", form | {"rank": "8"})
    assert "load its settings" in told(jobs, "which", {"seed": "0", "learning_rate": "1e-4"})
    with pytest.raises(RunError, match="finished"):
        jobs.start(Entry("which", "experiment", resume=True))


@pytest.mark.parametrize("given", [{"seed": "3"}, {"rank": "4,"}])
def test_methods_alone_are_a_run_and_no_experiment(library, given):
    """As on the command line."""
    settings, queue = {"method": ["lora", "reslora"], "shortcut": ["input"], **given}, Jobs(library)
    assert "1 run: LoRA and ResLoRA, 200 steps each." in plan(library, settings)
    entry = Entry("new", "experiment", settings)
    assert queue.command_of(entry) and entry.kind == "run"


def test_the_best_arms_lora_is_handed_out(library):
    """In the format that most tools read; for methods without such a file, the reason is given."""
    folder = library.folder / "which"
    with gr.Blocks():
        tab = ReportTab(Parts(library, Jobs(library), Studio()))
    assert tab.look("which")[tab.take_best] == gr.update(interactive=False)
    with pytest.raises(RunError, match="There is no LoRA file: "):
        tab.copy_of_best("which")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"diffusers")
    assert Path(tab.copy_of_best("which")).read_bytes() == b"diffusers"
    (folder / "kohya.safetensors").write_bytes(b"kohya")
    assert tab.look("which")[tab.take_best] == gr.update(interactive=True)
    copy = Path(tab.copy_of_best("which"))
    assert copy.name == "which-kohya.safetensors" and copy.read_bytes() == b"kohya"
    content = json.loads((folder / "experiment.json").read_text())
    content["best"]["files"] = ["lycoris.safetensors"]  # of LoHa, LoKr or DoRA
    (folder / "experiment.json").write_text(json.dumps(content))
    (folder / "lycoris.safetensors").write_bytes(b"lycoris")
    assert Path(tab.copy_of_best("which")).read_bytes() == b"lycoris"
