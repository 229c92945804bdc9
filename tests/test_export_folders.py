"""Other files in the folder of an export, and the folder's content after a failure."""

import contextlib
from pathlib import Path

import pytest
from core_models import Stack, assert_one_line, tiny_unet
from peft import LoraConfig, get_peft_model

from reslora.export import DIFFUSERS_FILE, export_diffusers, export_merged, export_peft

RANKS = {"old": 2, "new": 3}


@pytest.mark.parametrize(
    ("fails", "config", "weights"),  # the first that fails is the write, the others are the two renames
    [("-", "new", "new"), ("adapter_model", None, "old")],
)
def test_an_adapter_leaves_other_files_and_is_never_described_by_another(fails, config, weights, tmp_path, monkeypatch):
    models = {
        name: get_peft_model(Stack(), LoraConfig(r=rank, target_modules=["proj"])) for name, rank in RANKS.items()
    }
    export_diffusers(models["old"], tmp_path)
    for name in ("old", "new"):
        export_peft(models[name], tmp_path / name)
    export_peft(models["old"], tmp_path)
    replace = Path.replace

    def failing(path, target):
        if target.name.startswith(fails):
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", failing)
    with contextlib.suppress(OSError):
        export_peft(models["new"], tmp_path)
    wanted = {"adapter_config.json": config, "adapter_model.safetensors": weights}
    wanted = {name: (tmp_path / which / name).read_bytes() for name, which in wanted.items() if which}
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert found.pop(DIFFUSERS_FILE) and found == wanted


def test_a_merged_model_replaces_no_folder_but_a_models(tmp_path):
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    for _ in range(2):
        export_merged(unet, tmp_path / "unet")
    export_diffusers(unet, tmp_path / "unet")
    for folder, first in ((tmp_path / "unet", DIFFUSERS_FILE), (tmp_path, "unet/config.json")):
        with pytest.raises(ValueError) as error:
            export_merged(unet, folder)
        assert_one_line(error, f"{folder} has {first}", "give another folder")
    assert len(list((tmp_path / "unet").iterdir())) == 3
