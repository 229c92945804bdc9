"""Exported files: each is loaded by stock PEFT or diffusers, with the output of the merged U-Net."""

import copy
import json

import pytest
import torch
from core_models import (
    ARCHITECTURES,
    Stack,
    adapter_layers,
    assert_one_line,
    base_weight,
    delta,
    find_layer,
    randomize,
    run,
    tiny_llama,
    tiny_unet,
)
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from suites import quick

import reslora
from reslora import ResLoraConfig
from reslora.export import (
    export_comfyui,
    export_diffusers,
    export_kohya,
    export_merged,
    export_peft,
    merged_state_dict,
    tuned_layers,
)

LORA = "pytorch_lora_weights.safetensors"
TOLERANCE = 1e-3  # float32: up to 1.1e-4, with another number of threads; LoRA changes the output by more than 1

CASES = {
    "equal ranks": (
        {"target_modules": ["to_q", "to_out.0", "proj_in", "ff.net.0.proj", "ff.net.2"]},
        ("middle", 2),
        {"method": "weights"},
    ),
    "block ranks": ({}, ("block", 2), {}),
    "block patterns": (
        {
            "use_rslora": True,
            "alpha_pattern": {"down_blocks.0.*attn1.to_q": 17},
            "rank_pattern": {"attn2.to_v": 2, "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k": 5},
        },
        ("block", -1),
        {},
    ),
    "block truncated": ({"lora_alpha": 7}, ("block", -1), {"max_rank": 4}),
}


def base_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return tiny_unet().float().eval()


@pytest.fixture(scope="module", params=list(CASES))
def merged(request):
    """A U-Net in float32 after a merge: plain LoRA. The tests only read it."""
    lora, plan, merge = CASES[request.param]
    model = ARCHITECTURES["unet"].lora(**lora).float().eval()
    reslora.connect(model, ResLoraConfig(*plan))
    reslora.merge(model, **merge)
    return model


@pytest.fixture
def inputs(unet):
    return {key: value.float() if value.is_floating_point() else value for key, value in unet.inputs().items()}


@torch.no_grad()
def predict(model, inputs) -> torch.Tensor:
    return run(model.eval(), inputs)


def assert_predicts(model, inputs, expected) -> None:
    actual = predict(model, inputs)
    assert float((actual - expected).abs().max()) < TOLERANCE
    assert float((predict(base_unet(), inputs) - expected).abs().max()) > 100 * TOLERANCE  # LoRA does something


def pipeline() -> StableDiffusionPipeline:
    """Return a stock pipeline around the bare U-Net."""
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=base_unet(),
        scheduler=DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def loaded_by_diffusers(*arguments, **keywords) -> UNet2DConditionModel:
    pipe = pipeline()
    pipe.load_lora_weights(*arguments, **keywords)
    return pipe.unet


# --- each format loads back -------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_peft_loads_the_peft_files(merged, inputs, tmp_path):
    export_peft(merged, tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert_predicts(PeftModel.from_pretrained(base_unet(), tmp_path), inputs, predict(merged, inputs))


def test_the_peft_config_lists_names_in_order(tmp_path):
    """PEFT stores names in sets and writes them in an order that differs between processes."""
    targets = {"to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"}
    unet = base_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, exclude_modules={"mid_block", "conv_in", "down_blocks.0"}))
    export_peft(unet, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(targets)
    assert config["exclude_modules"] == sorted(config["exclude_modules"])
    assert isinstance(unet.peft_config["default"].target_modules, set)


def test_diffusers_loads_the_diffusers_file(merged, inputs, tmp_path):
    export_diffusers(merged, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LORA]
    assert_predicts(loaded_by_diffusers(tmp_path), inputs, predict(merged, inputs))


@pytest.mark.exhaustive
def test_the_diffusers_file_means_the_same_without_its_metadata(merged, inputs, tmp_path):
    """B includes the scale, and alpha equals the rank, so readers that ignore metadata agree."""
    export_diffusers(merged, tmp_path)
    save_file(load_file(tmp_path / LORA), tmp_path / LORA)
    assert_predicts(loaded_by_diffusers(tmp_path), inputs, predict(merged, inputs))


def test_diffusers_loads_the_kohya_file(merged, inputs, tmp_path):
    path = tmp_path / "kohya.safetensors"
    export_kohya(merged, path)
    assert_predicts(loaded_by_diffusers(str(path)), inputs, predict(merged, inputs))


@pytest.mark.exhaustive
def test_diffusers_loads_the_kohya_file_without_its_metadata(merged, inputs, tmp_path):
    path = tmp_path / "kohya.safetensors"
    export_kohya(merged, path)
    save_file(load_file(path), path)
    assert_predicts(loaded_by_diffusers(str(path)), inputs, predict(merged, inputs))


def test_diffusers_loads_the_merged_unet(merged, inputs, tmp_path):
    export_merged(merged, tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert not adapter_layers(loaded)
    assert set(loaded.state_dict()) == set(base_unet().state_dict())
    assert_predicts(loaded, inputs, predict(merged, inputs))


@pytest.mark.exhaustive
def test_exporting_leaves_the_model_as_it_was(merged, inputs, tmp_path):
    expected = predict(merged, inputs)
    before = {key: value.clone() for key, value in merged.state_dict().items()}
    export_peft(merged, tmp_path / "peft")
    export_diffusers(merged, tmp_path)
    export_kohya(merged, tmp_path / "kohya.safetensors")
    export_merged(merged, tmp_path / "unet")
    after = merged.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(predict(merged, inputs), expected)


# --- what is in the files ---------------------------------------------------------------------------------------------


def test_the_kohya_file_has_one_alpha_and_kohyas_names(merged, tmp_path):
    path = tmp_path / "kohya.safetensors"
    export_kohya(merged, path)
    tensors = load_file(path)
    names = {key.split(".")[0] for key in tensors}
    assert names == {"lora_unet_" + name.replace(".", "_") for name in adapter_layers(merged)}
    assert {key.split(".", 1)[1] for key in tensors} == {"alpha", "lora_down.weight", "lora_up.weight"}
    assert len({float(tensors[f"{name}.alpha"]) for name in names}) == 1


def test_the_kohya_product_is_s_b_a(merged, tmp_path):
    """alpha / rank x up x down, the formula of kohya's readers, layer by layer."""
    path = tmp_path / "kohya.safetensors"
    export_kohya(merged, path)
    tensors = load_file(path)
    for name, layer in adapter_layers(merged).items():
        key = "lora_unet_" + name.replace(".", "_")
        down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
        product = float(tensors[f"{key}.alpha"]) / down.shape[0] * (up @ down)
        torch.testing.assert_close(product, delta(layer), rtol=1e-4, atol=1e-5)


def test_the_kohya_metadata(merged, tmp_path):
    path = tmp_path / "kohya.safetensors"
    export_kohya(merged, path, metadata={"ss_output_name": "style"})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_output_name"] == "style"
    tensors = load_file(path)
    alphas = {float(value) for key, value in tensors.items() if key.endswith(".alpha")}
    ranks = [value.shape[0] for key, value in tensors.items() if key.endswith(".lora_down.weight")]
    assert {float(metadata["ss_network_alpha"])} == alphas
    assert ranks.count(int(metadata["ss_network_dim"])) == max(map(ranks.count, ranks))


def test_the_diffusers_product_is_s_b_a(merged, tmp_path):
    export_diffusers(merged, tmp_path)
    tensors = load_file(tmp_path / LORA)
    assert all(key.startswith("unet.") for key in tensors)
    for name, layer in adapter_layers(merged).items():
        product = tensors[f"unet.{name}.lora_B.weight"] @ tensors[f"unet.{name}.lora_A.weight"]
        torch.testing.assert_close(product, delta(layer), rtol=1e-4, atol=1e-5)


def test_merged_weights_are_summed_in_fp32_then_cast(unet, tmp_path):
    torch.manual_seed(0)
    model = unet.lora(base=tiny_unet().bfloat16()).eval()
    for layer in adapter_layers(model).values():
        layer.lora_A["default"].float()
        layer.lora_B["default"].float()
    randomize(model, scale=0.1)
    reslora.connect(model, ResLoraConfig("block", 2))
    reslora.merge(model)
    export_merged(model, tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).state_dict()
    for name, layer in adapter_layers(model).items():
        expected = (base_weight(layer).float() + delta(layer)).bfloat16()
        stored = loaded[f"{name}.weight"]
        assert stored.dtype == torch.bfloat16
        assert float((stored.float() - expected.float()).norm()) <= 1e-3 * float(expected.float().norm())


@pytest.mark.exhaustive
def test_only_the_named_adapter_is_exported(unet, inputs, tmp_path):
    model = unet.lora().float().eval()
    expected = predict(model, inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="other")
    randomize(model, seed=9, adapter="other")
    model.set_adapter("default")
    export_diffusers(model, tmp_path / "diffusers")
    export_peft(model, tmp_path / "peft")
    export_kohya(model, tmp_path / "kohya.safetensors")
    export_merged(model, tmp_path / "unet")
    assert_predicts(loaded_by_diffusers(tmp_path / "diffusers"), inputs, expected)
    assert_predicts(PeftModel.from_pretrained(base_unet(), tmp_path / "peft"), inputs, expected)
    assert_predicts(loaded_by_diffusers(str(tmp_path / "kohya.safetensors")), inputs, expected)
    assert_predicts(UNet2DConditionModel.from_pretrained(tmp_path / "unet"), inputs, expected)


def test_plain_lora_of_two_ranks_has_its_own_alphas_in_the_peft_config(unet, tmp_path):
    model = unet.lora().float()
    reslora.connect(model, ResLoraConfig("block", 2))
    reslora.merge(model)
    export_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert all(key.startswith("^") for key in config["rank_pattern"])
    layer = find_layer(model, "up_blocks.1.attentions.1.transformer_blocks.1.attn1.to_q")
    assert layer.r["default"] == 9 and layer.scaling["default"] == pytest.approx(5 / 3)


@pytest.mark.parametrize("case", quick(CASES, "equal ranks", "block patterns"))
@pytest.mark.parametrize("blocks", quick(["all", "some"], "some"))
def test_all_files_have_the_scale_that_set_adapters_gave(case, blocks, inputs, tmp_path):
    lora, plan, merge = CASES[case]
    model = ARCHITECTURES["unet"].lora(**lora).float().eval()
    reslora.connect(model, ResLoraConfig(*plan))
    model.set_adapters(["default"], [0.3 if blocks == "all" else {"down": 0.3, "mid": -1.0}])
    reslora.merge(model, **merge)
    expected, config = predict(model, inputs), copy.deepcopy(model.peft_config["default"])
    export_peft(model, tmp_path / "peft")
    assert model.peft_config["default"] == config
    assert_predicts(PeftModel.from_pretrained(base_unet(), tmp_path / "peft"), inputs, expected)
    assert_predicts(loaded_by_diffusers(export_diffusers(model, tmp_path)), inputs, expected)
    assert_predicts(loaded_by_diffusers(export_kohya(model, tmp_path / "kohya.safetensors")), inputs, expected)
    model.set_adapters(["default"], [1.0])
    export_peft(model, tmp_path / "peft")
    read = LoraConfig.from_pretrained(tmp_path / "peft")
    assert (read.lora_alpha, read.alpha_pattern) == (config.lora_alpha, config.alpha_pattern)


# --- refused ----------------------------------------------------------------------------------------------------------


def assert_refused(model, folder, *words: str, **named) -> None:
    """Assert that every format refuses it and leaves no file behind."""
    for export in (export_peft, export_diffusers, export_kohya, export_merged):
        with pytest.raises((ValueError, RuntimeError)) as error:
            export(model, folder / "out", **named)
        assert_one_line(error, *words)
        assert not (folder / "out").exists()


def test_a_model_without_lora_is_refused(tmp_path):
    assert_refused(base_unet(), tmp_path)


def test_an_adapter_that_is_not_there_is_named(unet, tmp_path):
    assert_refused(unet.lora(), tmp_path, "missing", adapter_name="missing")


def test_a_connected_model_is_told_to_merge_first(unet, tmp_path):
    model = unet.lora()
    reslora.connect(model, ResLoraConfig("input"))
    assert_refused(model, tmp_path, "reslora.merge")


def test_an_adapter_that_peft_has_merged_is_not_added_once_more(unet, inputs, tmp_path):
    adapter = "default"
    model = unet.lora(target_modules=["to_q"]).float().eval()
    expected = predict(model, inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False), adapter_name="other")
    model.set_adapter("default")
    model.fuse_lora(adapter_names=[adapter])
    for call in (lambda: export_merged(model, tmp_path / "unet"), lambda: tuned_layers(model)):
        with pytest.raises(ValueError) as error:
            call()
        assert_one_line(error, f"{adapter} merged by PEFT", "unfuse_lora()")
    assert not list(tmp_path.iterdir())
    model.unfuse_lora()
    export_merged(model, tmp_path / "unet")
    assert_predicts(UNet2DConditionModel.from_pretrained(tmp_path / "unet"), inputs, expected)


@pytest.mark.parametrize(
    "config, words",
    [
        (LoraConfig(target_modules=["proj"], init_lora_weights="olora"), "init_lora_weights='olora'"),
        (LoHaConfig(target_modules=["proj"]), "LOHA"),
        (LoKrConfig(target_modules=["proj"]), "LOKR"),
        (AdaLoraConfig(target_modules=["proj"], total_step=9), "ADALORA"),
    ],
)
def test_a_scale_that_pefts_files_cannot_hold_is_refused(config, words, tmp_path):
    model = get_peft_model(Stack(), config)
    export_peft(model, tmp_path / "before")
    find_layer(model, "layers.1.proj").scale_layer(0.25)
    with pytest.raises(ValueError) as error:
        export_peft(model, tmp_path / "after")
    assert_one_line(error, "layers.1.proj", "export_merged", words)
    assert not (tmp_path / "after").exists()


def test_kohyas_alpha_is_exact_in_half_precision(tmp_path):
    unet = ARCHITECTURES["unet"].lora(lora_alpha=257).bfloat16()
    path = export_kohya(unet, tmp_path / "kohya.safetensors")
    tensors = load_file(path)
    assert {float(value) for key, value in tensors.items() if key.endswith(".alpha")} == {257.0}


# --- adapters whose update is no sum ----------------------------------------------------------------------------------


def adapted_stack(config) -> tuple[Stack, torch.nn.Module]:
    """Return a bare `Stack` in float64, and the same with an adapter of random weights."""
    torch.manual_seed(0)
    bare = Stack(layers=2, width=8).double()
    model = get_peft_model(copy.deepcopy(bare), config).double().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return bare, model


def dora_by_hand(layer, weight: torch.Tensor) -> torch.Tensor:
    """`m (W + s B A) / |W + s B A|`, row by row (Liu et al., 2024, Eq. 5; PEFT's rows are its columns)."""
    whole = weight + 5 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return layer.lora_magnitude_vector["default"].weight[:, None] * whole / whole.square().sum(1, keepdim=True).sqrt()


def oft_by_hand(layer, weight: torch.Tensor) -> torch.Tensor:
    """`W R^T`, where R has blocks `(I - Q)^-1 (I + Q)` to PEFT's fourth power, with Q skew (Qiu et al., 2023)."""
    blocks = []
    for entries in layer.oft_R["default"].weight:
        upper = torch.zeros(4, 4, dtype=torch.float64)
        upper[tuple(torch.triu_indices(4, 4, 1))] = entries
        q, one = upper - upper.T, torch.eye(4, dtype=torch.float64)
        blocks.append(one + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    return weight @ torch.block_diag(*blocks).T


@pytest.mark.parametrize(
    ("config", "by_hand"),
    [
        (LoraConfig(r=2, lora_alpha=5, target_modules=["proj"], use_dora=True), dora_by_hand),
        (OFTConfig(oft_block_size=4, target_modules=["proj"]), oft_by_hand),
    ],
    ids=["dora", "oft"],
)
def test_merged_weights_are_by_the_formula_and_plain_files_are_refused(config, by_hand, tmp_path):
    bare, model = adapted_stack(config)
    base = model.get_base_model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merged = merged_state_dict(base)
    for number, layer in enumerate(base.layers):
        expected = by_hand(layer.proj, bare.layers[number].proj.weight)
        torch.testing.assert_close(merged[f"layers.{number}.proj.weight"], expected, rtol=1e-12, atol=1e-13)
        assert torch.equal(merged[f"layers.{number}.proj.bias"], bare.layers[number].proj.bias)
    x = torch.randn(3, 8, dtype=torch.float64)
    bare.load_state_dict(merged)
    torch.testing.assert_close(bare(x), model(x), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    with pytest.raises(ValueError) as error:
        export_kohya(model, tmp_path / "kohya.safetensors")
    assert_one_line(error, "no LoRA layers, only OFT" if config.peft_type == "OFT" else "is not plain LoRA")


@pytest.mark.parametrize(
    ("more", "words"),
    [({"bias": "lora_only"}, "bias='lora_only'"), ({"modules_to_save": ["layers.0"]}, "modules_to_save=['layers.0']")],
)
def test_what_trains_beside_lora_is_merged_and_in_no_plain_file(more, words, tmp_path):
    bare, model = adapted_stack(LoraConfig(r=2, target_modules=["1.proj"], **more))
    x = torch.randn(3, 8, dtype=torch.float64)
    bare.load_state_dict(merged_state_dict(model.get_base_model()))
    torch.testing.assert_close(bare(x), model(x), rtol=1e-12, atol=1e-12)
    for write, path in ((export_diffusers, tmp_path), (export_kohya, tmp_path / "k.safetensors")):
        with pytest.raises(ValueError) as error:
            write(model, path)
        assert_one_line(error, words)
    assert not list(tmp_path.iterdir())


def test_lora_on_changed_frozen_weights_is_in_no_plain_file(tmp_path):
    """The readers of these files would add it to the weights as they were before."""
    init = "pissa"
    model = get_peft_model(Stack(), LoraConfig(r=2, target_modules=["proj"], init_lora_weights=init))
    for write in (export_diffusers, export_kohya, export_comfyui):
        with pytest.raises(ValueError) as error:
            write(model, tmp_path / "file")
        assert_one_line(error, f"init_lora_weights={init!r}", "export_peft or export_merged")
    assert not list(tmp_path.iterdir())


def test_trained_tokens_are_merged_and_in_no_plain_file(tmp_path):
    """The rows of an embedding that `trainable_token_indices` names, and of the last layer if it is tied."""
    bare = tiny_llama(tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5])
    model = randomize(get_peft_model(copy.deepcopy(bare), config)).double().eval()
    (tokens,) = [value for name, value in model.named_parameters() if "trainable_tokens" in name]
    tokens.data.normal_()
    inputs = {"input_ids": torch.arange(8)[None]}
    export_merged(model, tmp_path / "merged")
    loaded = type(bare).from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert (model(**inputs).logits - bare.eval()(**inputs).logits).abs().max() > 0.1
    with pytest.raises(ValueError) as error:
        export_diffusers(model, tmp_path / "plain")
    assert_one_line(error, "trainable_token_indices=[1, 5]")


def test_a_bias_of_lora_is_merged_and_in_no_plain_file(tmp_path):
    bare, model = adapted_stack(LoraConfig(r=2, target_modules=["proj"], lora_bias=True))
    x = torch.randn(3, 8, dtype=torch.float64)
    bare.load_state_dict(merged_state_dict(model.get_base_model()))
    torch.testing.assert_close(bare(x), model(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="is not plain LoRA"):
        export_diffusers(model, tmp_path)


def test_files_of_rslora_have_its_scale(tmp_path):
    """alpha / sqrt(r), which kohya's readers compute as alpha / r."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["proj"], use_rslora=True, rank_pattern={"layers.1.proj": 1})
    _, model = adapted_stack(config)
    export_kohya(model, tmp_path / "kohya.safetensors")
    export_diffusers(model, tmp_path)
    kohya, diffusers = load_file(tmp_path / "kohya.safetensors"), load_file(tmp_path / LORA)
    assert kohya["lora_unet_layers_0_proj.alpha"].item() == 6 / 2 * 4  # the scale times r
    for number, (rank, scale) in enumerate([(4, 6 / 2), (1, 6 / 1)]):
        layer = model.get_base_model().layers[number].proj
        update = scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        name = f"lora_unet_layers_{number}_proj"
        read = kohya[f"{name}.lora_up.weight"] @ kohya[f"{name}.lora_down.weight"]
        torch.testing.assert_close(read * kohya[f"{name}.alpha"].double() / rank, update, rtol=1e-12, atol=1e-14)
        name = f"unet.layers.{number}.proj"
        read = diffusers[f"{name}.lora_B.weight"] @ diffusers[f"{name}.lora_A.weight"]
        torch.testing.assert_close(read, update, rtol=1e-12, atol=1e-14)
