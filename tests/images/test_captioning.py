"""`reslora-caption`: captions of tiny models in text files, what a second start skips, and refusals."""

import json
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from suites import quick
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from reslora.caption import main
from reslora.images.captioning import Captioner

SIDE = 32
LAYER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"vocab_size": 40, "max_position_embeddings": 128, "pad_token_id": 0, "initializer_range": 1.0, **LAYER}
VISION = {"image_size": SIDE, "patch_size": 8, "initializer_range": 1.0, **LAYER}
CHAT = "{% for m in messages %}user {% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}"
CHAT += " {% endfor %}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
COLORS = ("red", "blue", "white")


def tokenizer(**special) -> BertTokenizer:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "<image>", "user", "assistant", "describe"]
    names += [f"word{number}" for number in range(40 - len(names))]
    return BertTokenizer(vocab={name: number for number, name in enumerate(names)}, **special)


def blip() -> tuple:
    text = {**TEXT, "encoder_hidden_size": 16, "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION, initializer_range=1.0))
    torch.nn.init.constant_(model.text_decoder.cls.predictions.bias[:6], -1e3)  # words only, no special token
    images = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    return model, BlipProcessor(images, tokenizer(bos_token="[DEC]"))


def git() -> tuple:
    model = GitForCausalLM(GitConfig(**TEXT, vision_config=VISION, bos_token_id=2, eos_token_id=3))
    return model, GitProcessor(clip_images(), tokenizer(model_input_names=["input_ids", "attention_mask"]))


def llava() -> tuple:
    parts = {"vision_config": CLIPVisionConfig(**VISION), "text_config": LlamaConfig(**TEXT, eos_token_id=3)}
    config = LlavaConfig(**parts, image_token_index=6)
    words = tokenizer(extra_special_tokens={"image_token": "<image>"})
    processor = LlavaProcessor(clip_images(), words, patch_size=8, num_additional_image_tokens=1,
                               vision_feature_select_strategy="default", chat_template=CHAT)  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def clip_images() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a function that returns the folder of a tiny image-text model with random weights."""

    def saved(build=blip) -> Path:
        folder = tmp_path_factory.getbasetemp() / build.__name__
        if not folder.exists():
            torch.manual_seed(0)
            for part in build():
                part.save_pretrained(folder)
        return folder

    return saved


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with three images, one of them in a subfolder, and files that are no images to caption."""
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    (root / ".trash").mkdir()
    for number, color in enumerate(COLORS):
        paint(root / "more" / "2.png" if number == 2 else root / f"{number}.png", color)
    for hidden in ("._0.png", ".trash/3.png"):
        paint(root / hidden, "red")
    (root / "notes.md").write_text("no image")
    return root


def paint(path: Path, color: str) -> None:
    PIL.Image.new("RGB", (SIDE, 24), color).save(path)


def caption(*words) -> int:
    """Return the exit status, also if argparse exits."""
    try:
        return main(list(map(str, words)))
    except SystemExit as error:
        return error.code


def texts(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.txt"))}


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert caption(*words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reslora-caption")]
    assert len(lines) == 1 and lines[0].startswith("reslora-caption: error: "), lines
    return lines[0].removeprefix("reslora-caption: error: ")


def test_captions_are_written_resumed_and_replaced_on_request_alone(model, folder, capsys):
    flags = [folder, "--model", model(), "--max_new_tokens", 6, "--batch_size", 2, "--prefix", "sks"]
    (folder / "1.txt").write_text("by hand")
    (folder / "4.png").write_bytes((folder / "0.png").read_bytes()[:60])
    assert caption(*flags) == 0
    written, (out, err) = texts(folder), capsys.readouterr()
    assert list(written) == ["0.txt", "1.txt", "more/2.txt"] and written["1.txt"] == "by hand"
    assert all(text.startswith("sks word") and text.endswith("\n") for name, text in written.items() if name != "1.txt")
    assert written["0.txt"] != written["more/2.txt"]
    assert "skipped 1 image with a caption" in out and "wrote 2 captions" in out and "left out 1 image" in out
    assert f"{folder / '4.png'}: left out, because it is damaged" in out + err

    (folder / "4.png").unlink()
    (folder / "0.txt").unlink()
    (folder / "more" / "2.txt").rename(folder / "more" / "2.caption")  # as kohya's scripts name it
    assert caption(*flags) == 0 and "wrote 1 caption " in capsys.readouterr().out
    assert texts(folder) == {name: written[name] for name in ("0.txt", "1.txt")}
    assert caption(*flags, "--model", "no/such-model") == 0  # all images have a caption: the model is not loaded
    assert "skipped 3 images" in capsys.readouterr().out

    assert caption(*flags, "--overwrite") == 0
    assert texts(folder)["more/2.txt"] == written["more/2.txt"] and texts(folder)["1.txt"].startswith("sks word")


@pytest.mark.parametrize("build", quick([blip, git, llava], blip))
def test_a_batch_gives_what_each_image_gives_and_no_prompt(build, model):
    images = [PIL.Image.new("RGB", (40, 30), color) for color in COLORS]
    captioner = Captioner(str(model(build)), "describe", 6)
    found = captioner.describe(images)
    assert found == [captioner.describe([image])[0] for image in images] and len(set(found)) > 1
    if build is llava:  # its random words include those of the prompt
        return
    assert all(text and not set(text.split()) & {"user", "describe", "assistant"} for text in found)
    assert all(len(text.split()) <= 6 for text in found)
    # The model's own first step, with the prompt in front, gives the first word.
    inputs = captioner.inputs(images[:1])
    assert captioner.processor.tokenizer.decode(inputs["input_ids"][0, -1]) != "[SEP]" or build is blip
    first = captioner.model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]
    assert captioner.processor.tokenizer.decode(first) == found[0].split()[0]


def test_what_cannot_be_captioned_is_refused_in_one_line(model, folder, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    paint(empty / ".0.png", "red")
    assert refused(capsys, folder) == "--model: missing; give the folder or hub name of an image-text model"
    assert refused(capsys, folder, "--modle", "x").startswith("--modle: unknown option; did you mean --model?")
    assert refused(capsys, folder, "--model", "x", "--batch_size", 0).startswith("--batch_size 0: is not")
    assert refused(capsys, folder, "--model", tmp_path / "none").endswith("give a model folder in transformers format")
    assert refused(capsys, tmp_path / "none", "--model", "x").endswith("no such folder; check the name")
    assert refused(capsys, empty, "--model", model()) == f"FOLDER {empty}: no images; give a folder with images"
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n')
    assert f"the trainer reads {folder / 'metadata.jsonl'}, not text files" in refused(
        capsys, folder, "--model", model()
    )
    (folder / "metadata.jsonl").unlink()
    assert not texts(folder)


def test_models_with_pickles_with_code_and_without_all_weights_are_refused(model, folder, tmp_path, capsys):
    def copy(name: str) -> Path:
        (tmp_path / name).mkdir()
        for path in model().iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
        return tmp_path / name

    weights = load_file(model() / "model.safetensors")
    pickled, partial, coded = map(copy, ("pickled", "partial", "coded"))
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    lost = "text_decoder.bert.encoder.layer.0.attention.self.query.weight"
    save_file({name: value for name, value in weights.items() if name != lost}, partial / "model.safetensors")
    config = json.loads((coded / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"}
    config |= {"model_type": "own", "auto_map": own}
    (coded / "config.json").write_text(json.dumps(config))
    (coded / "own.py").write_text("raise SystemExit('this code has run')")
    assert "--prompt in the form that this model reads" in refused(
        capsys, folder, "--model", model(), "--prompt", "word0 " * 200
    )
    for bad, problem in ((pickled, "safetensors"), (partial, f"lacks weights, such as {lost}"), (coded, "code")):
        assert problem in refused(capsys, folder, "--model", bad)
    assert not texts(folder)
