"""Captions and images are encoded as the pipeline itself encodes them, cached or not, with workers or without."""

import json
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

from diffusion.runs import cut, final_weights, losses, main, only, printed, refused
from reslora.diffusion.arguments import Flags
from reslora.diffusion.context import Context
from reslora.diffusion.data import encoding
from reslora.diffusion.data.size import Size


def trained_without_noise(folder: Path, images: int, log_variance: float) -> tuple[DiffusionPipeline, Path]:
    """A pipeline whose only timestep adds hardly any noise, and a run that it trained: noisy latents are latents.

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
    """The mean of the latents of an image's centre: images are 32 high and 32, 40 or 48 wide."""
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


def test_latents_are_the_vaes_times_its_scaling_factor(pure_latents):
    pipeline, output = pure_latents
    expected = [3.7 * latents_of(pipeline, number) for number in range(4)]
    seen = set()
    for sample in read_by_the_merge(output)["sample"]:
        distances = [(sample - latents).abs().max().item() for latents in expected]
        assert min(distances) < 1e-2
        seen.add(int(np.argmin(distances)))
    assert seen == {0, 1, 2, 3}


def test_latents_are_drawn_from_the_vaes_distribution(tmp_path):
    """Their mean and the standard deviation that the VAE gives them, here 0.5, times the scaling factor."""
    pipeline, output = trained_without_noise(tmp_path, images=1, log_variance=2 * math.log(0.5))
    samples = read_by_the_merge(output)["sample"]
    drawn = (samples / 3.7 - latents_of(pipeline, 0)).flatten()
    assert len(drawn) == 16 * 4 * 8 * 8
    assert drawn.std().item() == pytest.approx(0.5, rel=0.05) and drawn.mean().abs() < 0.05
    assert len(drawn.unique()) > len(drawn) * 0.99


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


def test_a_second_run_encodes_nothing(brief_flags, tmp_path, monkeypatch):
    """What is in --cache_dir is enough: neither the images nor the captions are encoded again."""
    flags = [*brief_flags, "--cache_dir", tmp_path / "cache"]
    assert main(*flags, "--output_dir", tmp_path / "one") == 0
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "encode", lambda *_, **__: 1 / 0)
        patch.setattr(CLIPTextModel, "forward", lambda *_, **__: 1 / 0)
        assert main(*flags, "--output_dir", tmp_path / "two") == 0
        with pytest.raises(ZeroDivisionError):  # other crops are other latents
            main(*flags, "--seed", 1, "--random_flip", "--output_dir", tmp_path / "three")
    assert losses(tmp_path / "one", "lora") == losses(tmp_path / "two", "lora")


@pytest.mark.parametrize(
    ("part", "encoder"), [("text_encoder/model", CLIPTextModel), ("vae/diffusion_pytorch_model", AutoencoderKL)]
)
def test_what_another_encoder_made_is_not_used(brief_flags, model, tmp_path, monkeypatch, part, encoder):
    """One tensor in the middle of its file is another."""
    there = shutil.copytree(model, tmp_path / "model")
    flags = [*brief_flags, "--cache_dir", tmp_path / "cache", "--pretrained_model_name_or_path", there]
    assert main(*flags, "--output_dir", tmp_path / "one") == 0
    weights = there / f"{part}.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[len(tensors) // 2]
    save_file(tensors | {name: tensors[name] + 1}, weights, metadata={"format": "pt"})
    monkeypatch.setattr(encoder, "encode" if encoder is AutoencoderKL else "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(*flags, "--output_dir", tmp_path / "two")


def test_images_that_are_all_encoded_anew_are_announced(brief_flags, tmp_path):
    """One more image is enough, or another setting; other data is not."""
    folder, other = image_folder(tmp_path / "p", 3, layout="txt"), image_folder(tmp_path / "q", 4)
    flags = [*brief_flags, "--cache_dir", tmp_path / "cache"]
    announced, number = [], 0

    def train(*more) -> None:
        nonlocal number
        number += 1
        lines = printed(*flags, "--output_dir", tmp_path / f"out-{number}", *more)
        announced.append([line for line in lines if "encoded anew" in line])

    train("--train_data_dir", folder)
    train("--train_data_dir", other)
    train("--train_data_dir", folder)
    assert announced == [[], [], []]
    random_image(9).save(folder / "3.png")
    (folder / "3.txt").write_text("red disc")
    train("--train_data_dir", folder)
    train("--train_data_dir", folder, "--random_flip")
    train("--train_data_dir", folder)
    assert [line for lines in announced for line in lines] == 2 * [
        "the images or settings changed: all 4 images are encoded anew"
    ]


def test_what_an_interrupted_run_has_encoded_is_kept(brief_flags, tmp_path, monkeypatch):
    """Encoding is stopped in the second of three parts: the next run encodes what is missing, no more."""
    monkeypatch.setattr(encoding, "PART_OF_IMAGES", 2)
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
    assert len(calls) == 4


def test_an_image_that_breaks_off_is_left_out_and_the_cache_knows(brief_flags, capsys, tmp_path):
    """Its header is whole, so that only decoding it tells."""
    folder = image_folder(tmp_path / "images", 3)
    cut(folder / "1.png")
    flags = [*brief_flags, "--train_data_dir", folder, "--cache_dir", tmp_path / "cache"]
    for name in ("one", "two"):
        lines = printed(*flags, "--output_dir", tmp_path / name)
        assert "damaged" in only(lines, "left out", "1.png")
        only(lines, "left out 1 images, kept 2")
    assert losses(tmp_path / "one", "lora") == losses(tmp_path / "two", "lora")
    assert "1.png" in refused(capsys, *flags, "--strict", "--output_dir", tmp_path / "three", quiet=False)


# -- in other ways ---------------------------------------------------------------------------------------------------


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
    wait_until(lambda: log.is_file() and "train" in log.read_text(), "a step", process)
    for worker in psutil.Process(process.pid).children():
        worker.send_signal(signal.SIGKILL)
    assert ended(process) == 1
    assert "--dataloader_num_workers" in runs.last_line()
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert max(steps) < 300


# -- what files are named by -------------------------------------------------------------------------------------------


def names_of_captions(monkeypatch, captions: list[str], key: object, longest: int | None) -> list[str]:
    """Names of the files that these captions are kept in."""
    found: list[Path] = []
    monkeypatch.setattr(encoding, "cached", lambda paths, *rest: found.extend(paths))
    flags = Flags(max_sequence_length=longest, cache_dir="cache", output_dir="out")
    context = Context(flags, SimpleNamespace(family=None), None, None)
    encoding.encode_texts(captions, key, None, context)
    return [path.name for path in found]


def test_captions_are_kept_by_model_length_and_text(monkeypatch):
    captions, key = ["red", "blue", "red"], ("sd", "abc", "float32")
    (name,) = names_of_captions(monkeypatch, captions, key, 77)
    assert names_of_captions(monkeypatch, captions, key, 77) == [name]
    assert names_of_captions(monkeypatch, ["red", "blue"], key, 77) == [name]  # each once
    others = [(captions, ("sd", "abd", "float32"), 77), (captions, ("sd", "abc", "bfloat16"), 77)]
    others += [(captions, key, 78), (captions, key, None), (["red", "blue", ""], key, 77), (["blue", "red"], key, 77)]
    assert len({name, *(names_of_captions(monkeypatch, *other)[0] for other in others)}) == 7


def test_every_part_of_the_captions_has_a_file_of_its_own(monkeypatch):
    monkeypatch.setattr(encoding, "PART_OF_CAPTIONS", 2)
    one, two = names_of_captions(monkeypatch, ["a", "b", "c"], "key", 77)
    other, same = names_of_captions(monkeypatch, ["x", "b", "c"], "key", 77)
    assert one != two and other not in (one, two) and same not in (one, other)


class Pictures:
    """Stands for the images of a dataset."""

    def __init__(self, content: str = "content", square: bool = False) -> None:
        self.content, self.square = content, square

    def __len__(self) -> int:
        return 3


IMAGE_FLAGS = Flags(
    resolution=64, image_interpolation_mode="lanczos", center_crop=False, random_flip=False, seed=0,
    dataloader_num_workers=0, train_data_dir="images", dataset_name=None, dataset_config_name=None,
)  # fmt: skip


def names_of_latents(monkeypatch, folder: Path, key: object = "key", pictures: Pictures | None = None, **flags):
    """Names of the files that these images' latents are kept in."""
    found: list[Path] = []
    nothing = SimpleNamespace(problems=dict)
    monkeypatch.setattr(encoding, "cached", lambda paths, *rest: found.extend(paths) or nothing)
    flags = IMAGE_FLAGS.replace(**flags, cache_dir=str(folder))
    variants = encoding.Variants(pictures or Pictures(), [Size(flags.resolution, flags.resolution)] * 3, flags)
    encoding.encode_images(variants, key, None, Context(flags, None, Accelerator(cpu=True), None))
    return [path.name for path in found]


def test_latents_are_kept_by_autoencoder_images_and_all_that_their_pixels_depend_on(monkeypatch, tmp_path):
    (name,) = names_of_latents(monkeypatch, tmp_path)
    assert names_of_latents(monkeypatch, tmp_path) == [name]
    changes = [{"resolution": 32}, {"image_interpolation_mode": "bilinear"}, {"center_crop": True}]
    changes += [{"random_flip": True}, {"seed": 1}, {"key": "other"}, {"pictures": Pictures("other")}]
    changes += [{"pictures": Pictures(square=True)}]
    names = [name, *(names_of_latents(monkeypatch, tmp_path, **change)[0] for change in changes)]
    distinct = {"center_crop": names[3], "square": names[8]}
    assert distinct["center_crop"] == distinct["square"]  # both are the one crop in the middle
    assert len(set(names)) == len(names) - 1


def test_latents_of_one_crop_do_not_depend_on_the_seed(monkeypatch, tmp_path):
    for change in ({"center_crop": True}, {"pictures": Pictures(square=True)}):
        names = [names_of_latents(monkeypatch, tmp_path, seed=seed, **change) for seed in (0, 1)]
        assert names[0] == names[1]


def test_every_part_of_the_images_has_a_file_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(encoding, "PART_OF_IMAGES", 2)
    assert len(set(names_of_latents(monkeypatch, tmp_path))) == 2
