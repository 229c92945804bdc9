"""The report: its content, that users' texts never become HTML tags, and its use in a browser."""

import copy
import html
import json
import math
import re
import shlex
import shutil
from functools import partial

import browsers
import numpy as np
import pytest
from waiting import LIMIT

from experiment import examples
from reslora.experiment import report
from reslora.experiment.choice import choose
from reslora.experiment.statistics import rerun
from reslora.experiment.verdicts import compare
from reslora.images.experiment.report_sections import IMAGES
from reslora.images.settings import parse_args
from reslora.options.images import Options
from reslora.plots.charts import Series

headline_of = report.headline_of
page = partial(report.page, about=IMAGES)
write_report = partial(report.write_report, about=IMAGES)
ORDER = (
    "Verdicts", "Images", "What to use", "What is missing", "Chosen on the selection split", "Runs",
    "Loss on the selection split", "Loss on the test images by timestep", "Loss by test image",
    "Settings and versions",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experiment")


@pytest.fixture(scope="module")
def experiment(folder) -> dict:
    found = examples.experiment(folder)
    (folder / "experiment.json").write_text(json.dumps(found))
    return found


@pytest.fixture(scope="module")
def text(experiment, folder) -> str:
    """The report of the experiment after a round trip through JSON, which turns tuples into lists."""
    write_report(json.loads((folder / "experiment.json").read_text()), folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def words_of(content: str) -> str:
    """Return the visible text, without tags."""
    content = re.sub(r"<(style|script)>.*?</\1>", "", content, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", content)))


def test_all_of_it_in_order(text, experiment):
    assert tuple(re.findall("<h2>(.*?)</h2>", text)) == ORDER
    words = words_of(text)
    better = next(verdict for verdict in experiment["verdicts"] if verdict["conclusion"] == "better")
    assert "ResLoRA block(4) at 0.0001 is better than LoRA at 0.0002: test loss" in words
    assert "no significant difference shown between LoRA x2 at" in words
    assert not re.search(
        r"\b(reslora|lora_x2|loha)\b(?![/-])", words.partition("Settings")[0].replace("--method reslora", "")
    )
    assert "LoHa 0.0008 2 failed the loss is not finite at step 61 0.31000 — 61 7 min 0 s 5.00 GiB " in words
    assert words.count("seed 0, step 200") == 4
    ours = [np.mean(arm["test"]["losses"]) for arm in experiment["arms"] if arm["label"] == "lora_x2" and arm["test"]]
    low, high = rerun(ours)
    assert f" {np.mean(ours):.5f} {low:.5f} to {high:.5f} 8 " in words  # a loss, of one more seed, and the rank
    assert " base model — 0 0.34000 0.34000 — " in words
    low, high = better["rerun"]
    assert f"&minus;{-low:.1f}% to &minus;{-high:.1f}%" in text
    assert "LoHa: 1 run failed" in words and "torch 2.9" in words and "duplicates 3" in words
    assert "<h1>ResLoRA block(4) is better than LoRA, LoRA x2 and LoHa</h1>" in text
    assert better["label"] in experiment["ranking"]["best"]
    bars = re.findall(r'class="bar" d="M([\d.]+) \d+H([\d.]+)"/><path class="dot" d="M([\d.]+) ', text)
    assert len(bars) == 3 and all(float(low) < float(mean) < float(high) for low, high, mean in bars)
    assert "base model, before training" in words and "percent; left of 0 is better" in words
    assert "Losses in this report are squared errors without weights" in words


def test_a_report_of_runs_that_start_from_a_lora_says_so(experiment, folder):
    found = experiment | {"settings": experiment["settings"] | {"init_lora": "/loras/mine.safetensors"}}
    words = words_of(page(found, folder))
    assert " initial LoRA — 0 0.34000 0.34000 — " in words and "initial LoRA, before training" in words
    assert "base model —" not in words and "base model, before" not in words


def test_intervals_say_their_coverage(experiment, folder):
    """In an older record, it follows from the number of readings."""
    found = words_of(page(experiment, folder))
    assert found.count("97% interval") == 5 and "95% interval" not in found
    older = copy.deepcopy(experiment) | {"readings": 2}
    for verdict in older["verdicts"]:
        del verdict["level"]
    found = page(older, folder)
    assert "with 99.2% intervals" in found and ">99.2% interval</th>" in found


def test_a_command_trains_the_best_run_on_all_images(experiment, folder, tmp_path):
    """It is one run with the experiment's settings, without those that vary and without the splits."""
    place = tmp_path / "an experiment"
    place.mkdir()
    grid = parse_args([
        "--method", "lora", "reslora", "--learning_rate", "1e-4", "2e-4", "--seed", "0", "1", "--test_split", "0.3",
        "--shortcut", "input", "block", "--max_train_steps", "400", "--train_batch_size", "3",
        "--average_checkpoints", "ema:0.5",
        "--output_dir", str(place),
    ])  # fmt: skip
    (place / "config.json").write_text(json.dumps(grid.flat()))
    best = experiment["best"] | {"options": experiment["best"]["options"] | {"shortcut": "block"}}
    content = page(experiment | {"best": best, "settings": {"output_dir": str(place)}}, folder)
    (command,) = (html.unescape(text) for text in re.findall('data-copy="(accelerate[^"]*)"', content))
    words = shlex.split(command)
    assert words[:3] == ["accelerate", "launch", "train_sd.py"]
    options = parse_args(words[3:])
    assert isinstance(options, Options) and options["method"] == ["reslora"] and options["shortcut"] == "block"
    assert (options["learning_rate"], options["seed"], options["max_train_steps"]) == (1e-4, 1, 200)
    assert (options["train_batch_size"], options["output_dir"]) == (3, f"{place}-all")
    assert not (options["test_split"] or options["select_split"] or options["validation_split"])


def test_it_needs_nothing_else(text, folder):
    """It has no external addresses; large images are scaled down; the folder has no other file."""
    assert not re.search(r'(src|href)=(?!"data:)|url\(|@import|https?:', text.replace("image.src = from.src", ""))
    sizes = re.findall(r'width="(\d+)" height="(\d+)">', text)
    assert len(sizes) == 2 * 5 and set(sizes) == {("512", "512")}
    assert {path.name for path in folder.iterdir()} == {
        "experiment.json",
        "report.html",
        "lora",
        "lora_x2",
        "reslora",
        "loha",
    }


def test_what_others_wrote_is_text(experiment, folder):
    """No string of the record becomes a tag or ends an attribute."""
    evil = "</title></script><img src=x onerror=alert(1)>\"'&"

    def replaced(content):
        if isinstance(content, dict):
            return {key: value if key == "folder" else replaced(value) for key, value in content.items()}
        if isinstance(content, list | tuple):
            return [replaced(value) for value in content]
        return evil if isinstance(content, str) and content not in ("finished", "failed", "low") else content

    hostile = replaced(experiment)
    hostile["chosen"] = {evil: next(iter(experiment["chosen"].values()))}
    hostile["notes"], hostile["settings"][evil] = [evil], evil
    content = page(hostile, folder)
    assert f'alt="{html.escape(evil)}: {html.escape(evil)}"' in content
    plain = re.sub('="[^"]*"', "", content)
    for quoted in (shlex.quote(evil), evil):  # as in the command
        assert html.escape(quoted) in plain
        plain = plain.replace(html.escape(quoted), "")
    assert "onerror=alert" not in plain
    assert plain.count("<script>") == plain.count("</title>") == 1


def test_an_unfinished_experiment_says_what_is_missing(tmp_path):
    found = examples.unfinished()
    words = words_of(page(found, tmp_path))
    assert "So far, with 7 of 60 runs: nothing to compare yet" in words
    assert "nothing to compare yet --experiment_minutes 5 are over " in words
    assert "LoHa: 1 run in training" in words and "LoRA: 13 runs not trained yet" in words
    assert "ResLoRA block(4): not compared" in words
    assert "highest" not in words  # further rates are still to be trained
    found["chosen"]["lora"] |= {"at_end": "high", "next": 2e-4}
    assert "highest; next: 0.0002" in words_of(page(found, tmp_path))
    nothing = found | {"arms": [], "chosen": {}, "notes": [], "timesteps": [], "settings": {}, "versions": {}}
    content = page(nothing, tmp_path)
    assert re.findall("<h2>(.*?)</h2>", content) == ["Settings and versions"] and "How to read this" not in content


def test_settings_name_no_place_outside_the_working_directory(experiment, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {"output_dir": str(tmp_path / "runs" / "mine"), "train_data_dir": ["/home/someone/cats", "dogs"]}
    words = words_of(page(experiment | {"settings": paths}, folder))
    assert "output_dir runs/mine train_data_dir cats, dogs" in words and "someone" not in words


def test_a_damaged_image_and_a_missing_one(experiment, tmp_path):
    """If no samples exist at the chosen step, those of the nearest step are shown."""
    examples.experiment(tmp_path)
    lora = tmp_path / "lora" / "lr-0.0002" / "seed-0" / "samples"
    shutil.rmtree(lora / "step-000200")
    (lora / "step-000100" / "0-0.png").write_bytes(b"no image")
    (lora / "step-000100" / "1-0.png").unlink()
    words = words_of(page(experiment, tmp_path))
    assert "seed 0, step 100" in words and "damaged: " in words and "no image" in words


@pytest.mark.parametrize(
    ("conclusions", "words"),
    [
        (("better",), "a is better than LoRA"),
        (("cannot tell",), "a and LoRA could not be told apart"),
        (("better", "worse", "better"), "a and c are better than LoRA"),
        ((), "There is nothing to compare"),
    ],
)
def test_the_headline_without_a_ranking(conclusions, words):
    verdicts = [
        {"label": label, "reference": "lora", "conclusion": conclusion, "sentence": f"{label}: sentence"}
        for label, conclusion in zip("abc", conclusions, strict=False)
    ]
    arms = [{"status": "finished", "label": "lora"}, {"status": "finished", "label": "a"}]
    found = {"verdicts": verdicts, "arms": arms, "chosen": {"lora": {}}}
    assert headline_of(found, "image").startswith(words)
    if verdicts:
        unfinished = {"verdicts": verdicts, "arms": [*arms, {"status": "waiting"}]}
        assert headline_of(unfinished, "image").startswith(f"So far, with 2 of 3 runs: {words}")


def test_the_headline_of_several_methods_is_the_ranking():
    assert report.ranking_in_words(["reslora block(4)"], ["lora"]) == "ResLoRA block(4) is better than LoRA"
    alike = report.ranking_in_words(["lora", "reslora"], ["loha"])
    assert alike == "LoRA and ResLoRA could not be told apart; LoHa is worse"
    assert report.ranking_in_words(["lora"], list("abcde")) == "LoRA is better than 5 methods"


def test_the_headline_of_one_method_is_its_best_rate():
    """Such an experiment asks for nothing else."""
    arms = [{"status": "finished", "label": "lora"}] * 2
    chosen = {"lora": {"learning_rate": 2e-4, "step": 50}}
    found = {"verdicts": [], "arms": arms, "chosen": chosen}
    assert headline_of(found, "image") == "LoRA does best at learning rate 0.0002, step 50"
    assert headline_of(found | {"arms": [*arms, {"status": "waiting", "label": "lora"}]}, "image").endswith("yet")


def test_charts_show_what_is_finite(experiment, folder):
    """A non-finite loss is a gap, one far above all others is at the edge; no NaN is drawn."""
    arms = [dict(arm) for arm in experiment["arms"]]
    arms[0]["select_by_step"] = {"50": None, "100": 1e9, "150": None, "200": None}
    arms[1]["select_by_step"] = {step: math.nan for step in arms[1]["select_by_step"]}
    svg = report.select_charts(experiment | {"arms": arms, "chosen": {}})
    assert "nan" not in svg and "inf" not in svg
    assert not re.search(r"<circle|class=\"ring\"", svg) and svg.count("<figure ") == 1  # nothing is chosen
    assert svg.count('class="hollow"') == 1
    assert not re.search(r"[ML][\d.]+ -", svg)  # within the picture


def test_charts_of_the_select_losses_by_hand(monkeypatch):
    """Two rates, two seeds and two steps: the lower rate has its best mean at the second step, the other at the first.

    The dots are the seeds, and the ring is at the chosen rate.
    """
    drawn = []
    monkeypatch.setattr(report, "chart", lambda series, axes: drawn.append(series) or "")
    losses = {(1e-4, 0): (3.0, 0.5), (1e-4, 1): (2.0, 1.0), (2e-4, 0): (2.0, 1.5), (2e-4, 1): (1.0, 2.5)}
    arms = [
        {"label": "lora", "learning_rate": rate, "seed": seed, "select_by_step": {"50": first, "100": second}}
        | {"status": "finished"}
        for (rate, seed), (first, second) in losses.items()
    ]
    report.select_charts({"arms": arms, "chosen": {"lora": {"learning_rate": 1e-4, "step": 100, "loss": 0.75}}})
    dots = [(1e-4, 0.5), (1e-4, 1.0), (2e-4, 2.0), (2e-4, 1.0)]
    by_rate = Series("LoRA", 0, [(1e-4, 0.75), (2e-4, 1.5)], dots, (1e-4, 0.75))
    dots = [(50, 3.0), (100, 0.5), (50, 2.0), (100, 1.0)]
    assert drawn == [[by_rate], [Series("LoRA", 0, [(50, 2.5), (100, 0.75)], dots, (100, 0.75))]]


def test_a_rate_at_which_a_seed_failed_is_in_no_chart(experiment):
    """It is never chosen, and its first loss may be the lowest of all; without failed arms there is no note."""
    shown = report.select_charts(experiment)
    assert shown.endswith("<p>A line is the mean over seeds, a dot one seed (hollow: above the edge), a ring what was "
                          "chosen. Rates at which a seed failed are left out.</p>")  # fmt: skip
    others = [dict(arm) for arm in experiment["arms"] if arm["status"] == "finished"]
    lower = others[0] | {"learning_rate": 0.01, "select_by_step": {"50": 0.01}}
    for first, second in (("failed", "finished"), ("finished", "failed")):
        arms = [*experiment["arms"], lower | {"status": first}, lower | {"status": second, "seed": 9}]
        assert report.select_charts(experiment | {"arms": arms}) == shown
    assert "left out" not in report.select_charts(experiment | {"arms": others})


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsers.opened(tmp_path_factory.getbasetemp().parent) as browser:
        yield browser


def test_in_a_browser(browser, text, folder):
    """The page requests nothing from outside, has no errors, fits the window, and keys move the slider."""
    shown = browser.new_page(viewport={"width": 420, "height": 900})
    shown.set_default_timeout(LIMIT * 1000)
    wrong, asked = [], []
    shown.on("console", lambda message: wrong.append(message.text))
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.on("dialog", lambda dialog: wrong.append(dialog.message))
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto((folder / "report.html").as_uri())
    assert shown.evaluate("document.documentElement.scrollWidth") <= 420
    slider, pair = shown.locator("#slider"), shown.locator(".pair")
    assert slider.input_value() == "50" and shown.locator(".pair .left").inner_text() == "LoRA"
    assert shown.locator(".pair .right").inner_text() == "ResLoRA block(4)"
    slider.focus()
    for key, value in (("ArrowRight", 51), ("ArrowLeft", 50), ("Home", 0), ("End", 100)):
        slider.press(key)
        assert pair.evaluate("pair => getComputedStyle(pair).getPropertyValue('--at')") == f"{value}%"
        assert slider.get_attribute("aria-valuetext") == f"{value}% LoRA"
    box = pair.bounding_box()
    pair.click(position={"x": box["width"] / 4, "y": 30})
    assert slider.input_value() == "25"
    before = shown.locator(".under").get_attribute("src")
    shown.locator("#right").select_option("LoHa")
    shown.locator("#prompt").select_option(examples.PROMPTS[1])
    assert shown.locator(".under").get_attribute("src") != before
    assert shown.locator(".under").get_attribute("alt") == f"{examples.PROMPTS[1]}: LoHa"
    loaded = "async image => (await image.decode(), image.naturalWidth)"  # not the width of the one before
    assert shown.locator(".under").evaluate(loaded) == 512
    unnamed = "[...document.querySelectorAll('img, svg:not([aria-hidden])')].filter(e => !e.alt && !e.ariaLabel).length"
    assert shown.evaluate(unnamed) == 0
    assert wrong == [] and {url.partition(":")[0] for url in asked} <= {"file", "data"}
    shown.close()


def test_a_button_copies_what_is_next_to_it(browser, text, folder):
    with browser.new_context(permissions=["clipboard-read"], viewport={"width": 420, "height": 900}) as context:
        shown = context.new_page()
        shown.set_default_timeout(LIMIT * 1000)
        shown.goto((folder / "report.html").as_uri())
        shown.get_by_text("What to use").click()
        button = shown.locator("button[data-copy]").first
        button.click()
        assert button.inner_text() == "Copied"
        assert shown.evaluate("navigator.clipboard.readText()") == button.get_attribute("data-copy")


def test_what_to_use_says_how_sure_it_is_and_how_each_file_is_used(experiment, folder):
    best = experiment["best"]
    own = {"settings": {"output_dir": str(folder / "{mine}")}}
    content = page(experiment | own, folder)
    words, place = words_of(content), folder / "{mine}"
    assert "Use ResLoRA block(4) at learning rate 0.0001, 200 steps. It is better than LoRA: chance makes" in words
    line = "kohya.safetensors, pytorch_lora_weights.safetensors and peft/ are those of reslora/lr-0.0001/seed-1"
    assert f"{line} at step 200, which does best on the selection split:" in words
    assert "kohya.safetensors : ComfyUI: put it into models/loras" in words
    assert f"load_lora_weights('{place}')" in words and f'data-copy="{place / "kohya.safetensors"}"' in content
    words = words_of(page(experiment | {"best": best | {"files": ["peft"]}}, folder))
    assert "peft/ is that of reslora" in words and "peft/ : PEFT: PeftModel" in words and "ComfyUI" not in words
    assert "with --train_text_encoder, its text encoders too" in words and "peft/text_encoder*'" in words
    assert "What to use" not in page({name: experiment[name] for name in experiment if name != "best"}, folder)


@pytest.mark.parametrize(
    ("best", "conclusion", "words"),
    [
        (
            ["a", "b", "c", "d"],
            "not shown",
            "It has the lowest loss on the selection split; this experiment does not show",
        ),
        (["a"], "not shown", "This experiment does not show whether it is better than LoRA"),
    ],
)
def test_how_sure_it_is(best, conclusion, words):
    verdicts = [{"label": "a", "reference": "lora", "conclusion": conclusion}] if conclusion else []
    found = {"ranking": {"best": best} if best else None, "verdicts": verdicts}
    said = report.certainty(found, "a", "image")
    assert said.startswith(words) and bool(said) == bool(words)


def test_without_a_winner_the_report_says_whose_the_files_are(experiment, folder):
    found = copy.deepcopy(experiment)
    found["ranking"]["best"] = ["lora", found["best"]["label"]]
    assert "No clear winner: the files are those of ResLoRA block(4) at learning rate" in words_of(page(found, folder))


def test_a_run_that_was_stopped_early_is_shown_at_its_last_loss(experiment, folder):
    """Its rate is not chosen, however low its losses were, and no line of a chart leads to it."""
    found = copy.deepcopy(experiment)
    stopped = [arm for arm in found["arms"] if (arm["label"], arm["learning_rate"]) == ("lora", 4e-4)]
    for arm in stopped:
        arm |= {"status": "stopped", "reason": "stopped early at step 100: why", "steps": 100, "test": None}
        arm["select_by_step"] = {"50": 0.1, "100": 0.31}
    assert choose(found["arms"])["lora"] == choose(experiment["arms"])["lora"]
    words = words_of(page(found, folder))
    assert words.count("stopped early at step 100: why") == len(stopped) == 3
    assert "A dot off the line is a run that was stopped early, at its last loss." in words
    assert headline_of(found, "image") == headline_of(experiment, "image")
    assert "stopped early" not in words_of(page(experiment, folder))


def test_effects_of_two_options_have_a_plot_and_no_other_section_about_them(experiment, folder):
    """Long names are in lines of their own, and the numbers are below them."""
    arms = [
        arm
        | {"label": f"lora lora_dropout={one} optimizer={other}", "values": {"lora_dropout": one, "optimizer": other}}
        for arm in experiment["arms"]
        if arm["label"] == "lora"
        for one in (0, 0.1)
        for other in ("adamw", "prodigy")
    ]
    chosen = {arm["label"]: experiment["chosen"]["lora"] for arm in arms}
    verdicts, ranking = compare(arms, chosen, base=experiment["base"])[:2]
    found = experiment | {"arms": arms, "chosen": chosen, "verdicts": verdicts, "ranking": ranking}
    content = page(found | {"best": None}, folder)
    assert "<h1>none of 3 differences is significant</h1>" in content
    words = words_of(content)
    assert all(verdict["sentence"] in words for verdict in verdicts) and "the sum of both effects" in words
    names = re.findall(r'<text class="name" x="\d+" y="(\d+)">lora_dropout=0.1 with optimizer=prodigy', content)
    values = [int(y) for y in re.findall(r'y="(\d+)" text-anchor="end">', content)]
    assert names and int(names[0]) not in values and "data-name=" in content
