"""Qwen-Image-Edit: the reference images in text states, loss and samples, at a smaller size than the real one."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from pipelines import qwen_image_edit, random_image

from images.runs import main
from images.test_edit_models import packed, pair_folders, stirred, training_data_of, without_pairs
from reslora.images.data.batch import collate
from reslora.images.data.samples import TrainingSamples
from reslora.images.denoising import DenoisingLoss
from reslora.seeds import derive

VAE = {"latents_std": [14.0, 7.0, 11.0, 9.0]}  # large latents, on which images depend
calculate_dimensions = pipeline_qwenimage_edit.calculate_dimensions


@pytest.fixture(autouse=True)
def small_references(monkeypatch):
    """Use references of 64 x 64 pixels instead of a million, in the stock pipeline too."""
    shrink(monkeypatch)


def shrink(patch: pytest.MonkeyPatch) -> None:
    small = lambda area, ratio: calculate_dimensions(area // 256, ratio)  # noqa: E731
    patch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", small)
    two = lambda area, ratio: small(area, ratio)[:2]  # noqa: E731
    patch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", two)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> SimpleNamespace:
    return place_of(tmp_path_factory.mktemp("qwen"), QwenImageEditPipeline)


@pytest.fixture(scope="module")
def plus(tmp_path_factory) -> SimpleNamespace:
    """Qwen-Image-Edit-2511, whose blocks know which tokens are without noise, and two references per image."""
    found = place_of(tmp_path_factory.mktemp("plus"), QwenImageEditPlusPipeline, 1.0, second=random_image)
    config = found.model / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"zero_cond_t": True}))
    return found


def place_of(folder: Path, kind: type, scale: float = 0.5, **pairs) -> SimpleNamespace:
    model, pairs = stirred(qwen_image_edit(folder / "qwen", vae=VAE, kind=kind), scale), pair_folders(folder, **pairs)
    flags = ["--pretrained_model_name_or_path", str(model), *pairs, "--resolution", "32", "--rank", "2"]
    flags += ["--train_batch_size", "2", "--learning_rate", "0.1", "--report_to", "none"]
    flags += ["--num_inference_steps", "2", "--num_validation_images", "1", "--merge_calibration_samples", "2"]
    return SimpleNamespace(folder=folder, model=model, pairs=pairs, flags=flags, kind=kind)


@pytest.mark.exhaustive
@pytest.mark.parametrize("named", ["place", "plus"])
@torch.no_grad()
def test_loss_by_hand(named, request, tmp_path):
    """Text states of caption and references are the pipeline's; the references' tokens follow, not predicted."""
    place = request.getfixturevalue(named)
    flags = [*place.flags, "--no-cache_latents", "--use_aspect_ratio_buckets", "--output_dir", str(tmp_path / "out")]
    one = training_data_of(flags)
    stock = place.kind.from_pretrained(place.model, torch_dtype=torch.float32)
    draws_of = one.data.plan(1).forward(0)
    batch = collate([TrainingSamples(one.data)[draw] for draw in draws_of])
    images, states = one.data.sources[0].images, []
    for draw in draws_of:
        area, read = 1024**2 if named == "place" else 384**2, []
        for reference in images.open_references(draw.image):
            width, height, _ = pipeline_qwenimage_edit.calculate_dimensions(area, reference.width / reference.height)
            read.append(stock.image_processor.resize(reference, height, width))
        states.append(stock.encode_prompt(images.captions[draw.image], read, device="cpu")[0][0])
    assert all(len(state) > 16 for state in states)  # tokens of the image, beside those of the caption
    stock.to(torch.float64)
    denoiser, vae, draws = stock.transformer, stock.vae, torch.Generator().manual_seed(5)
    for parameter in denoiser.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=draws)
    loss = DenoisingLoss(one.context, one.objective, one.pipeline, denoiser.config)
    loss.dtype = torch.float64
    one.pipeline.vae.double()
    batch.text = {"states": [state.double() for state in batch.text["states"]]}
    found = loss(denoiser, batch)
    pictures = [batch.pixels, *batch.reference_pixels.unbind(1)]
    image, *others = (vae.encode(pixels.double()[:, :, None]).latent_dist for pixels in pictures)
    moments = torch.stack([image.mean, image.std], 1)[:, :, :, 0]
    assert len(others) == (1 if named == "place" else 2)

    mean, std = moments.double().unbind(1)
    centre, spread = (
        torch.tensor(v).double().view(1, -1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    x = (mean + std * batch.posterior_noise - centre) / spread
    r = [(other.mean[:, :, 0] - centre) / spread for other in others]
    e, s = batch.noise.double(), (batch.timesteps / 1000).double().view(-1, 1, 1, 1)
    shapes = [(1, side.shape[2] // 2, side.shape[3] // 2) for side in (x, *r)]
    tokens, own = torch.cat([packed((1 - s) * x + s * e), *map(packed, r)], 1), shapes[0][1] * shapes[0][2]
    expected = []
    for number, state in enumerate(states):
        one_by_one = {"encoder_hidden_states": state[None].double(), "img_shapes": [shapes]}
        output = denoiser(tokens[number][None], timestep=s[number].flatten(), **one_by_one).sample[:, :own]
        expected.append((output - packed(e - x)[number]).square().mean())
    assert shapes[0] not in shapes[1:]
    torch.testing.assert_close(found, torch.stack(expected).float(), rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def trained(place) -> Path:
    """Four steps of ResLoRA with two prompts of different lengths, with given references."""
    out, before = place.folder / "out", place.folder / "before"
    flags = [*place.flags, "--output_dir", out, "--method", "reslora", "--shortcut", "middle", "--max_train_steps", "4"]
    flags += ["--checkpointing_steps", "2", "--validation_prompt", "blue box", "red", "--validation_steps", "2"]
    flags += ["--validation_image", before / "3.png", before / "0.png", "--guidance_scale", "2"]
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        assert main(*flags, "--validation_split", "0.4") == 0
    return out


def drawn(
    place: SimpleNamespace, weights: Path | None, reference: PIL.Image.Image | list[PIL.Image.Image]
) -> np.ndarray:
    pipe = place.kind.from_pretrained(place.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if weights:
        pipe.load_lora_weights(weights.parent, weight_name=weights.name)
    seed = torch.Generator().manual_seed(derive(0, "sample", 0, 0))
    more = {"height": 32, "width": 32, "true_cfg_scale": 2.0, "negative_prompt": ""}
    return pipe(reference, "blue box", generator=seed, num_inference_steps=2, output_type="np", **more).images[0]


@pytest.mark.exhaustive
def test_samples_are_those_of_the_stock_pipeline_with_the_exported_lora(place, trained):
    """The stock pipeline encodes prompt, negative prompt and reference itself."""
    files = json.loads((trained / "reslora" / "exports.json").read_text())["read_back"]
    names = {"pytorch_lora_weights.safetensors", "kohya.safetensors", "peft", "transformer"}
    assert names <= files.keys() and max(files.values()) < 1e-6
    sample = np.asarray(PIL.Image.open(trained / "reslora" / "merged" / "0-0.png")) / 255
    reference = random_image(303)
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        assert np.abs(drawn(place, trained / "reslora" / name, reference) - sample).max() <= 1 / 255
    assert np.abs(drawn(place, None, reference) - sample).max() > 3 / 255
    other = drawn(place, trained / "reslora" / "kohya.safetensors", PIL.Image.new("RGB", (32, 32), "red"))
    assert np.abs(other - sample).max() > 3 / 255


@pytest.mark.exhaustive
def test_samples_of_several_references_are_those_of_the_stock_pipeline(plus):
    """The stock pipeline encodes prompt, negative prompt and both references itself."""
    out, before = plus.folder / "out", [plus.folder / name / "3.png" for name in ("before", "second")]
    flags = [*plus.flags, "--output_dir", out, "--method", "lora", "--max_train_steps", "2", "--guidance_scale", "2"]
    assert main(*flags, "--validation_prompt", "blue box", "--validation_image", *before) == 0
    files = json.loads((out / "lora" / "exports.json").read_text())["read_back"]
    assert "kohya.safetensors" in files and max(files.values()) < 1e-6
    sample = np.asarray(PIL.Image.open(out / "lora" / "merged" / "0-0.png")) / 255
    references, weights = [PIL.Image.open(path) for path in before], out / "lora" / "pytorch_lora_weights.safetensors"
    assert np.abs(drawn(plus, weights, references) - sample).max() <= 1 / 255
    other = [references[0], PIL.Image.new("RGB", (32, 32), "red")]
    assert np.abs(drawn(plus, weights, other) - sample).max() > 3 / 255


@pytest.mark.exhaustive
def test_text_states_belong_to_caption_and_reference(place, tmp_path):
    """An edited reference has other text states; the empty caption of caption dropout is read with each reference."""
    pairs = pair_folders(tmp_path)
    flags = [*without_pairs(place.flags), *pairs, "--output_dir", str(tmp_path / "out"), "--caption_dropout", "0.5"]
    flags += ["--cache_dir", str(tmp_path / "cache")]
    before = training_data_of(flags).data
    PIL.Image.new("RGB", (32, 32), "red").save(tmp_path / "before" / "0.png")
    after = training_data_of(flags).data
    marks = [data.sources[0].images.marks for data in (before, after)]
    for caption in ("red disc", ""):
        one, other = (data.texts[caption, mark[0]]["states"] for data, mark in zip((before, after), marks, strict=True))
        assert one.shape != other.shape or not one.equal(other)
    assert marks[0][1:] == marks[1][1:]
