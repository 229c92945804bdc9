"""PEFT's initializations: the start, training, resuming, and plain LoRA on the original base, by hand in float64."""

import copy
import math

import pytest
import torch
from core_models import (
    assert_equal,
    assert_one_line,
    delta,
    loss_of,
    run,
    tiny_gpt2,
    tiny_llama,
    tiny_unet,
    token_inputs,
    unet_inputs,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from suites import quick
from torch import nn

from reslora.export import export_diffusers, export_kohya, export_peft, merged_state_dict
from reslora.linking import base_model, lora_layers
from reslora.methods.adapters import attach, load_adapter, save_adapter, trained_state, without_adapters
from reslora.methods.initial import INITIAL
from reslora.methods.registry import METHODS, AdapterSettings, adapter_config

MODELS = {
    "llama": (tiny_llama, token_inputs, ["q_proj", "down_proj"]),
    "gpt2": (tiny_gpt2, token_inputs, ["c_attn"]),  # its weights are stored transposed
    "unet": (tiny_unet, unet_inputs, ["to_q", "to_out.0"]),
}
STARTS = [("pissa", "llama"), ("pissa", "gpt2"), ("pissa_niter_4", "unet"), ("olora", "llama")]
starts = pytest.mark.parametrize(("init", "kind"), STARTS)
RANK, ALPHA = 4, 6


def bare(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind][0]().float()


def attached(init: str, kind: str, method: str = "lora", **settings) -> nn.Module:
    """Return a model with the adapter, in float64; PEFT initializes in float32."""
    values = {"r": RANK, "alpha": ALPHA, "dropout": 0.0, "total_steps": 10, "targets": MODELS[kind][2], **settings}
    torch.manual_seed(1)
    return attach(bare(kind), adapter_config(method, AdapterSettings(init_lora_weights=init, **values))).double()


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return lora_layers(base_model(model), "default")


def train(model: nn.Module, kind: str, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, MODELS[kind][1](seed=step)).backward()
        optimizer.step()
    return model


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the frozen weights of the adapted layers."""
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers_of(model).items()}


@starts
def test_the_frozen_weight_and_the_initial_update_are_the_base_weight(init, kind):
    model, base = attached(init, kind), bare(kind)
    for name, layer in layers_of(model).items():
        weight, update = base.get_submodule(name).weight.double(), delta(layer)
        assert_equal(layer.get_base_layer().weight + (update.T if kind == "gpt2" else update), weight, atol=1e-6)
        if init == "pissa":
            u, s, v = torch.linalg.svd(weight.T if kind == "gpt2" else weight, full_matrices=False)
            assert_equal(update, u[:, :RANK] * s[:RANK] @ v[:RANK], atol=1e-5)
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trained and all("lora_A" in name or "lora_B" in name for name in trained)
    assert not any("initial" in name for name in trained)


@pytest.mark.parametrize(
    ("init", "kind", "method"),
    quick(
        [(*start, "lora") for start in STARTS] + [("olora", "llama", "rslora")],
        ("pissa", "gpt2", "lora"),
        ("olora", "llama", "rslora"),
    ),
)
def test_the_exported_lora_on_the_stock_base_is_the_trained_model(init, kind, method, tmp_path):
    model = attached(init, kind, method, rank_pattern={"layers.1.self_attn.q_proj": 2} if kind == "llama" else {})
    start = {name: delta(layer) for name, layer in layers_of(model).items()}
    expected = run(train(model, kind).eval(), MODELS[kind][1](seed=9))
    by_hand = {name: delta(layer) - start[name] for name, layer in layers_of(model).items()}
    assert all(update.norm() > 0.01 for update in by_hand.values())
    plain = METHODS[method].plain_lora(model)
    assert plain is model and plain.peft_config["default"].init_lora_weights is True
    for name, layer in layers_of(plain).items():
        assert_equal(delta(layer), by_hand[name])
        rank = 4 if "layers.1.self" in name else 2 * RANK
        assert layer.lora_A["default"].weight.shape[0] == rank and not any(hasattr(layer, part) for part in INITIAL)
        assert_equal(frozen(plain)[name], bare(kind).get_submodule(name).weight.double(), atol=1e-6)
    assert_equal(run(plain, MODELS[kind][1](seed=9)), expected, atol=1e-10)
    export_peft(plain, tmp_path)
    loaded = PeftModel.from_pretrained(bare(kind), tmp_path).double().eval()
    assert_equal(run(loaded, MODELS[kind][1](seed=9)), expected, atol=1e-4)
    summed = bare(kind).double()
    summed.load_state_dict(merged_state_dict(base_model(plain)))
    assert_equal(run(summed.eval(), MODELS[kind][1](seed=9)), expected, atol=1e-10)
    if kind == "unet":
        export_kohya(plain, tmp_path / "kohya.safetensors"), export_diffusers(plain, tmp_path)
        written = load_file(tmp_path / "kohya.safetensors")
        assert {len(value) for name, value in written.items() if "lora_down" in name} == {2 * RANK}


def test_the_converted_lora_is_that_of_peft(tmp_path):
    """PEFT converts with a file of the initial adapter."""
    ours = attached("pissa", "llama").float()
    theirs = get_peft_model(
        bare("llama"),
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODELS["llama"][2], init_lora_weights="pissa"),
    )
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    noise = torch.Generator().manual_seed(0)
    for one, other in zip(layers_of(ours).values(), layers_of(theirs).values(), strict=True):
        for part in ("lora_A", "lora_B"):
            mine, other_one = getattr(one, part)["default"].weight, getattr(other, part)["default"].weight
            assert torch.equal(mine, other_one)
            change = torch.randn(mine.shape, generator=noise) / 3
            mine.data += change
            other_one.data += change
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    export_peft(METHODS["lora"].plain_lora(ours), tmp_path / "ours")
    both = [PeftModel.from_pretrained(bare("llama"), tmp_path / name).double() for name in ("ours", "theirs")]
    for one, other in zip(*(layers_of(model).values() for model in both), strict=True):
        torch.testing.assert_close(delta(one), delta(other), rtol=0, atol=2e-6)


def test_the_base_model_is_available_during_training():
    model = train(attached("pissa", "unet"), "unet").eval()
    trained, expected = run(model, unet_inputs()), run(bare("unet").double().eval(), unet_inputs())
    with without_adapters(model):
        assert_equal(run(model, unet_inputs()), expected, atol=1e-5)
    assert torch.equal(run(model, unet_inputs()), trained) and (trained - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_model_has_the_same_frozen_weights(dtype, tmp_path):
    """The same bits on the same machine; up to rounding where the decomposition has another result."""
    model = attached("pissa_niter_1", "llama").to(dtype)
    before = frozen(model)
    with torch.no_grad():
        for value in (p for p in model.parameters() if p.requires_grad):
            value.normal_()
    save_adapter(model, tmp_path)
    assert {name.split(".")[-2] for name in trained_state(model)} >= set(INITIAL)
    same, other = attached("pissa_niter_1", "llama").to(dtype), None
    load_adapter(same, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in frozen(same).items())
    assert torch.equal(run(same, token_inputs()), run(model, token_inputs()))
    other = attached("pissa", "llama").to(dtype)  # whose factors are others
    load_adapter(other, tmp_path)
    for name, value in frozen(other).items():
        assert_equal(value, before[name], atol=8 * torch.finfo(dtype).eps)
    assert_equal(run(copy.deepcopy(same), token_inputs()), run(model, token_inputs()))


def test_orthogonal_factors_have_a_product_of_zero_and_both_are_trained():
    model, base = attached("orthogonal", "llama"), bare("llama").double()
    assert_equal(run(model, token_inputs()), run(base, token_inputs()), atol=1e-5)
    loss_of(model, token_inputs()).backward()
    for layer in layers_of(model).values():
        for part in (layer.lora_A, layer.lora_B):
            assert part["default"].weight.norm() > 0.1 and part["default"].weight.grad.norm() > 0
        assert not any(hasattr(layer, name) for name in INITIAL)


@pytest.mark.parametrize(("init", "kind", "layer"), [("pissa", "unet", "conv_in"), ("olora", "gpt2", "c_attn")])
def test_other_layers_are_refused(init, kind, layer):
    with pytest.raises(ValueError) as error:
        attached(init, kind, targets=[layer])
    assert_one_line(error, layer, f"init_lora_weights='{init}'")


def test_the_alpha_divides_the_initial_factors():
    """So the initial update is the same for every scale: PEFT's `s B_0 A_0`, with s = alpha / r or alpha / sqrt(r)."""
    plain, doubled, rooted = (attached("pissa", "llama", method) for method in ("lora", "lora_x2", "rslora"))
    for one, *others in zip(*(layers_of(model).values() for model in (plain, doubled, rooted)), strict=True):
        for other in others:
            assert_equal(delta(other), delta(one), atol=1e-5)
    assert {layer.scaling["default"] for layer in layers_of(rooted).values()} == {ALPHA / math.sqrt(RANK)}
