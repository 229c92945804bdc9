"""The parser of all scripts: complete names, numbers in any notation, and the most similar known option."""

import pytest

from reslora.images import conversion
from reslora.options.argument_parser import Parser
from reslora.options.texts import GlueOptions, LlmOptions
from reslora.texts.arguments import read


def parser() -> Parser:
    made = Parser(prog="script.py")
    made.add_argument("--learning_rate", type=float, nargs="+")
    made.add_argument("--rank", type=int)
    made.add_argument("--prompt")
    return made


def refusal(capsys, parse, *words: str) -> str:
    """Return the one line on stderr."""
    with pytest.raises(SystemExit) as end:
        parse(list(words))
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    return line.strip()


@pytest.mark.parametrize("text", ["-1e-4", "-inf"])
def test_a_negative_number_is_a_value_in_any_notation(text):
    values = parser().parse_args(["--learning_rate", "1", text, "--rank", "4"])
    assert repr(values.learning_rate) == repr([1.0, float(text)]) and values.rank == 4


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--leraning_rate 1e-4", "--leraning_rate: unknown option; did you mean --learning_rate?"),
        ("-rank 4", "-rank: unknown option; did you mean --rank?"),
        ("--ran 4", "--ran: unknown option; did you mean --rank?"),  # no abbreviations
        ("--rnak 4 --volume", "--rnak: unknown option; did you mean --rank?; --volume: unknown option"),
        ("--rank 4 8", "8: no option takes this; options begin with --"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_one(capsys, words, line):
    assert refusal(capsys, parser().parse_args, *words.split()) == f"script.py: error: {line}"


def parse_conversion(words: list[str]) -> object:
    return conversion.build_parser().parse_args(["one", "other", "--to", "kohya", *words])


@pytest.mark.parametrize(
    ("parse", "words", "meant"),
    [
        (lambda words: read(LlmOptions, "train_llm.py", words), ["--leraning_rate", "1e-4"], "--learning_rate"),
        (lambda words: read(GlueOptions, "train_glue.py", words), ["--tsak_name", "rte"], "--task_name"),
        (parse_conversion, ["--ovewrite"], "--overwrite"),
    ],
)
def test_every_script_suggests_what_was_meant(capsys, parse, words, meant):
    assert refusal(capsys, parse, *words).endswith(f"error: {words[0]}: unknown option; did you mean {meant}?")
