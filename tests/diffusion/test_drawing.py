"""Samples: what the pipeline is given."""

import json

import numpy as np
import pytest
import torch
from pipelines import FAMILIES

from reslora.diffusion.arguments import Flags
from reslora.diffusion.model.families import load_family
from reslora.diffusion.output.drawing import Drawer


@pytest.mark.parametrize("name", FAMILIES)
def test_text_states_of_half_precision_are_drawn_in_the_pipelines(tmp_path, name):
    """As the export does: in float32 whatever the precision of training."""
    folder = FAMILIES[name](tmp_path / "model")
    family = load_family(json.loads((folder / "model_index.json").read_text())["_class_name"])
    pipeline = family.pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        texts = {c: family.encode_captions(pipeline, [c], 8) for c in ("red disc", "")}
    texts = {c: {k: v[0].bfloat16() for k, v in states.items()} for c, states in texts.items()}
    flags = Flags(seed=0, train_batch_size=2, num_inference_steps=1, guidance_scale=4.0, resolution=32)
    drawer = Drawer(pipeline, family, texts, flags)
    (drawn,) = drawer.draw(getattr(pipeline, family.denoiser), ["red disc"], 1)
    assert drawn.shape == (32, 32, 3) and np.isfinite(drawn).all()
