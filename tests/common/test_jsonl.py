"""JSON lines as people write them."""

from reslora.common.jsonl import NOT_JSON, json_lines


def test_lines_are_numbered_and_blank_ones_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b"}\n\n  \nnull\n{"cut": \n[1]', encoding="utf-8")
    assert list(json_lines(path)) == [(1, {"text": "a\u2028b"}), (4, None), (5, NOT_JSON), (6, [1])]


def test_what_is_nested_too_deep_is_not_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 100_000)
    assert list(json_lines(path)) == [(1, NOT_JSON)]
