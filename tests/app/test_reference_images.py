"""Edit models under Generate: the uploaded reference image, in images and in grids."""

import numpy as np
import pytest
from app_runs import pixels
from diffusers import FluxKontextPipeline
from images.test_edit_models import stirred
from pipelines import flux_kontext, random_image
from torch import Generator

from app.generation_request import Request
from app.library import Library
from app.runs import BASE, RunError
from app.studio import Picture, Studio

REQUEST = Request("blue box", seed=3, steps=2, guidance=3.5, width=32, height=32)


def run_of(folder, model):
    (folder / "runs" / "run").mkdir(parents=True)
    (folder / "runs" / "run" / "config.json").write_text(f'{{"pretrained_model_name_or_path": "{model}"}}')
    return Library(folder / "runs").find("run")


def test_an_edit_model_changes_the_reference_image(tmp_path):
    model = stirred(flux_kontext(tmp_path / "model", vae={"scaling_factor": 3.0}))
    run, studio, path = run_of(tmp_path, model), Studio(), tmp_path / "reference.png"
    reference = random_image(3)
    reference.save(path)
    pipe = FluxKontextPipeline.from_pretrained(model)
    more = {"height": 32, "width": 32, "max_area": 32 * 32, "_auto_resize": False, "output_type": "np"}
    words = {"generator": Generator().manual_seed(3), "num_inference_steps": 2, **more}
    expected = pipe(reference.crop((0, 0, 32, 32)), "blue box", **words).images[0]
    (drawn,) = pixels(studio.generate(run, [BASE], REQUEST, reference=path))
    (cell,) = pixels(studio.draw(run, [Picture(BASE, REQUEST, "one", path)]))
    assert np.abs(drawn - 255 * expected).max() <= 1 and np.array_equal(drawn, cell)
    random_image(6).save(path)
    (other,) = pixels(studio.generate(run, [BASE], REQUEST, reference=path))
    assert not np.array_equal(drawn, other)
    with pytest.raises(RunError, match=r"This model changes an image: give a reference image\."):
        list(studio.generate(run, [BASE], REQUEST))
    path.write_text("no image")
    with pytest.raises(RunError, match=r"The reference image cannot be used: not an image\."):
        list(studio.generate(run, [BASE], REQUEST, reference=path))
