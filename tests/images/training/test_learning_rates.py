"""Learning rates of single layers and LoRA+: the optimizer's groups, its steps, processes and a resumed run."""

from types import SimpleNamespace

import pytest
import torch
from core_models import assert_one_line, tiny_unet
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from images.runs import RESUME, main
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


def test_methods_without_b_are_named(capsys):
    without_b = [row.name for row in METHODS.values() if not row.trains_b]
    assert without_b == ["loha", "lokr", "oft"]
    parse_args(["--method", *without_b, "--loraplus_lr_ratio", "4"])
    assert "--loraplus_lr_ratio 4: it has no effect with --method loha lokr oft" in capsys.readouterr().out


# -- processes and resumed runs ----------------------------------------------------------------------------------------


@pytest.mark.exhaustive
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
