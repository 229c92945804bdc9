"""app/studio.py and app/weight_files.py on a tiny Stable Diffusion that was trained for a few steps."""

import json
import pickle
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from app_runs import own_runs, pixels, write_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from app import generation_request, weight_files
from app.generation_request import Request
from app.library import Library
from app.runs import BASE, RunError, Weights
from app.studio import Cancelled, Studio
from reslora.methods.registry import METHODS

REQUEST = Request(prompt="red disc", steps=3, seed=5, width=64, height=64)
EXPORTS = ("merged weights", "kohya.safetensors", "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Library(own_runs(tmp_path_factory)).find("tiny")


@pytest.fixture(scope="module")
def studio():
    return Studio()


def draw(studio, run, *choices, request=REQUEST):
    """Generate images, and return them as arrays."""
    return pixels(studio.generate(run, list(choices), request))


def one(studio, run, label, request=REQUEST):
    return draw(studio, run, run.find_weights(label), request=request)[0]


@pytest.mark.exhaustive
def test_every_form_of_the_merged_weights_draws_the_same(studio, run):
    base = one(studio, run, BASE.label)
    for method in ("lora", "reslora"):
        forms = [one(studio, run, f"{METHODS[method].title}: {name}") for name in EXPORTS]
        assert np.abs(forms[0] - base).max() > 8
        for other in forms[1:]:
            assert np.abs(other - forms[0]).max() <= 2
    assert studio.loads == 1


@pytest.mark.exhaustive
def test_an_unmerged_checkpoint_is_drawn_with_its_shortcuts(studio, run):
    lora = one(studio, run, "LoRA: unmerged, step 4")
    assert np.abs(lora - one(studio, run, "LoRA: merged weights")).max() <= 2
    steps = [one(studio, run, f"ResLoRA: unmerged, step {step}") for step in (2, 4)]
    assert np.abs(steps[0] - steps[1]).max() > 8
    plain = np.abs(one(studio, run, "ResLoRA: merged weights") - one(studio, run, BASE.label)).mean()
    assert np.abs(steps[1] - one(studio, run, "ResLoRA: merged weights")).mean() < plain


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["merged weights", "unmerged, step 4"])
def test_strength_goes_from_the_base_to_the_adapter(studio, run, name):
    none, half, whole = (one(studio, run, f"LoRA: {name}", replace(REQUEST, strength=s)) for s in (0, 0.5, 1))
    assert np.abs(none - one(studio, run, BASE.label)).max() <= 1
    assert np.abs(half - none).max() > 2 and np.abs(half - whole).max() > 2
    file = one(studio, run, "LoRA: pytorch_lora_weights.safetensors", replace(REQUEST, strength=0.5))
    assert np.abs(half - file).max() <= 2


def test_cancel_stops_within_one_step(studio, run, monkeypatch):
    """So does a client that goes away, at the next image; both leave the studio to the next request."""
    seen, step = [], studio._step

    def stepped(*given):
        seen.append(given)
        assert len(seen) < 2 or studio.cancel()
        step(*given)

    monkeypatch.setattr(studio, "_step", stepped)
    with pytest.raises(Cancelled):
        list(studio.generate(run, [BASE], replace(REQUEST, steps=150, images=8)))
    assert len(seen) == 2 and not studio.cancel()
    monkeypatch.undo()
    abandoned = studio.generate(run, [BASE], replace(REQUEST, images=2))
    next(abandoned)
    abandoned.close()
    assert not studio.lock.locked() and len(draw(studio, run, BASE)) == 1


def test_a_failed_load_leaves_the_model_usable(studio, run, tmp_path):
    before = one(studio, run, "LoRA: merged weights")
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
    with pytest.raises(RunError, match=r"cannot be loaded: .* empty: no readable model_index\.json"):
        draw(studio, Library(tmp_path / "runs").find("bad"), BASE)
    assert np.array_equal(one(studio, run, "LoRA: merged weights"), before)
    assert studio.loads == 1


def test_a_model_that_could_run_code_is_not_loaded(studio, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps(Bomb()))
    write_run(tmp_path / "runs" / "bad", pretrained_model_name_or_path=str(tmp_path / "model.ckpt"))
    with pytest.raises(RunError, match=r"model\.ckpt: not a \.safetensors file"):
        draw(studio, Library(tmp_path / "runs").find("bad"), BASE)


# -- files from people -------------------------------------------------------------------------------------------------


def write_changed(run, folder, change, name="pytorch_lora_weights.safetensors", metadata=None):
    """Write a LoRA file of the run with changed tensors."""
    path = folder / "changed.safetensors"
    save_file(change(load_file(run.folder / "lora" / name)), path, metadata=metadata)
    return path


def without(key):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key}


def with_value(key, change):
    return lambda tensors: tensors | {key: change(tensors[key]).contiguous()}


DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
A, B = f"unet.{DOWN}.lora_A.weight", f"unet.{DOWN}.lora_B.weight"
KOHYA = "lora_unet_" + DOWN.replace(".", "_")


@pytest.mark.parametrize("name", EXPORTS[1:])
def test_a_lora_of_layers_that_the_model_lacks_is_refused_by_name(studio, run, tmp_path, name):
    """Both factors of one layer have a name that the model lacks: diffusers would leave them out."""

    def rename(tensors):
        return {
            key.replace("attn1.to_q", "attn7.to_q").replace("attn1_to_q", "attn7_to_q"): t for key, t in tensors.items()
        }

    path = write_changed(run, tmp_path, rename, name)
    with pytest.raises(RunError, match=r"changed\.safetensors: .*attn7.to_q is not a layer of stable_diffusion"):
        draw(studio, run, weight_files.uploaded(path))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("method", "file"), [("lora", "adapter.safetensors"), ("reslora", "reslora_model.safetensors")]
)
def test_checkpoints_that_are_not_whole_are_refused_by_name(studio, run, tmp_path, method, file):
    weights = run.find_weights(f"{METHODS[method].title}: unmerged, step 4")
    folder = shutil.copytree(weights.path, tmp_path / "checkpoint-4")
    tensors = load_file(folder / file)
    key = next(name for name in sorted(tensors) if "to_k" in name and "lora_A" in name)
    with safe_open(folder / file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(without(key)(tensors), folder / file, metadata=metadata)
    (folder / "checksums.json").unlink(missing_ok=True)
    with pytest.raises(RunError) as refusal:
        draw(studio, run, replace(weights, path=folder))
    assert str(refusal.value).startswith(f"{weights.label}: ") and "to_k" in str(refusal.value)
    assert "\n" not in str(refusal.value) and str(tmp_path) not in str(refusal.value)


class Bomb:
    """Fails the test if anything unpickles it."""

    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


def test_only_whole_safetensors_with_lora_weights_are_taken(studio, run, tmp_path):
    good = (run.folder / "lora" / "kohya.safetensors").read_bytes()
    path = tmp_path / "upload.safetensors"
    path.write_bytes(good)
    assert weight_files.uploaded(path) == Weights("upload.safetensors", "file", "", path)

    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Bomb()))
    save_file({"weight": torch.zeros(2)}, tmp_path / "no-lora")
    for content in (b"", good[:-1], good[:100], pickle.dumps(Bomb()), (tmp_path / "zip").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"^upload\.safetensors: "):
            weight_files.uploaded(path)
    for name in ("upload.bin", "upload.ckpt", "upload.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(RunError, match="safetensors"):
            weight_files.uploaded(tmp_path / name)
    path.write_bytes((tmp_path / "no-lora").read_bytes())
    with pytest.raises(RunError, match=r"^upload\.safetensors: "):
        draw(studio, run, weight_files.uploaded(path))


def test_an_image_has_its_settings_as_metadata(studio, run, tmp_path):
    request = replace(REQUEST, prompt="red <b> disc - 猫", negative_prompt="box", strength=0.7, guidance=2.5)
    (drawn,) = studio.generate(run, [run.find_weights("ResLoRA: merged weights")], request)
    path = generation_request.save_image(drawn, tmp_path / "image.png")
    assert PIL.Image.open(path).info["parameters"] == (
        "red <b> disc - 猫\nNegative prompt: box\nSteps: 3, CFG scale: 2.5, Seed: 5, Size: 64x64, Run: tiny, "
        "Weights: ResLoRA: merged weights, LoRA strength: 0.7"
    )
