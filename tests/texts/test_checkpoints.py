"""Which checkpoints can be resumed from."""

import shutil
from pathlib import Path

import pytest

from reslora.errors import RunFailed
from reslora.runtime.checkpoint_folders import numbered
from reslora.texts import trainer
from reslora.texts.checkpoints import damage, set_unfinished_aside, usable_checkpoint

from .helpers import assert_not_resumed, build, trainer_for


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("reslora_model.safetensors", "half"),
        ("reslora_config.json", "half"),
        ("trainer_state.json", None),
        ("optimizer.pt", "half"),
        ("scheduler.pt", None),
        ("rng_state.pth", None),
    ],
)
def test_a_damaged_last_checkpoint_is_left_out(tmp_path, monkeypatch, name, content):
    warnings = []
    monkeypatch.setattr("reslora.texts.checkpoints.logger.warning", warnings.append)
    model, _ = build()
    trainer_for(model, tmp_path).train()
    path = tmp_path / "checkpoint-6" / name
    data = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(data[: len(data) // 2])
    (tmp_path / "checkpoint-notes").mkdir()
    assert usable_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert len(warnings) == 1 and "checkpoint-6 cannot be resumed" in warnings[0] and "\n" not in warnings[0]
    assert_not_resumed(tmp_path, str(tmp_path / "checkpoint-6"), "checkpoint-6", "cannot be resumed", "use latest")


@pytest.mark.exhaustive
@pytest.mark.parametrize("made_by", [1, 2, 3, 4])
def test_another_number_of_processes_cannot_go_on(tmp_path, made_by):
    trainer_for(build()[0], tmp_path, max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    (folder / "checksums.json").unlink()
    state = (folder / "rng_state.pth").read_bytes()
    if made_by > 1:
        (folder / "rng_state.pth").unlink()
        for rank in range(made_by):
            (folder / f"rng_state_{rank}.pth").write_bytes(state)
    for processes in (1, 2, 3, 4):
        found = damage(folder, processes)
        assert found is None if processes == made_by else "made by another number of processes" in found
        assert usable_checkpoint(tmp_path, processes) == (str(folder) if processes == made_by else None)


def test_a_checkpoint_of_the_adapter_alone_says_why_it_cannot_go_on(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("reslora.texts.trainer.logger.warning", said.append)
    trainer_for(build()[0], tmp_path, save_only_model=True).train()
    assert len(said) == 1 and said[0].startswith("--save_only_model: no checkpoint can be resumed")
    for named, fix in (("latest", "; remove them to start afresh"), ("checkpoint-6", "; leave it out")):
        line = assert_not_resumed(tmp_path, named, "it holds the adapter alone, as with --save_only_model", fix)
        assert "processes" not in line


def test_an_older_one_goes_once_the_new_one_is_whole(tmp_path, monkeypatch):
    """Checksums are written last, when every process has written its part."""
    there: list[set[str]] = []

    def seen(folder, before=trainer.write_checksums):
        before(folder)
        if (folder / "trainer_state.json").exists():  # not of the adapter alone
            there.append({path.name for path in tmp_path.glob("checkpoint-*")})

    monkeypatch.setattr(trainer, "write_checksums", seen)
    trainer_for(build()[0], tmp_path, save_total_limit=1).train()
    assert there == [{"checkpoint-2"}, {"checkpoint-2", "checkpoint-4"}, {"checkpoint-4", "checkpoint-6"}]
    assert [path.name for path in numbered(tmp_path)] == ["checkpoint-6"]


@pytest.mark.parametrize(("best", "limit", "kept"), [(2, 1, [6, 2]), (4, 2, [6, 4]), (6, 2, [6, 4]), (2, 3, [6, 4, 2])])
def test_the_best_one_stays_whatever_the_limit(tmp_path, best, limit, kept):
    one = trainer_for(build()[0], tmp_path, save_total_limit=limit)
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    one.state.best_model_checkpoint = f"{tmp_path}/./checkpoint-{best}"
    one._remove_older()
    assert [path.name for path in numbered(tmp_path)] == [f"checkpoint-{step}" for step in kept]


def test_one_that_cannot_be_removed_ends_no_training(tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise PermissionError("Operation not permitted: 'optimizer.pt'")

    one = trainer_for(build()[0], tmp_path, save_total_limit=1)
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refused)
        one._remove_older()
    assert [path.name for path in numbered(tmp_path)] == ["checkpoint-4"]
    assert "(it was checkpoint-2) is no longer needed, but cannot be removed" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_later_ones_step_aside_once_the_chosen_one_is_loaded(tmp_path, monkeypatch):
    def there() -> set[str]:
        return {path.name for path in tmp_path.glob("*checkpoint-*")}

    trainer_for(build()[0], tmp_path).train()
    whole = {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    trainer = trainer_for(build()[0], tmp_path)
    with monkeypatch.context() as patched, pytest.raises(RunFailed, match="nothing on disk was changed"):
        patched.setattr(trainer, "_load_allocator", fail)
        trainer.train(resume_from_checkpoint="checkpoint-2")
    assert there() == whole
    trainer.train(resume_from_checkpoint="checkpoint-2")
    assert there() == whole | {"set-aside-checkpoint-4", "set-aside-checkpoint-6"}
    trainer = trainer_for(build()[0], tmp_path)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="out of memory"):
        patched.setattr(trainer, "training_step", fail)  # a kill before the next checkpoint
        trainer.train(resume_from_checkpoint="set-aside-checkpoint-4")
    assert usable_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4") == str(numbered(tmp_path)[0])
    assert_same_content(tmp_path / "checkpoint-4", tmp_path / "set-aside-checkpoint-4")


def assert_same_content(one: Path, other: Path) -> None:
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other)]
    assert contents[0] == contents[1]


def fail(*args) -> None:
    raise RuntimeError("out of memory")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "shortcut"), [("reslora", "input"), ("adalora", "none")])
def test_one_flipped_bit_in_any_file_counts_as_damaged(tmp_path, method, shortcut):
    trainer_for(build(method, shortcut)[0], tmp_path, max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    assert damage(folder) is None
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in (0, len(content) // 3, len(content) // 2, len(content) - 2):
            for bit in (0, 6):
                flipped = bytearray(content)
                flipped[place] ^= 1 << bit
                path.write_bytes(flipped)
                assert damage(folder) is not None, f"{path.name}, byte {place}, bit {bit}"
        path.write_bytes(content)
    assert damage(folder) is None


def test_a_checkpoint_that_was_not_finished_is_left_out(tmp_path, monkeypatch):
    """The adapter is listed as soon as it is written; the trainer's state comes last, and not at once."""
    last, write = tmp_path / "checkpoint-6", trainer.write_checksums
    monkeypatch.setattr(trainer, "write_checksums", lambda folder: folder == last or write(folder))  # as if killed
    trainer_for(build()[0], tmp_path).train()
    assert (last / "checksums.json").is_file() and damage(last) == "it was not finished"
    assert usable_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_an_unfinished_one_steps_aside_where_it_is_alone(tmp_path, capsys):
    """What is damaged later stays, and so does what still goes on."""
    trainer_for(build()[0], tmp_path, max_steps=4).train()
    early, late = tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"
    for path in (early, late):  # a run that has lost two has come further than its first
        (path / "checksums.json").unlink()
        (path / "trainer_state.json").rename(path / "kept")
    set_unfinished_aside(tmp_path)
    assert numbered(tmp_path) == [late, early]
    shutil.rmtree(late)
    (early / "kept").rename(early / "trainer_state.json")
    (early / "optimizer.pt").write_bytes(b"cut")
    set_unfinished_aside(tmp_path)
    (early / "trainer_state.json").unlink()
    (tmp_path / "results.json").write_text("{}")  # of a run that has come to its end
    set_unfinished_aside(tmp_path)
    assert numbered(tmp_path) == [early] and "not finished" not in capsys.readouterr().out
    (tmp_path / "results.json").unlink()
    set_unfinished_aside(tmp_path)
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["unfinished-checkpoint-2"]
    assert f"{early} was not finished: renamed to unfinished-checkpoint-2" in capsys.readouterr().out


def test_a_checkpoint_without_checksums_is_read_as_before(tmp_path):
    trainer_for(build()[0], tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "checksums.json").unlink()
    assert usable_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
