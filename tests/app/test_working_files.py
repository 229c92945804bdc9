"""app/working_files.py: files for visitors to download."""

from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import PIL.Image
from app_runs import REQUEST

from app import working_files
from app.generation_request import Drawn
from app.tabs.generate import GenerateTab


def test_the_images_of_a_long_request_stay_when_their_working_files_go(monkeypatch, tmp_path):
    monkeypatch.setattr(working_files, "KEPT", 1)
    monkeypatch.setattr(gallery := gr.Gallery(), "GRADIO_CACHE", str(tmp_path))
    tab = SimpleNamespace(files=working_files.WorkingFiles(), gallery=gallery)
    source = {"run": "r", "weights": "w"}
    images = [Drawn(PIL.Image.new("RGB", (8, 8), (value, 0, 0)), REQUEST, source) for value in range(3)]
    paths = [Path(GenerateTab.save(tab, image)) for image in images]
    assert len(set(paths)) == 3 and all(path.is_file() for path in paths)
