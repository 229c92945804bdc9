"""Edit models: a reference image per image, in the loss, the cache, samples, exports and the data's layouts."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, FluxKontextPipeline
from pipelines import flux, flux2, flux2_klein, flux_kontext, image_folder, random_image, same_image

from images.memory.rehearsed import resolved
from images.memory.test_phases import assert_planned
from images.runs import RESUME, assert_same, final_weights, main, refused
from reslora.images.data.batch import collate
from reslora.images.data.folders import load_folders
from reslora.images.data.samples import TrainingSamples
from reslora.images.data.training_data import load_training_data
from reslora.images.denoising import DenoisingLoss
from reslora.images.memory.phases import Rehearsal
from reslora.images.memory.plan import guess, plan_of
from reslora.images.run import load_and_check, resolve_context
from reslora.images.settings import parse_args
from reslora.runtime.signals import StopRequest
from reslora.seeds import derive


def pair_folders(
    folder: Path, count: int = 6, reference=lambda number: random_image(number + 300), second=None
) -> list[str]:
    """Write images and reference images of the same sizes and names; return the options.

    `second`: a function that makes second references, or None for one reference per image.
    """
    image_folder(folder / "images", count)
    made = {"before": reference} | ({"second": second} if second else {})
    for name, make in made.items():
        (folder / name).mkdir()
        for number in range(count):
            make(number).save(folder / name / f"{number}.png")
    folders = [str(folder / name) for name in made]
    return ["--train_data_dir", str(folder / "images"), "--conditioning_data_dir", *folders]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> SimpleNamespace:
    """A tiny Kontext, pairs of images, and the flags of short runs."""
    folder = tmp_path_factory.mktemp("kontext")
    model, pairs = stirred(flux_kontext(folder / "model", vae={"scaling_factor": 3.0})), pair_folders(folder)
    flags = ["--pretrained_model_name_or_path", str(model), *pairs, "--resolution", "32", "--rank", "2"]
    flags += ["--train_batch_size", "2", "--learning_rate", "0.02", "--report_to", "none"]
    flags += ["--num_inference_steps", "2", "--num_validation_images", "1", "--merge_calibration_samples", "2"]
    return SimpleNamespace(folder=folder, model=model, pairs=pairs, flags=flags)


@torch.no_grad()
def stirred(model: Path, scale: float = 0.1) -> Path:
    """The pipeline with larger random transformer weights, so that its images depend on the reference."""
    transformer, draws = DiffusionPipeline.from_pretrained(model).transformer, torch.Generator().manual_seed(3)
    for parameter in transformer.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=draws)
    transformer.save_pretrained(model / "transformer")
    return model


def training_data_of(flags: list[str]) -> SimpleNamespace:
    options = parse_args(flags)
    context = resolve_context(options, Accelerator(cpu=True), StopRequest())
    pipeline, objective = load_and_check(context)
    images = load_folders(options.model, options.data, options.training, options.output)
    found = load_training_data(images, pipeline, objective, context)
    return SimpleNamespace(data=found, pipeline=pipeline, objective=objective, context=context)


def packed(latents: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // 4, 4 * channels)


@pytest.mark.parametrize("flags", [[], ["--no-cache_latents", "--use_aspect_ratio_buckets"]], ids=["cached", "fresh"])
@torch.no_grad()
def test_loss_by_hand(place, tmp_path, flags):
    """The tokens of the reference's mean latents follow, with 1 as first coordinate, and are not predicted."""
    one = training_data_of([*place.flags, "--output_dir", str(tmp_path / "out"), *flags])
    stock = FluxKontextPipeline.from_pretrained(place.model, torch_dtype=torch.float64)
    denoiser, vae, draws = stock.transformer, stock.vae.config, torch.Generator().manual_seed(5)
    for parameter in denoiser.parameters():  # zero-initialised parts would hide what flows through them
        parameter += 0.05 * torch.randn(parameter.shape, generator=draws)
    loss = DenoisingLoss(one.context, one.objective, one.pipeline, denoiser.config)
    loss.dtype = torch.float64
    one.pipeline.vae.double()
    batch = collate([TrainingSamples(one.data)[draw] for draw in one.data.plan(1).forward(0)])
    batch.text = text = {name: value.double() for name, value in batch.text.items()}
    found = loss(denoiser, batch)
    moments, reference = batch.moments, None if flags else batch.reference[:, 0]
    if flags:
        image, other = (stock.vae.encode(pixels.double()) for pixels in (batch.pixels, batch.reference_pixels[:, 0]))
        moments = torch.stack([image.latent_dist.mean, image.latent_dist.std], 1)
        reference = other.latent_dist.mean

    mean, std = moments.double().unbind(1)
    x = (mean + std * batch.posterior_noise - vae.shift_factor) * vae.scaling_factor
    r, e = (reference.double() - vae.shift_factor) * vae.scaling_factor, batch.noise.double()
    s = (batch.timesteps / 1000).double().view(-1, 1, 1, 1)
    rows, columns = torch.meshgrid(torch.arange(x.shape[2] // 2), torch.arange(x.shape[3] // 2), indexing="ij")
    ids = torch.cat([torch.stack([torch.full_like(rows, k), rows, columns], 2).view(-1, 3) for k in (0, 1)]).double()
    tokens = torch.cat([packed((1 - s) * x + s * e), packed(r)], 1)
    states, no_ids, guidance = text["states"], torch.zeros(text["states"].shape[1], 3), torch.ones(2)
    output = denoiser(tokens, states, text["pooled"], s.flatten(), ids, no_ids, guidance).sample
    expected = (output[:, : rows.numel()] - packed(e - x)).square().flatten(1).mean(1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)

    name = "reference_pixels" if flags else "reference"
    setattr(batch, name, torch.zeros_like(getattr(batch, name)))
    assert (loss(denoiser, batch) - found).abs().min() > 1e-5


def test_a_reference_is_cropped_and_flipped_as_its_image(place, tmp_path):
    """If both are the same file, all crops and flips agree, with latents on disk and without."""
    flags = ["--random_flip", "--use_aspect_ratio_buckets"]
    pairs = pair_folders(tmp_path, reference=random_image)
    for cache in ("--cache_latents", "--no-cache_latents"):
        one = training_data_of([*place.flags, *pairs, *flags, "--output_dir", str(tmp_path / "out"), cache])
        samples, (source,) = TrainingSamples(one.data), one.data.sources
        found = [samples[draw] for forward in range(9) for draw in one.data.plan(1).forward(forward)]
        if cache == "--cache_latents":
            assert all(sample.reference[0].equal(sample.moments[0]) for sample in found)
        else:
            assert all(sample.reference_pixels[0].equal(sample.pixels) for sample in found)
        assert len(set(source.sizes)) == len(flags)


@pytest.fixture(scope="module")
def trained(place) -> Path:
    """Four steps of ResLoRA with two prompts, whose references are those of the first held-out images."""
    out = place.folder / "out"
    flags = [*place.flags, "--output_dir", out, "--method", "reslora", "--shortcut", "middle", "--max_train_steps", "4"]
    flags += ["--checkpointing_steps", "2", "--validation_prompt", "blue box", "red disc", "--validation_steps", "2"]
    assert main(*flags, "--validation_split", "0.4") == 0
    return out


def drawn(place: SimpleNamespace, weights: Path | None, reference: PIL.Image.Image, number: int = 0) -> np.ndarray:
    pipe = FluxKontextPipeline.from_pretrained(place.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if weights:
        pipe.load_lora_weights(weights.parent, weight_name=weights.name)
    seed, prompt = torch.Generator().manual_seed(derive(0, "sample", number, 0)), ["blue box", "red disc"][number]
    size = {"height": 32, "width": 32, "max_area": 32 * 32, "_auto_resize": False}
    return pipe(reference, prompt, generator=seed, num_inference_steps=2, output_type="np", **size).images[0]


@pytest.mark.exhaustive
def test_samples_are_those_of_the_stock_pipeline_with_the_exported_lora(place, trained):
    """The references of the prompts are those of the first held-out images; here they have the sample's size."""
    files = json.loads((trained / "reslora" / "exports.json").read_text())["read_back"]
    assert {"pytorch_lora_weights.safetensors", "peft", "transformer"} <= files.keys() and max(files.values()) < 1e-6
    one = training_data_of([*place.flags, "--validation_split", "0.4", "--validation_prompt", "a", "b"])
    weights = trained / "reslora" / "pytorch_lora_weights.safetensors"
    for number, (_, image) in enumerate(one.data.held_out[:2]):
        reference = random_image(image + 300)
        assert same_image(one.data.references()[number][1][0], reference)
        middle = (reference.width - 32) // 2
        reference = reference.crop((middle, 0, middle + 32, 32))
        sample = np.asarray(PIL.Image.open(trained / "reslora" / "merged" / f"{number}-0.png")) / 255
        assert np.abs(drawn(place, weights, reference, number) - sample).max() <= 2 / 255
        assert np.abs(drawn(place, None, reference, number) - sample).max() > 4 / 255
        assert np.abs(drawn(place, weights, PIL.Image.new("RGB", (32, 32), "red"), number) - sample).max() > 4 / 255


@pytest.mark.exhaustive
def test_a_stopped_run_resumes_to_the_same_weights(place, trained, tmp_path):
    flags = [*place.flags, "--method", "reslora", "--shortcut", "middle", "--checkpointing_steps", "2"]
    flags += ["--validation_prompt", "blue box", "red disc", "--validation_steps", "2", "--validation_split", "0.4"]
    for steps, more in ((2, ()), (4, RESUME)):
        assert main(*flags, "--max_train_steps", steps, "--output_dir", tmp_path / "out", *more) == 0
    assert_same(final_weights(tmp_path / "out"), final_weights(trained))


@pytest.mark.exhaustive
def test_a_step_takes_what_is_planned(place, tmp_path):
    more = ["--no-cache_latents", "--output_preservation_weight", "1", "--output_preservation_prompt", "a disc"]
    flags = [*place.pairs[2:], "--validation_prompt", "red disc", "--num_validation_images", "1", *more]
    images, context = resolved(place.model, place.folder / "images", tmp_path / "out", *flags)
    plan = plan_of(images, context, None)
    assert plan.unknown == () and plan.peak.total < guess(context)
    assert_planned(
        next(phase for phase in plan.phases if phase.name == "training"), Rehearsal(images, context), context
    )


def without_pairs(flags: list[str]) -> list[str]:
    at = flags.index("--train_data_dir")
    return [*flags[:at], *flags[at + 4 :]]


# -- FLUX.2 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "second"), [(flux2_klein, random_image), (flux2, None)], ids=["klein", "dev"])
@torch.no_grad()
def test_flux2s_loss_by_hand(family, second, tmp_path):
    """The tokens of the references' latents follow those of the image, with 10 and 20 as the first coordinate."""
    model = stirred(family(tmp_path / "model"))
    flags = [
        "--pretrained_model_name_or_path",
        str(model),
        *pair_folders(tmp_path, second=second),
        "--resolution",
        "32",
    ]
    flags += ["--rank", "2", "--train_batch_size", "2", "--output_dir", str(tmp_path / "out")]
    one = training_data_of(flags)
    stock = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float64)
    denoiser, bn = stock.transformer, stock.vae.bn
    loss = DenoisingLoss(one.context, one.objective, one.pipeline, denoiser.config)
    loss.dtype = torch.float64
    one.pipeline.vae.double()
    batch = collate([TrainingSamples(one.data)[draw] for draw in one.data.plan(1).forward(0)])
    batch.text = text = {name: value.double() for name, value in batch.text.items()}
    found = loss(denoiser, batch)

    def normalized(latents: torch.Tensor) -> torch.Tensor:
        variance = bn.running_var[:, None, None].double() + stock.vae.config.batch_norm_eps
        return (latents.double() - bn.running_mean[:, None, None]) / variance.sqrt()

    mean, std = batch.moments.double().unbind(1)
    x, e = normalized(mean + std * batch.posterior_noise), batch.noise.double()
    r = [normalized(latents) for latents in batch.reference.unbind(1)]
    s = (batch.timesteps / 1000).double().view(-1, 1, 1, 1)
    tokens = torch.cat([part.flatten(2).transpose(1, 2) for part in ((1 - s) * x + s * e, *r)], 1)
    assert r[0].shape[2:] == (8, 8) and x.shape[2:] == (4, 4)  # the pipeline's references have 64 pixels at least
    sides = [(0, 4), (10, 8), (20, 8)][: 1 + len(r)]
    assert len(sides) == (3 if second else 2)
    ids = torch.tensor([(k, row, column, 0) for k, side in sides for row in range(side) for column in range(side)])
    told = torch.ones(2).double() if family is flux2 else None
    words = torch.tensor([(0, 0, 0, place) for place in range(text["states"].shape[1])])
    places, words = ids.expand(2, -1, -1), words.expand(2, -1, -1)
    output = denoiser(tokens, text["states"], s.flatten(), places, words, told).sample[:, :16]
    expected = (output - (e - x).flatten(2).transpose(1, 2)).square().flatten(1).mean(1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)
    batch.reference[:, -1] = 0
    assert (loss(denoiser, batch) - found).abs().min() > 1e-5


@pytest.mark.exhaustive
def test_flux2s_samples_are_those_of_the_stock_pipeline_with_reference_and_lora(tmp_path):
    """Two prompts with two references each, which the pipeline cannot generate together."""
    model = stirred(flux2_klein(tmp_path / "model"))
    kinds = [lambda number, k=k: random_image(number + k).resize((64, 64)) for k in (0, 300)]
    pairs = pair_folders(tmp_path, reference=kinds[0], second=kinds[1])
    flags = ["--pretrained_model_name_or_path", model, *pairs, "--resolution", "32", "--rank", "2", "--method", "lora"]
    flags += ["--train_batch_size", "2", "--learning_rate", "0.02", "--validation_prompt", "blue box", "red disc"]
    flags += ["--num_inference_steps", "2", "--num_validation_images", "1", "--max_train_steps", "2"]
    assert main(*flags, "--report_to", "none", "--output_dir", tmp_path / "out") == 0
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.load_lora_weights(tmp_path / "out" / "lora", weight_name="pytorch_lora_weights.safetensors")
    for number, prompt in enumerate(["blue box", "red disc"]):
        sample = np.asarray(PIL.Image.open(tmp_path / "out" / "lora" / "merged" / f"{number}-0.png")) / 255
        seen = []
        for order in (("before", "second"), ("second", "before")):
            images = [PIL.Image.open(tmp_path / name / f"{number}.png") for name in order]
            seed = torch.Generator().manual_seed(derive(0, "sample", number, 0))
            size = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 4.0}
            seen.append(pipe(images, prompt, generator=seed, output_type="np", **size).images[0])
        assert np.abs(seen[0] - sample).max() <= 1 / 255 and np.abs(seen[1] - sample).max() > 2 / 255


def test_flux2_without_pairs_takes_no_reference_of_samples(tmp_path, capsys):
    model, (flag, images, *_) = flux2_klein(tmp_path / "model"), pair_folders(tmp_path)
    line = refused(
        capsys,
        "--pretrained_model_name_or_path",
        model,
        flag,
        images,
        "--validation_image",
        tmp_path / "before" / "0.png",
    )
    assert "flux2_klein edits images only if the data are pairs of images; give --conditioning_data_dir" in line


# -- layouts ---------------------------------------------------------------------------------------------------------


def images_of(*flags) -> object:
    options = parse_args(["--pretrained_model_name_or_path", "someone/model", "--resolution", "16", *map(str, flags)])
    return load_folders(options.model, options.data, options.training, options.output)


def assert_paired(images) -> None:
    for number in range(len(images)):
        assert same_image(images.open(number), random_image(number))
        assert same_image(images.open_references(number)[0], random_image(number + 300))


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_columns_name_the_references(tmp_path, layout):
    """As file names or as an image; here with exchanged column names, as in InstructPix2Pix' data."""
    (tmp_path / "p").mkdir()
    columns = {"image": [random_image(number + 300) for number in range(3)]}
    columns |= {"edited": [random_image(number) for number in range(3)], "text": ["red disc"] * 3}
    flags = ["--train_data_dir", tmp_path / "p", "--cache_dir", tmp_path / "cache"]
    if layout == "jsonl":
        names = [(f"{number}.png", f"before-{number}.png") for number in range(3)]
        for (name, before), image, reference in zip(names, columns["edited"], columns["image"], strict=True):
            image.save(tmp_path / "p" / name)
            reference.save(tmp_path / "p" / before)
        rows = [
            {"file_name": name, "text": "red disc", "conditioning_image": before, "style": name}
            for name, before in names
        ]
        (tmp_path / "p" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (found,) = images_of(*flags, "--conditioning_image_column", "conditioning_image", "style")
        assert found.notes == () and all(same_image(found.open_references(n)[1], random_image(n)) for n in range(3))
    else:
        features = {"image": datasets.Image(), "edited": datasets.Image(), "text": datasets.Value("string")}
        made = datasets.Dataset.from_dict(columns, datasets.Features(features))
        made.to_parquet(tmp_path / "p" / "train.parquet")
        (found,) = images_of(*flags, "--image_column", "edited", "--conditioning_image_column", "image")
    assert_paired(found)
    (plain,) = images_of(*flags, *(() if layout == "jsonl" else ("--image_column", "edited")))
    assert len(plain) == 3 and not plain.paired and plain.fingerprint != found.fingerprint


def test_what_has_no_partner_is_named_with_the_fix(place, tmp_path, capsys):
    pairs = pair_folders(tmp_path)
    before = tmp_path / "before"
    (before / "0.png").unlink()
    (before / "1.png").write_bytes(b"no image")
    random_image(9).save(before / "nine.png")
    random_image(2).resize((32, 64)).save(before / "2.png")
    (found,) = images_of(*pairs)
    assert list(found.left_out) == [
        f"{tmp_path}/images/0.png: no reference image {before}/0 (.png, .jpg, ...): add it, or remove the image",
        f"{tmp_path}/images/1.png: its reference image: not an image",
    ]
    one, other = found.notes
    assert one == (
        f"warning: 1 reference image without an image of the same name in {tmp_path}/images: remove "
        f"{before}/nine.png, or add its image"
    )
    assert other.startswith("warning: 1 reference image cropped to the aspect ratio") and "images/2.png" in other
    flags = [*without_pairs(place.flags), *pairs, "--strict", "--output_dir", tmp_path / "out"]
    assert f"no reference image {before}/0" in refused(capsys, *flags)


REFUSALS = [
    (["--conditioning_data_dir", "{before}", "{before}"], "flux_kontext reads one reference image per image; give one"),
    (["--conditioning_data_dir", "nowhere"], "no such folder"),
    (["--conditioning_data_dir", "{before}", "--conditioning_image_column", "a"], "give one of the two"),
    (["--conditioning_data_dir", "{before}", "--class_data_dir", "c", "--class_prompt", "a"], "class images have no"),
    (["--conditioning_image_column", "a"], "has the columns 'file_name', 'text'; name one of these"),
    (["--conditioning_data_dir", "{before}", "--validation_image", "a.png"], "no such file; give an image"),
    (["--conditioning_data_dir", "{before}", "--validation_image", "{half}"], "truncated"),
    (["--validation_image", "{one}", "{one}", "--validation_prompt", "a", "b", "c"], "2 images for 3 prompts"),
    ([], "flux_kontext edits reference images, and none are named; give --conditioning_data_dir FOLDER"),
]


@pytest.mark.parametrize(("flags", "words"), REFUSALS, ids=[words for _, words in REFUSALS])
def test_refusals(place, tmp_path, capsys, flags, words):
    before = place.folder / "before"
    half = tmp_path / "half.png"
    half.write_bytes((before / "1.png").read_bytes()[:1500])
    given = [flag.format(before=before, one=before / "1.png", half=half) for flag in flags]
    common = ["--pretrained_model_name_or_path", place.model, "--train_data_dir", place.folder / "images"]
    assert words in refused(capsys, *common, "--resolution", "32", "--output_dir", tmp_path / "out", *given)


def test_another_model_has_no_use_for_references(place, tmp_path, capsys):
    model = flux(tmp_path / "model")
    common = ["--pretrained_model_name_or_path", model, "--output_dir", tmp_path / "out", "--resolution", "32"]
    for flags in (place.pairs, [*place.pairs[:2], "--validation_image", place.folder / "before" / "1.png"]):
        line = refused(capsys, *common, *flags)
        models = "flux_kontext, flux2, flux2_klein, qwen_image_edit, qwen_image_edit_plus"
        assert line.endswith(f"flux edits no images; leave it out, or give a model of {models}")


def test_given_references_are_those_of_the_prompts_in_turn(place, tmp_path):
    files = [str(place.folder / "before" / f"{number}.png") for number in (4, 1)]
    words = [*place.flags, "--validation_prompt", "a", "b", "--validation_image", *files]
    found = training_data_of([*words, "--output_dir", str(tmp_path / "out")]).data.references()
    for (_, (image,)), number in zip(found, (4, 1), strict=True):
        assert same_image(image, random_image(number + 300))
