"""The table, the refusal of a run that does not fit, and the flags that make it fit."""

import pytest

from diffusion.planning.rehearsed import settled
from diffusion.runs import main, only, printed, refused
from reslora.diffusion.planning import plan as planning
from reslora.diffusion.planning.phases import Phase
from reslora.diffusion.planning.plan import Plan, check_memory, plan_of


@pytest.fixture
def large(model, data, tmp_path) -> list[str]:
    """A run of which a step takes more than exports and encoding do."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--resolution", "64"),
        *("--train_batch_size", "16", "--rank", "4", "--method", "lora", "--max_train_steps", "1", "--center_crop"),
        *("--num_validation_images", "0", "--output_dir", str(tmp_path / "out"), "--report_to", "none"),
        *("--num_inference_steps", "1", "--mixed_precision", "no"),
    ]  # fmt: skip


def give(monkeypatch, free: float) -> None:
    """A device that has so many bytes free."""
    monkeypatch.setattr(planning, "free_memory", lambda device: int(free))


def test_the_table_has_every_phase_and_the_most():
    phases = (
        Phase("encoding images", {"activations": 3 * 2**20}),
        Phase("training", {"base": 2**20, "activations": None}),
    )
    table = str(Plan(phases, 2**22, "cpu", ("activations of a step: unknown, it asks",))).splitlines()
    assert table[0].split() == ["planned", "memory", "in", "MiB", "encoding", "images", "training"]
    assert only(table, "base").split() == ["base", "1.00"]
    assert table[2].split() == ["activations", "3.00", "unknown"]
    assert only(table, "together").split() == ["together", "3.00", "1.00"]
    assert "the most, 3.00 MiB of 4.00 MiB that cpu has free, while encoding images" in table[-1]


def test_plan_tells_the_table_and_writes_nothing(large, tmp_path):
    lines = printed(*large, "--plan")
    assert only(lines, "planned memory").count("training") == 1 and only(lines, "the most", "while training")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_run_that_does_not_fit_is_refused_with_a_flag_that_makes_it_fit(large, capsys, monkeypatch, tmp_path):
    images, context = settled(large[1], large[3], tmp_path / "out", *large)
    plan = plan_of(images, context, None)
    checked = plan_of(images, with_flags(context, gradient_checkpointing=True), None)
    assert checked.peak.total < 0.8 * plan.peak.total
    give(monkeypatch, (plan.peak.total + checked.peak.total) / 2)
    line = refused(capsys, *large)
    assert "--train_batch_size 16" in line and "--gradient_checkpointing it takes" in line
    assert not list((tmp_path / "out").glob("*/*"))
    assert main(*large, "--gradient_checkpointing", "--plan") == 0


def test_where_one_flag_is_not_enough_several_are_named(large, capsys, monkeypatch, tmp_path):
    images, context = settled(large[1], large[3], tmp_path / "out", *large)
    alone = [{"train_batch_size": 1, "gradient_accumulation_steps": 16}, {"gradient_checkpointing": True}]
    both = plan_of(images, with_flags(context, **alone[0], **alone[1]), None).peak.total
    one = min(plan_of(images, with_flags(context, **change), None).peak.total for change in alone)
    monkeypatch.setattr(planning, "changes", lambda context: iter(alone))
    give(monkeypatch, (both + one) / 2)
    line = refused(capsys, *large, "--plan")
    assert "--train_batch_size 1 --gradient_accumulation_steps 16 --gradient_checkpointing it takes" in line
    give(monkeypatch, 1000)
    assert "a smaller model" in refused(capsys, *large, "--plan")


def test_nothing_is_gone_through_where_it_surely_fits_or_is_not_wanted(large, capsys, monkeypatch, tmp_path):
    images, context = settled(large[1], large[3], tmp_path / "out", *large)
    monkeypatch.setattr(planning, "plan_of", None)
    give(monkeypatch, 2**40)
    check_memory(images, context)
    give(monkeypatch, 1000)
    check_memory(images, with_flags(context, plan=False))
    assert "planned" not in capsys.readouterr().out


def with_flags(context, **changes):
    """The context with other flags."""
    import dataclasses

    return dataclasses.replace(context, flags=context.flags.replace(**changes))
