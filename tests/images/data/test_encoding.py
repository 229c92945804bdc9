"""Captions and images are encoded as the pipeline itself encodes them, with and without cache and workers."""

import dataclasses
import math
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiffusionPipeline
from pipelines import image_folder, random_image, stable_diffusion
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel
from waiting import ended, wait_until

from images.runs import cut, final_weights, load_images, losses, main, only, printed
from reslora.errors import InvalidArgument
from reslora.images.context import ImageContext
from reslora.images.data import encoding
from reslora.images.data.dataset import ImageDataset
from reslora.images.data.size import Size
from reslora.images.data.training_data import source_of
from reslora.images.generators import derive
from reslora.images.settings import parse_args
from reslora.runtime.signals import StopRequest


def trained_without_noise(folder: Path, images: int, log_variance: float) -> tuple[DiffusionPipeline, Path]:
    """A pipeline whose only timestep adds hardly any noise, and a run that it trained: noisy latents equal latents.

    The VAE gives every latent the same variance.
    """
    scheduler = {"num_train_timesteps": 1, "beta_start": 1e-6, "beta_end": 1e-6, "timestep_spacing": "trailing"}
    model = stable_diffusion(folder / "model", vae={"scaling_factor": 3.7}, scheduler=scheduler)
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["quant_conv.weight"][4:] = 0.0
    state["quant_conv.bias"][4:] = log_variance
    save_file(state, weights, metadata={"format": "pt"})
    flags = ["--pretrained_model_name_or_path", model, "--resolution", 32, "--output_dir", folder / "out"]
    flags += ["--train_data_dir", image_folder(folder / "images", count=images), "--center_crop", "--rank", 4]
    flags += ["--max_train_steps", 1, "--method", "reslora", "--merge", "weights", "--report_to", "none"]
    flags += ["--num_inference_steps", 1, "--num_validation_images", 1, "--merge_calibration_samples", 16]
    assert main(*flags) == 0
    return DiffusionPipeline.from_pretrained(model), folder / "out"


def latents_of(pipeline: DiffusionPipeline, number: int) -> torch.Tensor:
    """Return the mean latents of an image's center crop: images are 32 high and 32, 40 or 48 wide."""
    left = 4 * (number % 3)
    pixels = np.asarray(random_image(number))[:, left : left + 32]
    pixels = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        return pipeline.vae.encode(pixels).latent_dist.mean[0]


def read_by_the_merge(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "reslora" / "calibration.safetensors")


@pytest.fixture(scope="module")
def pure_latents(tmp_path_factory):
    return trained_without_noise(tmp_path_factory.mktemp("latents"), images=4, log_variance=-30.0)


@pytest.mark.exhaustive
def test_latents_are_the_vaes_times_its_scaling_factor(pure_latents):
    pipeline, output = pure_latents
    expected = [3.7 * latents_of(pipeline, number) for number in range(4)]
    seen = set()
    for sample in read_by_the_merge(output)["sample"]:
        distances = [(sample - latents).abs().max().item() for latents in expected]
        assert min(distances) < 1e-2
        seen.add(int(np.argmin(distances)))
    assert seen == {0, 1, 2, 3}


@pytest.mark.exhaustive
def test_latents_are_drawn_from_the_vaes_distribution(tmp_path):
    """With their mean and the VAE's standard deviation, here 0.5, times the scaling factor."""
    pipeline, output = trained_without_noise(tmp_path, images=1, log_variance=2 * math.log(0.5))
    samples = read_by_the_merge(output)["sample"]
    drawn = (samples / 3.7 - latents_of(pipeline, 0)).flatten()
    assert len(drawn) == 16 * 4 * 8 * 8
    assert drawn.std().item() == pytest.approx(0.5, rel=0.05) and drawn.mean().abs() < 0.05
    assert len(drawn.unique()) > len(drawn) * 0.99


@pytest.mark.exhaustive
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


# -- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_a_second_run_encodes_nothing(brief_flags, tmp_path, monkeypatch):
    """The content of --cache_dir is enough: neither images nor captions are encoded again."""
    flags = [*brief_flags, "--cache_dir", tmp_path / "cache"]
    assert main(*flags, "--output_dir", tmp_path / "one") == 0
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "encode", lambda *_, **__: 1 / 0)
        patch.setattr(CLIPTextModel, "forward", lambda *_, **__: 1 / 0)
        assert main(*flags, "--output_dir", tmp_path / "two") == 0
        with pytest.raises(ZeroDivisionError):  # other crops are other latents
            main(*flags, "--seed", 1, "--random_flip", "--output_dir", tmp_path / "three")
    assert losses(tmp_path / "one", "lora") == losses(tmp_path / "two", "lora")


@pytest.mark.exhaustive
def test_damaged_latents_and_captions_are_encoded_again(brief_flags, tmp_path):
    """Their bytes are zero, or a single bit is another one; the headers are intact."""
    flags = [*brief_flags, "--cache_dir", tmp_path / "cache"]
    assert main(*flags, "--output_dir", tmp_path / "one") == 0
    files = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")}
    for path, content in files.items():
        header = 8 + int.from_bytes(content[:8], "little")
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes(content[:header] + bytes(len(content) - header) if "latents" in path.name else flipped)
    lines = printed(*flags, "--output_dir", tmp_path / "two")
    for kind in ("latents-", "captions-"):
        only(lines, "warning: ", kind, "damaged", "encoding the content again")
    assert {path: path.read_bytes() for path in files} == files
    assert losses(tmp_path / "one", "lora") == losses(tmp_path / "two", "lora")


@pytest.mark.exhaustive
def test_what_another_encoder_made_is_not_used(brief_flags, model, tmp_path, monkeypatch):
    """One tensor in the middle of the encoder's file differs."""
    part = "text_encoder/model"
    there = shutil.copytree(model, tmp_path / "model")
    flags = [*brief_flags, "--cache_dir", tmp_path / "cache", "--pretrained_model_name_or_path", there]
    assert main(*flags, "--output_dir", tmp_path / "one") == 0
    weights = there / f"{part}.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[len(tensors) // 2]
    save_file(tensors | {name: tensors[name] + 1}, weights, metadata={"format": "pt"})
    monkeypatch.setattr(CLIPTextModel, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(*flags, "--output_dir", tmp_path / "two")


@pytest.mark.exhaustive
def test_what_an_interrupted_run_has_encoded_is_kept(brief_flags, tmp_path, monkeypatch):
    """A stop is requested while the third of six images is encoded; the next run encodes only the rest."""
    flags, calls, encode = [*brief_flags, "--output_dir", tmp_path / "out"], [], AutoencoderKL.encode

    def counted(vae, *args, **more):
        calls.append(1)
        return encode(vae, *args, **more)

    def stopped(vae, *args, **more):
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return counted(vae, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "encode", stopped)
        assert main(*flags) == 128 + signal.SIGTERM
    calls.clear()
    monkeypatch.setattr(AutoencoderKL, "encode", counted)
    assert main(*flags) == 0
    assert len(calls) == 3


# -- in other ways ---------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_an_uncached_run_sees_the_same_captions(brief_flags, tmp_path):
    """Captions are encoded in each step, to the same states; with center crops, everything is the same."""
    flags = [*brief_flags, "--center_crop", "--max_train_steps", 2, "--validation_split", "0.3"]
    flags += ["--validation_steps", 1]
    uncached = ["--no-cache_text_embeddings", "--no-cache_latents"]
    for name, more in (("cached", []), ("uncached", uncached)):
        assert main(*flags, *more, "--output_dir", tmp_path / name) == 0
    cached, uncached = (losses(tmp_path / name, "lora") for name in ("cached", "uncached"))
    assert [row[:2] for row in cached] == [row[:2] for row in uncached]
    np.testing.assert_allclose([row[2] for row in cached], [row[2] for row in uncached], rtol=1e-4)


@pytest.mark.exhaustive
def test_half_precision_and_uncached_encoders_train(runs, tmp_path):
    """In its own process: accelerate keeps its first precision."""
    uncached = ["--no-cache_latents", "--no-cache_text_embeddings", "--dataloader_num_workers", "1"]
    flags = ["--snr_gamma", "5", "--noise_offset", "0.1", "--gradient_checkpointing", "--mixed_precision", "bf16"]
    assert runs.finish(tmp_path / "out", *flags, *uncached, "--max_train_steps", "2") == 0
    weights = final_weights(tmp_path / "out", step=2)
    weights.pop("reslora.norms")  # a ring that is not yet full
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())


@pytest.mark.exhaustive
def test_a_killed_loader_process_ends_the_run_in_one_line(runs, tmp_path):
    """As the system kills it if memory is short."""
    log = tmp_path / "out" / "reslora" / "log.jsonl"
    flags = ("--dataloader_num_workers", "1", "--max_train_steps", "100000", "--checkpointing_steps", "100000")
    process = runs.start(tmp_path / "out", *flags)
    wait_until(lambda: log.is_file() and "train" in log.read_text(), "a step", process)
    for worker in psutil.Process(process.pid).children():
        worker.send_signal(signal.SIGKILL)
    assert ended(process) == 1
    assert "--dataloader_num_workers" in runs.last_line()


# -- what an encoded image or caption is found by ----------------------------------------------------------------------


class Counting:
    """An encoder that distinguishes images and captions, and counts its calls."""

    encodes_in_float32 = False

    def __init__(self) -> None:
        self.images, self.captions = [], []

    def encode_images(self, vae: object, pixels: torch.Tensor) -> torch.Tensor:
        self.images.append(len(pixels))
        return torch.stack([pixels, -pixels], dim=1)

    def encode_captions(self, pipeline: object, captions: list[str], longest: int | None) -> dict[str, torch.Tensor]:
        self.captions += captions
        return {"states": torch.tensor([derive(text) for text in captions])}


FLAGS = ["--pretrained_model_name_or_path", "someone/model", "--resolution", "16", "--method", "lora"]
VAE = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def setting(tmp_path) -> ImageContext:
    """Five images, two of them square, and no encoders."""
    folder = image_folder(tmp_path / "images", 5, lambda number: f"box {number}", layout="txt")
    flags = [*FLAGS, "--train_data_dir", str(folder), "--output_dir", str(tmp_path / "out"), "--no-random_flip"]
    return ImageContext(parse_args(flags), SimpleNamespace(family=Counting()), Accelerator(cpu=True), StopRequest())


def images_encoded(setting: ImageContext, key: object = "vae", size: Size | None = None, **flags) -> list[int]:
    """Return how many variants of each image had to be encoded; all are checked."""
    setting = dataclasses.replace(setting, options=setting.options.replace(**flags))
    family, images = (
        setting.model.family,
        load_images(setting.options),
    )
    (side,) = setting.options.data.resolution
    options = setting.options
    variants = encoding.Variants(
        images, [size or Size(side, side)] * len(images), options.data, options.training, family
    )
    family.images.clear()
    latents, problems = encoding.encode_images(variants, key, VAE, setting)
    made = {index: variants[index] for index in set(range(len(images))) - problems.keys()}
    assert latents.variants == max(len(views["pixels"]) for views in made.values())
    for index, views in made.items():
        pixels, sizes = views["pixels"], views["sizes"]
        for variant in range(latents.variants):
            found = latents.of(index, variant)
            assert torch.equal(found["moments"][0], pixels[variant % len(pixels)])
            assert torch.equal(found["sizes"], sizes[variant % len(pixels)])
    return family.images


def captions_encoded(setting: ImageContext, captions: list[str], key: object = "encoders", **flags) -> list[str]:
    """Return the captions that had to be encoded; all are checked."""
    setting = dataclasses.replace(setting, options=setting.options.replace(**flags))
    family = setting.model.family
    family.captions.clear()
    texts = encoding.encode_texts(captions, key, lambda: None, setting)
    assert all(texts[caption]["states"] == derive(caption) for caption in captions)
    return family.captions


def add_image(folder: Path, number: int) -> None:
    random_image(number).save(folder / f"{number}.png")
    (folder / f"{number}.txt").write_text("one more")


def test_one_more_image_is_encoded_alone(setting):
    """The crops of the other images do not change, even if the new image precedes them."""
    folder = Path(*setting.options.data.train_data_dir)
    assert images_encoded(setting) == [1, 4, 4, 1, 4]
    assert images_encoded(setting) == []
    add_image(folder, 5)
    assert images_encoded(setting) == [4]
    (folder / "0.png").rename(folder / "9.png")
    (folder / "0.txt").rename(folder / "9.txt")
    assert images_encoded(setting) == []
    shutil.copy(folder / "1.png", folder / "8.png")
    (folder / "8.txt").write_text("the same image again")
    assert images_encoded(setting) == []
    random_image(77).save(folder / "1.png")
    assert images_encoded(setting) == [4]
    (folder / "2.png").unlink()
    assert images_encoded(setting) == []


def test_images_are_encoded_anew_when_their_pixels_or_the_autoencoder_are_others(setting):
    images_encoded(setting)
    changes = [{"resolution": 8}, {"image_interpolation_mode": "nearest"}, {"random_flip": True}, {"key": "other"}]
    for change in [*changes, {"size": Size(8, 24)}]:
        assert len(images_encoded(setting, **change)) == 5
        assert images_encoded(setting, **change) == []
    assert images_encoded(setting, seed=1) == [4, 4, 4]  # square ones have no crops to be drawn
    assert images_encoded(setting, center_crop=True) == [1, 1, 1]
    assert images_encoded(setting, center_crop=True, seed=1) == images_encoded(setting) == []


def test_where_no_latents_are_kept_damaged_images_are_found_once_before_training(setting, monkeypatch):
    """Otherwise they would end the run when they are sampled, and again after each resume."""
    folder = Path(*setting.options.data.train_data_dir)
    random_image(1).convert("RGBA").save(folder / "1.png")
    cut(folder / "1.png")

    def found(**flags) -> ImageDataset:
        flags = setting.options.replace(cache_latents=False, masked_loss=False, **flags)
        images = load_images(flags)
        context = dataclasses.replace(setting, options=flags)
        return source_of(images, [Size(16, 16)] * len(images), None, context).images

    left = found()
    (line,) = left.left_out
    assert len(left) == 4 and line.startswith(f"{folder}/1.png: damaged (")
    add_image(folder, 5)
    opened, open_image = [], ImageDataset.open
    monkeypatch.setattr(ImageDataset, "open", lambda self, index: opened.append(index) or open_image(self, index))
    assert len(found()) == 5 and opened == [5]
    with pytest.raises(InvalidArgument, match=r"--strict .*/1\.png: damaged"):
        found(strict=True)


def test_a_caption_that_was_edited_is_encoded_alone(setting):
    captions = ["red", "blue", "red", "green"]
    assert captions_encoded(setting, captions) == ["red", "blue", "green"]
    assert captions_encoded(setting, ["green", "red", "blue"]) == captions_encoded(setting, ["blue"]) == []
    assert captions_encoded(setting, ["red", "dark blue", "green"]) == ["dark blue"]
    assert captions_encoded(setting, captions) == []


def test_captions_are_encoded_anew_by_another_encoder_or_up_to_another_length(setting):
    captions = ["red", "blue"]
    for change in ({}, {"key": "other"}, {"max_sequence_length": 78}, {"max_sequence_length": None}):
        if change != {"max_sequence_length": setting.options.training.max_sequence_length}:
            assert captions_encoded(setting, captions, **change) == captions
        assert captions_encoded(setting, captions, **change) == []
