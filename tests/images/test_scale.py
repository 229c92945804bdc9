"""Work is not repeated, and memory does not grow with the data: what a run encodes, opens and holds."""

import json
import shutil
from collections.abc import Callable

import pytest
from pipelines import image_folder, random_image, stable_diffusion

import train_sd
from reslora.errors import RunFailed
from reslora.images.data.batch import Batch
from reslora.images.data.dataset import ImageDataset
from reslora.images.data.plan import Draw
from reslora.images.data.samples import TrainingSamples
from reslora.images.model.families.stable_diffusion import StableDiffusion
from reslora.images.model.loading import Model
from reslora.runtime.log import read_log

pytestmark = pytest.mark.exhaustive

IMAGES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model and a dozen images with six captions."""
    folder = tmp_path_factory.mktemp("scale")
    stable_diffusion(folder / "model")
    image_folder(folder / "images", IMAGES, lambda number: f"box {number % 6}")
    return folder


@pytest.fixture
def train(folder, tmp_path) -> Callable:
    """Train two steps of LoRA with two images each and the cache `tmp_path / "cache"`; return the losses."""

    def run(name: str, *flags: str, status: int = 0) -> list[float]:
        output = tmp_path / name
        given = ["--pretrained_model_name_or_path", folder / "model", "--train_data_dir", folder / "images"]
        given += ["--resolution", 32, "--random_flip", "--train_batch_size", 2, "--max_train_steps", 2, "--rank", 2]
        given += ["--method", "lora", "--num_inference_steps", 1, "--num_validation_images", 0, "--report_to", "none"]
        given += ["--cache_dir", tmp_path / "cache", "--output_dir", output, *flags]
        assert train_sd.main(list(map(str, given))) == status
        return [row["loss"] for row in read_log(output / "lora" / "log.jsonl")]

    return run


def encoders_are_not_loaded(monkeypatch, captions: bool = False) -> None:
    """Let encoding fail from now on, except that of captions if it is allowed."""
    load_pipeline = Model.load_pipeline

    def load(self, *args, encoders: bool, **more):
        assert captions or not encoders
        return load_pipeline(self, *args, encoders=encoders, **more)

    def encode(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(Model, "load_pipeline", load)
    monkeypatch.setattr(StableDiffusion, "encode_images", encode)
    if not captions:
        monkeypatch.setattr(StableDiffusion, "encode_captions", encode)


def test_another_run_on_the_same_data_encodes_nothing(train, folder, tmp_path, monkeypatch):
    """In another folder, and with data and model in other places: only the content counts."""
    losses = train("first")
    assert len(losses) == 2 and not (tmp_path / "first" / "cache").exists()
    encoders_are_not_loaded(monkeypatch)
    for part in ("model", "images"):
        shutil.copytree(folder / part, tmp_path / part)
    model, images = (str(tmp_path / part) for part in ("model", "images"))
    assert train("second", "--pretrained_model_name_or_path", model, "--train_data_dir", images) == losses


def test_one_more_image_and_an_edited_caption_are_encoded_alone(train, folder, tmp_path, monkeypatch):
    encoded, encode_images, encode_captions = [], StableDiffusion.encode_images, StableDiffusion.encode_captions
    images = shutil.copytree(folder / "images", tmp_path / "images")
    monkeypatch.setattr(
        StableDiffusion, "encode_images", lambda *given: encoded.append(len(given[2])) or encode_images(*given)
    )
    monkeypatch.setattr(
        StableDiffusion, "encode_captions", lambda *given: encoded.extend(given[2]) or encode_captions(*given)
    )
    train("first", "--train_data_dir", str(images))
    assert encoded == [*[2, 8, 8] * (IMAGES // 3), "", *(f"box {number}" for number in range(6))]
    encoded.clear()
    rows = list(map(json.loads, (images / "metadata.jsonl").read_text().splitlines()))
    random_image(100).save(images / "100.png")
    rows[5]["text"] = "disc"  # the caption of another image still
    rows = [{"file_name": "100.png", "text": "box 0"}, *reversed(rows[:8])]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train("second", "--train_data_dir", str(images))
    assert encoded == [8, "disc"]


def test_an_interrupted_run_encodes_no_image_twice(train, tmp_path, monkeypatch):
    encode_images, encoded = StableDiffusion.encode_images, []

    def interrupted_at_the_eighth(self, vae, pixels):
        encoded.append(len(pixels))
        if len(encoded) == 8:
            raise RunFailed("interrupted")
        return encode_images(self, vae, pixels)

    monkeypatch.setattr(StableDiffusion, "encode_images", interrupted_at_the_eighth)
    train("out", status=1)
    names = [path.name[:8] for path in (tmp_path / "cache" / "encoded").iterdir()]
    assert names == ["latents-"] * 7  # captions are last
    assert len(train("out")) == 2
    variants = [2, 8, 8] * (IMAGES // 3)  # mirrored and not: one crop of those that are square, four of the others
    assert encoded == variants[:8] + variants[7:]


def test_without_cached_latents_an_image_is_opened_once_before_training_and_when_it_is_drawn(
    train, tmp_path, monkeypatch
):
    opened, drawn, open_image, sample = [], [], ImageDataset.open, TrainingSamples.__getitem__
    monkeypatch.setattr(ImageDataset, "open", lambda self, index: (opened.append(index), open_image(self, index))[1])

    def draw(self, wanted: Draw) -> Batch:
        drawn.append(wanted.image)
        return sample(self, wanted)

    monkeypatch.setattr(TrainingSamples, "__getitem__", draw)
    train("out", "--no-cache_latents")
    assert opened == [*range(IMAGES), *drawn] and len(drawn) == 4
    assert not list((tmp_path / "cache" / "encoded").glob("latents*"))
