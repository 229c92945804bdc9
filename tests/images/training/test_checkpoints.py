"""Resuming: bit for bit without changes, a warning for a damaged checkpoint, or an error of one line."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from pipelines import image_folder
from safetensors.torch import load_file, save_file
from suites import quick

from images import exact_steps
from images.conftest import STEPS
from images.runs import (
    RESUME,
    assert_same,
    cut,
    digests,
    final_weights,
    flip_a_bit,
    killed_after,
    losses,
    main,
    only,
    options_of,
    printed,
    refused,
    training_state,
)
from reslora.errors import InvalidArgument, RunFailed
from reslora.images.settings import parse_args
from reslora.io import write_json
from reslora.runtime.checkpoint_folders import step_of
from reslora.training.checkpoints import (
    Identity,
    check_past,
    checkpoints_of,
    notes_of,
    plan_resume,
    read_checkpoint,
    refuse_other_content,
    restore,
    save_checkpoint,
)


def unfinished(run: Path, output: Path, *methods: str) -> Path:
    """A copy of the run in which the trained method is not exported yet."""
    for method in methods:
        shutil.copytree(run / method, output / method)
        (output / method / "exports.json").unlink()
    return output


@pytest.mark.parametrize("method", quick(["lora", "reslora", "adalora", "lora_matched"], "reslora"))
def test_resumed_run_equals_an_uninterrupted_one(base_flags, tmp_path, method):
    flags = [*base_flags, "--method", method, "--lora_dropout", "0.2", "--lr_scheduler", "cosine"]
    flags += ["--lr_warmup_steps", "1", "--num_validation_images", "0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(*flags, "--output_dir", whole) == 0
    killed_after(2, whole, parts, method)
    assert main(*flags, "--output_dir", parts, *RESUME) == 0
    weights = "checkpoint-4/*.safetensors"
    assert digests(whole / method, weights) == digests(parts / method, weights)
    one, other = (training_state(folder, 4, method) for folder in (whole, parts))
    assert one["lr_scheduler"] == other["lr_scheduler"]
    for index, state in one["optimizer"]["state"].items():
        assert_same(state, other["optimizer"]["state"][index])
    assert losses(whole, method) == losses(parts, method)


@pytest.mark.exhaustive
def test_pissa_resumes_exactly_and_exports_lora_on_the_base_model(base_flags, model, tmp_path):
    flags = [*base_flags, "--method", "lora", "--init_lora_weights", "pissa_niter_2", "--num_validation_images", "0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(*flags, "--output_dir", whole) == 0
    killed_after(2, whole, parts, "lora")
    assert main(*flags, "--output_dir", parts, *RESUME) == 0
    assert losses(whole, "lora") == losses(parts, "lora")
    for pattern in ("checkpoint-4/*.safetensors", "peft/*.safetensors", "unet/*.safetensors"):
        assert digests(whole / "lora", pattern) == digests(parts / "lora", pattern)
    trained, exported = final_weights(whole, "lora", 4), load_file(whole / "lora/peft/adapter_model.safetensors")
    base = UNet2DConditionModel.from_pretrained(model, subfolder="unet").state_dict()
    merged = UNet2DConditionModel.from_pretrained(whole / "lora" / "unet").state_dict()
    for name in (name.removesuffix(".lora_A.default.weight") for name in trained if "lora_A.default" in name):
        a, b = (trained[f"{name}.lora_{part}.default.weight"].double() for part in "AB")
        initial_a, initial_b = (trained[f"{name}.lora_initial_{part}.default"].double() for part in "AB")
        down, up = (exported[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        assert len(down) == 2 * len(a)
        torch.testing.assert_close(up @ down, b @ a - initial_b @ initial_a, rtol=1e-5, atol=1e-5)
        update = merged[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        torch.testing.assert_close(update, 2 * up @ down, rtol=1e-5, atol=1e-5)  # alpha is twice the rank


@pytest.mark.exhaustive
def test_latest_with_nothing_to_go_on_from_says_so_and_starts_afresh(brief_flags, tmp_path):
    """Otherwise a typing error in --output_dir would cost hours."""
    lines = printed(*brief_flags, "--output_dir", tmp_path / "out", *RESUME)
    only(lines, "--resume_from_checkpoint latest", str(tmp_path / "out"))
    assert (tmp_path / "out" / "lora" / "exports.json").is_file()


def test_missing_named_checkpoint_is_an_error(base_flags, capsys, tmp_path):
    flags = ("--output_dir", tmp_path, "--resume_from_checkpoint", "checkpoint-7")
    assert "checkpoint-7" in refused(capsys, *base_flags, *flags)


@pytest.mark.parametrize("words", [("--max_train_steps", "6"), ("--num_train_epochs", "5"), ("--max_train_steps", "4")])
def test_a_finished_method_without_its_checkpoints_is_not_trained_over(tmp_path, words):
    """They were removed to save disk space. With the same steps, an exported file is missing too."""
    record = {"step": 4, "num_train_epochs": 100, "by_epochs": False, "read_back": {"unet": 0}}
    write_json(tmp_path / "lora" / "exports.json", record)
    flags = parse_args(["--output_dir", str(tmp_path), "--method", "lora", *words])
    with pytest.raises(
        InvalidArgument, match=r"lora has been trained, but the checkpoint .* is missing; .* remove .*lora to"
    ):
        plan_resume(flags)
    there = tmp_path / "lora" / ("unet" if words[1] == "4" else "checkpoint-2")
    write_json(there / "trainer.json", {})  # what was gone
    assert plan_resume(flags.replace(resume_from_checkpoint="latest")).finished == ["lora"] * (there.name == "unet")


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_one_flipped_bit_is_damage_in_every_file(runs, whole, tmp_path):
    """Each file in its own checkpoint, which are all the newest ones."""
    output = tmp_path / "out"
    shutil.copytree(whole / "reslora", output / "reslora")
    (output / "reslora" / "exports.json").unlink()
    damaged = {5: "reslora_model.safetensors", 4: "trainer.pt", 3: "trainer.json"}
    for step, name in damaged.items():
        flip_a_bit(output / "reslora" / f"checkpoint-{step}" / name)
    lines = printed(*runs.flags, "--output_dir", output, *RESUME)
    for step in damaged:
        only(lines, "warning", f"checkpoint-{step} is damaged")
    only(lines, "resuming from", "checkpoint-2")
    assert_same(final_weights(output, step=STEPS), final_weights(whole, step=STEPS))


DAMAGES = {
    "trainer.pt cut short": lambda folder: cut(folder / "trainer.pt"),
    "trainer.pt gone": lambda folder: (folder / "trainer.pt").unlink(),
    "trainer.json empty": lambda folder: (folder / "trainer.json").write_text(""),
    "weights empty": lambda folder: (folder / "reslora_model.safetensors").write_bytes(b""),
    "configuration cut short": lambda folder: cut(folder / "reslora_config.json"),
}


@pytest.mark.exhaustive
def test_latest_goes_back_to_the_newest_that_is_whole(runs, whole, tmp_path):
    """Every kind of damage in its own checkpoint, and the newest checkpoint with all of them."""
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / "reslora" / "exports.json").unlink()
    for step, damage in zip(range(STEPS, 0, -1), list(DAMAGES.values())[: STEPS - 1], strict=False):
        damage(output / "reslora" / f"checkpoint-{step}")
    assert runs.finish(output, *RESUME) == 0
    assert_same(final_weights(output, step=STEPS), final_weights(whole, step=STEPS))
    assert losses(output) == losses(whole)


@pytest.mark.exhaustive
@pytest.mark.parametrize("damage", ["trainer.pt cut short", "configuration cut short"])
def test_named_checkpoint_that_is_damaged_is_refused(runs, whole, tmp_path, damage):
    shutil.copytree(whole / "reslora" / "checkpoint-2", tmp_path / "reslora" / "checkpoint-2")
    DAMAGES[damage](tmp_path / "reslora" / "checkpoint-2")
    assert runs.finish(tmp_path, "--resume_from_checkpoint", "checkpoint-2") == 2
    assert "--resume_from_checkpoint" in runs.last_line() and "damaged" in runs.last_line()


@pytest.mark.exhaustive
def test_where_no_checkpoint_is_whole_nothing_is_trained_over_them(runs, whole, tmp_path):
    """They may contain weeks of training: only the user may decide to start again."""
    output = tmp_path / "out"
    shutil.copytree(whole / "reslora", output / "reslora")
    (output / "reslora" / "exports.json").unlink()
    for checkpoint in checkpoints_of(output / "reslora"):
        cut(checkpoint / "trainer.pt")
    before = digests(output, "reslora/checkpoint-*/*")
    assert runs.finish(output, *RESUME, "--checkpoints_total_limit", "1") == 2
    assert "no checkpoint in" in runs.last_line() and "remove that folder" in runs.last_line()
    assert digests(output, "reslora/checkpoint-*/*") == before


# -- what is whole, and cannot be loaded now ---------------------------------------------------------------------------


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


# -- checkpoints of another line ---------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_going_back_keeps_what_was_trained_from_there_before(run, base_flags, tmp_path):
    """Later checkpoints are not overwritten at the same step, not removed by the limit, and not the newest."""
    output = unfinished(run, tmp_path / "out", "lora")
    (output / "lora" / "checkpoint-6").mkdir()  # somebody's, in the way of a later one
    (output / "lora" / "checkpoint-6" / "mine.txt").write_text("mine")
    before = digests(output, "lora/checkpoint-4/*")
    flags = [*base_flags, "--method", "lora", "--output_dir", output, "--checkpoints_total_limit", "1"]
    flags += ["--max_train_steps", "6", "--resume_from_checkpoint", "checkpoint-2"]
    only(printed(*flags), "checkpoint-4 is not part of this training", "set-aside-checkpoint-4")
    kept = {path.name for path in (output / "lora").glob("*checkpoint-*")}
    assert kept == {"checkpoint-6", "set-aside-checkpoint-4", "set-aside-checkpoint-6"}
    after = digests(output, "lora/set-aside-checkpoint-4/*")
    assert {name.replace("set-aside-", ""): value for name, value in after.items()} == before
    assert (output / "lora" / "set-aside-checkpoint-6" / "mine.txt").read_text() == "mine"


# -- other settings, models and images -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [("--rank", "8"), ("--train_batch_size", "3")])
def test_resume_refuses_other_settings(run, base_flags, capsys, flags):
    line = refused(capsys, *base_flags, *flags, "--output_dir", run, "--method", "reslora", "--max_train_steps", "6",
                   *RESUME)  # fmt: skip
    assert flags[0] in line or "batch size" in line


def test_a_damaged_newest_checkpoint_does_not_hide_other_settings(run, base_flags, capsys, tmp_path):
    output = unfinished(run, tmp_path / "out", "lora")
    (output / "lora" / "checkpoint-4" / "trainer.json").write_text("[]")
    flags = [*base_flags, "--method", "lora", "--output_dir", output, *RESUME]
    assert "--learning_rate" in refused(capsys, *flags, "--learning_rate", "0.5")


def flags_in(folder: Path) -> list[str]:
    """Return the flags of a run with its model and images next to it."""
    places = {"--pretrained_model_name_or_path": "model", "--train_data_dir": "images", "--output_dir": "out"}
    return [word for flag, name in places.items() for word in (flag, str(folder / name))]


@pytest.fixture(scope="module")
def one_step(brief_flags, model, tmp_path_factory) -> Path:
    """Return the folder of a run of one step with its model and images next to it."""
    folder = tmp_path_factory.mktemp("one_step")
    shutil.copytree(model, folder / "model")
    image_folder(folder / "images")
    assert main(*brief_flags, *flags_in(folder)) == 0
    return folder


@pytest.fixture
def again(one_step, brief_flags, tmp_path) -> list[str]:
    """Return the flags to resume for a second step, in a copy of that folder in `tmp_path`."""
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    return [*brief_flags, *flags_in(tmp_path), "--max_train_steps", "2", *RESUME]


@pytest.mark.exhaustive
def test_resume_refuses_an_image_that_was_replaced_by_one_of_as_many_bytes(brief_flags, capsys, tmp_path):
    folder = image_folder(tmp_path / "p", 3, layout="jsonl")
    flags = [*brief_flags, "--train_data_dir", folder, "--output_dir", tmp_path / "out"]
    assert main(*flags, "--cache_dir", tmp_path / "cache") == 0
    path = folder / "1.png"
    size = path.stat().st_size
    PIL.Image.fromarray(np.zeros((32, 40, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))  # what follows a PNG's end is not read
    assert path.stat().st_size == size
    capsys.readouterr()
    again = ("--max_train_steps", "2", *RESUME, "--cache_dir", tmp_path / "cache")
    line = refused(capsys, *flags, *again, quiet=False)
    assert f"--train_data_dir {folder}" in line and "checkpoint-1" in line


@pytest.mark.exhaustive
def test_a_run_goes_on_where_its_model_and_images_have_moved(brief_flags, model, data, tmp_path):
    """Bit for bit as without moving: their content decides, and their place is only recorded."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(model, here / "model")
    shutil.copytree(data, here / "images")
    for folder in (here, there):
        flags = [*brief_flags, "--output_dir", tmp_path / "out", *RESUME]
        flags += ["--pretrained_model_name_or_path", folder / "model", "--train_data_dir", folder / "images"]
        steps = 1 if folder == here else 2
        lines = printed(*flags, "--max_train_steps", steps)
        here.exists() and here.rename(there)
    only(lines, "resuming from", "checkpoint-1")
    whole = [*brief_flags, "--max_train_steps", "2", "--checkpointing_steps", "1", "--output_dir", tmp_path / "whole"]
    assert main(*whole) == 0
    assert losses(tmp_path / "out", "lora") == losses(tmp_path / "whole", "lora")
    assert_same(*(final_weights(tmp_path / name, "lora", step=2) for name in ("out", "whole")))


@pytest.mark.exhaustive
def test_resume_refuses_another_model_at_the_same_place(again, capsys, tmp_path):
    """All weights differ, then only queries and values in all blocks; then the first model is back."""
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    before, tensors = weights.read_bytes(), load_file(weights)
    for factor, parts in ((2, ("",)), (-3, (".to_q.", ".to_v."))):
        changed = {k: value * (factor if any(part in k for part in parts) else 1) for k, value in tensors.items()}
        save_file(changed, weights, metadata={"format": "pt"})
        line = refused(capsys, *again, quiet=False)
        assert f"--pretrained_model_name_or_path {tmp_path}/model" in line and "checkpoint-1" in line
    weights.write_bytes(before)
    assert main(*again) == 0


# -- by themselves: one learner, no run --------------------------------------------------------------------------------


@pytest.fixture
def keep(model, tmp_path):
    """Save the learner at a step, with these flags; return the checkpoint. `keep.learner` is a new ResLoRA."""
    training_data, loss, denoiser = exact_steps.setting(model)
    accelerator = Accelerator(cpu=True)
    learner = exact_steps.learner_of(denoiser, loss, accelerator)

    assert (learner.step, learner.seconds) == (0, 0.0)

    def save(step: int, **flags) -> Path:
        learner.step, learner.seconds = step, 10.0 * step
        options, identity = (
            options_of(training_data).replace(**flags),
            Identity("model", "images", "--model", "--images"),
        )
        context = SimpleNamespace(options=options, accelerator=accelerator, folder_of=lambda method: tmp_path)
        schedule = SimpleNamespace(steps=9)
        save_checkpoint(learner, SimpleNamespace(context=context, identity=identity, schedule=schedule))
        return tmp_path / f"checkpoint-{step}"

    save.learner, save.options, save.accelerator = learner, options_of(training_data), accelerator
    return save


def restored(learner, candidates: list[Path], output, accelerator) -> None:
    """Restore the learner in the directory of its name."""
    optimizer, folder = SimpleNamespace(lr_scheduler="constant"), Path(output.output_dir) / learner.name
    options = SimpleNamespace(output=output, optimizer=optimizer)
    context = SimpleNamespace(options=options, accelerator=accelerator, folder_of=lambda _: folder)
    restore(learner, candidates, 9, context)


@pytest.mark.parametrize(
    ("there", "flag"),
    [
        ({"model": "other"}, "--model m: out was trained from a model with other content"),
        ({"images": "some"}, "--data d: out was trained on some, these are all; class images: few"),
        ({"images": "all; class images: many"}, "--class_data_dir c: out was trained on all; class images: many, "),
    ],
)
def test_other_content_is_named_by_its_own_option(there, flag):
    identity = Identity("model", "all; class images: few", "--model m", "--data d", "--class_data_dir c")
    with pytest.raises(InvalidArgument, match=f"^{flag}"):
        refuse_other_content(Path("out"), there, identity)


def test_changed_options_without_effect_on_a_finished_method_are_noted(keep):
    finished = {"shown": {"num_validation_images": 4, "rank": 99}}
    (note,) = notes_of(keep.options.replace(num_validation_images=2), Path("out"), finished)
    assert note == "out is finished, so --num_validation_images has no effect: it was 4"


def test_a_checkpoint_that_loads_but_differs_from_its_checksums_is_passed_over(keep, capsys):
    """A digit of its training time or the last bit of a weight: it could still be read."""
    paths = [keep(step) for step in (1, 2, 3)]
    record = paths[2] / "trainer.json"
    record.write_text(record.read_text().replace("30.0", "31.0"))
    weights = paths[1] / "reslora_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-8] ^= 1
    weights.write_bytes(content)
    load_file(weights)
    flags = keep.options.replace(resume_from_checkpoint="latest")
    restored(keep.learner, paths[::-1], flags.output, keep.accelerator)
    assert (keep.learner.step, keep.learner.seconds) == (1, 10.0)
    assert capsys.readouterr().out.count("warning: ") == 2
    with pytest.raises(InvalidArgument, match="damaged"):
        restored(
            keep.learner, paths[1:2], flags.replace(resume_from_checkpoint="checkpoint-2").output, keep.accelerator
        )


@pytest.mark.exhaustive
def test_a_checkpoint_without_its_record_is_damaged_and_not_nothing(keep, tmp_path):
    """If it is the only one, training must not start from zero next to it."""
    first, second = [keep(step, max_train_steps=9) for step in (1, 2)]
    keep.learner.name, named = tmp_path.name, {"output_dir": str(tmp_path.parent), "method": [tmp_path.name]}
    flags = keep.options.replace(**named, max_train_steps=9, resume_from_checkpoint="latest")
    (second / "trainer.json").unlink()
    restored(keep.learner, plan_resume(flags).checkpoints[tmp_path.name], flags.output, keep.accelerator)
    assert keep.learner.step == 1
    (first / "trainer.json").unlink()
    with pytest.raises(InvalidArgument, match=r"no checkpoint in .* is complete"):
        restored(keep.learner, plan_resume(flags).checkpoints[tmp_path.name], flags.output, keep.accelerator)


def test_a_checkpoint_that_cannot_be_loaded_sets_no_others_aside(keep, tmp_path, monkeypatch):
    first, *_ = [keep(step) for step in (1, 2, 3)]
    keep.learner.name, flags = tmp_path.name, keep.options.replace(output_dir=str(tmp_path.parent))
    with monkeypatch.context() as patch, pytest.raises(RunFailed, match="nothing on disk was changed"):
        patch.setattr(torch, "load", out_of_memory)
        restored(keep.learner, [first], flags.output, keep.accelerator)
    assert [step_of(path) for path in checkpoints_of(tmp_path)] == [3, 2, 1]
    restored(keep.learner, [first], flags.output, keep.accelerator)
    assert [step_of(path) for path in checkpoints_of(tmp_path)] == [1]


@pytest.mark.parametrize(("limit", "kept"), [(None, [4, 3, 2, 1]), (1, [4])])
def test_no_more_checkpoints_stay_than_the_limit_allows(keep, tmp_path, limit, kept):
    for step in (1, 2, 3, 4):
        keep(step, checkpoints_total_limit=limit)
    assert [step_of(path) for path in checkpoints_of(tmp_path)] == kept
    assert len(list(tmp_path.glob("checkpoint-*"))) == len(kept)


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "same"),
    [(1, 8, 1, True), (2, 2, 2, True), (4, 2, 2, False)],
)  # fmt: skip
def test_batch_accumulation_and_processes_may_change_as_long_as_a_steps_samples_stay(
    keep, monkeypatch, batch, accumulation, processes, same
):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    checkpoint = keep(1, train_batch_size=4, gradient_accumulation_steps=2)
    flags = keep.options.replace(train_batch_size=batch, gradient_accumulation_steps=accumulation)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if same:
        return check_past(flags, checkpoint, read_checkpoint(checkpoint), None)
    with pytest.raises(InvalidArgument, match="batch size x accumulation x processes") as error:
        check_past(flags, checkpoint, read_checkpoint(checkpoint), None)
    assert str(batch * accumulation * processes) in str(error.value) and "trained with 8" in str(error.value)


def test_what_steers_is_not_added_half_way_and_named_itself(keep):
    """--validation_noises was not given, so it is not named. If it was measured, patience may be added or changed."""
    steering = {"save_best": True}
    plain, measured = keep(1), keep(2, validation_noises=4, save_best="save_best" in steering)
    flags = keep.options.replace(validation_noises=4, **steering)
    (name,) = steering
    with pytest.raises(InvalidArgument, match=rf"^--{name}( 3)?: needs --validation_noises .* leave it out"):
        check_past(flags, plain, read_checkpoint(plain), None)
    for patience in (flags.validation.early_stopping_patience, 5, None):
        check_past(flags.replace(early_stopping_patience=patience), measured, read_checkpoint(measured), None)
    with pytest.raises(InvalidArgument, match=r"--validation_noises 4: .* was trained with 2; use that"):
        fewer = keep(3, validation_noises=2)
        check_past(flags.replace(save_best=False), fewer, read_checkpoint(fewer), None)


def test_what_a_run_was_begun_without_is_to_be_left_out(keep):
    checkpoint = keep(1)
    with pytest.raises(InvalidArgument, match=r"--caption_prefix sks: .* was trained with none; leave it out, or"):
        check_past(keep.options.replace(caption_prefix="sks"), checkpoint, read_checkpoint(checkpoint), None)


@pytest.mark.exhaustive
def test_where_images_have_several_sizes_a_forwards_samples_stay_too(keep, monkeypatch):
    """A batch has images of one size, so the images of a step depend on the number of images per batch."""
    sizes = {"use_aspect_ratio_buckets": True}
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    checkpoint = keep(1, train_batch_size=8, gradient_accumulation_steps=1, **sizes)
    record, flags = read_checkpoint(checkpoint), keep.options.replace(gradient_accumulation_steps=1, **sizes)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_past(flags.replace(train_batch_size=4), checkpoint, record, None)
    with pytest.raises(InvalidArgument, match=r"several sizes, batch size x processes = 2: .* was trained with 8"):
        check_past(flags.replace(train_batch_size=1, gradient_accumulation_steps=4), checkpoint, record, None)
