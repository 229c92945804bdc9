"""Refusals before a model is connected, and while it is."""

import copy
import pickle

import pytest
import torch
from core_models import (
    RANK,
    STACK_INPUTS,
    assert_equal,
    assert_one_line,
    lora_stack,
    randomize,
    run,
    tiny_llama,
)
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners import lora
from peft.tuners.lora import LoraModel
from peft.utils import hotswap
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from transformers import Trainer, TrainingArguments

import reslora
from reslora import ResLoraConfig

WIRED = [ResLoraConfig("block", 2), ResLoraConfig("middle", 2)]
wired = pytest.mark.parametrize("config", WIRED, ids=lambda config: config.shortcut)
NAMES = ("reslora.merge", "reslora.save")


def connected(arch, config=WIRED[0], **lora):
    model = arch.lora(**lora)
    reslora.connect(model, config)
    return model


def injected(config=WIRED[0]):
    """A connected transformers model whose adapter was added in place."""
    config_of_peft = LoraConfig(r=RANK, lora_alpha=5, target_modules=["q_proj", "v_proj"])
    model = randomize(inject_adapter_in_model(config_of_peft, tiny_llama()))
    reslora.connect(model, config)
    return model


@pytest.mark.parametrize("gone", ["forward", "lora_variant"])
def test_a_peft_that_does_not_call_variants_is_refused(monkeypatch, gone):
    """Its layers would train plain LoRA."""
    model, before = lora_stack(), torch.get_rng_state()
    expected = run(model, STACK_INPUTS)
    with monkeypatch.context() as changed:
        if gone == "forward":
            changed.setattr(lora.Linear, "forward", lambda self, x: self.base_layer(x))
        else:
            changed.setattr(lora.Linear, "__init__", without_variants(lora.Linear.__init__))
        assert_refused(
            lambda: reslora.connect(model, WIRED[0], example_inputs=STACK_INPUTS), "peft", "variants", "install"
        )
    assert torch.equal(run(model, STACK_INPUTS), expected)
    reslora.connect(model, WIRED[0], example_inputs=STACK_INPUTS)
    assert torch.equal(torch.get_rng_state(), before)


def without_variants(initialize):
    def changed(layer, *args, **kwargs):
        initialize(layer, *args, **kwargs)
        del layer.lora_variant

    return changed


def assert_refused(call, *words: str) -> None:
    with pytest.raises(RuntimeError) as error:
        call()
    assert_one_line(error, *words)


def plain_folder(arch, directory) -> str:
    """A folder with a plain LoRA of another seed, saved by stock PEFT."""
    arch.lora(seed=8).save_pretrained(directory)
    return str(directory)


def instance_methods(model: nn.Module) -> list[str]:
    """Return the attributes of instances that replace their methods."""
    return [key for module in model.modules() for key in vars(module) if callable(getattr(type(module), key, None))]


# --- saving -----------------------------------------------------------------------------------------------------------


@wired
def test_saving_a_connected_peft_model_is_refused_until_it_is_plain(llama, tmp_path, config):
    model = connected(llama, config)
    assert_refused(lambda: model.save_pretrained(tmp_path / "out"), "save_pretrained", "'default'", *NAMES)
    assert_refused(lambda: model.save_pretrained(tmp_path / "out", selected_adapters=["default"]), *NAMES)
    assert not (tmp_path / "out").exists()
    reslora.disconnect(model)
    model.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(llama.lora().unload(), tmp_path / "out")
    assert_equal(run(loaded, llama.inputs()), run(model, llama.inputs()))


def test_a_merged_model_is_saved(llama, tmp_path):
    model = connected(llama, ResLoraConfig("block", 2))
    reslora.merge(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama.lora().unload(), tmp_path)
    assert_equal(run(loaded, llama.inputs()), run(model, llama.inputs()))


@wired
def test_saving_a_connected_transformers_model_is_refused(llama, tmp_path, config):
    model = injected(config)
    assert_refused(lambda: model.save_pretrained(tmp_path / "out"), "save_pretrained", *NAMES)
    assert_refused(lambda: model.push_to_hub("nobody/nothing"), "push_to_hub", *NAMES)
    assert not (tmp_path / "out").exists()
    reslora.disconnect(model)
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("verb", ["save_pretrained", "save_lora_adapter"])
@wired
def test_saving_a_connected_unet_is_refused(unet, tmp_path, verb, config):
    model = connected(unet, config)
    assert_refused(lambda: getattr(model, verb)(tmp_path / "out"), verb, *NAMES)
    assert not (tmp_path / "out").exists()
    reslora.merge(model, "none")
    getattr(model, verb)(tmp_path / "out")
    assert any((tmp_path / "out").iterdir())


def test_a_base_that_was_connected_without_its_wrapper_refuses_too(llama, tmp_path):
    model = llama.lora()
    reslora.connect(model.get_base_model(), WIRED[0])
    assert_refused(lambda: model.get_base_model().save_pretrained(tmp_path / "out"), *NAMES)


@pytest.mark.exhaustive
@wired
def test_a_checkpoint_of_the_stock_trainer_is_refused(llama, tmp_path, config):
    """`Trainer` saves by `save_pretrained`, which would drop the shortcuts."""
    model = connected(llama, config)
    data = [{"input_ids": [2, 3, 4, 5], "labels": [2, 3, 4, 5]}] * 2
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    assert_refused(Trainer(model, arguments, train_dataset=data).train, "save_pretrained", *NAMES)
    assert not list(tmp_path.rglob("adapter_*"))


@wired
def test_another_adapter_is_saved_as_ever(llama, tmp_path, config):
    model = connected(llama, config)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert (tmp_path / "other" / "adapter_model.safetensors").exists()
    assert_refused(lambda: model.save_pretrained(tmp_path / "all"), *NAMES)


@pytest.mark.exhaustive
def test_without_a_shortcut_nothing_is_refused(llama, unet, tmp_path):
    config = ResLoraConfig("none")
    model = connected(llama, config)
    model.save_pretrained(tmp_path / "llama")
    model.load_adapter(str(tmp_path / "llama"), "default", torch_device="cpu")
    connected(unet, config).save_lora_adapter(tmp_path / "unet")
    expected = run(model, llama.inputs())
    model.merge_adapter()
    assert_equal(run(model, llama.inputs()), expected)


@pytest.mark.exhaustive
@wired
def test_handing_out_the_connected_weights_is_refused_until_they_are_plain(llama, tmp_path, config):
    """diffusers' own script passes these weights to `save_lora_weights`."""
    model = connected(llama, config)
    base = model.get_base_model()
    for asked in (model, model.base_model, torch.compile(model)):
        assert_refused(
            lambda asked=asked: get_peft_model_state_dict(asked), "get_peft_model_state_dict", "'default'", *NAMES
        )
    assert_refused(lambda: get_peft_model_state_dict(model, state_dict=model.state_dict()), *NAMES)
    base.peft_config = model.peft_config
    assert_refused(lambda: get_peft_model_state_dict(base), *NAMES)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(whole)
    reslora.save(model, tmp_path)
    loaded = reslora.load(randomize(llama.lora(), seed=8), tmp_path)
    assert_equal(run(loaded, llama.inputs()), run(model, llama.inputs()))
    reslora.disconnect(model)
    plain = randomize(llama.lora(), seed=8)
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    assert_equal(run(plain, llama.inputs()), run(model, llama.inputs()))


# --- combining and replacing ------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@wired
def test_combining_the_connected_adapter_is_refused(llama, config):
    model = llama.lora()
    for name in ("other", "third"):
        model.add_adapter(name, LoraConfig(r=RANK, lora_alpha=5, target_modules=llama.targets))
    reslora.connect(model, config)
    expected = run(model, llama.inputs())

    def combine(*adapters):
        model.add_weighted_adapter([*adapters], [0.5, 0.5], "".join(adapters), combination_type="cat")

    assert_refused(lambda: combine("default", "other"), "add_weighted_adapter", *NAMES)
    combine("other", "third")
    assert torch.equal(run(model, llama.inputs()), expected)
    reslora.disconnect(model)
    combine("default", "other")
    assert "defaultother" in model.peft_config


@wired
def test_loading_over_the_connected_adapter_is_refused(llama, tmp_path, config):
    folder = plain_folder(llama, tmp_path)
    model = connected(llama, config)
    expected = run(model, llama.inputs())
    assert_refused(lambda: model.load_adapter(folder, "default"), "load_adapter", "'default'", *NAMES, "reslora.load")
    assert_refused(lambda: model.load_adapter(model_id=folder, adapter_name="default"), *NAMES)
    model.load_adapter(folder, "other", torch_device="cpu")
    assert torch.equal(run(model.train(), llama.inputs()), expected)


@pytest.mark.exhaustive
@wired
def test_setting_the_weights_of_the_connected_adapter_is_refused(llama, unet, config):
    for arch in (llama, unet):
        plain = get_peft_model_state_dict(arch.lora(seed=8))
        model = connected(arch, config)
        expected = run(model, arch.inputs())
        assert_refused(
            lambda model=model, plain=plain: set_peft_model_state_dict(model, plain), "set_peft_model", *NAMES
        )
        assert torch.equal(run(model, arch.inputs()), expected)


@wired
def test_hot_swapping_the_connected_adapter_is_refused(llama, tmp_path, config):
    folder = plain_folder(llama, tmp_path)
    model = connected(llama, config)
    expected = run(model, llama.inputs())
    assert_refused(lambda: hotswap_adapter(model, folder, "default", "cpu"), "hotswap_adapter", *NAMES)
    assert torch.equal(run(model, llama.inputs()), expected)
    reslora.disconnect(model)
    hotswap_adapter(model, folder, "default", "cpu")
    assert_equal(run(model, llama.inputs()), run(llama.lora(seed=8, base=llama.lora().unload()), llama.inputs()))


# --- before connecting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*WIRED, ResLoraConfig("none")], ids=lambda config: config.shortcut)
def test_connecting_an_inactive_adapter_is_an_error(llama, tmp_path, config):
    model = llama.lora()
    model.add_adapter("other", LoraConfig(r=RANK, lora_alpha=5, target_modules=llama.targets))
    with pytest.raises(ValueError) as error:
        reslora.connect(model, config, adapter_name="other")
    assert_one_line(error, "'other'", "'default'", "set_adapter")
    assert not instance_methods(model)
    model.set_adapter("other")
    reslora.connect(model, config, adapter_name="other")
    reslora.save(model, tmp_path, "other")
    reslora.disconnect(model, "other")
    model.set_adapter("default")
    with pytest.raises(ValueError) as error:
        reslora.load(model, tmp_path, "other")
    assert_one_line(error, "'other'", "set_adapter")


def test_an_inactive_adapter_is_merged_all_the_same(llama):
    model = connected(llama, ResLoraConfig("block", 2))
    expected = run(model, llama.inputs())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    reslora.merge(model)
    model.set_adapter("default")
    assert_equal(run(model, llama.inputs()), expected)


# --- adapters that go away --------------------------------------------------------------------------------------------

EVERY = [*WIRED, ResLoraConfig("none")]
every = pytest.mark.parametrize("config", EVERY, ids=lambda config: config.shortcut)


def assert_bare(base: nn.Module) -> None:
    assert "_reslora" not in vars(base)
    for module in base.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
    assert not instance_methods(base)


@pytest.mark.exhaustive
@every
def test_unloading_leaves_nothing_behind(llama, config):
    model = connected(llama, config)
    base = model.unload()
    assert_bare(base)
    assert not instance_methods(model)
    assert_equal(run(base, llama.inputs()), run(llama.lora().unload(), llama.inputs()))


@every
def test_an_adapter_that_takes_the_name_of_a_deleted_one_is_not_connected(config):
    model = lora_stack()
    model.add_adapter("other", LoraConfig(r=RANK, target_modules=["proj"]))
    reslora.connect(model, config, example_inputs=STACK_INPUTS)
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=RANK, lora_alpha=5, target_modules=["proj"]))
    model.set_adapter("default")
    with pytest.raises(ValueError) as error:
        reslora.merge(model, "weights")
    assert_one_line(error, "not connected")
    assert reslora.connect(model, config, example_inputs=STACK_INPUTS) is not None
    reslora.disconnect(model)
    assert_bare(model.get_base_model())


def test_deleting_the_connected_adapter_leaves_plain_layers(llama):
    """In half precision, a layer without a shortcut needs PEFT's cast of its input."""
    config = LoraConfig(r=RANK, target_modules=["q_proj"])
    model = llama.lora(base=tiny_llama().bfloat16())
    model.add_adapter("other", config)
    reslora.connect(model, WIRED[0])
    model.delete_adapter("other")
    assert_refused(model.merge_and_unload, "reslora.merge")
    base = model.get_base_model()
    model.delete_adapter("default")
    assert_bare(base)
    model.add_adapter("default", config)
    model.set_adapter("default")
    run(model, llama.inputs())
    model.merge_and_unload()


# --- guards come and go -----------------------------------------------------------------------------------------------


@every
def test_no_guard_is_left_on_a_plain_model(llama, config):
    model = connected(llama, config)
    (lambda model: reslora.merge(model, "none"))(model)
    assert_bare(model)


@pytest.mark.exhaustive
@wired
def test_a_copy_is_guarded_by_itself(llama, tmp_path, config):
    model = connected(llama, config)
    twin = copy.deepcopy(model)
    reslora.disconnect(model)
    model.save_pretrained(tmp_path / "plain")
    assert_refused(lambda: twin.save_pretrained(tmp_path / "twin"), *NAMES)
    reslora.disconnect(twin)
    twin.save_pretrained(tmp_path / "twin")
    assert (tmp_path / "twin" / "adapter_model.safetensors").exists()


def test_an_unpickled_model_is_guarded_where_no_other_was_connected(llama, tmp_path, monkeypatch):
    """As in another process: by `torch.load`, or in a spawned worker."""
    folder = plain_folder(llama, tmp_path)
    plain = get_peft_model_state_dict(llama.lora(seed=8))
    content = pickle.dumps(connected(llama))
    for name in ("hotswap_adapter_from_state_dict", "_convert_scalings_to_tensor"):
        monkeypatch.setattr(hotswap, name, getattr(hotswap, name).__wrapped__)
    for name in ("add_weighted_adapter", "_get_adapter_state_dict", "_remap_adapter_state_dict_for_load"):
        method = vars(LoraModel)[name]
        fresh = classmethod(method.__func__.__wrapped__) if isinstance(method, classmethod) else method.__wrapped__
        monkeypatch.setattr(LoraModel, name, fresh)
    model = pickle.loads(content)
    assert_refused(lambda: get_peft_model_state_dict(model), "get_peft_model_state_dict", *NAMES)
    assert_refused(lambda: set_peft_model_state_dict(model, plain), "set_peft_model_state_dict", *NAMES)
    assert_refused(lambda: model.add_weighted_adapter(["default"], [1.0], "new"), "add_weighted_adapter", *NAMES)
    assert_refused(lambda: hotswap_adapter(model, folder, "default", "cpu"), "hotswap_adapter", *NAMES)
    assert_refused(lambda: prepare_model_for_compiled_hotswap(model), "prepare_model_for_compiled_hotswap", *NAMES)


def test_a_wrapper_is_free_when_its_base_was_disconnected(llama, tmp_path):
    model = connected(llama)
    reslora.disconnect(model.get_base_model())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_reslora_save_and_load_pass(llama, tmp_path):
    model = connected(llama)
    reslora.save(model, tmp_path)
    reslora.load(model, tmp_path)
    loaded = reslora.load(tiny_llama(), tmp_path)
    assert_refused(lambda: loaded.save_pretrained(tmp_path / "out"), *NAMES)
