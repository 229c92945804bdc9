"""Claims and tables of `reslora-compare`, from experiments and from losses of any trainer."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from reslora.compare import main
from reslora.experiment.answers import check, table

from .examples import experiment
from .test_losses import losses_of, written


@pytest.fixture
def folder(tmp_path) -> Path:
    """An experiment that compares all pairs: `reslora block(4)` is the best and `loha` the worst method."""
    return kept(tmp_path / "out", experiment(None))


def kept(folder: Path, content: dict) -> Path:
    folder.mkdir()
    (folder / "experiment.json").write_text(json.dumps(content))
    return folder


def ended(capsys, *words: object) -> tuple[int, str]:
    """Return the exit status and the printed line."""
    try:
        status = main([*map(str, words)])
    except SystemExit as end:
        status = end.code
    out, error = capsys.readouterr()
    assert (out + error).count("\n") == 1
    return status, out + error


@pytest.mark.parametrize(
    ("claim", "status", "words"),
    [
        ("reslora block(4) < lora", 0, "shown: reslora block(4) at 0.0001 is better than lora"),
        ("lora<loha", 0, "shown: lora at 0.0002 is better than loha"),
        ("lora_x2 < lora", 1, "not shown: no significant difference shown between lora_x2"),
        ("lora < reslora block(4)", 3, "the opposite is shown: lora at 0.0002 is worse than reslora block(4)"),
        ("reslora block(4) < loha", 0, "shown: reslora block(4) at 0.0001 is better than loha"),
        ("loha < lora_x2", 3, "the opposite is shown: loha at 0.0004 is worse than lora_x2"),
        ("lora_x3 < lora", 2, "has no test losses of lora_x3; did you mean lora_x2?"),
        ("lora < lora", 2, "does not compare lora with lora"),
        ("lora", 2, "is not a claim"),
    ],
)
def test_a_claim_ends_with_its_status(folder, capsys, claim, status, words):
    """Also about two methods of which neither is the reference, as all pairs are compared."""
    found, line = ended(capsys, folder, "--check", claim)
    assert found == status and words in line


def test_every_claim_has_the_level_of_all_pairs(folder, tmp_path):
    """The p value does not depend on which method is the reference."""
    content = json.loads((folder / "experiment.json").read_text())
    assert content["ranking"]["sentence"]
    given = {each["label"]: each["p_holm"] for each in content["verdicts"]}
    rows = csv.DictReader(io.StringIO(table(folder, "csv")))
    assert {row["method"]: float(row["p"]) for row in rows if row["p"]} == given
    only = kept(tmp_path / "only", content | {"ranking": None})  # compared with the reference only
    assert check(only, "lora < loha")[0] == 0
    with pytest.raises(ValueError, match=r"does not compare loha with lora_x2; .* such as lora_x2 < lora"):
        check(only, "loha < lora_x2")
    stale = kept(tmp_path / "stale", content | {"as_of": 60})
    assert check(stale, "lora < loha")[1].endswith("(as of 60 runs)")


def test_losses_of_any_trainer_are_checked_at_the_level_of_their_evaluations(tmp_path, capsys):
    path = written(tmp_path / "losses.csv", {"adam": losses_of(0), "muon": losses_of(-0.1), "sgd": losses_of(0.2)})
    assert ended(capsys, path, "--check", "muon < sgd")[0] == 0
    assert ended(capsys, path, "--check", "sgd < muon")[0] == 3
    assert ended(capsys, path, "--check", "sgd < muon", "--evaluations", 2)[1].count("99.2% interval") == 1
    close = written(tmp_path / "close.csv", {"adam": losses_of(0), "muon": losses_of(-0.02)})
    alone, later = (ended(capsys, close, "--check", "muon < adam", "--evaluations", n)[0] for n in (1, 50))
    assert (alone, later) == (0, 1)


def test_a_table_has_a_row_for_each_method_and_all_digits_as_csv(folder):
    content = json.loads((folder / "experiment.json").read_text())
    for arm in content["arms"]:
        if arm["test"]:
            arm["test"]["figures"] = {"accuracy": 0.5 + 0.1 * arm["seed"]}
    (folder / "experiment.json").write_text(json.dumps(content))
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(table(folder, "csv")))}
    assert [*rows][-1] == "base model" and len(rows) == 5 and float(rows["base model"]["loss"]) == pytest.approx(0.34)
    arms = [arm for arm in content["arms"] if arm["label"] == "loha" and arm["test"]]
    means = [np.mean(arm["test"]["losses"]) for arm in arms]
    row, (verdict,) = rows["loha"], [each for each in content["verdicts"] if each["label"] == "loha"]
    assert float(row["loss"]) == np.mean(means) and float(row["loss_sd"]) == pytest.approx(np.std(means, ddof=1))
    assert (row["seeds"], row["items"], row["learning_rate"]) == ("3", "12", "0.0004")
    assert float(row["accuracy"]) == pytest.approx(0.6) and rows["lora"]["reference"] == ""
    assert (row["verdict"], float(row["difference"])) == ("worse", verdict["relative"])
    assert [float(row["low"]), float(row["high"])] == verdict["interval"]


def test_a_table_in_markdown_and_latex(tmp_path, capsys):
    path = written(tmp_path / "losses.csv", {"a|b": losses_of(0), "mine_1 50%": losses_of(-0.1)})
    assert main([str(path), "--table", "markdown"]) == 0
    head, line, first, second = capsys.readouterr().out.splitlines()
    assert {text.count("|") for text in (head, line, first, second)} == {16} and "a&#124;b" in first
    head, rows = table(path, "latex").split(r"\\" + "\n", 1)
    assert head.startswith(r"\begin{tabular}{lrrrrrrlrrrrrlr}") and r"learning\_rate & step" in head
    assert rows.count("&") == 2 * 14 and r"mine\_1 50\% &" in rows and rows.endswith("\\hline\n\\end{tabular}\n")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["lost", "--check", "a < b"], "lost: [Errno 2] No such file or directory"),
        (["empty", "--table", "csv"], "empty: has no experiment.json; give the output folder of an experiment"),
        (["old", "--table", "csv"], "old: has no experiment.json of this version"),
        (["new", "--table", "csv"], "new: has no test losses yet; finish the experiment first"),
        (["new", "--check", "lora < loha"], "new has no test losses of lora; finish the experiment first"),
        (["new", "--table", "csv", "--check", "a < b"], "--table csv: not possible with --check"),
        (["new", "--check", "a < b", "--evaluations", "2"], "--evaluations 2: an experiment counts them itself"),
        (["new"], "--check and --table: both missing"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, monkeypatch, words, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    kept(tmp_path / "old", {"format": 0})
    untested = experiment(None) | {"verdicts": [], "ranking": None, "chosen": {}}
    kept(tmp_path / "new", untested)
    status, line = ended(capsys, *words)
    assert status == 2 and problem in line
