"""New tokens that train with the adapter: compared with diffusers' own textual inversion; processes, resumed runs."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from pipelines import FAMILIES, image_folder, tiny_clip, tiny_tokenizer
from safetensors.torch import load_file
from suites import quick

from images import exact_steps
from images.model.families.test_losses import Setting
from images.runs import RESUME, assert_same, losses, main, only, printed, refused, training_state
from images.training.test_training import assert_equal_but_for_rounding, steps_of_two
from reslora.images.denoising import DenoisingLoss
from reslora.images.generators import derive
from reslora.images.initial_lora import add_adapters
from reslora.images.model.new_tokens import add_embeddings, add_tokens
from reslora.training.schedule import Schedule
from reslora.training.state import new_learner
from reslora.training.trained import Trained

FLAG = ("--new_tokens", "<sks>=red box", "<other>")
STOCK = {"stable_diffusion": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def parts_of(pipeline) -> list[tuple]:
    """Return each CLIP encoder with its tokenizer, and the key of its embeddings in SDXL's files."""
    found = [(pipeline.text_encoder, pipeline.tokenizer, "clip_l")]
    if isinstance(pipeline, StableDiffusionXLPipeline):
        found.append((pipeline.text_encoder_2, pipeline.tokenizer_2, "clip_g"))
    return found


@pytest.mark.parametrize("family", STOCK)
def test_loss_and_gradients_are_those_of_diffusers_textual_inversion(family, tmp_path):
    """Only the adapter and the rows of new tokens get gradients; the tables of the encoders are frozen."""
    one = Setting(family, tmp_path, "--method", "lora", *FLAG)
    pipe, words, context = one.loss.pipeline, one.options.adapter.words_of_tokens, one.context
    add_tokens(pipe, one.family, words)
    encoders = context.model.load_encoders(context.live_encoders, pipe)
    rows = add_embeddings(encoders, pipe, words)
    trained = Trained({"unet": one.denoiser}, one.loss, rows)
    add_adapters(trained, "lora", 4, context)
    learner = new_learner("lora", trained, Schedule(4, 4, 0, False), context)
    batch = one.batch(["<sks> disc", "blue <other>"])
    found = trained(batch)
    found.mean().backward()

    tables = []
    for (encoder, tokenizer, _), new in zip(parts_of(one.stock), rows.values(), strict=True):
        table = encoder.get_input_embeddings().weight.detach()
        starts = torch.stack([(table[3] + table[6]) / 2, table.mean(0)])  # red and box
        torch.testing.assert_close(new.weight.detach(), starts)
        for token, start in zip(words, starts, strict=True):
            one.stock.load_textual_inversion(start, token=token, tokenizer=tokenizer, text_encoder=encoder)
        tables.append(encoder.requires_grad_(False).get_input_embeddings().weight.requires_grad_())
    states, _, *pooled = one.stock.encode_prompt(
        batch.caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    text = {"states": states, **({"pooled": pooled[0]} if pooled else {})}
    told = DenoisingLoss(context, one.objective, pipe, one.denoiser.config)
    told.parts = ()  # nothing trains: it takes the captions as they are encoded
    expected = told(one.denoiser, dataclasses.replace(batch, text=text))
    gradients = torch.autograd.grad(expected.mean(), tables)
    torch.testing.assert_close(found, expected)
    for new, gradient in zip(rows.values(), gradients, strict=True):
        torch.testing.assert_close(new.weight.grad, gradient[-2:])
        assert new.weight.grad.abs().max(1).values.all()
    adapter = [parameter for parameter in one.denoiser.parameters() if parameter.requires_grad]
    assert {id(p) for p in learner.parameters} == {id(p) for p in (*adapter, *(new.weight for new in rows.values()))}
    assert learner.optimizer.param_groups[-1]["weight_decay"] == 0.0
    frozen = [p for encoder in encoders.values() for name, p in encoder.named_parameters() if ".rows." not in name]
    assert not any(parameter.requires_grad for parameter in frozen)


def test_the_pooled_state_is_that_of_the_end_token(tmp_path):
    """Older configurations name a wrong end token: transformers takes the highest number, which a new token has."""
    tokenizer, encoder = tiny_tokenizer(), tiny_clip({"eos_token_id": 2}, projected=True)
    pipe = type("Pipe", (), {"tokenizer": tokenizer, "text_encoder": encoder})()
    tokenizer.add_tokens(["<sks>"])
    add_embeddings({"text_encoder": encoder}, pipe, {"<sks>": "red"})
    ids = tokenizer(["<sks> disc"], padding="max_length", max_length=8, return_tensors="pt").input_ids
    assert ids.tolist()[0][:4] == [0, 7, 5, 1]
    found = encoder(ids)
    torch.testing.assert_close(found.text_embeds, encoder.text_projection(found.last_hidden_state[:, 3]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs of each family, made when they are first requested, with their flags."""
    made: dict[str, tuple[Path, list[str]]] = {}

    def run(family: str) -> tuple[Path, list[str]]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            FAMILIES[family](folder / "model")
            image_folder(folder / "images", caption=lambda number: ["<sks> disc", "blue <other>"][number % 2])
            flags = [
                *("--pretrained_model_name_or_path", str(folder / "model"), "--train_data_dir", str(folder / "images")),
                *("--resolution", "32", "--max_train_steps", "4", "--checkpointing_steps", "2", "--rank", "2"),
                *("--train_batch_size", "2", "--method", "lora", "--learning_rate", "1e-2", "--report_to", "none"),
                *("--validation_prompt", "<sks> box", "--num_validation_images", "1", "--num_inference_steps", "2"),
                *("--guidance_scale", "2.0", *FLAG),
            ]
            lines = printed(*flags, "--output_dir", folder / "out")
            assert only(lines, "--new_tokens <sks> <other>: trained in text_encoder", "each step encodes its captions")
            made[family] = folder, flags
        return made[family]

    return run


@pytest.mark.parametrize("family", quick(STOCK, "stable_diffusion"))
def test_stock_diffusers_reads_the_embeddings_and_draws_the_runs_sample(run, family):
    folder, _ = run(family)
    out = folder / "out" / "lora"
    pipe = STOCK[family].from_pretrained(folder / "model", unet=UNet2DConditionModel.from_pretrained(out / "unet"))
    pipe.set_progress_bar_config(disable=True)

    def drawn() -> np.ndarray:
        how = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 32, "width": 32, "output_type": "np"}
        return pipe("<sks> box", generator=torch.Generator().manual_seed(derive(0, "sample", 0, 0)), **how).images[0]

    with PIL.Image.open(out / "merged" / "0-0.png") as sample:
        expected = np.asarray(sample) / 255
    assert np.abs(drawn() - expected).max() > 4 / 255  # it does not know the token
    trained = load_file(out / "checkpoint-4" / "new_tokens.safetensors")
    for token, number in (("<sks>", 0), ("<other>", 1)):
        path = out / "embeddings" / f"{token.strip('<>')}.safetensors"
        content = load_file(path)
        for (encoder, tokenizer, key), rows in zip(parts_of(pipe), trained.values(), strict=True):
            assert content[key if family == "sdxl" else token].equal(rows[number : number + 1])
            given = content[key] if family == "sdxl" else path  # a file of one tensor has the token's name
            more = {"token": token} if family == "sdxl" else {}
            pipe.load_textual_inversion(given, tokenizer=tokenizer, text_encoder=encoder, **more)
    assert np.abs(drawn() - expected).max() <= 2 / 255


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", STOCK)
def test_a_resumed_run_equals_an_uninterrupted_one(run, family, tmp_path):
    folder, flags = run(family)
    shutil.copytree(folder / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "lora" / "checkpoint-4")
    (tmp_path / "out" / "lora" / "exports.json").unlink()
    assert "resuming from" in "\n".join(printed(*flags, *RESUME, "--output_dir", tmp_path / "out"))
    assert losses(tmp_path / "out", "lora") == losses(folder / "out", "lora")
    both = [place / "lora" / "checkpoint-4" for place in (tmp_path / "out", folder / "out")]
    for name in ("new_tokens.safetensors", "adapter.safetensors"):
        assert_same(*(load_file(path / name) for path in both))
    resumed, expected = (training_state(place, 4, "lora")["optimizer"] for place in (tmp_path / "out", folder / "out"))
    for number, state in expected["state"].items():
        assert_same(resumed["state"][number], state)
    before = load_file(folder / "out" / "lora" / "checkpoint-2" / "new_tokens.safetensors")
    assert all(
        (value != load_file(both[0] / "new_tokens.safetensors")[key]).any(1).all() for key, value in before.items()
    )


@pytest.mark.exhaustive
def test_the_best_checkpoints_tokens_are_exported(run, tmp_path):
    """The validation loss of the first checkpoint is made the lowest."""
    _, flags = run("stable_diffusion")
    more = ["--save_best", "--validation_split", "0.3", "--validation_steps", "2", "--learning_rate", "3"]
    assert main(*flags, *more, "--output_dir", tmp_path / "out") == 0
    out = tmp_path / "out" / "lora"
    (best,) = (path for path in (out / "best").iterdir() if path.is_dir())
    exported = load_file(out / "embeddings" / "sks.safetensors")["<sks>"]
    kept, last = (load_file(path / "new_tokens.safetensors") for path in (best, out / "checkpoint-4"))
    assert best.name == "step-000002" and exported.equal(kept["text_encoder.weight"][:1])
    assert not exported.equal(last["text_encoder.weight"][:1])


@pytest.mark.exhaustive
def test_steps_of_two_processes_are_those_of_one_batch(tmp_path):
    model, flags = FAMILIES["stable_diffusion"](tmp_path / "sd"), FLAG[:2]
    found = exact_steps.trained(model, 4, 1, *flags)
    first, last = (found[f"new_tokens.text_encoder.weight {number}"] for number in (0, 3))
    assert last.dtype == torch.float64 and (last - first).abs().max() > 1e-6
    assert_equal_but_for_rounding(steps_of_two(tmp_path, model, 2, 1, *flags), found)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["red=blue"], "--new_tokens red: the model has this token already; choose another one, such as <red>"),
        (["<a>"], "--new_tokens <a>: no caption contains it; write it into captions"),
        (["<a b>"], "--new_tokens <a b>: a token is one word with letters"),
        (["<a>", "[A]"], "--new_tokens [A]: another token has the same letters"),
        (["<a>", "<b>=a <a>"], "--new_tokens <b>=a <a>: it starts from a new token"),
        (["<a>", "--train_text_encoder"], "--train_text_encoder: cannot be combined with --new_tokens"),
        (["<a>", "--seed", "1", "2"], "--new_tokens: this is an experiment; leave it out"),
    ],
)
def test_what_cannot_work_is_refused(brief_flags, capsys, tmp_path, words, expected):
    model = FAMILIES["stable_diffusion"](tmp_path / "model")
    flags = [*brief_flags, "--pretrained_model_name_or_path", model, "--output_dir", tmp_path / "out"]
    if words == ["red=blue"]:
        flags += ["--caption_prefix", "red "]
    assert expected in refused(capsys, *flags, "--new_tokens", *words, quiet=False)


def test_families_with_other_text_encoders_are_refused(capsys, tmp_path, data):
    model = FAMILIES["sd3"](tmp_path / "model")
    words = ["--pretrained_model_name_or_path", model, "--train_data_dir", data, "--output_dir", tmp_path / "out"]
    assert "--new_tokens: new tokens of sd3 are not trained" in refused(capsys, *words, *FLAG)
