"""What a run finds in its folder: itself, finished or not."""

from diffusion.runs import main, refused, without


def test_finished_run_does_nothing(run, base_flags, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert main(*base_flags, "--method", "lora", "reslora", "--output_dir", run) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_steps_and_epochs_are_told_apart(run, base_flags, capsys):
    """A run that `--max_train_steps` ended is not the run of so many epochs, and not one of fewer steps."""
    flags = [*base_flags, "--method", "lora", "reslora", "--output_dir", run]
    assert "unfinished run" in refused(capsys, *without(flags, "--max_train_steps"), "--num_train_epochs", 2)
    line = refused(capsys, *flags, "--max_train_steps", 2)
    assert "--max_train_steps 2" in line and "4" in line


def test_unfinished_run_is_not_overwritten(run, base_flags, capsys, tmp_path):
    checkpoint = tmp_path / "lora" / "checkpoint-2"
    checkpoint.parent.mkdir()
    checkpoint.symlink_to(run / "lora" / "checkpoint-2")
    flags = [*base_flags, "--method", "lora", "--output_dir", tmp_path]
    assert "--resume_from_checkpoint latest" in refused(capsys, *flags)
