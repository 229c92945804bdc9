"""PiSSA on an unchanged base model: its start, its update, plain LoRA of twice the rank, and PEFT's PiSSA."""

import copy
import shutil

import pytest
import torch
from core_models import (
    Stack,
    adapter_layers,
    assert_equal,
    assert_one_line,
    base_weight,
    delta,
    fix_dropout,
    gradients_of,
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
from torch import nn

import reslora
from reslora.chains import base_model
from reslora.export import export_diffusers, export_kohya, export_peft, merged_state_dict
from reslora.methods.adapters import (
    attach,
    load_adapter,
    remove_adapters,
    save_adapter,
    trained_state,
    without_adapters,
)
from reslora.methods.pissa import INITIAL, merged
from reslora.methods.registry import METHODS, AdapterSettings, adapter_config

MODELS = {
    "llama": (tiny_llama, token_inputs, ["q_proj", "down_proj"]),
    "gpt2": (tiny_gpt2, token_inputs, ["c_attn"]),  # its weights are stored transposed
    "unet": (tiny_unet, unet_inputs, ["to_q", "to_out.0"]),
}
models = pytest.mark.parametrize("kind", MODELS)
RANK, ALPHA = 3, 5


def bare(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind][0]().double()


def pissa(kind: str, **settings) -> nn.Module:
    values = {"r": RANK, "alpha": ALPHA, "dropout": 0.0, "total_steps": 10, "targets": MODELS[kind][2], **settings}
    return attach(bare(kind), adapter_config("pissa", AdapterSettings(**values)))


def train(model: nn.Module, kind: str, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, MODELS[kind][1](seed=step)).backward()
        optimizer.step()
    return model


@models
def test_it_starts_as_the_base_model_from_principal_singular_vectors(kind):
    model, base = pissa(kind), bare(kind)
    torch.testing.assert_close(run(model, MODELS[kind][1]()), run(base, MODELS[kind][1]()), rtol=1e-12, atol=1e-12)
    for layer in adapter_layers(model).values():
        weight, update = base_weight(layer), delta(layer)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        assert_equal(update, u[:, :RANK] * s[:RANK] @ v[:RANK])
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        singular = torch.diag(s[:RANK] / (ALPHA / RANK))
        assert_equal(a @ a.T, singular), assert_equal(b.T @ b, singular)
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert all("lora_A" in name or "lora_B" in name for name in trained) and len(trained) == 2 * len(
        adapter_layers(model)
    )


@models
def test_forward_and_gradients_are_those_of_lora_on_the_residual(kind):
    """PEFT's PiSSA by hand, with dropout: LoRA with the same factors whose base is `W - s B_0 A_0`."""
    model = pissa(kind, dropout=0.4)
    residual = get_peft_model(bare(kind), LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.4, target_modules=MODELS[kind][2], fan_in_fan_out=kind == "gpt2"
    )).train()  # fmt: skip
    with torch.no_grad():
        for one, other in zip(adapter_layers(model).values(), adapter_layers(residual).values(), strict=True):
            weight = other.base_layer.weight
            weight -= delta(one).T if kind == "gpt2" else delta(one)
            for part in ("lora_A", "lora_B"):
                noise = torch.randn(getattr(one, part)["default"].weight.shape, dtype=torch.float64) / 3
                getattr(one, part)["default"].weight += noise
                getattr(other, part)["default"].weight.copy_(getattr(one, part)["default"].weight)
    fix_dropout(model.train()), fix_dropout(residual)
    assert_equal(run(model, MODELS[kind][1]()), run(residual, MODELS[kind][1]()))
    found, expected = (list(gradients_of(each, MODELS[kind][1]()).values()) for each in (model, residual))
    assert len(found) > 0
    assert_equal(found, expected)


@models
def test_the_exported_lora_on_the_stock_base_is_the_trained_model(kind, tmp_path):
    model = pissa(kind, rank_pattern={"layers.1.self_attn.q_proj": 2} if kind == "llama" else {})
    start = {name: delta(layer) for name, layer in adapter_layers(model).items()}
    train(model, kind)
    expected = run(model.eval(), MODELS[kind][1](seed=9))
    assert (expected - run(bare(kind), MODELS[kind][1](seed=9))).abs().max() > 1e-3
    by_hand = {name: delta(layer) - start[name] for name, layer in adapter_layers(model).items()}
    plain = METHODS["pissa"].plain_lora(model)
    assert plain is model
    for name, layer in adapter_layers(plain).items():
        assert_equal(delta(layer), by_hand[name])
        assert layer.lora_A["default"].weight.shape[0] == (4 if "layers.1.self" in name else 2 * RANK)
        assert not layer.lora_variant and not any(hasattr(layer, part) for part in INITIAL)
    assert_equal(run(plain, MODELS[kind][1](seed=9)), expected, atol=1e-10)
    export_peft(plain, tmp_path)
    loaded = PeftModel.from_pretrained(bare(kind), tmp_path).eval()
    assert_equal(run(loaded, MODELS[kind][1](seed=9)), expected, atol=1e-10)
    summed = bare(kind)
    summed.load_state_dict(merged_state_dict(base_model(plain)))
    assert_equal(run(summed.eval(), MODELS[kind][1](seed=9)), expected, atol=1e-10)
    if kind == "unet":
        export_kohya(plain, tmp_path / "kohya.safetensors"), export_diffusers(plain, tmp_path)
        written = load_file(tmp_path / "kohya.safetensors")
        assert {len(value) for name, value in written.items() if "lora_down" in name} == {2 * RANK}


def test_the_start_and_the_converted_lora_are_those_of_peft(tmp_path):
    """PEFT converts with its initial adapter; it initializes in float32 only."""
    ours = attach(bare("llama").float(), adapter_config("pissa", AdapterSettings(
        r=RANK, alpha=ALPHA, dropout=0.0, targets=MODELS["llama"][2], total_steps=10
    )))  # fmt: skip
    theirs = get_peft_model(bare("llama").float(), LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=MODELS["llama"][2], init_lora_weights="pissa"
    ))  # fmt: skip
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    noise = torch.Generator().manual_seed(0)
    for one, other in zip(adapter_layers(ours).values(), adapter_layers(theirs).values(), strict=True):
        for part in ("lora_A", "lora_B"):
            mine, other_one = getattr(one, part)["default"].weight, getattr(other, part)["default"].weight
            assert torch.equal(mine, other_one)
            change = torch.randn(mine.shape, generator=noise) / 3
            mine.data += change
            other_one.data += change
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    export_peft(merged(ours), tmp_path / "ours")
    both = [
        PeftModel.from_pretrained(bare("llama"), tmp_path / name, autocast_adapter_dtype=False).double().eval()
        for name in ("ours", "theirs")
    ]
    for one, other in zip(*(adapter_layers(model).values() for model in both), strict=True):
        torch.testing.assert_close(delta(one), delta(other), rtol=0, atol=2e-6)
    torch.testing.assert_close(*(run(model, token_inputs()) for model in both), rtol=0, atol=1e-5)


def test_the_base_model_is_unchanged_and_shared():
    base = bare("unet")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    settings = AdapterSettings(r=RANK, alpha=ALPHA, dropout=0.0, targets=MODELS["unet"][2], total_steps=10)
    model = train(attach(base, adapter_config("pissa", settings)), "unet")
    expected = run(bare("unet"), unet_inputs())
    with without_adapters(model):
        torch.testing.assert_close(run(model, unet_inputs()), expected, rtol=1e-12, atol=1e-12)
    assert (run(model, unet_inputs()) - expected).abs().max() > 1e-6
    remove_adapters(base)
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_checkpoint_has_the_initial_factors(tmp_path):
    model = train(pissa("llama"), "llama")
    assert {name.split(".")[-2] for name in trained_state(model)} >= set(INITIAL)
    save_adapter(model, tmp_path)
    expected = run(model, token_inputs())
    other = pissa("llama")
    parameters = list(other.parameters())
    with torch.no_grad():
        for name, value in other.named_parameters():
            if "lora_" in name:
                value.zero_()  # as if the decomposition had another result on another machine
    load_adapter(other, tmp_path)
    assert torch.equal(run(other, token_inputs()), expected)
    assert all(one is two for one, two in zip(other.parameters(), parameters, strict=True))
    shutil.copytree(tmp_path, tmp_path / "copy")
    copied = copy.deepcopy(other)
    assert torch.equal(run(copied, token_inputs()), expected)
    assert_equal(run(merged(copied), token_inputs()), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_keeps_the_base_model_at_the_start(autocast):
    """The residual of PEFT's PiSSA would be rounded to bfloat16; here the weight is unchanged."""
    base = bare("llama").float() if autocast else bare("llama").bfloat16()
    settings = AdapterSettings(r=RANK, alpha=ALPHA, dropout=0.0, targets=["q_proj"], total_steps=10)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = run(base, token_inputs())
        model = attach(base, adapter_config("pissa", settings))
        assert torch.equal(run(model, token_inputs()), expected)
    assert {layer.lora_A["default"].weight.dtype for layer in adapter_layers(model).values()} == {torch.float32}


def test_other_layers_and_shortcuts_are_refused():
    settings = AdapterSettings(r=2, alpha=4, dropout=0.0, targets=["conv_in", "to_q"], total_steps=10)
    base = bare("unet")
    with pytest.raises(ValueError) as error:
        attach(base, adapter_config("pissa", settings))
    assert_one_line(error, "conv_in", "PiSSA")
    assert not adapter_layers(base)
    settings = AdapterSettings(r=2, alpha=4, dropout=0.0, targets=["proj"], total_steps=10)
    model = attach(Stack().double(), adapter_config("pissa", settings))
    with pytest.raises(ValueError, match="variant"):
        reslora.connect(model, reslora.ResLoraConfig("middle"), example_inputs={"x": torch.zeros(1, 4, 6).double()})
