"""Captions and images are encoded as the pipeline itself encodes them, cached or not, with workers or without."""

import json
import signal
import time

import numpy as np
import psutil
import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import image_folder, random_image, stable_diffusion
from safetensors.torch import load_file, save_file

from diffusion.runs import final_weights, losses, main


@pytest.fixture(scope="module")
def pure_latents(tmp_path_factory):
    """A pipeline whose only timestep adds no noise and whose VAE is certain, and what the merge read of four images.

    So the noisy latents of a sample are the latents of its image.
    """
    folder = tmp_path_factory.mktemp("latents")
    scheduler = {"num_train_timesteps": 1, "beta_start": 1e-6, "beta_end": 1e-6, "timestep_spacing": "trailing"}
    model = stable_diffusion(folder / "model", vae={"scaling_factor": 3.7}, scheduler=scheduler)
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["quant_conv.bias"][4:] = -1e3  # the logarithm of the variance; diffusers stops at -30
    save_file(state, weights, metadata={"format": "pt"})
    flags = ["--pretrained_model_name_or_path", model, "--resolution", 32]
    flags += ["--train_data_dir", image_folder(folder / "images", count=4)]
    flags += ["--max_train_steps", 1, "--method", "reslora", "--merge", "weights", "--rank", 4, "--center_crop"]
    flags += ["--num_inference_steps", 1, "--num_validation_images", 1, "--merge_calibration_samples", 16]
    assert main(*flags, "--report_to", "none", "--output_dir", folder / "out") == 0
    return DiffusionPipeline.from_pretrained(model), folder / "out"


def read_by_the_merge(output) -> dict[str, torch.Tensor]:
    return load_file(output / "reslora" / "calibration.safetensors")


def test_latents_are_the_vaes_times_its_scaling_factor(pure_latents):
    pipeline, output = pure_latents
    samples = read_by_the_merge(output)["sample"]
    expected = []
    for number in range(4):
        left = 4 * (number % 3)  # images are 32, 40 or 48 wide: the centre
        pixels = np.asarray(random_image(number))[:, left : left + 32]
        pixels = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            expected.append(3.7 * pipeline.vae.encode(pixels).latent_dist.mean[0])
    seen = set()
    for sample in samples:
        distances = [(sample - latents).abs().max().item() for latents in expected]
        assert min(distances) < 1e-2
        seen.add(int(np.argmin(distances)))
    assert seen == {0, 1, 2, 3}


def test_captions_are_encoded_as_the_pipeline_encodes_a_prompt(pure_latents):
    pipeline, output = pure_latents
    with torch.no_grad():
        expected = [
            pipeline.encode_prompt(caption, "cpu", 1, do_classifier_free_guidance=False)[0][0]
            for caption in ("red disc", "blue box")
        ]
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    seen = set()
    for states in read_by_the_merge(output)["encoder_hidden_states"]:
        distances = [(states - caption).abs().max().item() for caption in expected]
        assert min(distances) < 1e-5
        seen.add(int(np.argmin(distances)))
    assert seen == {0, 1}


def test_an_uncached_run_sees_the_same_captions(base_flags, run, tmp_path):
    """Captions are encoded in the step, to the same states: with square crops in their middle all is the same."""
    flags = [*base_flags, "--no-random_flip", "--center_crop", "--method", "lora"]
    uncached = ["--no-cache_text_embeddings", "--no-cache_latents"]
    for name, more in (("cached", []), ("uncached", uncached)):
        assert main(*flags, *more, "--output_dir", tmp_path / name) == 0
    cached, uncached = (losses(tmp_path / name, "lora") for name in ("cached", "uncached"))
    assert [row[:2] for row in cached] == [row[:2] for row in uncached]
    np.testing.assert_allclose([row[2] for row in cached], [row[2] for row in uncached], rtol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_half_precision_and_uncached_encoders_train(runs, tmp_path, cached):
    """In a process of its own: accelerate keeps the precision it was first started with."""
    uncached = ["--no-cache_latents", "--no-cache_text_embeddings", "--dataloader_num_workers", "1"]
    flags = ["--snr_gamma", "5", "--noise_offset", "0.1", "--gradient_checkpointing", "--mixed_precision", "bf16"]
    assert runs.finish(tmp_path / "out", *flags, *([] if cached else uncached), "--max_train_steps", "2") == 0
    weights = final_weights(tmp_path / "out", step=2)
    weights.pop("reslora.norms")  # a ring that is not yet full
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())


def test_a_killed_loader_process_ends_the_run_in_one_line(runs, tmp_path):
    """As the system kills it where memory is short. The run has 300 steps to notice."""
    log = tmp_path / "out" / "reslora" / "log.jsonl"
    flags = ("--dataloader_num_workers", "1", "--max_train_steps", "300", "--checkpointing_steps", "300")
    process = runs.start(tmp_path / "out", *flags)
    while not (log.is_file() and "train" in log.read_text()) and process.is_alive():
        time.sleep(0.02)
    for worker in psutil.Process(process.pid).children():
        worker.send_signal(signal.SIGKILL)
    process.join()
    assert process.exitcode == 1
    assert "--dataloader_num_workers" in runs.last_line()
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert max(steps) < 300
