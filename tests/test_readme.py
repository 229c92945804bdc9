"""README, docs, RESULTS and model cards: Python code runs, options of commands exist, links resolve."""

import importlib
import json
import pydoc
import re
import shlex
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
SITE_ONLY = ("index.md", "api.md")  # a home page, and what mkdocstrings makes of docstrings
REPORTS = sorted((ROOT / "benchmarks" / "reports").glob("*.md"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS, *(ROOT / "assets").rglob("*.md"), *REPORTS])
# What a reader has and the checkout hasn't: a model on the hub, a finished run.
STAND_INS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "assets/pipeline",
    "runs/my-style/lora": "app/example/lora",
}
HEADING = re.compile(r"^#+ +(.+)$", re.M)
LIBRARY = "reslora.merge(model, calibration=batches)"


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)


def section(document: Path, heading: str) -> str:
    """Return the text below a heading of the second level."""
    return document.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


SNIPPETS = [(document, code) for document in DOCUMENTS for code in blocks(document, "python")]


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A folder that snippets see as the checkout and may write to."""
    for part in ("app", "assets"):
        (tmp_path / part).symlink_to(ROOT / part)
    width = json.loads((ROOT / "assets" / "pipeline" / "text_encoder" / "config.json").read_text())["hidden_size"]
    embeddings = tmp_path / "runs" / "sks" / "lora" / "embeddings"
    embeddings.mkdir(parents=True)
    save_file({"<sks>": torch.ones(1, width)}, embeddings / "sks.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny_base():
    return AutoModelForCausalLM.from_pretrained(ROOT / "assets" / "tiny-llama", dtype=torch.float32)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("document", "code"), SNIPPETS, ids=[name_of(document) for document, _ in SNIPPETS])
def test_snippet_runs(document, code, checkout):
    names = {}
    if LIBRARY in code:
        tokenizer = AutoTokenizer.from_pretrained("assets/tiny-llama")
        names = {"base": tiny_base(), "batches": [dict(tokenizer(["Mia has 7 pens."], return_tensors="pt"))]}
    for there, here in STAND_INS.items():
        code = code.replace(there, here)
    exec(compile(code, name_of(document), "exec"), names)
    if LIBRARY in code:
        reloaded = PeftModel.from_pretrained(tiny_base(), "out").eval()
        batch = names["batches"][0]
        with torch.no_grad():
            torch.testing.assert_close(reloaded(**batch).logits, names["model"].eval()(**batch).logits)
    elif "image = " in code:
        assert names["image"].size == (64, 64)


def test_nothing_is_replaced_in_vain():
    code = "\n".join(code for _, code in SNIPPETS)
    assert all(name in code for name in (*STAND_INS, LIBRARY))


def commands(script: str) -> list[tuple[str, list[str]]]:
    """Return the arguments of every command in the documents that starts `script`."""
    found = []
    for document in DOCUMENTS:
        for block in blocks(document, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                for command in line.split("&&"):
                    words = shlex.split(command, comments=True)
                    if script in words:
                        found.append((name_of(document), words[words.index(script) + 1 :]))
    return found


@pytest.mark.parametrize(
    "script", ["train_sd.py", "train_llm.py", "train_glue.py", "reslora-convert", "reslora-caption", "reslora-compare"]
)
def test_commands_have_flags_that_exist(script, capsys):
    found = commands(script)
    assert found
    module = importlib.import_module(script.replace("-", ".").removesuffix(".py"))
    with pytest.raises(SystemExit):
        module.main(["--help-all" if script.endswith(".py") else "--help"])
    known = set(re.findall(r"--[a-z0-9_-]+", capsys.readouterr().out))
    for document, words in found:
        unknown = {word for word in words if word.startswith("--")} - known
        assert not unknown, f"{document}: {script} has no {', '.join(unknown)}"
    if script == "train_sd.py":
        table = section(ROOT / "docs" / "migrate.md", "Names")
        rows = [line for line in table.splitlines() if line.startswith("|")]
        ours = set(re.findall(r"--[a-z0-9_]+", " ".join(row.split("|")[-2] for row in rows)))
        assert len(ours) > 30 and not ours - known


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_and_images_are_there(document):
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    lost = [t for t in targets if not t.startswith("http") and not (document.parent / t).exists()]
    assert not lost


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_anchors_are_there(document):
    """Each link within the documents leads to a heading, or to a named anchor."""
    lost = []
    for target, anchor in re.findall(r"\]\(((?:[^)#\s:]+\.md)?)#([^)\s]+)\)", document.read_text(encoding="utf-8")):
        text = (document.parent / target if target else document).read_text(encoding="utf-8")
        headings = [re.sub(r"[^\w\- ]", "", line).strip().replace(" ", "-").lower() for line in HEADING.findall(text)]
        lost += [] if anchor in headings or f'<a name="{anchor}">' in text else [f"{target}#{anchor}"]
    assert not lost


def test_readme_fits_a_few_screens_and_leads_to_every_page():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 2000
    pages = [page.name for page in DOCS if page.name not in SITE_ONLY]
    assert not [name for name in pages if f"](docs/{name})" not in text]


@pytest.mark.parametrize(
    ("document", "heading"), [(README, "What we found"), (ROOT / "docs" / "method.md", "What was measured")]
)
def test_figures_are_in_results(document, heading):
    results = "".join(report.read_text(encoding="utf-8") for report in [ROOT / "RESULTS.md", *REPORTS])
    figures = re.findall(r"\b\d+\.\d+\b", section(document, heading))
    assert figures and not [figure for figure in figures if figure not in results]


def test_names_on_the_page_of_the_library_exist():
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert names and [name for name in names if pydoc.locate(name) is None] == []
