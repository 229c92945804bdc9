"""--output_preservation_weight: the second loss by hand, unaffected results, processes, memory, a resumed run."""

import copy

import pytest
import torch
from core_models import assert_one_line
from peft.tuners.tuners_utils import BaseTunerLayer
from suites import quick
from torch.func import functional_call

from images import exact_steps
from images.memory.rehearsed import consume_request, resolved
from images.model.families.test_losses import Setting, ddpm_parts, flow_parts
from images.runs import RESUME, assert_same, final_weights, killed_after, losses, main
from images.training.test_text_encoders import ENCODERS, learner_of, texts_by_hand
from reslora.errors import InvalidArgument
from reslora.images.data.batch import Batch
from reslora.images.denoising import DenoisingLoss
from reslora.images.memory.phases import ACTIVATIONS, Rehearsal
from reslora.images.memory.plan import guess, plan_of
from reslora.images.settings import parse_args
from reslora.training.preparing import prepare
from reslora.wiring import connection_of

WEIGHT, PROMPT = 0.7, "blue box"
FLAGS = ["--output_preservation_weight", str(WEIGHT), "--output_preservation_prompt", PROMPT]
CAPTIONS = ["red disc", "red"]


def preserving(name: str, folder, *flags: str, method: str = "lora"):
    """A learner in float64 with random B, its setting, and a copy of its denoiser without adapter."""
    one = Setting(name, folder, "--method", method, *FLAGS, *flags, **ENCODERS[name])
    encode = one.family.encode_frozen if one.context.encoders else one.family.encode_captions
    bare = copy.deepcopy(one.denoiser).double().requires_grad_(False)
    learner, draws = learner_of(one, method), torch.Generator().manual_seed(3)
    with torch.no_grad():
        text = encode(one.loss.pipeline, [PROMPT], one.options.training.max_sequence_length)
        one.loss.class_text = {key: value[0] for key, value in text.items()}
        for key, parameter in learner.denoiser.named_parameters():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.2)
    return one, learner, bare


def fused(bare: torch.nn.Module, adapted: torch.nn.Module, leaves: dict):
    """Return the bare model as a function with W replaced by `W + 2 B A`; A and B are added to `leaves`."""
    weights = {}
    for name, layer in adapted.named_modules():
        if isinstance(layer, BaseTunerLayer):
            a, b = (part["default"].weight.detach().clone().requires_grad_() for part in (layer.lora_A, layer.lora_B))
            leaves[layer.lora_A["default"].weight], leaves[layer.lora_B["default"].weight] = a, b
            weights[f"{name}.weight"] = bare.get_submodule(name).weight + 2 * b @ a
    return lambda *args, **kwargs: functional_call(bare, weights, args, kwargs)


def predicted(name: str, one: Setting, denoiser, batch: Batch, text: dict) -> torch.Tensor:
    if name == "stable_diffusion":
        return denoiser(ddpm_parts(one, batch)[0].double(), batch.timesteps, text["states"]).sample
    return denoiser(flow_parts(one, batch)[0].double(), text["states"], text["pooled"], batch.timesteps).sample


@pytest.mark.parametrize(
    ("name", "flags"),
    quick(
        [("stable_diffusion", ["--prediction_type", "v_prediction", "--train_text_encoder"]), ("sd3", [])], ("sd3", [])
    ),
)
def test_loss_and_gradients_by_hand(tmp_path, name, flags):
    """The loss plus the weighted MSE of predictions for the class prompt with `W + 2 B A` and with W."""
    one, learner, bare = preserving(name, tmp_path, *flags)
    batch, leaves, made = one.batch(CAPTIONS), {}, learner.trained.parts
    one.stock.to(torch.float64)
    stock = {part: getattr(one.stock, part) for part in ("text_encoder", "text_encoder_2") if hasattr(one.stock, part)}
    with_adapters = {part: fused(plain, made[part], leaves) if part in made else plain for part, plain in stock.items()}
    plain = DenoisingLoss(one.context, one.objective, one.loss.pipeline, one.denoiser.config)
    plain.dtype = torch.float64
    usual = plain(learner.denoiser, batch)
    usual.mean().backward()
    of_usual = [parameter.grad.clone() for parameter in learner.parameters]
    for parameter in learner.parameters:
        parameter.grad = None

    denoiser = fused(bare, learner.denoiser, leaves)
    on = predicted(name, one, denoiser, batch, texts_by_hand(name, one.stock, with_adapters, [PROMPT] * 2))
    with torch.no_grad():
        off = predicted(name, one, bare, batch, texts_by_hand(name, one.stock, stock, [PROMPT] * 2))
    second = WEIGHT * torch.stack([(a - b).square().mean() for a, b in zip(on, off, strict=True)])
    assert (second > 1e-4).all()
    gradients = dict(zip(leaves, torch.autograd.grad(second.mean(), list(leaves.values())), strict=True))

    found = learner.trained(batch)
    torch.testing.assert_close(found, (usual + second).float(), rtol=1e-5, atol=0)
    found.mean().backward()
    assert {id(p) for p in learner.parameters} == {id(p) for p in leaves}
    for parameter, before in zip(learner.parameters, of_usual, strict=True):
        expected = before + gradients[parameter]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        # Nothing reads what some weights of Stable Diffusion 3's last block return.
        assert bool(gradients[parameter].any()) == bool(before.any()) and parameter.requires_grad
    layers = [layer for part in made.values() for layer in part.modules() if isinstance(layer, BaseTunerLayer)]
    assert all(part.training for part in made.values()) and not any(layer.disable_adapters for layer in layers)


@pytest.mark.exhaustive
def test_what_is_not_training_is_without_it(tmp_path):
    """Validation, and the calibration of control methods."""
    one, learner, _ = preserving("stable_diffusion", tmp_path)
    plain, batch = (
        DenoisingLoss(one.context, one.objective, one.loss.pipeline, one.denoiser.config),
        one.batch(CAPTIONS),
    )
    plain.dtype = torch.float64
    with torch.no_grad():
        for more in ({}, {"weighted": False}):
            expected = plain(learner.denoiser, batch, **more)
            assert torch.equal(one.loss(learner.denoiser, batch, **more), expected)
    assert (one.loss(learner.denoiser, batch) > expected).all()


@pytest.mark.exhaustive
def test_shortcuts_and_checkpointed_gradients(tmp_path):
    """The pass without adapters records no norms and has no effect on the other passes."""
    flags = ["--shortcut", "middle", "--gradient_checkpointing", "--train_text_encoder"]
    one, learner, bare = preserving("stable_diffusion", tmp_path, *flags, method="reslora")
    batch, found = one.batch(CAPTIONS), []
    for checkpointed in (False, True):
        if checkpointed:
            prepare(learner, exact_steps.study_of(one.context))
        learner.trained(batch).mean().backward()
        found.append([parameter.grad.clone() for parameter in learner.parameters])
        for parameter in learner.parameters:
            parameter.grad = None
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-9, atol=1e-12)
    assert int(connection_of(learner.denoiser).wires.norms.pushed.max()) == 4  # two of each of two forwards
    with torch.no_grad():  # the connected denoiser's preservation is of its own output from the bare one's
        text = texts_by_hand(
            "stable_diffusion", one.stock.to(torch.float64), {"text_encoder": one.stock.text_encoder}, [PROMPT] * 2
        )
        off = predicted("stable_diffusion", one, bare, batch, text)
        encoded = one.family.encode_trained(one.loss.pipeline, [PROMPT] * 2, {})
        on = predicted("stable_diffusion", one, learner.denoiser, batch, encoded)
        expected = (on - off).square().flatten(1).mean(1)
    found = one.loss.preservation(learner.denoiser, batch).detach()
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            FLAGS[:2],
            "--output_preservation_weight 0.7: there is no prompt whose predictions to preserve; add --output_p",
        ),
        (FLAGS[2:], "--output_preservation_prompt blue box: it has no effect; add --output_preservation_weight 1"),
        (["--output_preservation_weight", "0", *FLAGS[2:]], "--output_preservation_prompt blue box: it has no effect"),
    ],
)
def test_weight_and_prompt_go_together(words, line):
    with pytest.raises(InvalidArgument) as error:
        parse_args(words)
    assert_one_line(error, line)
    assert parse_args(FLAGS).training.preserved_prompts == [PROMPT]


# -- processes, memory and resumed runs --------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_the_plan_has_the_second_pass(model, data, tmp_path):
    activations = []
    for flags in ([], FLAGS):
        images, context = resolved(model, data, tmp_path / "out", *flags)
        rehearsal = Rehearsal(images, context)
        planned, real = rehearsal.training("lora"), consume_request(rehearsal, context)
        held = planned.held[ACTIVATIONS] + planned.held["gradients"]
        assert held == pytest.approx(real.at_work, rel=0.1)
        assert plan_of(images, context, None).peak.total < guess(context)
        activations.append(planned.held[ACTIVATIONS])
    assert 1.6 * activations[0] < activations[1] < 2.2 * activations[0]


@pytest.mark.exhaustive
def test_a_resumed_run_equals_an_uninterrupted_one(base_flags, tmp_path):
    method = "reslora"
    more = ["--no-cache_latents"]
    flags = [*base_flags, "--method", method, "--num_validation_images", "0", *FLAGS, *more]
    whole, resumed, plain = (tmp_path / name for name in ("whole", "parts", "plain"))
    assert main(*flags, "--output_dir", whole) == 0
    killed_after(2, whole, resumed, method)
    assert main(*flags, "--output_dir", resumed, *RESUME) == 0
    assert losses(whole, method) == losses(resumed, method)
    assert_same(final_weights(whole, method), final_weights(resumed, method))
    assert main(*flags[: -len(FLAGS) - len(more)], *more, "--output_dir", plain) == 0
    first, other = (
        [loss for _, split, loss in losses(output, method) if split == "train"] for output in (whole, plain)
    )
    assert first[0] == pytest.approx(other[0], rel=1e-6) and first[1] != other[1]  # B is zero in the first step
