"""Saving and loading an unmerged adapter: round trips, files, and refusals."""

import copy
import itertools
import json
import pickle

import pytest
import torch
from core_models import (
    ARCHITECTURES,
    RANK,
    STACK_INPUTS,
    Stack,
    adapter_layers,
    assert_equal,
    assert_one_line,
    delta,
    find_layer,
    lora_stack,
    loss_of,
    randomize,
    results_of,
    run,
    tiny_llama,
    tiny_unet,
    token_inputs,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from suites import quick

import reslora
from reslora import ResLoraConfig

CONFIG = "reslora_config.json"
WEIGHTS = "reslora_model.safetensors"
PLANS = [("input", 1, "none"), ("block", 2, "repeat"), ("middle", -1, "repeat"), ("none", 1, "repeat")]
plans = pytest.mark.parametrize("shortcut, pre_num, head", PLANS)


def base_of(arch, seed: int = 0):
    torch.manual_seed(seed)
    return arch.build()


def saved(arch, directory, shortcut="input", pre_num=1, head="repeat", window=100, steps=0, **lora):
    """A connected model that was saved."""
    model = arch.lora(**lora)
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head, window))
    for seed in range(steps):
        loss_of(model, arch.inputs(seed=seed)).backward()
    reslora.save(model, directory)
    return model


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model, before) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["bare", "adapter", "rescaled"])
def test_scales_that_alpha_does_not_say_come_back(into, tmp_path):
    model = lora_stack().eval()
    reslora.connect(model, ResLoraConfig("block", 2), example_inputs=STACK_INPUTS)
    find_layer(model, "layers.1.proj").set_scale("default", 0.5)
    reslora.save(model, tmp_path)
    target = lora_stack().unload() if into == "bare" else lora_stack()
    if into == "rescaled":
        find_layer(target, "layers.2.proj").set_scale("default", 3)
    loaded = reslora.load(target, tmp_path).eval()
    assert_equal(run(loaded, STACK_INPUTS), run(model, STACK_INPUTS))
    assert (
        find_layer(loaded, "layers.2.proj").scaling["default"] == find_layer(model, "layers.2.proj").scaling["default"]
    )


@pytest.mark.parametrize(
    "name, shortcut, pre_num, head",
    quick(
        [(name, *plan) for name in ARCHITECTURES for plan in PLANS],
        *[("llama", *plan) for plan in PLANS],
        ("unet", "middle", -1, "repeat"),
    ),
)
def test_into_a_bare_base_and_into_a_matching_adapter(name, tmp_path, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model = saved(arch, tmp_path, shortcut, pre_num, head)
    expected = results_of(model, arch.inputs())
    output = expected.pop("")
    matching = arch.lora(seed=0)
    for parameter in matching.parameters():
        if parameter.requires_grad:
            torch.nn.init.zeros_(parameter)
    for loaded in (reslora.load(base_of(arch), tmp_path).train(), reslora.load(matching, tmp_path)):
        found = results_of(loaded, arch.inputs())
        assert torch.equal(found.pop(""), output) and found.keys() == expected.keys()
        assert_equal(found, expected)


def test_a_bare_language_model_comes_back_as_a_peft_model(llama, tmp_path):
    saved(llama, tmp_path)
    loaded = reslora.load(base_of(llama), tmp_path)
    assert isinstance(loaded, PeftModel)
    with loaded.disable_adapter():
        assert_equal(run(loaded, llama.inputs()), run(base_of(llama), llama.inputs()))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"rank_pattern": {"layers.2.self_attn.q_proj": 7}, "alpha_pattern": {"layers.1.self_attn.v_proj": 9}},
        {"layers_to_transform": [0, 2, 3], "target_modules": ["q_proj"]},
        {"lora_dropout": 0.25},
    ],
    ids=["rslora", "patterns", "some_layers", "dropout"],
)
def test_the_lora_config_comes_back(llama, tmp_path, lora):
    model = saved(llama, tmp_path, "middle", 2, **lora).eval()
    loaded = reslora.load(base_of(llama), tmp_path).eval()
    assert torch.equal(run(loaded, llama.inputs()), run(model, llama.inputs()))
    for ours, theirs in zip(adapter_layers(loaded).values(), adapter_layers(model).values(), strict=True):
        assert ours.r == theirs.r and ours.scaling == theirs.scaling
        assert str(ours.lora_dropout["default"]) == str(theirs.lora_dropout["default"])


def test_modules_to_save_come_back(tmp_path):
    arch = ARCHITECTURES["bert"]
    model = arch.lora()
    reslora.connect(model, ResLoraConfig("input"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.fill_(0.5)
    reslora.save(model, tmp_path)
    loaded = reslora.load(base_of(arch), tmp_path)
    assert torch.equal(run(loaded.eval(), arch.inputs()), run(model.eval(), arch.inputs()))


def test_tied_weights_that_are_trained_come_back(tmp_path):
    def base():
        torch.manual_seed(0)
        return tiny_llama(tie_word_embeddings=True)

    model = ARCHITECTURES["llama"].lora(base=base(), modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    reslora.connect(model, ResLoraConfig("input"))
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(2)
    reslora.save(model, tmp_path)
    loaded = reslora.load(base(), tmp_path)
    assert torch.equal(run(loaded, token_inputs()), run(model, token_inputs()))
    state = loaded.get_base_model()
    assert state.lm_head.weight.data_ptr() == state.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("version", [{}, {"shortcut_scale": "sum"}])
def test_a_folder_of_an_earlier_version_loads(llama, tmp_path, version):
    model = saved(llama, tmp_path)
    edit(tmp_path, version, factor=1.0)
    assert torch.equal(run(reslora.load(llama.lora(), tmp_path), llama.inputs()), run(model, llama.inputs()))


@pytest.mark.parametrize(
    ("config", "factor"),
    [({"shortcut_scale": "mean"}, 1), ({}, 0.25), ({"shortcut": "gated", "shortcut_scale": "sum"}, 1)],
)
def test_shortcuts_that_were_removed_are_refused_with_the_commit_that_loads_them(llama, tmp_path, config, factor):
    saved(llama, tmp_path)
    edit(tmp_path, config, factor=factor)
    with pytest.raises(ValueError) as error:
        reslora.load(llama.lora(), tmp_path)
    assert_one_line(error, str(tmp_path / CONFIG), "gated, averaged or fading", "8aaa5c1e")


def edit(folder, config: dict, **more) -> None:
    """Change the configuration of a saved adapter."""
    content = json.loads((folder / CONFIG).read_text())
    content["reslora"] |= config
    (folder / CONFIG).write_text(json.dumps(content | more))
    (folder / "checksums.json").unlink()


@pytest.mark.exhaustive
@pytest.mark.parametrize("window, steps", [(2, 3), (100, 3)])
def test_norm_windows_come_back(llama, tmp_path, window, steps):
    model = saved(llama, tmp_path, "middle", window=window, steps=steps)
    loaded = reslora.load(base_of(llama), tmp_path)
    for candidate in (model, loaded):
        assert reslora.merge(candidate).method == "input"
    for name, layer in adapter_layers(model).items():
        assert torch.equal(delta(find_layer(loaded, name)), delta(layer))


@pytest.mark.exhaustive
def test_recording_goes_on_where_it_stopped(llama, tmp_path):
    model = saved(llama, tmp_path, "middle", window=3, steps=4)
    loaded = reslora.load(base_of(llama), tmp_path).train()
    for candidate in (model, loaded):
        for seed in (8, 9):
            loss_of(candidate, llama.inputs(seed=seed, batch=seed)).backward()
        reslora.merge(candidate, method="input")
    for name, layer in adapter_layers(model).items():
        assert_equal(delta(find_layer(loaded, name)), delta(layer), rtol=1e-6)


def test_another_adapter_name(llama, tmp_path):
    model = llama.lora(adapter="style")
    reslora.connect(model, ResLoraConfig("input"), adapter_name="style")
    reslora.save(model, tmp_path, adapter_name="style")
    loaded = reslora.load(base_of(llama), tmp_path, adapter_name="style")
    assert torch.equal(run(loaded, llama.inputs()), run(model, llama.inputs()))


def test_missing_weights_are_named(llama, tmp_path):
    saved(llama, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"^{tmp_path / WEIGHTS} is missing: give a folder that reslora.save wrote$"):
        reslora.load(base_of(llama), tmp_path)


def test_only_the_named_adapter_is_saved(llama, tmp_path):
    model = llama.lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))
    reslora.connect(model, ResLoraConfig("input"))
    reslora.save(model, tmp_path)
    assert not any("o_proj" in key or "other" in key for key in load_file(tmp_path / WEIGHTS))


def test_float32_on_a_half_precision_base_is_not_rounded(tmp_path):
    arch = ARCHITECTURES["bert"]
    model = arch.lora(base=base_of(arch).bfloat16(), target_modules=["query", "word_embeddings"])
    reslora.connect(model, ResLoraConfig("block"))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for part in ("lora_A", "lora_embedding_B", "modules_to_save"):
        assert any(part in name for name in trained)
    for name, value in trained.items():
        value.data = torch.randn(value.shape).to(torch.float32 if "lora_" in name else torch.bfloat16)
    reslora.save(model, tmp_path)
    loaded = dict(reslora.load(base_of(arch).bfloat16(), tmp_path).named_parameters())
    assert_equal({name: loaded[name] for name in trained}, trained, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_kept(llama, tmp_path, dtype):
    model = llama.lora().float()
    for layer in adapter_layers(model).values():
        layer.lora_A["default"].to(dtype)
        layer.lora_B["default"].to(dtype)
    reslora.connect(model, ResLoraConfig("middle"))
    reslora.save(model, tmp_path)
    target = llama.lora(seed=4, base=base_of(llama)).float()
    for layer in adapter_layers(target).values():
        layer.lora_A["default"].to(dtype)
        layer.lora_B["default"].to(dtype)
    loaded = reslora.load(target, tmp_path)
    assert torch.equal(run(loaded, llama.inputs()), run(model, llama.inputs()))


# --- files ------------------------------------------------------------------------------------------------------------


@plans
def test_the_directory_holds_two_files_and_their_checksums(llama, tmp_path, shortcut, pre_num, head):
    saved(llama, tmp_path / "new" / "adapter", shortcut, pre_num, head, steps=1)
    assert {path.name for path in (tmp_path / "new" / "adapter").iterdir()} == {CONFIG, WEIGHTS, "checksums.json"}


def test_a_folder_without_checksums_still_loads(llama, tmp_path):
    model = saved(llama, tmp_path)
    (tmp_path / "checksums.json").unlink()
    assert torch.equal(run(reslora.load(base_of(llama), tmp_path), llama.inputs()), run(model, llama.inputs()))


@pytest.mark.exhaustive
def test_a_path_that_is_no_folder_is_named(llama, tmp_path):
    path = "nowhere"
    saved(llama, tmp_path)
    with pytest.raises(ValueError) as error:
        reslora.load(base_of(llama), tmp_path / path)
    assert_one_line(error, f"directory='{tmp_path / path}'", CONFIG, "give a folder that reslora.save wrote")
    assert ("is a file" in str(error.value)) is (path == WEIGHTS) and "Errno" not in str(error.value)


def test_stock_peft_cannot_mistake_it_for_a_plain_lora(llama, tmp_path):
    saved(llama, tmp_path)
    with pytest.raises((ValueError, OSError)):
        PeftModel.from_pretrained(base_of(llama), tmp_path)


def test_the_config_file_has_both_configs_and_the_chains(llama, tmp_path):
    model = saved(llama, tmp_path, "middle", 3, "none", window=9)
    text = (tmp_path / CONFIG).read_text()
    json.loads(text)
    for word in ('"middle"', '"lora_alpha"', '"target_modules"', '"window"'):
        assert word in text
    for chain in reslora.chains(model):
        assert all(block.name in text for block in chain)


def test_nothing_of_the_base_is_saved(llama, tmp_path):
    model = saved(llama, tmp_path, steps=1)
    tensors = load_file(tmp_path / WEIGHTS)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(tensor.numel() for tensor in tensors.values()) <= adapters + 101 * len(adapter_layers(model))
    assert not any("base_layer" in key or "embed" in key for key in tensors)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_save_over_another_that_ends_while_it_hashes_still_loads(llama, tmp_path, monkeypatch):
    saved(llama, tmp_path, "input", steps=2)
    model = llama.lora(seed=3)
    reslora.connect(model, ResLoraConfig("block", 2))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(reslora.io, "_sha256", interrupt)
        reslora.save(model, tmp_path)
    loaded = reslora.load(base_of(llama, seed=3), tmp_path)
    assert torch.equal(run(loaded, llama.inputs()), run(model, llama.inputs()))


def test_a_save_over_another_that_ends_while_it_writes_leaves_that_one(llama, tmp_path, monkeypatch):
    model = saved(llama, tmp_path)
    expected = run(model, llama.inputs())
    randomize(model, seed=3)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("safetensors.torch.save", interrupt)
        reslora.save(model, tmp_path)
    assert torch.equal(run(reslora.load(base_of(llama), tmp_path), llama.inputs()), expected)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS, "checksums.json"}


def test_saving_leaves_the_model_connected(llama, tmp_path):
    model = llama.lora()
    reslora.connect(model, ResLoraConfig("block", 2))
    expected = run(model, llama.inputs())
    reslora.save(model, tmp_path)
    assert torch.equal(run(model, llama.inputs()), expected)


def test_saving_a_plain_lora_model_is_an_error(llama, tmp_path):
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.save(llama.lora(), tmp_path / "out")
    assert_one_line(error, "connect")


def test_weights_on_the_meta_device_are_not_saved(llama, tmp_path):
    model = saved(llama, tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    model.to("meta")
    with pytest.raises(ValueError) as error:
        reslora.save(model, tmp_path)
    assert_one_line(error, "layers.0.self_attn.q_proj.lora_A", "meta")
    assert (tmp_path / WEIGHTS).read_bytes() == before


def test_nothing_is_saved_over_a_file(llama, tmp_path):
    model = llama.lora()
    reslora.connect(model, ResLoraConfig())
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError) as error:
        reslora.save(model, tmp_path / "out")
    assert_one_line(error, "directory=", "is a file", "give a folder")
    assert (tmp_path / "out").read_text() == "mine"


# --- refused ----------------------------------------------------------------------------------------------------------


def rewrite(directory, edit) -> None:
    """Change the tensors of a saved adapter."""
    tensors = load_file(directory / WEIGHTS)
    save_file(edit(tensors), directory / WEIGHTS)


def a_key(tensors) -> str:
    return next(key for key in sorted(tensors) if "layers.2.self_attn.q_proj" in key and "lora_B" in key)


def without_a_key(tensors):
    tensors.pop(a_key(tensors))
    return tensors


def with_another_shape(tensors):
    key = a_key(tensors)
    return {**tensors, key: torch.cat([tensors[key]] * 2)}


@pytest.mark.exhaustive
@pytest.mark.parametrize("into", ["bare", "adapter"])
@pytest.mark.parametrize(
    "edit, named",
    [(without_a_key, "layers.2.self_attn.q_proj"), (with_another_shape, "layers.2.self_attn.q_proj")],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(llama, tmp_path, edit, named, into):
    saved(llama, tmp_path, steps=1)
    rewrite(tmp_path, edit)
    target = base_of(llama) if into == "bare" else llama.lora(seed=6)
    assert_nothing_loaded(target, tmp_path, named)


def assert_nothing_loaded(target, folder, named: str) -> None:
    before = snapshot(target)
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.load(target, folder)
    assert_one_line(error, named)
    assert_same(target, before)
    assert all(not layer.lora_variant for layer in adapter_layers(target).values())


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "lora, named",
    [({"r": RANK + 1}, "self_attn.q_proj"), ({"target_modules": ["q_proj", "v_proj"]}, "layers.0.mlp.down_proj")],
    ids=["rank", "layers_missing"],
)
def test_an_adapter_that_does_not_match_is_refused(llama, tmp_path, lora, named):
    saved(llama, tmp_path, steps=1)
    target = llama.lora(seed=6, **lora)
    assert_nothing_loaded(target, tmp_path, named)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "build, named",
    [(lambda: tiny_llama(width=48), "layers.0.self_attn.q_proj"), (tiny_unet, "q_proj")],
    ids=["wider", "another_model"],
)
def test_a_base_that_does_not_match_is_refused_and_stays_bare(llama, tmp_path, build, named):
    saved(llama, tmp_path, steps=1)
    target = build()
    before = snapshot(target)
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.load(target, tmp_path)
    assert_one_line(error, named)
    assert_same(target, before)
    assert not adapter_layers(target)


def test_a_connected_model_keeps_its_plan_or_refuses(llama, tmp_path):
    saved(llama, tmp_path, "middle", 2)
    target = llama.lora(seed=6)
    reslora.connect(target, ResLoraConfig("input"))
    before, expected = snapshot(target), run(target, llama.inputs())
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.load(target, tmp_path)
    assert_one_line(error, "disconnect")
    assert_same(target, before)
    assert torch.equal(run(target, llama.inputs()), expected)


def test_a_model_connected_along_other_chains_is_refused_until_it_is_disconnected(tmp_path):
    config, inputs = ResLoraConfig("middle", 2), {"x": STACK_INPUTS["x"][:, :1]}
    model = lora_stack(Stack(pool_at=2))
    target = copy.deepcopy(model)
    assert reslora.connect(model, config, example_inputs=inputs).links == 3  # one token cannot be pooled
    assert reslora.connect(target, config, example_inputs=STACK_INPUTS).links == 2
    reslora.save(model, tmp_path)
    before, expected = snapshot(target), run(target, inputs)
    with pytest.raises(ValueError) as error:
        reslora.load(target, tmp_path)
    assert_one_line(error, "other chains (2 links)", f"{CONFIG} (3 links)", "reslora.disconnect")
    assert_same(target, before)
    assert torch.equal(run(target, inputs), expected)
    reslora.disconnect(target)
    reslora.load(target, tmp_path)
    assert not torch.equal(run(model, inputs), expected) and torch.equal(run(target, inputs), run(model, inputs))


class Bomb:
    """A class whose unpickling creates a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def bomb_pickle(path, target) -> None:
    path.write_bytes(pickle.dumps(Bomb(target)))


def bomb_torch(path, target) -> None:
    torch.save({"lora_A": Bomb(target)}, path)


@pytest.mark.parametrize("plant", [bomb_pickle, bomb_torch])
def test_a_pickle_is_refused_and_never_opened(llama, tmp_path, plant):
    saved(llama, tmp_path)
    plant(tmp_path / WEIGHTS, tmp_path / "exploded")
    target = base_of(llama)
    before = snapshot(target)
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.load(target, tmp_path)
    assert_one_line(error, WEIGHTS, "safetensors")
    assert not (tmp_path / "exploded").exists()
    assert_same(target, before)


def test_a_pickle_beside_the_missing_weights_is_never_opened(llama, tmp_path):
    saved(llama, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    bomb_torch(tmp_path / "adapter_model.bin", tmp_path / "exploded")
    with pytest.raises((ValueError, RuntimeError, OSError)):
        reslora.load(base_of(llama), tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("keep", [0, -8])
def test_a_truncated_file_is_refused(llama, tmp_path, keep):
    saved(llama, tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    target = llama.lora(seed=6)
    before = snapshot(target)
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.load(target, tmp_path)
    assert_one_line(error, WEIGHTS)
    assert_same(target, before)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name, old, new", [(WEIGHTS, None, None), (CONFIG, b'"window": 100', b'"window": 101')])
def test_a_flipped_bit_is_refused(llama, tmp_path, name, old, new):
    saved(llama, tmp_path, steps=1)
    content = bytearray((tmp_path / name).read_bytes())
    if old is None:
        content[-5] ^= 4  # in the middle of a number, which stays finite
    else:
        content = content.replace(old, new)
    (tmp_path / name).write_bytes(content)
    target = base_of(llama)
    before = snapshot(target)
    with pytest.raises(ValueError) as error:
        reslora.load(target, tmp_path)
    assert_one_line(error, name, "damaged")
    assert_same(target, before)


NOT_A_CONFIG = ["", "not json", "[]", '{"reslora": 1}', "[" * 100_000, "\udcff"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("content", NOT_A_CONFIG, ids=range(len(NOT_A_CONFIG)))
def test_a_config_file_that_is_not_one_is_refused(llama, tmp_path, content):
    saved(llama, tmp_path)
    (tmp_path / CONFIG).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert_load_refused(llama, tmp_path, "bare")


def assert_load_refused(arch, directory, into, *words: str) -> None:
    """One line that names the file, and a model as it was."""
    target = base_of(arch) if into == "bare" else arch.lora(seed=6)
    before = snapshot(target)
    with pytest.raises(ValueError) as error:
        reslora.load(target, directory)
    assert_one_line(error, "reslora_", *words)
    assert str(directory) in str(error.value)
    assert_same(target, before)


NO_LORA = [
    *({"unknown": 1}, {"r": "four"}, {"lora_alpha": None}, {"target_modules": 5}, {"rank_pattern": [1]}),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("into, wrong", [*(("bare", wrong) for wrong in NO_LORA), *itertools.product(
    ["bare", "adapter"], [None, []]
)])  # fmt: skip
def test_a_wrong_lora_configuration_is_refused(llama, tmp_path, wrong, into):
    saved(llama, tmp_path)
    (tmp_path / "checksums.json").unlink()
    content = json.loads((tmp_path / CONFIG).read_text())
    content["lora"] = content["lora"] | wrong if isinstance(wrong, dict) else wrong
    (tmp_path / CONFIG).write_text(json.dumps(content))
    assert_load_refused(llama, tmp_path, into)


def test_norms_of_other_blocks_are_not_taken(llama, tmp_path):
    saved(llama, tmp_path, window=3, steps=1)
    (tmp_path / "checksums.json").unlink()
    content = json.loads((tmp_path / CONFIG).read_text())
    content["norms"]["names"].reverse()
    (tmp_path / CONFIG).write_text(json.dumps(content))
    assert reslora.merge(reslora.load(base_of(llama), tmp_path)).method == "weights"


def test_an_adapter_that_peft_has_merged_is_refused(llama, tmp_path):
    saved(llama, tmp_path)
    model = llama.lora()
    model.merge_adapter()
    with pytest.raises(ValueError) as error:
        reslora.load(model, tmp_path)
    assert_one_line(error, "unmerge_adapter")
    model.unmerge_adapter()
    reslora.load(model, tmp_path)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_bias": True}])
def test_without_wires_layers_that_cannot_be_wired_come_back(lora, tmp_path):
    """`connect` and `save` accept them, too."""
    arch = ARCHITECTURES["gpt2"]
    model = saved(arch, tmp_path, "none", **lora).eval()
    target = base_of(arch)
    loaded = reslora.load(target, tmp_path).eval()
    assert_equal(run(loaded, arch.inputs()), run(model, arch.inputs()))


def test_norms_of_another_training_are_forgotten(llama, tmp_path):
    saved(llama, tmp_path)  # without a step, and so without norms
    model = llama.lora()
    reslora.connect(model, ResLoraConfig())
    loss_of(model, llama.inputs()).backward()
    reslora.load(model, tmp_path)
    with pytest.raises(ValueError) as error:
        reslora.merge(model, "input")
    assert_one_line(error, "norms")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_from_the_frozen_weight_is_repeated_on_a_bare_base(tmp_path, init):
    torch.manual_seed(0)
    base = tiny_llama().float()
    bare = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=RANK, target_modules=["q_proj"], init_lora_weights=init))
    reslora.connect(model, ResLoraConfig("middle"))
    reslora.save(model, tmp_path)
    inputs = ARCHITECTURES["llama"].inputs()
    loaded = reslora.load(bare, tmp_path)
    assert torch.allclose(run(loaded, inputs), run(model, inputs), atol=1e-5)
    plain = get_peft_model(tiny_llama().float(), LoraConfig(r=RANK, target_modules=["q_proj"]))
    assert_nothing_loaded(plain, tmp_path, f"init_lora_weights=True, but {tmp_path / CONFIG} has {init!r}")
