"""Runs with trained text encoders: every choice of weights generates with the encoders that belong to it."""

import numpy as np
import pytest
import torch
from app_runs import REQUEST, image_of
from pipelines import FAMILIES, image_folder

import train_sd
from app.generation_request import Request
from app.library import Library
from app.runs import BASE, Weights
from app.studio import Studio
from reslora.methods.registry import METHODS

LAYERS = {"num_hidden_layers": 3}


@pytest.fixture(scope="module", params=["stable_diffusion", "sd3"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    names = ["text_encoder"] if request.param == "stable_diffusion" else ["text_encoder", "text_encoder_2"]
    FAMILIES[request.param](folder / "model", **dict.fromkeys(names, LAYERS))
    image_folder(folder / "images")
    flags = ["--pretrained_model_name_or_path", folder / "model", "--train_data_dir", folder / "images"]
    flags += ["--output_dir", folder / "runs" / "run", "--resolution", "32", "--rank", "2", "--train_batch_size", "3"]
    flags += ["--max_train_steps", "3", "--learning_rate", "0.05", "--num_validation_images", "0"]
    flags += ["--num_inference_steps", "1", "--merge_calibration_samples", "3", "--report_to", "none"]
    assert train_sd.main([*map(str, flags), "--method", "lora", "reslora", "--train_text_encoder"]) == 0
    return Library(folder / "runs").find("run")


@pytest.fixture(scope="module")
def studio():
    return Studio()


def drawn(studio: Studio, run, weights: Weights, **changes) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Return the image, and the output of the pipeline's text encoders for a prompt."""
    request = Request(**vars(REQUEST) | changes)
    image = image_of(studio, run, weights, request)
    pipe, states = studio.pipeline, []
    with torch.no_grad():
        for name in studio.parts.keys() - {studio.family.denoiser}:
            tokens = pipe.tokenizer(["red blue"], return_tensors="pt").input_ids
            states.append(getattr(pipe, name)(tokens)[0])
    return image, states


def apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return min((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["lora", "reslora"])
def test_every_form_draws_with_the_encoders_that_belong_to_it(studio, run, method):
    _, base = drawn(studio, run, BASE)
    image, states = drawn(studio, run, run.find_weights(f"{METHODS[method].title}: merged weights"))
    assert apart(states, base) > 1e-2
    files = [weights for weights in run.weights() if weights.method == method and weights.kind == "file"]
    assert len(files) == (2 if (run.folder.parents[1] / "model" / "unet").is_dir() else 1)
    for weights in files:
        seen, found = drawn(studio, run, weights)
        torch.testing.assert_close(found, states, rtol=1e-4, atol=1e-5)
        assert np.abs(seen - image).max() <= 2
    _, unmerged = drawn(studio, run, run.find_weights(f"{METHODS[method].title}: unmerged, step 3"))
    assert apart(unmerged, base) > 1e-2
    if method == "lora":
        torch.testing.assert_close(unmerged, states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn(studio, run, BASE)[1], base, rtol=0, atol=0)
