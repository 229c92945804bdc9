"""Stable Diffusion XL: the inputs of its pipeline."""

from types import SimpleNamespace

import pytest
import torch

from reslora.images.model.families.sdxl import StableDiffusionXL


@pytest.mark.parametrize("zeros", [True, False])
def test_guidance_goes_away_from_zeros_or_from_the_empty_caption(zeros):
    """As `force_zeros_for_empty_prompt` says, for states and pooled states.

    The empty caption serves the complete batch.
    """
    text = {"states": torch.randn(3, 4, 5), "pooled": torch.randn(3, 6)}
    empty = {"states": torch.randn(1, 4, 5), "pooled": torch.randn(1, 6)}
    pipeline = SimpleNamespace(config=SimpleNamespace(force_zeros_for_empty_prompt=zeros))
    found = StableDiffusionXL().sampling_inputs(pipeline, text, empty, True)
    assert found["prompt_embeds"] is text["states"] and found["pooled_prompt_embeds"] is text["pooled"]
    for name, negative in (("states", "negative_prompt_embeds"), ("pooled", "negative_pooled_prompt_embeds")):
        expected = torch.zeros_like(text[name]) if zeros else torch.cat([empty[name]] * 3)
        assert torch.equal(found[negative], expected)
