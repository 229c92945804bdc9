"""What is said of targets and shortcuts before anything is encoded; what is refused is in test_arguments.py."""

from diffusion.runs import only, printed


def test_a_clipped_pre_num_and_names_that_match_nothing_are_said(brief_flags, tmp_path):
    flags = [*brief_flags, "--method", "reslora", "--shortcut", "block", "--pre_num", "50"]
    lines = printed(*flags, "--target_modules", "to_q", "nothing", "--output_dir", tmp_path / "out")
    assert "2 of 2 chains" in (line := only(lines, "--pre_num 50")) and "2 blocks" in line
    assert "0 layers" in only(lines, "--target_modules", "nothing")


def test_layers_that_stay_plain_are_counted(brief_flags, tmp_path):
    """Convolutions get an adapter, and no shortcut: the tiny U-Net has one `conv_in`."""
    flags = [*brief_flags, "--method", "reslora", "--target_modules", "to_q", "conv_in"]
    lines = printed(*flags, "--output_dir", tmp_path / "out")
    assert "1 " in only(lines, "conv_in")


def test_a_pre_num_that_fits_is_not_mentioned(brief_flags, tmp_path):
    flags = [*brief_flags, "--method", "reslora", "--shortcut", "block", "--pre_num", "1"]
    lines = printed(*flags, "--target_modules", "to_k", "--output_dir", tmp_path / "out")
    assert not [line for line in lines if "--pre_num" in line or "--target_modules" in line]
