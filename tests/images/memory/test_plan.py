"""The table of the memory estimate, the refusal of a run that does not fit, and options that make it fit."""

import dataclasses

import pytest

from images.memory.rehearsed import resolved
from images.runs import main, only, printed, refused
from reslora.errors import InvalidArgument
from reslora.images.memory import plan as planning
from reslora.images.memory.phases import Phase
from reslora.images.memory.plan import Plan, check_memory, plan_of


@pytest.fixture
def large(model, data, tmp_path) -> list[str]:
    """A run of which a step needs more memory than exports and encoding."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--resolution", "64"),
        *("--train_batch_size", "16", "--rank", "4", "--method", "lora", "--max_train_steps", "1", "--center_crop"),
        *("--num_validation_images", "0", "--output_dir", str(tmp_path / "out"), "--report_to", "none"),
        *("--num_inference_steps", "1", "--mixed_precision", "no"),
    ]  # fmt: skip


@pytest.fixture
def prepared(large, tmp_path) -> tuple:
    """Return the images and the context of that run."""
    return resolved(large[1], large[3], tmp_path / "out", *large)


def give(monkeypatch, free: float) -> None:
    """Let the device have this many free bytes."""
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
    assert only(table, "left out: ", "workspaces of kernels", "libraries")
    assert "the most, 3.00 MiB of 4.00 MiB that cpu has free, while encoding images" in table[-1]


@pytest.mark.exhaustive
def test_plan_tells_the_table_and_writes_nothing(large, tmp_path):
    lines = printed(*large, "--plan")
    assert only(lines, "planned memory").count("training") == 1 and only(lines, "the most", "while training")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.exhaustive
def test_a_run_that_does_not_fit_is_refused_with_a_flag_that_helps(prepared, large, capsys, monkeypatch, tmp_path):
    images, context = prepared
    plan = plan_of(images, context, None)
    checked = plan_of(images, with_flags(context, gradient_checkpointing=True), None)
    assert checked.peak.total < 0.8 * plan.peak.total
    give(monkeypatch, (plan.peak.total + checked.peak.total) / 2)
    line = refused(capsys, *large)
    assert "--train_batch_size 16" in line and "--gradient_checkpointing it takes" in line
    assert not list((tmp_path / "out").glob("*/*"))
    assert main(*large, "--gradient_checkpointing", "--plan") == 0


def test_where_one_flag_is_not_enough_several_are_named(prepared, monkeypatch):
    """By a stand-in: checkpointing halves the memory, batch size 1 halves it, other options change nothing."""
    images, context = prepared

    def half(images, context, free) -> Plan:
        flags = context.options
        total = (
            4
            * 2**30
            // (1 + flags.training.gradient_checkpointing)
            // (2 if flags.training.train_batch_size == 1 else 1)
        )
        return Plan((Phase("training", {"activations": total}),), free, "cpu")

    monkeypatch.setattr(planning, "plan_of", half)
    for free, words in ((3, "--gradient_checkpointing it takes 2.00"), (0.5, "a smaller model")):
        assert words in said(half(images, context, free * 2**30), images, context)
    both = "--gradient_checkpointing --train_batch_size 1 --gradient_accumulation_steps 16 it takes 1.00 GiB"
    assert both in said(half(images, context, 1.5 * 2**30), images, context)


def said(plan, images, context) -> str:
    with pytest.raises(InvalidArgument) as refusal:
        planning.refuse(plan, images, context)
    return str(refusal.value)


def test_nothing_is_gone_through_where_it_surely_fits_or_is_not_wanted(prepared, capsys, monkeypatch):
    images, context = prepared
    monkeypatch.setattr(planning, "plan_of", None)
    give(monkeypatch, 2**40)
    check_memory(images, context)
    give(monkeypatch, 1000)
    check_memory(images, with_flags(context, plan=False))
    assert "planned" not in capsys.readouterr().out


def with_flags(context, **changes):
    """Return the context with other flags."""
    return dataclasses.replace(context, options=context.options.replace(**changes))
