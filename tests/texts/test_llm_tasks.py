"""Rows as prompts and answers, and which answers are equal."""

import pytest

from reslora.texts.llm_tasks import TASKS, Example, extract_answer, same_answer

from .helpers import row


def test_examples_have_the_form_of_the_paper():
    assert TASKS["svamp"].example(row(1)) == Example("Tom has 2 pens. He finds 1. How many?", "2 + 1.", "3")
    assert TASKS["svamp"].example(row(1)).answer == "2 + 1. The answer is 3."
    gsm = {"question": "How much?", "answer": "It is 48/2=<<48/2=24>>24.\nSo <<24+1=25>>25.\n#### 1,025"}
    assert TASKS["gsm8k"].example(gsm).answer == "It is 48/2=24. So 25. The answer is 1,025."
    meta = {"query": "What?", "response": "Add.\n#### 5\nThe answer is: 5"}
    assert TASKS["metamathqa"].example(meta).answer == "Add.\n#### 5 The answer is 5."
    options = "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these"
    maths = {"Problem": "Gain?", "Rationale": '"explanation : x"', "options": options, "correct": "a"}
    example = TASKS["mathqa"].example(maths)
    assert example.prompt == f"Gain?\nThere are 5 options: {options}\nPlease answer the correct option."
    assert example.answer == "explanation : x. The answer is a."
    twice = maths | {"options": "a ) a ) 10 , b ) b ) 12 , c ) c ) 14"}  # as the hub has some
    assert "\nThere are 3 options: a ) a ) 10 , b ) b ) 12 , c ) c ) 14\n" in TASKS["mathqa"].example(twice).prompt
    swag = {"ctx": "He throws.", "endings": ["It flies.", "It sings.", "It eats.", "It."], "label": "2"}
    example = TASKS["hellaswag"].example(swag)
    assert '"He throws."\nThere are 4 options as an ending:\n0: It flies.\n1: It sings.' in example.prompt
    assert example.answer == "The answer is 2."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 3. The answer is 5.", "5"),
        ("The answer is 3.50. And so on", "3.50"),
        ("The answer is: $1,200", "$1,200"),
        ("The answer is 7\nmore", "7"),
        ("The answer is a.", "a"),
        ("The answer is 4. No: The answer is 5.", "5"),
        ("It is 5.", None),
        ("The answer is", None),
        ("", None),
    ],
)
def test_what_follows_the_answer_is_taken(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1,200", "1200.0"), ("1200", "1,200"), ("$3", "3"), ("3/4", "0.75"), ("1 1/2", "1.5"), ("-7", "\u22127.0"),
        ("50%", "50"), (".5", "0.5"), ("5.", "5"), ("+4", "4"), ("2e3", "2000"), ("0.333333333", "1/3"),
        ("1,000,000", "1e6"), ("B", "b"), ("none of  these", "None of these"),
    ],
)  # fmt: skip
def test_equal_answers_are_equal_however_they_are_written(given, expected):
    assert same_answer(given, expected) and same_answer(expected, given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, "5"), ("", "5"), ("5", "50"), ("5 apples", "5"), ("1/0", "1"), ("a", "b"), ("0.33", "1/3"), ("-7", "7"),
     ("2001", "2000"), ("0.3334", "1/3"), ("1e999999", "5"), ("9" * 5000, "9")],
)  # fmt: skip
def test_other_answers_are_not(given, expected):
    assert not same_answer(given, expected)
