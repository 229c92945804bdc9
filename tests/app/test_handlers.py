"""app/handlers.py: exceptions of handlers become sentences."""

import errno
import os
import tempfile

import gradio as gr
import pytest

from app.handlers import server_function, translating
from app.runs import RunError


@pytest.mark.parametrize(
    ("raised", "told", "printed"),
    [
        (RunError("There is no such run."), "There is no such run.", ""),
        (RunError("It's <b>x</b>.png"), "It's &lt;b&gt;x&lt;/b&gt;.png", ""),  # the page shows it as HTML
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{tempfile.gettempdir()}/reslora-app-1/grid.png"),
            "A file cannot be written (No space left on device): make room on the disk that has the system's "
            "temporary folder.",
            "",
        ),
        (KeyError("secret"), "An unexpected error occurred; see the terminal for details.", "KeyError"),
    ],
)
def test_errors_are_sentences_without_paths(raised, told, printed, capsys):
    with pytest.raises(gr.Error) as caught, translating():
        raise raised
    assert caught.value.message == told
    assert printed in (said := capsys.readouterr().err) and bool(said) == bool(printed)


def test_a_script_gets_the_sentence_as_text():
    def refuse(_: dict) -> dict:
        raise RunError("No <b> here.")

    assert server_function(refuse)({}) == {"error": "No <b> here."}
