"""Sample n of a run is a function of the seed and n: the same for every method, batch size and process."""

from types import SimpleNamespace

import pytest
import torch
from pipelines import image_folder, stable_diffusion
from safetensors.torch import load_file

from images import exact_steps
from images.runs import FAMILY, assert_same, digests, losses, main, read_by
from reslora.images.data.batch import Batch
from reslora.images.data.plan import Plan
from reslora.images.data.samples import (
    VALIDATION_DRAWS,
    CalibrationSamples,
    TrainingData,
    TrainingSamples,
    ValidationSamples,
)
from reslora.images.data.size import Size
from reslora.images.data.sources import Source, split
from reslora.options.images import Options


@pytest.mark.exhaustive
def test_methods_share_initial_weights(brief_flags, tmp_path):
    """At this learning rate, float32 rounds every update of A away, and B stays negligible."""
    flags = [*brief_flags, "--method", "lora", "lora_x2", "reslora", "--merge", "none", "--learning_rate", "1e-30"]
    assert main(*flags, "--output_dir", tmp_path / "out") == 0
    states = []
    for method in ("lora", "lora_x2", "reslora"):
        state = load_file(tmp_path / "out" / method / "pytorch_lora_weights.safetensors")
        states.append({name: value for name, value in state.items() if "lora_A" in name})
        assert len(states[-1]) * 2 == len(state)
        assert all(value.abs().max() < 1e-25 for name, value in state.items() if "lora_B" in name)
    assert all(value.abs().max() > 0 for value in states[0].values())
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])


@pytest.mark.exhaustive
def test_methods_share_the_samples(run):
    """B is zero at first, so the first training loss is the base model's on the same noise: bitwise equal."""
    first = {method: [row for row in losses(run, method) if row[0] <= 1] for method in ("lora", "reslora")}
    assert len(first["lora"]) == 2 and first["lora"] == first["reslora"]
    assert digests(run / "lora", "samples/step-000000/*") == digests(run / "reslora", "samples/step-000000/*")
    assert digests(run / "lora", "samples/step-000004/*") != digests(run / "reslora", "samples/step-000004/*")


# -- the noise offset ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pure_noise(tmp_path_factory) -> list[str]:
    """Return options for a model whose only timestep leaves nothing of the image: noisy latents equal the noise."""
    folder = tmp_path_factory.mktemp("noise")
    scheduler = {
        "num_train_timesteps": 1,
        "beta_start": 1 - 1e-6,
        "beta_end": 1 - 1e-6,
        "timestep_spacing": "trailing",
    }
    flags = ["--pretrained_model_name_or_path", stable_diffusion(folder / "model", scheduler=scheduler)]
    flags += ["--train_data_dir", image_folder(folder / "images"), "--resolution", 32, "--max_train_steps", 1]
    flags += [
        "--method",
        "reslora",
        "--rank",
        4,
        "--merge",
        "weights",
        "--num_inference_steps",
        1,
        "--report_to",
        "none",
    ]
    return [*flags, "--num_validation_images", 1, "--merge_calibration_samples", 32, "--validation_split", 0.3]


@pytest.fixture(scope="module")
def with_and_without_offset(pure_noise, tmp_path_factory):
    outputs = {}
    for offset in (0.0, 0.5):
        outputs[offset] = tmp_path_factory.mktemp("offset") / "out"
        assert main(*pure_noise, "--noise_offset", offset, "--output_dir", outputs[offset]) == 0
    return outputs


def by_step(output, method: str = "reslora") -> dict[tuple[int, str], float]:
    return {(step, split): loss for step, split, loss in losses(output, method)}


@pytest.mark.exhaustive
def test_noise_offset_shifts_each_channel_of_each_sample(with_and_without_offset):
    """By 0.5 times a normal number per sample and channel, constant over the image; the noise itself is unchanged."""
    noises = {
        offset: load_file(output / "reslora" / "calibration.safetensors")["sample"]
        for offset, output in with_and_without_offset.items()
    }
    plain = noises[0.0]
    assert plain.mean().abs() < 0.05 and (plain.std() - 1).abs() < 0.05
    shift = noises[0.5] - plain
    assert (shift - shift.mean(dim=(2, 3), keepdim=True)).abs().max() < 0.02
    per_channel = shift.mean(dim=(2, 3)).flatten()
    assert len(per_channel) == 32 * 4 and len(per_channel.unique()) == 32 * 4
    assert per_channel.std().item() == pytest.approx(0.5, rel=0.2) and per_channel.mean().abs() < 0.15


@pytest.mark.exhaustive
def test_the_loss_is_weighted_in_training_alone(pure_noise, with_and_without_offset, tmp_path):
    """A millionth of the image remains: for v, the min-SNR weight snr / (snr + 1) is a millionth too."""
    assert main(*pure_noise, "--snr_gamma", 5, "--output_dir", tmp_path / "out") == 0
    before, after = by_step(with_and_without_offset[0.0]), by_step(tmp_path / "out")
    assert after[0, "validation"] == before[0, "validation"]
    assert after[1, "train"] == pytest.approx(1e-6 * before[1, "train"], rel=0.1)


# -- the validation loss ---------------------------------------------------------------------------------------------


def validation(limit: int, seed: int = 0, count: int = 100) -> list[Batch]:
    """Return the validation samples of `count` images, a fifth of them held out."""
    flags = Options.of(
        seed=seed, validation_split=0.2, max_validation_images=limit, noise_offset=0.0, cache_text_embeddings=False
    )
    train, held_out = split(count, flags.validation.validation_split, flags.training.seed)
    latents = SimpleNamespace(variants=1, of=lambda index, variant: {"sizes": torch.tensor(index)})
    images = SimpleNamespace(captions=[["box"]] * count)
    objective = SimpleNamespace(at=lambda share: torch.tensor(share))
    source = Source(images, latents, train, held_out, (Size(16, 16),) * count)
    samples = ValidationSamples(
        TrainingData((source,), {}, objective, {Size(16, 16): (1, 2, 2)}, FAMILY, **read_by(flags))
    )
    return [samples[draw] for draw in samples.draws]


def images_of(samples: list[Batch]) -> list[int]:
    return [int(sample.sizes) for sample in samples[::VALIDATION_DRAWS]]


def test_the_validation_loss_is_measured_on_a_limited_number_of_images_drawn_by_seed():
    assert len(validation(64)) == len(validation(20)) == 20 * VALIDATION_DRAWS
    drawn = images_of(validation(7))
    held_out = images_of(validation(64))
    assert len(set(drawn)) == 7 and set(drawn) < set(held_out) and sorted(drawn) == drawn != held_out[:7]
    assert drawn == images_of(validation(7)) and set(drawn) < set(images_of(validation(8)))
    places = {tuple(sorted(images_of(validation(64, seed)).index(i) for i in images_of(validation(7, seed))))
              for seed in range(4)}  # fmt: skip
    assert len(places) == 4


def test_an_image_is_measured_with_the_same_noises_whichever_others_are():
    every, some = ({(int(s.sizes), int(4 * s.timesteps)): s for s in validation(limit)} for limit in (64, 7))
    assert len(some) == 7 * VALIDATION_DRAWS
    for key, sample in some.items():
        for name in ("timesteps", "noise", "posterior_noise"):
            assert getattr(sample, name).equal(getattr(every[key], name))


# -- crops and mirror images -------------------------------------------------------------------------------------------


# -- what noises are for -----------------------------------------------------------------------------------------------


def test_training_calibration_and_validation_have_noises_of_their_own(model):
    """Otherwise merge and validation would be measured on the noise that was trained on."""
    training_data, *_ = exact_steps.setting(model)
    kinds = (TrainingSamples, CalibrationSamples, ValidationSamples)
    draws = Plan(training_data.sources, 3, 0).forward(0)
    drawn = {kind: [kind(training_data)[draw] for draw in draws] for kind in kinds}
    for name in ("noise", "posterior_noise"):
        values = [getattr(sample, name) for samples in drawn.values() for sample in samples]
        assert len({tuple(value.flatten().tolist()) for value in values}) == 9
    again, before = TrainingSamples(training_data)[draws[1]], drawn[TrainingSamples][1]
    for name in ("noise", "timesteps", "moments"):
        assert torch.equal(getattr(again, name), getattr(before, name))


def test_calibration_takes_training_images_and_validation_those_held_out(model):
    training_data, *_ = exact_steps.setting(model)
    (source,) = training_data.sources
    plan = Plan(training_data.sources, len(source.train), 0)
    for number in range(3):
        assert {draw.image for draw in plan.forward(number)} == set(source.train)
    draws = ValidationSamples(training_data).draws
    assert [draw.image for draw in draws] == [index for index in source.held_out for _ in range(VALIDATION_DRAWS)]


def test_validation_has_a_timestep_in_each_quarter(model):
    samples = ValidationSamples(exact_steps.setting(model)[0])
    quarters = [int(samples[draw].timesteps) // 250 for draw in samples.draws]
    assert quarters == [0, 1, 2, 3] * (len(samples.draws) // 4)
