"""The methods: configured, attached to models of transformers and diffusers, saved, loaded, converted to plain LoRA."""

import math
from types import SimpleNamespace

import pytest
import torch
from core_models import Stack, assert_one_line, tiny_bert, tiny_llama, tiny_unet, token_inputs, unet_inputs
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import reslora
from reslora.errors import RunFailed
from reslora.io import write_checksums
from reslora.linking import base_model
from reslora.methods.adapters import (
    as_plain_lora,
    attach,
    check_rank,
    known_targets,
    load_adapter,
    rank_allocator,
    save_adapter,
    targeted,
    trained_state,
)
from reslora.methods.registry import METHODS, AdapterSettings, adapter_config
from reslora.model import connection_of

FLAGS = {"r": 4, "alpha": 8, "dropout": 0.0, "total_steps": 10}
TARGETS = {"llama": ["q_proj", "v_proj"], "unet": ["to_q", "to_v"]}
MODELS = {"llama": (tiny_llama, token_inputs, "logits"), "unet": (tiny_unet, unet_inputs, "sample")}


def build(method: str, kind: str = "llama", shortcut: str = "input", seed: int = 0, **flags) -> torch.nn.Module:
    """Return a model with the method's adapter, with random weights wherever training can change them."""
    torch.manual_seed(0)
    base = MODELS[kind][0]()
    config = adapter_config(method, AdapterSettings(**{**FLAGS, "targets": TARGETS[kind], **flags}))
    shortcuts = reslora.ResLoraConfig(shortcut=shortcut) if method == "reslora" else None
    return randomized(attach(base, config, shortcuts).double(), seed)


@torch.no_grad()
def randomized(model, seed: int):
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        if value.requires_grad:
            value.copy_(torch.randn(value.shape, generator=generator) / 3)
    return model


@torch.no_grad()
def outputs(model, kind: str = "llama") -> torch.Tensor:
    _, inputs, name = MODELS[kind]
    return getattr(model.eval()(**inputs()), name)


def values(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


# -- configuration -----------------------------------------------------------------------------------------------------


def test_lora_x2_is_lora_with_doubled_alpha_and_reslora_is_lora():
    settings = AdapterSettings(**{**FLAGS, "dropout": 0.1}, targets=["q_proj"], init_lora_weights="gaussian")
    lora, doubled, wired = (adapter_config(method, settings) for method in ("lora", "lora_x2", "reslora"))
    assert (lora.lora_alpha, doubled.lora_alpha) == (8, 16)
    assert {**doubled.to_dict(), "lora_alpha": 8} == lora.to_dict() == wired.to_dict()
    assert (lora.r, lora.lora_dropout, lora.init_lora_weights) == (4, 0.1, "gaussian")
    assert adapter_config("adalora", settings).init_lora_weights is True


def test_adalora_moves_ranks_between_a_tenth_and_a_half_of_the_steps():
    settings = AdapterSettings(**{**FLAGS, "total_steps": 1000, "targets": ["q_proj"]})
    config = adapter_config("adalora", settings)
    assert (config.tinit, config.tfinal, config.total_step, config.deltaT, config.lora_alpha) == (100, 500, 1000, 10, 8)


@pytest.mark.parametrize("total_steps", [1, 10])
def test_adalora_has_a_schedule_for_any_number_of_steps(total_steps):
    config = adapter_config("adalora", AdapterSettings(**{**FLAGS, "targets": ["q_proj"], "total_steps": total_steps}))
    assert (config.init_r, config.target_r) == (6, 4)
    assert config.tinit < config.total_step - config.tfinal and config.deltaT >= 1


def test_known_targets_are_query_and_value():
    assert known_targets("llama") == ["q_proj", "v_proj"]
    assert known_targets("roberta") == known_targets("bert") == ["query", "value"]
    assert known_targets("nothing") is None


# -- attaching ---------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_as_the_base_model_and_trains_its_targets(method, kind):
    torch.manual_seed(0)
    base = MODELS[kind][0]()
    expected = outputs(base, kind)
    shortcuts = reslora.ResLoraConfig(shortcut="middle", pre_num=2) if method == "reslora" else None
    model = attach(base, adapter_config(method, AdapterSettings(**FLAGS, targets=TARGETS[kind])), shortcuts)
    assert isinstance(model, PeftModel) == (kind == "llama") and (model is base) == (kind == "unet")
    torch.testing.assert_close(outputs(model, kind), expected)
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trained and all(any(f".{target}." in name for target in TARGETS[kind]) for name in trained)
    assert (connection_of(base_model(model)) is not None) == (method == "reslora")
    assert (rank_allocator(model) is not None) == (method == "adalora")


def test_other_models_are_wrapped():
    assert isinstance(attach(Stack(), adapter_config("lora", AdapterSettings(**FLAGS, targets=["proj"]))), PeftModel)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_rank_larger_than_a_layer_is_refused_before_anything_is_made(method):
    base = tiny_llama()
    config = adapter_config(method, AdapterSettings(**{**FLAGS, "r": 100_000}, targets=["q_proj", "v_proj"]))
    with pytest.raises(ValueError) as error:  # v_proj is the narrower: 32 in, 16 out
        attach(base, config)
    assert_one_line(error, "rank 100000", "model.layers.0.self_attn.v_proj", "at most 16")
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize(
    ("build_base", "targets", "most"),
    [(tiny_llama, ["q_proj"], 32), (tiny_llama, "all-linear", 16), (tiny_llama, r".*\.mlp\.(up|down)_proj", 32)],
)
def test_the_largest_rank_is_the_smaller_side_of_the_narrowest_layer(build_base, targets, most):
    base = build_base()
    check_rank(base, LoraConfig(r=most, target_modules=targets))
    with pytest.raises(ValueError, match=f"at most {most}"):
        check_rank(base, LoraConfig(r=most + 1, target_modules=targets))


def test_what_trains_whole_is_no_target():
    """The classifier has two outputs; PEFT adapts neither it nor modules below the pooler."""
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["classifier", "bert.pooler"])
    check_rank(tiny_bert(), config)
    found = [name for name, _ in targeted(tiny_bert(), config)]
    assert found == get_peft_model(tiny_bert(), config).targeted_module_names


def test_adalora_is_measured_by_the_rank_that_was_asked_for_and_lokr_by_none():
    """`check_rank` and `attach` raise an error for a rank that is too high."""
    settings = AdapterSettings(**{**FLAGS, "r": 16}, targets=["v_proj"])
    check_rank(tiny_llama(), adapter_config("adalora", settings))  # begins with 24
    attach(tiny_llama(), adapter_config("lokr", AdapterSettings(**{**FLAGS, "r": 100_000}, targets=["v_proj"])))


def test_adalora_trains_only_what_peft_saves():
    settings = AdapterSettings(**FLAGS, targets=TARGETS["llama"])
    model = attach(tiny_llama().to(torch.bfloat16), adapter_config("adalora", settings))
    trained = {name.split(".")[-2] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"lora_A", "lora_B", "lora_E"}


def test_adalora_refuses_convolutions():
    with pytest.raises(ValueError) as error:
        attach(tiny_unet(), adapter_config("adalora", AdapterSettings(**FLAGS, targets=["to_q", "conv_in"])))
    assert_one_line(error, "conv_in is a convolution", "AdaLoRA", "another method")


# -- AdaLoRA -----------------------------------------------------------------------------------------------------------


def layers_of(model) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_E")]


@pytest.mark.parametrize("kind", MODELS)
def test_the_penalty_is_the_papers_regularizer(kind):
    model = build("adalora", kind)
    by_hand = []
    for layer in layers_of(model):
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        by_hand.append(math.sqrt(((a @ a.T - torch.eye(6)) ** 2).sum().item()))
        by_hand.append(math.sqrt(((b.T @ b - torch.eye(6)) ** 2).sum().item()))
    expected = 0.5 * sum(by_hand) / len(by_hand)  # PEFT's weight
    allocator = rank_allocator(model)
    assert allocator.penalty().item() == pytest.approx(expected, rel=1e-12)
    assert [p for p in allocator.factors() if p.requires_grad] == allocator.factors()


def accelerated(scale: float | None = None, sync_gradients: bool = True) -> SimpleNamespace:
    """Return the accelerator's attributes that the method reads, with an fp16 scaler if there is a scale."""
    scaler = SimpleNamespace(get_scale=lambda: scale) if scale else None
    return SimpleNamespace(scaler=scaler, sync_gradients=sync_gradients)


def test_a_gradient_added_is_that_of_the_penalty_in_the_loss():
    """Multiplied by the scale of an fp16 scaler, and only after the last forward pass of a step."""
    model = build("adalora")
    allocator = rank_allocator(model)
    loss = model(**token_inputs()).logits.square().mean()
    (loss + allocator.penalty()).backward()
    expected = [factor.grad.clone() for factor in allocator.factors()]
    model.zero_grad()
    model(**token_inputs()).logits.square().mean().backward()
    allocator.add_gradient(accelerated(sync_gradients=False))
    allocator.add_gradient(accelerated())
    for factor, gradient in zip(allocator.factors(), expected, strict=True):
        torch.testing.assert_close(factor.grad, gradient)
    allocator.add_gradient(accelerated(scale=2.0))
    for factor, gradient in zip(allocator.factors(), expected, strict=True):
        single = torch.autograd.grad(allocator.penalty(), factor)[0]
        torch.testing.assert_close(factor.grad, gradient + 2 * single)


def train(model, kind: str, steps: range, optimizer) -> None:
    _, inputs, name = MODELS[kind]
    allocator = rank_allocator(model)
    for step in steps:
        loss = getattr(model(**inputs(seed=step)), name).square().mean()
        (loss + allocator.penalty()).backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", MODELS)
def test_ranks_are_moved_and_a_restored_allocator_goes_on_alike(tmp_path, kind):
    stopped = 3

    def fresh(seed=0):
        model = build("adalora", kind, seed=seed).train()
        return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)

    whole, optimizer = fresh()
    train(whole, kind, range(1, stopped + 1), optimizer)
    save_file(rank_allocator(whole).state_dict(), tmp_path / "allocator.safetensors")
    save_adapter(whole, tmp_path)
    train(whole, kind, range(stopped + 1, 11), optimizer)
    kept = [int((layer.lora_E["default"] != 0).sum()) for layer in layers_of(whole)]
    assert sum(kept) == 4 * len(kept) and len(set(kept)) > 1

    resumed, optimizer = fresh(seed=5)
    load_adapter(resumed, tmp_path)
    rank_allocator(resumed).load_state_dict(load_file(tmp_path / "allocator.safetensors"))
    train(resumed, kind, range(stopped + 1, 11), optimizer)
    assert_same(trained_state(whole), trained_state(resumed))
    assert_same(rank_allocator(whole).state_dict(), rank_allocator(resumed).state_dict())


@pytest.mark.parametrize(("steps", "first"), [(2, "ipt"), (7, "ranks")])
def test_an_allocators_state_of_another_model_is_refused(steps, first):
    model, other = build("adalora"), build("adalora", "unet").train()
    train(other, "unet", range(1, steps + 1), torch.optim.SGD(other.parameters(), lr=0.01))
    before = rank_allocator(model).state_dict()
    with pytest.raises(ValueError, match=f"does not fit the model; the first difference is {first}/"):
        rank_allocator(model).load_state_dict(rank_allocator(other).state_dict())
    assert_same(before, rank_allocator(model).state_dict())


def test_plain_lora_computes_what_adalora_did():
    model = build("adalora", "unet").train()
    train(model, "unet", range(1, 11), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05))
    expected = outputs(model, "unet")
    frozen = {name: module.weight for name, module in model.named_modules() if name.endswith("base_layer")}
    plain = as_plain_lora(model.train(False))
    assert plain is model and {module.training for module in plain.modules()} == {False}
    torch.testing.assert_close(outputs(plain, "unet"), expected, rtol=1e-12, atol=1e-12)
    assert not layers_of(plain) and rank_allocator(plain) is None
    for name, weight in frozen.items():  # the same tensors: no base was loaded again
        assert model.get_submodule(name).weight is weight and not weight.requires_grad
    config = model.peft_config["default"]
    assert (config.peft_type.value, config.r, config.lora_alpha) == ("LORA", 6, 6)
    assert config.target_modules == set(TARGETS["unet"])
    reslora.connect(plain, reslora.ResLoraConfig(shortcut="block"))  # it is LoRA for every tool
    reslora.disconnect(plain)


def test_a_plain_lora_keeps_the_dtypes_of_base_and_adapter():
    base = tiny_unet().to(torch.bfloat16)
    config = adapter_config("adalora", AdapterSettings(**FLAGS, targets=TARGETS["unet"]))
    model = randomized(attach(base, config), 3)
    for value in model.parameters():
        value.data = value.data.float() if value.requires_grad else value.data
    plain = as_plain_lora(model)
    layer = next(module for module in plain.modules() if hasattr(module, "lora_A"))
    assert layer.lora_A["default"].weight.dtype == torch.float32 and layer.base_layer.weight.dtype == torch.bfloat16


# -- saving and loading ------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_the_trained_state_is_all_that_was_added_and_nothing_else(method, kind):
    model, bare = build(method, kind), MODELS[kind][0]()
    prefix = "base_model.model." if kind == "llama" else ""
    own = {f"{prefix}{name}" for name, _ in [*bare.named_parameters(), *bare.named_buffers()]}
    every = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    state = trained_state(model)
    assert state.keys() == {name for name in every if name.replace(".base_layer", "") not in own}
    assert {name for name, value in model.named_parameters() if value.requires_grad} <= state.keys()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_loads_to_the_last_bit(tmp_path, method, kind):
    model, other = build(method, kind), build(method, kind, seed=7)
    assert not torch.equal(outputs(model, kind), outputs(other, kind))
    save_adapter(model, tmp_path)
    names = {"reslora_config.json", "reslora_model.safetensors"} if method == "reslora" else {"adapter.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"checksums.json"}
    load_adapter(other, tmp_path)
    assert_same(trained_state(model), trained_state(other))
    assert torch.equal(outputs(model, kind), outputs(other, kind))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = build("lora")
    name, weight = list(trained_state(model).items())[-1]
    weight.view(-1)[0] = math.nan  # storage is shared
    with pytest.raises(RunFailed, match="is not finite; lower --learning_rate") as error:
        save_adapter(model, tmp_path / "checkpoint")
    assert_one_line(error, name)
    assert not (tmp_path / "checkpoint").exists()


def test_one_flipped_bit_is_refused(tmp_path):
    model = build("lora")
    save_adapter(model, tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    before = values(model)
    with pytest.raises(ValueError, match="damaged") as error:
        load_adapter(model, tmp_path)
    assert_one_line(error, path.name)
    assert_same(before, values(model))


def shorter(state: dict) -> None:
    state.popitem()


def reshaped(state: dict) -> None:
    state[next(iter(state))] = torch.zeros(3, 5)


@pytest.mark.parametrize("change", [shorter, reshaped])
def test_an_adapter_that_does_not_fit_changes_nothing(tmp_path, change):
    model = build("lokr")
    save_adapter(build("lokr", seed=8), tmp_path)
    state = load_file(tmp_path / "adapter.safetensors")
    change(state)
    save_file(state, tmp_path / "adapter.safetensors")
    write_checksums(tmp_path, ["adapter.safetensors"])
    before = values(model)
    with pytest.raises(ValueError) as error:
        load_adapter(model, tmp_path)
    assert_one_line(error, "adapter.safetensors does not fit")
    assert_same(before, values(model))


@pytest.mark.parametrize("content", [None, b"\0" * 20])
def test_a_missing_or_broken_file_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "adapter.safetensors").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_adapter(build("lora"), tmp_path)
    assert_one_line(error, "adapter.safetensors")


def test_a_model_that_peft_has_wrapped_itself_is_known():
    model = get_peft_model(tiny_llama(), AdaLoraConfig(target_modules=["q_proj"], total_step=10))
    assert rank_allocator(model) is not None
    assert rank_allocator(tiny_llama()) is None and trained_state(tiny_llama()) == {}
