"""Similarities by CLIP and DINOv2, by hand, and those of an arm's samples to the base model's samples."""

from types import SimpleNamespace

import torch
from pipelines import random_image, tiny_clip_of_images, tiny_dino
from torch.nn.functional import cosine_similarity
from transformers import CLIPImageProcessor, CLIPModel, Dinov2Model

from reslora.images.output.metric import Metric

IMAGES = [random_image(number) for number in range(3)]


def test_clip_embeds_images_and_captions(tmp_path):
    folder = tiny_clip_of_images(tmp_path / "clip")
    metric, model = Metric(str(folder), "cpu"), CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessor.from_pretrained(folder)(IMAGES, return_tensors="pt")["pixel_values"]
    tokens = torch.tensor([[0, 3, 5, 1], [0, 4, 6, 1], [0, 2, 2, 1]])
    with torch.no_grad():
        out = model(pixel_values=pixels, input_ids=tokens, attention_mask=torch.ones_like(tokens))
    found, captions = metric.images(IMAGES), metric.captions(["red disc", "blue box", "no word"])
    torch.testing.assert_close(found @ captions.T, out.logits_per_image / model.logit_scale.exp(), rtol=1e-4, atol=1e-5)
    assert metric.reads_captions


def test_dino_embeds_images_alone_each_content_once(tmp_path):
    folder = tiny_dino(tmp_path / "dino")
    metric, model = Metric(str(folder), "cpu"), Dinov2Model.from_pretrained(folder).eval()
    assert not metric.reads_captions
    pixels = metric.processor(images=IMAGES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = model(pixel_values=pixels).pooler_output
    found = metric.images(IMAGES)
    expected = cosine_similarity(tokens[:, None], tokens[None], dim=-1)
    torch.testing.assert_close(found @ found.T, expected, rtol=1e-4, atol=1e-5)
    opened = []

    def open_image(number: int):
        opened.append(number)
        return IMAGES[number]

    source = SimpleNamespace(images=SimpleNamespace(marks=["a", "b", "c"], open=open_image))
    again = [metric.of([source], [(0, 2), (0, 0)]) for _ in range(2)]
    assert opened == [2, 0] and again[0].equal(again[1])
    torch.testing.assert_close(again[0], found[[2, 0]], rtol=1e-4, atol=1e-5)
