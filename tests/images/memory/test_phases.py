"""A rehearsed run needs the memory of a real one: weights and states exactly, activations approximately."""

import dataclasses

import pytest
import torch
from pipelines import FAMILIES

from images.memory.rehearsed import consume_request, resolved
from reslora.images.context import ImageContext
from reslora.images.memory.components import empty_denoiser
from reslora.images.memory.inference import exporting
from reslora.images.memory.meta_tensors import tensor_bytes
from reslora.images.memory.phases import ACTIVATIONS, ADAPTER, BASE, EXACT, GRADIENTS, OPTIMIZER, Phase, Rehearsal
from reslora.images.memory.plan import guess, plan_of
from reslora.images.model.start import Start

NAMES = ["encoding images", "encoding captions", "training", "sampling", "exporting"]
NEAR = 0.1  # of what is computed with; 0.15 is promised of all that a run holds


FLAGS = {  # of each family's run
    "stable_diffusion": ["--gradient_checkpointing", "--optimizer", "adafactor"],
    "sdxl": ["--gradient_checkpointing"],
    "z_image": ["--method", "reslora", "--shortcut", "block"],
    "qwen_image": ["--base_precision", "fp8"],
    "sd3": ["--method", "dora"],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl", "flux", "qwen_image"])
def test_a_step_takes_what_is_planned(family, data, tmp_path):
    """Compared with the bytes that the allocator hands out for real tensors; the upper bound is never too low."""
    flags = ["--validation_prompt", "red disc", "--num_validation_images", "1", *FLAGS.get(family, [])]
    images, context = resolved(FAMILIES[family](tmp_path / "model"), data, tmp_path / "out", *flags)
    plan = plan_of(images, context, None)
    assert plan.unknown == () and plan.fits
    assert [phase.name for phase in plan.phases] == NAMES
    assert all(phase.held[ACTIVATIONS] > 0 for phase in plan.phases)
    assert plan.peak.total < guess(context)
    assert_planned(plan.phases[2], Rehearsal(images, context), context)


@pytest.mark.exhaustive
def test_text_encoders_that_train_and_images_that_are_encoded_in_the_step_count(model, data, tmp_path):
    images, context = resolved(model, data, tmp_path / "out", "--train_text_encoder", "--no-cache_latents")
    rehearsal = Rehearsal(images, context)
    assert_planned(rehearsal.training("lora"), rehearsal, context)


@pytest.mark.exhaustive
def test_exports_of_text_encoders_that_train_in_half_precision_are_planned(model, data, tmp_path):
    """They are converted to float32, and loaded from disk once more in float32."""
    images, context = resolved(model, data, tmp_path / "out", "--train_text_encoder")
    context = dataclasses.replace(context, options=context.options.replace(mixed_precision="bf16"))
    rehearsal = Rehearsal(images, context)
    step = rehearsal.training("lora")
    planned = exporting(rehearsal, "lora", step, 0).held
    half = tensor_bytes(rehearsal.pipeline.text_encoder, trained=False)
    exact = tensor_bytes(empty_denoiser(context.model, torch.float32))
    assert rehearsal.unknown == [] and planned[ACTIVATIONS] == 0  # without prompts, no image is generated
    assert planned[BASE] == step.held[BASE] + half and planned[EXACT] == exact + 2 * half


@pytest.mark.exhaustive
def test_an_export_whose_base_is_loaded_from_disk_is_planned_with_it(model, data, tmp_path):
    """In float32 too, if memory has no complete base of its own: blocks are swapped, or it has an assistant."""
    images, context = resolved(model, data, tmp_path / "out")
    rehearsal, step = Rehearsal(images, context), Phase("training", {BASE: 1, ADAPTER: 1, OPTIMIZER: 1})
    assert EXACT not in exporting(rehearsal, "lora", step, 0).held
    swapped = dataclasses.replace(context, options=context.options.replace(blocks_to_swap=2))
    assisted = dataclasses.replace(context, assistant=Start({}, "", ""))
    exact = tensor_bytes(empty_denoiser(context.model, torch.float32))
    for rehearsal.context in (swapped, assisted):
        assert exporting(rehearsal, "lora", step, 0).held[EXACT] == exact


def assert_planned(planned: Phase, rehearsal: Rehearsal, context: ImageContext) -> None:
    """Compare a planned step with a real one."""
    real = consume_request(rehearsal, context)
    assert [planned.held[name] for name in (BASE, ADAPTER, OPTIMIZER)] == [real.base, real.adapter, real.optimizer]
    both = planned.held[ACTIVATIONS] + planned.held[GRADIENTS]
    assert both == pytest.approx(real.at_work, rel=NEAR)


@pytest.mark.exhaustive
def test_swapped_blocks_are_planned(model, data, tmp_path):
    """On a CPU, their codes count like the weights; on a GPU they would be in the other memory."""
    images, context = resolved(model, data, tmp_path / "out", "--blocks_to_swap", "2")
    swapped = Rehearsal(images, context).training("lora").held
    images, context = resolved(model, data, tmp_path / "out")
    whole = Rehearsal(images, context).training("lora").held
    assert swapped[ADAPTER] == whole[ADAPTER] and swapped[BASE] == pytest.approx(whole[BASE], rel=NEAR)
