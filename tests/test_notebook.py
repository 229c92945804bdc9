"""The notebook of an experiment: its cells run in order, and give the verdict and the plots."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import PIL.Image
import pytest
from waiting import LIMIT

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "experiment.ipynb"
IMAGES = 24


def cells() -> list[str]:
    """Return the code of each cell."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(cell: str, names: dict) -> None:
    """Run a cell as Jupyter does: a cell that begins with ! is a shell command."""
    if not cell.startswith("!"):
        exec(compile(cell, NOTEBOOK.name, "exec"), names)
        return
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": search, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(cell[1:], shell=True, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr


def test_the_notebook_is_small():
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.exhaustive
def test_the_notebook_trains_and_shows_the_verdict_and_the_plots(tmp_path, monkeypatch, capsys):
    for name in ("train_sd.py", "assets"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "examples").mkdir()
    (tmp_path / "few").mkdir()
    bundled = ROOT / "assets" / "twemoji"
    rows = (bundled / "metadata.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:IMAGES]
    (tmp_path / "few" / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    for row in rows:
        shutil.copy(bundled / json.loads(row)["file_name"], tmp_path / "few")
    monkeypatch.chdir(tmp_path / "examples")
    plt.switch_backend("agg")
    names: dict = {}
    for cell in cells():
        short = cell.replace("--max_train_steps 30", "--max_train_steps 2 --train_data_dir ../few")
        assert (short != cell) == cell.startswith("!")
        run(short, names)
    plt.close("all")
    folder, printed = tmp_path / "runs" / "notebook", capsys.readouterr().out
    experiment = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))
    assert len(experiment["arms"]) == 10 and len(experiment["verdicts"]) == 1
    assert experiment["verdicts"][0]["sentence"] in printed and experiment["ranking"]["sentence"] in printed
    assert f"minimum detectable effect: {experiment['verdicts'][0]['detectable']:.2f}%" in printed
    assert f"best run: {experiment['best']['label']}" in printed
    for name in ("forest", "rates", "samples"):
        with PIL.Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 100 and len(image.convert("RGB").getcolors(10**6)) > 10
