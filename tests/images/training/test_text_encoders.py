"""Text encoders trained with the denoiser: loss and gradients by hand, processes, a resumed run, refusals."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from pipelines import FAMILIES, image_folder
from safetensors.torch import load_file
from torch.func import functional_call

from images import exact_steps
from images.model.families.test_losses import Setting
from images.runs import RESUME, assert_same, losses, main, only, printed, refused, training_state
from images.training.test_training import assert_equal_but_for_rounding, steps_of_two
from reslora.images.data.batch import stack_texts
from reslora.images.data.samples import training_loader
from reslora.images.denoising import DenoisingLoss
from reslora.images.initial_lora import add_adapters
from reslora.images.output.sampling import Sampler
from reslora.training.loop import take_step
from reslora.training.preparing import prepare
from reslora.training.schedule import Schedule
from reslora.training.state import new_learner
from reslora.training.trained import Trained

LAYERS = {"num_hidden_layers": 3}
ENCODERS = {
    "stable_diffusion": {"text_encoder": LAYERS},
    "sdxl": {"text_encoder": LAYERS, "text_encoder_2": LAYERS},
    "sd3": {"text_encoder": LAYERS, "text_encoder_2": LAYERS},
    "flux": {"text_encoder": LAYERS},
}
FLAG = "--train_text_encoder"


# -- loss and gradients by hand ----------------------------------------------------------------------------------------


def texts_by_hand(name: str, pipe, encoders: dict, captions: list[str]) -> dict[str, torch.Tensor]:
    """Return the denoiser's text inputs by plain calls of transformers' models; `encoders` take tokens."""
    lengths = {"tokenizer": 8, "tokenizer_2": 512 if name == "flux" else 8, "tokenizer_3": 77}

    def tokens(tokenizer: str) -> torch.Tensor:
        padded = {"padding": "max_length", "max_length": lengths[tokenizer], "truncation": True}
        return getattr(pipe, tokenizer)(captions, return_tensors="pt", **padded).input_ids

    one = encoders["text_encoder"](tokens("tokenizer"), output_hidden_states=True)
    if name == "stable_diffusion":
        return {"states": one.last_hidden_state}
    if name == "flux":
        return {"states": pipe.text_encoder_2(tokens("tokenizer_2"))[0], "pooled": one.pooler_output}
    two = encoders["text_encoder_2"](tokens("tokenizer_2"), output_hidden_states=True)
    states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
    if name == "sdxl":
        return {"states": states, "pooled": two.text_embeds}
    t5 = pipe.text_encoder_3(tokens("tokenizer_3"))[0]
    wide = torch.zeros(len(captions), states.shape[1], t5.shape[-1], dtype=states.dtype)
    wide[..., : states.shape[-1]] = states
    return {"states": torch.cat([wide, t5], 1), "pooled": torch.cat([one.text_embeds, two.text_embeds], -1)}


def with_adapter(encoder: torch.nn.Module, adapted: torch.nn.Module, leaves: dict, scale: float):
    """Return the plain encoder as a function of tokens with W replaced by `W + s B A`.

    A and B are added to `leaves`.
    """
    weights = {}
    for name, layer in adapted.named_modules():
        if hasattr(layer, "lora_A"):
            a, b = (part["default"].weight.detach().clone().requires_grad_() for part in (layer.lora_A, layer.lora_B))
            leaves[layer.lora_A["default"].weight], leaves[layer.lora_B["default"].weight] = a, b
            weights[f"{name}.weight"] = encoder.get_submodule(name).weight + scale * b @ a
    return lambda tokens, **more: functional_call(encoder, weights, (tokens,), more)


def learner_of(one: Setting, method: str = "lora"):
    """Return a learner in float64 with random B in the encoders, and zero B in the denoiser, as at the start."""
    context = one.context
    encoders = context.model.load_encoders(context.encoders, one.loss.pipeline)
    made = Trained({one.family.denoiser: one.denoiser, **encoders}, one.loss)
    add_adapters(made, method, 4, context)
    learner = new_learner(method, made, Schedule(4, 4, 0, False), context)
    one.loss.pipeline.to(torch.float64)
    made.double().train()
    one.loss.dtype = torch.float64
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for encoder in encoders.values():
            for name, parameter in encoder.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.2)
    return learner


@pytest.fixture
def setting(tmp_path):
    return lambda name, *flags: Setting(name, tmp_path, FLAG, "--method", "lora", *flags, **ENCODERS[name])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ENCODERS)
def test_loss_and_gradients_are_those_of_plain_encoders(setting, name):
    """LoRA of rank 2 with alpha 4: `W + 2 B A`. Every trained tensor has a gradient, because DDP waits for each."""
    one = setting(name)
    learner, batch, leaves = learner_of(one), one.batch(), {}
    stock = {part.name: getattr(one.stock, part.name).double() for part in one.family.trainable}
    one.stock.to(torch.float64)
    made = learner.trained.parts
    by_hand = {part: with_adapter(plain, made[part], leaves, 2.0) for part, plain in stock.items()}
    text = texts_by_hand(name, one.stock, by_hand, batch.caption)
    with torch.no_grad():
        plain = one.family.encode_captions(one.stock, batch.caption, one.options.training.max_sequence_length)
    changed = "pooled" if name == "flux" else "states"
    assert (plain[changed] - text[changed]).std() > 1e-2
    told = DenoisingLoss(one.context, one.objective, one.loss.pipeline, one.denoiser.config)
    told.parts, told.dtype = (), torch.float64  # nothing trains: it takes the captions as they are encoded
    expected = told(learner.denoiser, dataclasses.replace(batch, text=text))
    gradients = torch.autograd.grad(expected.mean(), list(leaves.values()))
    found = learner.trained(batch)
    found.mean().backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    of_denoiser = [parameter for parameter in learner.denoiser.parameters() if parameter.requires_grad]
    assert {id(p) for p in (*leaves, *of_denoiser)} == {id(p) for p in learner.parameters}
    for parameter, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())
        assert gradient.abs().max() > 0
    assert all(parameter.grad is not None for parameter in learner.parameters)


@pytest.mark.exhaustive
def test_checkpointed_gradients_are_the_same(setting):
    """ResLoRA, whose chains pass activations from one layer of the encoder to the next."""
    one = setting("sdxl", "--method", "reslora", "--shortcut", "middle", "--gradient_checkpointing")
    learner, batch, found = learner_of(one, "reslora"), one.batch(), []
    for checkpointed in (False, True):
        if checkpointed:
            prepare(learner, exact_steps.study_of(one.context))
        encoders = one.loss.encoders
        assert [encoder.is_activation_checkpointing for encoder in encoders] == [checkpointed] * len(encoders)
        learner.trained(batch).mean().backward()
        found.append([parameter.grad.clone() for parameter in learner.parameters])
        for parameter in learner.parameters:
            parameter.grad = None
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-9, atol=1e-12)


def test_prompts_are_encoded_by_the_encoder_as_it_is(setting):
    """The empty caption for guidance, too; frozen states come from the cache."""
    one, told = setting("flux"), {}
    learner, pipe = learner_of(one), one.loss.pipeline
    with torch.no_grad():
        kept = {c: {"states": one.family.encode_frozen(pipe, [c], 8)["states"][0]} for c in ("red disc", "")}

    class Recorder(type(pipe)):
        def __call__(self, **given):
            told.update(given)
            return SimpleNamespace(images=[None])

    pipe.__class__ = Recorder
    Sampler(
        pipe, one.family, kept, one.options.data, one.options.training, one.options.validation, one.family.trainable
    ).draw(learner.denoiser, ["red disc"], 1)
    assert all(encoder.training for encoder in learner.trained.parts.values())
    with torch.no_grad():
        tokens = one.stock.tokenizer(["red disc"], padding="max_length", max_length=8, return_tensors="pt").input_ids
        expected = learner.trained.parts["text_encoder"](tokens).pooler_output
        base = one.stock.text_encoder.double()(tokens).pooler_output
    torch.testing.assert_close(told["pooled_prompt_embeds"], expected)
    assert (expected - base).abs().max() > 1e-2
    assert torch.equal(told["prompt_embeds"], stack_texts([kept["red disc"]])["states"])


# -- processes and resumed runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return FAMILIES["stable_diffusion"](tmp_path_factory.mktemp("model") / "sd", **ENCODERS["stable_diffusion"])


@pytest.fixture(scope="module")
def one_batch(model) -> dict[str, torch.Tensor]:
    found = exact_steps.trained(model, 4, 1, FLAG)
    first, last = (found[f"text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.default.weight {n}"] for n in (0, 3))
    assert last.dtype == torch.float64 and (last - first).abs().max() > 1e-6
    return found


@pytest.mark.exhaustive
def test_steps_of_two_processes_are_those_of_one_batch(model, one_batch, tmp_path):
    assert_equal_but_for_rounding(steps_of_two(tmp_path, model, 2, 1, FLAG), one_batch)


@pytest.fixture(scope="module")
def flags(model, data) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--resolution", "32"),
        *("--max_train_steps", "4", "--checkpointing_steps", "2", "--train_batch_size", "2", "--rank", "4"),
        *("--validation_prompt", "red disc", "--num_validation_images", "1", "--validation_steps", "2"),
        *("--num_inference_steps", "1", "--learning_rate", "1e-2", "--text_encoder_lr", "3e-3"),
        *("--lora_dropout", "0.2"),
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", "1", "--validation_split", "0.3", FLAG),
        *("--merge_calibration_samples", "2", "--report_to", "none"),
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    assert main(*flags, "--output_dir", output) == 0
    return output


def weights(output: Path, step: int = 4) -> dict[str, torch.Tensor]:
    folder = output / "reslora" / f"checkpoint-{step}"
    found = {"": folder, "text_encoder.": folder / "text_encoder"}
    return {
        prefix + name: value
        for prefix, place in found.items()
        for name, value in load_file(place / "reslora_model.safetensors").items()
    }


@pytest.mark.exhaustive
def test_a_resumed_run_equals_an_uninterrupted_one(whole, flags, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "reslora" / "checkpoint-4")
    (tmp_path / "out" / "reslora" / "exports.json").unlink()
    assert "resuming from" in "\n".join(printed(*flags, *RESUME, "--output_dir", tmp_path / "out"))
    assert losses(tmp_path / "out") == losses(whole)
    assert_same(weights(tmp_path / "out"), weights(whole))
    resumed, expected = (training_state(output, 4)["optimizer"] for output in (tmp_path / "out", whole))
    assert resumed["param_groups"] == expected["param_groups"]
    for number, state in expected["state"].items():
        assert_same(resumed["state"][number], state)
    for name in ("merge.json", "chains.json", "text_encoder/model.safetensors", "samples/step-000004/0-0.png"):
        assert (tmp_path / "out" / "reslora" / name).read_bytes() == (whole / "reslora" / name).read_bytes(), name


@pytest.mark.exhaustive
def test_gradients_are_clipped_over_all_parts(model):
    accelerator = Accelerator(cpu=True)
    training_data, loss, denoiser = exact_steps.setting(model, accelerator, FLAG)
    learner = exact_steps.learner_of(denoiser, loss, accelerator)
    before = [parameter.detach().clone() for parameter in learner.parameters]
    take_step(
        learner, iter(training_loader(training_data, range(1), 1, 0, pin=False)), exact_steps.study_of(loss.context)
    )
    moved = [now.detach() - then for now, then in zip(learner.parameters, before, strict=True)]
    assert all((value != 0).any() for value in moved)
    assert torch.cat([value.flatten() for value in moved]).norm().item() == pytest.approx(0.05, rel=1e-4)  # rate 1


# -- captions and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_captions_are_kept_of_frozen_encoders_alone(whole, tmp_path):
    assert not list(whole.glob("cache/captions-*"))
    model = FAMILIES["sd3"](tmp_path / "sd3", **ENCODERS["sd3"])
    data = image_folder(tmp_path / "images")
    words = ["--pretrained_model_name_or_path", model, "--train_data_dir", data, "--resolution", "32", "--rank", "2"]
    words += ["--max_train_steps", "1", "--train_batch_size", "2", "--num_inference_steps", "1", FLAG]
    words += ["--method", "lora", "--num_validation_images", "1", "--report_to", "none", "--max_sequence_length", "16"]
    lines = printed(*words, "--output_dir", tmp_path / "kept")
    line = only(lines, f"{FLAG}: ", "text_encoder_3 is not trained")
    assert "text_encoder and text_encoder_2 in addition to the transformer" in line
    for kept in (tmp_path / "kept" / "cache").glob("captions-*"):
        content = kept.read_bytes()
        assert b'"t5"' in content and b"pooled" not in content and b'"states"' not in content
    assert main(*words, "--no-cache_text_embeddings", "--output_dir", tmp_path / "fresh") == 0
    ((*_, fresh),), ((*_, kept),) = (losses(tmp_path / name, "lora") for name in ("fresh", "kept"))
    assert fresh == pytest.approx(kept)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--text_encoder_lr", "1e-5"], ["--text_encoder_lr 1e-05", "add --train_text_encoder"]),
        ([FLAG, "--method", "adalora"], ["--method adalora", FLAG]),
        ([FLAG, "--rank", "17"], ["rank"]),
    ],
)
def test_what_cannot_work_is_refused(flags, capsys, tmp_path, words, expected):
    without = [word for word in flags if word not in (FLAG, "--text_encoder_lr", "3e-3")]
    line = refused(capsys, *without, *words, "--output_dir", tmp_path / "out")
    assert all(word in line for word in expected), line


def test_families_whose_encoders_do_not_train_are_refused(capsys, tmp_path, data):
    family = "z_image"
    model = FAMILIES[family](tmp_path / "model")
    words = ["--pretrained_model_name_or_path", model, "--train_data_dir", data, "--output_dir", tmp_path / "out"]
    line = refused(capsys, *words, FLAG)
    assert f"the text encoder of {family} is not trained" in line
    assert all(name in line for name in ENCODERS) and not (tmp_path / "out").exists()
