"""app/generate.py on a tiny Stable Diffusion that was really trained for a few steps."""

import functools
import json
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train_sd import SCRIPT, pictures, tiny_pipeline

from app import generate
from app.generate import Cancelled, Picture, Request, Step, Studio
from app.runs import BASE, Library, RunError, Weights

REQUEST = Request(prompt="red disc", steps=3, seed=5, width=64, height=64)
EXPORTS = ("merged weights", "kohya.safetensors", "pytorch_lora_weights.safetensors")


@functools.cache
def trained(folder: Path) -> Path:
    """A run of LoRA and ResLoRA in `folder`, by the trainer itself; returns the folder of runs."""
    flags = [
        "--pretrained_model_name_or_path",
        tiny_pipeline(folder / "model"),
        "--output_dir",
        folder / "runs" / "tiny",
    ]
    flags += ["--train_data_dir", pictures(folder / "pictures"), "--method", "lora", "reslora", "--resolution", 32]
    flags += ["--max_train_steps", 4, "--validation_steps", 2, "--checkpointing_steps", 2, "--train_batch_size", 2]
    flags += ["--rank", 2, "--learning_rate", 0.05, "--validation_prompt", "red disc", "blue box"]
    flags += ["--num_inference_steps", 2, "--report_to", "none", "--merge_calibration_samples", 4]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, SCRIPT, *map(str, flags)], check=True, capture_output=True, env=environment)
    return folder / "runs"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Library(trained(tmp_path_factory.getbasetemp() / "trained")).find("tiny")


@pytest.fixture(scope="module")
def studio():
    return Studio()


def draw(studio, run, *choices, request=REQUEST):
    """Pictures as arrays."""
    events = list(studio.generate(run, list(choices), request))
    return [np.asarray(event.image).astype(int) for event in events if isinstance(event, Picture)]


def one(studio, run, label, request=REQUEST):
    return draw(studio, run, run.find_weights(label), request=request)[0]


def test_every_form_of_the_merged_weights_draws_the_same(studio, run):
    base = one(studio, run, BASE.label)
    for method in ("lora", "reslora"):
        forms = [one(studio, run, f"{method}: {name}") for name in EXPORTS]
        assert np.abs(forms[0] - base).max() > 8
        for other in forms[1:]:
            assert np.abs(other - forms[0]).max() <= 2
    assert studio.loads == 1


def test_base_is_untouched_by_what_was_used_in_between(studio, run):
    before = one(studio, run, BASE.label)
    for weights in run.weights():
        draw(studio, run, weights, request=replace(REQUEST, strength=0.5))
    assert np.array_equal(one(studio, run, BASE.label), before)
    assert studio.loads == 1


def test_an_unmerged_checkpoint_is_drawn_with_its_shortcuts(studio, run):
    lora = one(studio, run, "lora: unmerged, step 4")
    assert np.abs(lora - one(studio, run, "lora: merged weights")).max() <= 2
    steps = [one(studio, run, f"reslora: unmerged, step {step}") for step in (2, 4)]
    assert np.abs(steps[0] - steps[1]).max() > 8
    plain = np.abs(one(studio, run, "reslora: merged weights") - one(studio, run, BASE.label)).mean()
    assert np.abs(steps[1] - one(studio, run, "reslora: merged weights")).mean() < plain


@pytest.mark.parametrize("name", ["merged weights", "pytorch_lora_weights.safetensors", "unmerged, step 4"])
def test_strength_goes_from_the_base_to_the_adapter(studio, run, name):
    none, half, whole = (one(studio, run, f"lora: {name}", replace(REQUEST, strength=s)) for s in (0, 0.5, 1))
    assert np.abs(none - one(studio, run, BASE.label)).max() <= 1
    assert np.abs(half - none).max() > 2 and np.abs(half - whole).max() > 2
    file = one(studio, run, "lora: pytorch_lora_weights.safetensors", replace(REQUEST, strength=0.5))
    assert np.abs(half - file).max() <= 2


def test_a_picture_does_not_depend_on_the_others(studio, run):
    weights = run.find_weights("lora: merged weights")
    many = draw(studio, run, BASE, weights, request=replace(REQUEST, images=2))
    assert np.array_equal(many[1], one(studio, run, weights.label))
    assert np.array_equal(many[2], one(studio, run, BASE.label, replace(REQUEST, seed=6)))


def test_two_people_get_what_they_would_have_got_alone(studio, run):
    labels = ["lora: merged weights", "reslora: unmerged, step 4", BASE.label]
    alone = [one(studio, run, label) for label in labels]
    together = [None] * len(labels)

    def ask(number):
        together[number] = one(studio, run, labels[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(labels))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))


def test_cancel_and_disconnection_stop_within_one_step(studio, run):
    long = replace(REQUEST, steps=150, images=8)
    seen = []
    with pytest.raises(Cancelled):
        for event in studio.generate(run, [BASE], long, session="me"):
            if isinstance(event, Step):
                seen.append(event.done)
                assert studio.cancel("somebody else") is False
                assert studio.cancel("me") is True
    assert len(seen) <= 2
    assert studio.cancel("me") is False

    abandoned = studio.generate(run, [BASE], long, session="me")
    while not isinstance(next(abandoned), Step):
        pass
    abandoned.close()
    with studio.lock:  # it is given back; the next one is served
        pass
    assert len(draw(studio, run, BASE)) == 1


def test_a_failed_load_leaves_the_model_usable(studio, run, tmp_path):
    before = one(studio, run, "lora: merged weights")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((run.folder / "lora" / "pytorch_lora_weights.safetensors").read_bytes()[:-100])
    other = tmp_path / "other.safetensors"
    save_file(
        {
            "unet.elsewhere.to_q.lora_A.weight": torch.zeros(2, 3),
            "unet.elsewhere.to_q.lora_B.weight": torch.zeros(3, 2),
        },
        other,
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    for weights in (
        Weights("broken", "file", "", broken),
        Weights("other", "file", "", other),
        Weights("missing", "file", "", tmp_path / "no.safetensors"),
        Weights("empty", "adapter", "reslora", empty, 4),
    ):
        with pytest.raises(RunError) as refusal:
            draw(studio, run, weights)
        assert str(tmp_path) not in str(refusal.value) and "\n" not in str(refusal.value)
    (tmp_path / "runs" / "bad").mkdir(parents=True)
    (tmp_path / "runs" / "bad" / "config.json").write_text(json.dumps({"pretrained_model_name_or_path": str(empty)}))
    with pytest.raises(RunError, match="could not be loaded"):
        draw(studio, Library(tmp_path / "runs").find("bad"), BASE)
    assert np.array_equal(one(studio, run, "lora: merged weights"), before)
    assert studio.loads == 1


@pytest.mark.parametrize("method", generate.MERGES)
def test_merging_a_checkpoint_by_another_method(studio, run, method):
    report = studio.merge(run, run.find_weights("reslora: unmerged, step 4"), method)
    assert report["method"] == method
    assert report["blocks"] and all(block["error"] is not None for block in report["blocks"])
    folder = run.folder / "reslora" / f"merged-by-{method}-4"
    assert sorted(path.name for path in folder.iterdir()) == [
        "kohya.safetensors", "merge.json", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    if method == "lstsq":  # what the run itself did: the same samples, in the same batches
        ours, theirs = (load_file(f / "pytorch_lora_weights.safetensors") for f in (folder, run.folder / "reslora"))
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
    drawn = one(studio, run, f"reslora: step 4 merged by {method}")
    assert np.abs(drawn - one(studio, run, BASE.label)).max() > 2


def test_only_resloras_checkpoints_are_merged(studio, run):
    for label, method in (
        ("lora: unmerged, step 4", "input"),
        ("reslora: merged weights", "input"),
        (BASE.label, "input"),
    ):
        with pytest.raises(RunError):
            studio.merge(run, run.find_weights(label), method)
    with pytest.raises(RunError):
        studio.merge(run, run.find_weights("reslora: unmerged, step 4"), "../../x")


# -- requests and files ------------------------------------------------------------------------------------------------


def test_requests_are_clamped():
    wild = Request("x\0" + "y" * 5000, None, 2**70, 10**9, float("inf"), 10**9, -5, 99, float("nan")).clamped()
    assert len(wild.prompt) == 1000 and "\0" not in wild.prompt and wild.negative_prompt == ""
    assert wild == replace(wild, seed=2**32 - 1, steps=150, guidance=4.0, width=1024, height=32, images=8, strength=1.0)
    assert Request(width=101, height="72", steps="x", seed=None, images=None).clamped() == Request(width=96, height=72)
    assert Request(seed=-1).clamped().seed != Request(seed=-1).clamped().seed
    assert REQUEST.clamped() == REQUEST


def test_metadata_makes_the_picture_again(studio, run, tmp_path):
    request = replace(REQUEST, prompt="red <b> disc - 猫", negative_prompt="box", strength=0.7, guidance=2.5, images=2)
    drawn = [
        e
        for e in studio.generate(run, [run.find_weights("reslora: merged weights")], request)
        if isinstance(e, Picture)
    ]
    path = generate.save_picture(drawn[1], tmp_path / "picture.png")
    read, source = generate.read_picture(path)
    assert source == {"run": "tiny", "weights": "reslora: merged weights"}
    again = one(studio, run, source["weights"], read)
    assert np.array_equal(again, np.asarray(PIL.Image.open(path)))
    assert "Seed: 6" in PIL.Image.open(path).info["parameters"]


def test_pictures_from_elsewhere_have_no_settings(tmp_path):
    path = tmp_path / "picture.png"
    PIL.Image.new("RGB", (8, 8)).save(path)
    for content in (path.read_bytes(), b"", b"\x89PNG"):
        path.write_bytes(content)
        with pytest.raises(RunError, match="no settings"):
            generate.read_picture(path)


class Bomb:
    """Fails the test if anything unpickles it."""

    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


def test_only_whole_safetensors_with_lora_weights_are_taken(run, tmp_path):
    good = (run.folder / "lora" / "kohya.safetensors").read_bytes()
    path = tmp_path / "upload.safetensors"
    path.write_bytes(good)
    assert generate.uploaded(path).kind == "file"

    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Bomb()))
    save_file({"weight": torch.zeros(2)}, tmp_path / "no-lora")
    size = (2**40).to_bytes(8, "little")
    for content in (
        b"", b"\x01", good[:-1], good + b"x", good[:100], pickle.dumps(Bomb()), (tmp_path / "zip").read_bytes(),
        (tmp_path / "no-lora").read_bytes(), size + b"{}", (2).to_bytes(8, "little") + b"[]",
        (100000).to_bytes(8, "little") + b"[" * 100000,
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(RunError):
            generate.uploaded(path)
    for name in ("upload.bin", "upload.ckpt", "upload.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(RunError, match="safetensors"):
            generate.uploaded(tmp_path / name)


def test_base_of_a_run(run, tmp_path):
    assert generate.base_of(None) == generate.Base()
    assert generate.base_of(run).name.endswith("model")
    (tmp_path / "config.json").write_text('{"pretrained_model_name_or_path": "/elsewhere/assets/pipeline"}')
    assert generate.base_of(Library(tmp_path).find(tmp_path.name)) == generate.Base()
