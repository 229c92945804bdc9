"""JSON lines as users write them."""

import pytest

from reslora.errors import InvalidArgument
from reslora.json_lines import NOT_JSON, data_lines, json_lines


def test_lines_are_numbered_and_blank_ones_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b"}\n\n  \nnull\n{"cut": \n[1]', encoding="utf-8")
    assert list(json_lines(path)) == [(1, {"text": "a\u2028b"}), (4, None), (5, NOT_JSON), (6, [1])]


def test_what_is_nested_too_deep_is_not_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 100_000)
    assert list(json_lines(path)) == [(1, NOT_JSON)]


ROWS = '{"text": "Zo\u00eb"}\n\n{"text": "caf\u00e9"}\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_data_may_begin_with_a_byte_order_mark(tmp_path, encoding):
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS, encoding=encoding)
    assert list(data_lines(path, "rows", "correct it")) == [(1, {"text": "Zo\u00eb"}), (3, {"text": "caf\u00e9"})]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"text": "a"}\n{"text": "caf\u00e9"}'.encode("latin-1"), "rows line 2: is not UTF-8"),
        (ROWS.encode("utf-16"), "rows line 1: is not UTF-8"),
        (b'{"text": "a"}\n\n{"cut', "rows line 3: is not JSON; add it"),
        (b'{"text": ["a", {"b": "\\ud83d"}]}', "rows line 1: contains half of a surrogate pair, '\\ud83d'"),
    ],
    ids=["latin-1", "utf-16", "not JSON", "half of a character"],
)
def test_nothing_of_data_is_replaced_or_left_out(tmp_path, content, problem):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument) as caught:
        list(data_lines(path, "rows", "add it"))
    assert str(caught.value).startswith(problem)
