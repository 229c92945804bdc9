"""Learning rates of single layers and LoRA+: the optimizer's groups, its steps, processes and a resumed run."""

from types import SimpleNamespace

import pytest
import torch
from core_models import assert_one_line, tiny_unet
from launching import forked
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import nn

from images import exact_steps
from images.runs import RESUME, assert_same, final_weights, killed_after, losses, main, refused, training_state
from images.training.test_training import assert_equal_but_for_rounding, script_of_steps
from reslora.errors import InvalidArgument
from reslora.images.settings import parse_args
from reslora.methods.adapters import attach
from reslora.methods.registry import METHODS, AdapterSettings, adapter_config
from reslora.options.images import Options
from reslora.options.optimizers import OPTIMIZERS
from reslora.runtime.log import read_log
from reslora.training.learning_rates import FACTOR, factors_of_layers, groups_of
from reslora.training.state import new_optimizer
from reslora.training.trained import Trained

ACCELERATOR = SimpleNamespace(num_processes=1, device=torch.device("cpu"), scaler=None)
FLAGS = Options.of(learning_rate=1e-3, train_batch_size=1, gradient_accumulation_steps=1, optimizer="adamw")
LORA_OF_ALL = ["--method", "lora", "--train_text_encoder"]
PATTERNS = ["--lr_pattern", "mid_block.*=0.5", "down_blocks.*attn1.to_k=4", "--loraplus_lr_ratio", "3"]


def adapted(method: str = "lora") -> nn.Module:
    settings = AdapterSettings(2, 4, 0.0, ["to_q", "to_k"], 10)
    return attach(tiny_unet(), adapter_config(method, settings), in_place=True)


def rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(p): pytest.approx(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def optimizer_of(trained: Trained, options: Options) -> torch.optim.Optimizer:
    first, others = groups_of(trained, options.optimizer)
    return new_optimizer(first, options.training, options.optimizer, ACCELERATOR, others)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_loraplus_has_the_groups_of_peft(method):
    unet = adapted(method)
    expected = rates(create_loraplus_optimizer(unet, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0))
    found = rates(optimizer_of(Trained({"unet": unet}, None), FLAGS.replace(loraplus_lr_ratio=16.0)))
    assert found == expected and len(set(map(str, found.values()))) == 2


def test_rates_are_multiplied_by_layer_and_in_text_encoders_of_their_own_rate():
    made = {"unet": adapted(), "text_encoder": adapted()}
    patterns = ["mid_block.*=0.5", "attn2.to_k=2", "text_encoder.up_blocks.*attn1.to_q=8"]
    options = FLAGS.replace(lr_pattern=patterns, loraplus_lr_ratio=3.0, text_encoder_lr=1e-5)
    found, seen = rates(optimizer_of(Trained(made, None), options)), set()
    for part, rate in (("unet", 1e-3), ("text_encoder", 1e-5)):
        for name, parameter in made[part].named_parameters():
            if parameter.requires_grad:
                factor = 0.5 if name.startswith("mid_block") else 1
                factor *= 2 if "attn2.to_k" in name else 1  # in the middle block both
                factor *= 8 if part != "unet" and name.startswith("up_blocks") and "attn1.to_q" in name else 1
                factor *= 3 if "lora_B" in name else 1
                assert found.pop(id(parameter)) == rate * factor, name
                seen.add((part, factor))
    assert not found and len(seen) == 6 + 8


def test_without_factors_groups_are_as_before():
    made = Trained({"unet": adapted(), "text_encoder": adapted()}, None)
    first, others = groups_of(made, FLAGS.optimizer)
    for (group,), part in zip((first, others), made.parts.values(), strict=True):
        assert list(group) == ["params"]
        trained = [p for p in part.parameters() if p.requires_grad]
        assert all(one is other for one, other in zip(group["params"], trained, strict=True))


@pytest.mark.parametrize("name", [*sorted(OPTIMIZERS.keys() - {"prodigy", "adamw8bit"}), "torch.optim.Muon"])
def test_a_factor_is_a_learning_rate_of_its_own_with_every_optimizer(name):
    """Each parameter changes as it would alone at the multiplied learning rate."""

    def steps(groups: list, rate: float) -> list[nn.Parameter]:
        options = FLAGS.replace(optimizer=name, learning_rate=rate)
        optimizer = new_optimizer(groups, options.training, options.optimizer, ACCELERATOR)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for step in range(3):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.1 + step)
            optimizer.step()
        return parameters

    def weight() -> nn.Parameter:
        return nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3))

    one, other = steps([{"params": [weight()], FACTOR: 1.0}, {"params": [weight()], FACTOR: 0.5}], 0.1)
    for found, rate in ((one, 0.1), (other, 0.05)):
        (alone,) = steps([weight()], rate)
        torch.testing.assert_close(found, alone, rtol=1e-12, atol=0)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--lr_pattern", "to_q=0"], "--lr_pattern to_q=0: '0' is not a finite number above 0"),
        (
            ["--lr_pattern", "to_q=2", "--optimizer", "prodigy"],
            "--lr_pattern to_q=2: --optimizer prodigy estimates one",
        ),
        (["--loraplus_lr_ratio", "16", "--optimizer", "prodigyopt.Prodigy"], "--loraplus_lr_ratio 16: --optimizer"),
    ],
)
def test_refusals_without_a_model(words, line):
    with pytest.raises(InvalidArgument) as error:
        parse_args(words)
    assert_one_line(error, line)


def test_a_pattern_that_matches_nothing_names_the_nearest_layers():
    layers = ["mid_block.attn1.to_k", "mid_block.attn2.to_k", "up.attn2.to_k", "up.attn2.to_q", "text_encoder.q_proj"]
    with pytest.raises(InvalidArgument) as error:
        factors_of_layers(FLAGS.replace(lr_pattern=["atn2.to_k=2"]).optimizer, layers)
    nearest = "the most similar are up.attn2.to_k, mid_block.attn2.to_k, "
    assert_one_line(error, "--lr_pattern atn2.to_k=2: no adapted layer matches", nearest)


@pytest.mark.exhaustive
def test_a_run_with_such_a_pattern_ends_before_it_encodes(base_flags, capsys, tmp_path):
    words = [
        *base_flags,
        "--method",
        "lora",
        "--train_text_encoder",
        "--lr_pattern",
        "text_encoder.layers.7.*=2",
        "--output_dir",
        tmp_path,
    ]
    line = refused(capsys, *words, quiet=False)
    assert "--lr_pattern text_encoder.layers.7.*=2" in line and "text_encoder.encoder.layers.0" in line
    assert not list(tmp_path.glob("cache/*"))


def test_methods_without_b_are_named(capsys):
    without_b = [row.name for row in METHODS.values() if not row.trains_b]
    assert without_b == ["loha", "lokr", "oft"]
    parse_args(["--method", *without_b, "--loraplus_lr_ratio", "4"])
    assert "--loraplus_lr_ratio 4: it has no effect with --method loha lokr oft" in capsys.readouterr().out


# -- processes and resumed runs ----------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_steps_of_two_processes_are_those_of_one_batch(model, tmp_path):
    words = [str(model), "2", "1", str(tmp_path / "found"), *LORA_OF_ALL, *PATTERNS]
    forked(script_of_steps(tmp_path), *words, folder=tmp_path)
    whole, found = exact_steps.trained(model, 4, 1, *words[4:]), load_file(tmp_path / "found")
    assert found["processes"] == 2
    assert_equal_but_for_rounding(found, whole)
    plain = exact_steps.trained(model, 4, 1, *LORA_OF_ALL)
    name = next(name for name in whole if name.startswith("mid_block") and "lora_B" in name and name.endswith(" 0"))
    assert not torch.allclose(plain[name], whole[name])


@pytest.mark.exhaustive
def test_a_resumed_run_equals_an_uninterrupted_one(base_flags, capsys, tmp_path):
    flags = [*base_flags, *LORA_OF_ALL, "--num_validation_images", "0", *PATTERNS]
    flags += ["--text_encoder_lr", "1e-3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "1"]
    whole, resumed = tmp_path / "whole", tmp_path / "parts"
    assert main(*flags, "--output_dir", whole) == 0
    killed_after(2, whole, resumed, "lora")
    assert main(*flags, "--output_dir", resumed, *RESUME) == 0
    assert losses(whole, "lora") == losses(resumed, "lora")
    assert_same(final_weights(whole, "lora"), final_weights(resumed, "lora"))
    groups = [training_state(output, 4, "lora")["optimizer"]["param_groups"] for output in (whole, resumed)]
    assert groups[0] == groups[1] and {group[FACTOR] for group in groups[0]} == {1.0, 3.0, 0.5, 1.5, 4.0, 12.0}
    state = training_state(whole, 4, "lora")
    for group, base in zip(state["optimizer"]["param_groups"], state["lr_scheduler"]["base_lrs"], strict=True):
        assert base / group[FACTOR] == pytest.approx(1e-2) or base / group[FACTOR] == pytest.approx(1e-3)
    of_log = {row["step"]: row["lr"] for row in read_log(whole / "lora" / "log.jsonl") if row["split"] == "train"}
    assert max(of_log.values()) == pytest.approx(1e-2)  # the learning rate itself, whatever its factors
    line = refused(capsys, *flags, "--lr_pattern", "attn1.to_k=4", *RESUME, "--output_dir", whole, quiet=False)
    assert "--lr_pattern attn1.to_k=4" in line and "was trained with mid_block.*=0.5 down_blocks.*attn1.to_k=4" in line


def test_the_log_has_the_rate_of_each_step_also_of_a_run_that_is_resumed_with_more_steps(brief_flags, tmp_path, capsys):
    """Of a linear schedule over n steps, step k uses the rate times (n - k + 1) / n, whatever length came before."""
    flags = [*brief_flags, "--method", "lora", "--learning_rate", "1e-3", "--lr_scheduler", "linear"]
    flags += ["--lr_warmup_steps", "0", "--num_validation_images", "0", "--output_dir", tmp_path, *RESUME]
    logged = []
    for steps in (2, 4):
        assert main(*flags, "--max_train_steps", steps) == 0
        rows = [row for row in read_log(tmp_path / "lora" / "log.jsonl") if row["split"] == "train"]
        logged.append([row["lr"] for row in rows])
    assert logged[0] == pytest.approx([1e-3, 0.5e-3])
    assert logged[1] == pytest.approx([1e-3, 0.5e-3, 0.5e-3, 0.25e-3])
    assert "follows --lr_scheduler linear over 4 steps; before, it was 2" in capsys.readouterr().out
