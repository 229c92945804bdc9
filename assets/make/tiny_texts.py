"""The sentences that the tiny language models read: generated from a few templates and a random state."""

from __future__ import annotations

import random

NAMES = ["Tom", "Mia", "Ben", "Ana", "Leo", "Zoe", "Sam", "Eva", "Max", "Ida", "Kim", "Ron"]
THINGS = ["apples", "pens", "books", "coins", "cards", "shells", "stamps", "pears", "toys", "cups", "eggs", "balls"]
PLACES = ["box", "bag", "jar", "basket", "drawer", "room"]


# -- tiny-llama: statements about numbers, and word problems -----------------------------------------------------------


def numbers(rng: random.Random, kind: str) -> dict[str, int]:
    """Operands `a` and `b`, their sign, and the result `c`; `d` has nothing to do with them."""
    if kind == "times":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        c = a * b
    else:
        b, c = rng.randint(2, 19), rng.randint(2, 19)
        a = b + c
        if kind == "plus":
            a, c = c, a
    return {"a": a, "b": b, "c": c, "d": rng.randint(2, 19), "sign": SIGNS[kind]}


STATEMENTS = {
    "plus": [
        "{n} has {a} {t}. {n} {more} {b} more. Now {n} has",
        "{n} has {a} {t} and {m} has {b} {t}. Together they have",
        "There are {a} {t} in the {p}. {n} puts {b} {t} in it. Now it holds",
        "Yesterday {n} {got} {a} {t}, today {b}. That makes",
    ],
    "minus": [
        "{n} has {a} {t}. {n} {less} {b} of them. Now {n} has",
        "{n} has {a} {t} and {m} has {b} {t}. The difference is",
        "There are {a} {t} in the {p}. {n} takes {b} {t} out of it. It still holds",
        "{n} {lost} {b} of {a} {t}. That leaves",
    ],
    "times": [
        "{n} has {a} {ps}. Each {p} holds {b} {t}. That is",
        "{n} buys {b} {t} on each of {a} days. That makes",
    ],
}
EQUATION = "( {a}.0 {sign} {b}.0 )"
WORDS = {
    "more": ["finds", "buys", "wins", "gets"],
    "less": ["loses", "eats", "sells", "breaks"],
    "got": ["found", "bought", "won", "picked"],
    "lost": ["lost", "ate", "sold", "broke"],
}
SIGNS = {"plus": "+", "minus": "-", "times": "*"}
TYPES = {"plus": "Addition", "minus": "Subtraction", "times": "Multiplication"}

PROBLEMS = {
    "plus": [
        ("{n} {got} {a} {t} in the morning and {b} {t} in the evening.", "How many {t} did {n} get in all?"),
        ("{n} had {a} {t}. Then {m} gave {n} {b} {t}.", "How many {t} does {n} have now?"),
        ("After {n} {lost} {b} {t} there were {a} {t} left in the {p}.", "How many {t} were there at first?"),
    ],
    "minus": [
        ("{n} had {a} {t} and gave {b} {t} to {m}.", "How many {t} does {n} have left?"),
        ("{n} {got} {a} {t} while {m} {got} {b} {t}.", "How many more {t} did {n} get than {m}?"),
        ("There were {a} {t} in the {p} until {n} {lost} {b} of them.", "How many {t} are there still?"),
        ("{n} {got} {b} {t} and has {a} {t} now.", "How many {t} did {n} have at first?"),
    ],
    "times": [
        ("{n} filled {a} {ps} with {b} {t} each.", "How many {t} did {n} use in all?"),
        ("{a} friends gave {n} {b} {t} each.", "How many {t} did {n} get in all?"),
    ],
}
ASIDES = ["{m} had {d} {u}.", "There were {d} {u} in another {p}.", "{d} {u} were on the table.", ""]


def blanks(rng: random.Random, kind: str) -> dict[str, object]:
    """What fills the blanks of one template."""
    n, m = rng.sample(NAMES, 2)
    t, u = rng.sample(THINGS, 2)
    p = rng.choice(PLACES)
    words = {name: rng.choice(choices) for name, choices in WORDS.items()}
    ps = p + ("es" if p.endswith("x") else "s")
    return {"n": n, "m": m, "t": t, "u": u, "p": p, "ps": ps, **words, **numbers(rng, kind)}


def arithmetic_text(rng: random.Random) -> str:
    """A few bare equations, or a statement that ends in one, maybe after an aside."""
    if rng.random() < 0.4:
        return " ".join(f"{EQUATION} = {{c}}.".format(**numbers(rng, rng.choice(list(SIGNS)))) for _ in range(4))
    kind = rng.choice(list(SIGNS))
    sentences = [rng.choice(ASIDES), rng.choice(STATEMENTS[kind]) + f" {EQUATION} = {{c}} {{t}}."]
    return " ".join(sentences).strip().format(**blanks(rng, kind))


def word_problem(rng: random.Random, index: int) -> dict:
    """One row in the columns of SVAMP on the hub."""
    kind = rng.choice(["plus", "minus", "minus", "times"])
    filled = blanks(rng, kind)
    body, question = rng.choice(PROBLEMS[kind])
    sentences = [rng.choice(ASIDES), body]
    return {
        "ID": f"made-{index}",
        "Body": " ".join(sentence.format(**filled) for sentence in sentences if sentence),
        "Question": question.format(**filled),
        "Equation": EQUATION.format(**filled),
        "Answer": str(filled["c"]),
        "Type": TYPES[kind],
    }


# -- tiny-roberta: sentences that are grammatical or not ---------------------------------------------------------------

NOUNS = ["dog", "cat", "bird", "horse", "girl", "boy", "teacher", "doctor", "farmer", "friend", "king", "painter"]
ADJECTIVES = ["old", "small", "happy", "clever", "quiet", "brave"]
DETERMINERS = (["the", "a", "every", "this"], ["the", "many", "two", "these"])
TRANSITIVE = ["see", "like", "follow", "hear", "help", "know", "draw", "remember"]
INTRANSITIVE = ["sleep", "run", "wait", "sing", "fall"]


class Sentence:
    """A grammatical sentence as it grows, with the words that would be wrong in some place."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.words: list[str] = []
        self.mistakes: list[tuple[int, str]] = []

    def add(self, word: str, wrong: str | None = None) -> None:
        if wrong is not None:
            self.mistakes.append((len(self.words), wrong))
        self.words.append(word)

    def noun(self, plural: bool) -> None:
        determiner, noun = self.rng.choice(DETERMINERS[plural]), self.rng.choice(NOUNS)
        self.add(determiner)
        if self.rng.random() < 0.3:
            self.add(self.rng.choice(ADJECTIVES))
        forms = (noun, noun + "s")
        self.add(forms[plural], None if determiner == "the" else forms[not plural])

    def verb(self, verbs: list[str], plural: bool) -> None:
        verb = self.rng.choice(verbs)
        forms = (verb + "s", verb)
        self.add(forms[plural], forms[not plural])

    def subject(self, plural: bool, hard: bool) -> None:
        """A noun phrase; with something between noun and verb now and then, and a whole clause if `hard`."""
        self.noun(plural)
        if hard and self.rng.random() < 0.5:
            self.add("that")
            self.verb(TRANSITIVE, plural)
            self.noun(self.rng.random() < 0.5)
        elif self.rng.random() < 0.3:
            self.add(self.rng.choice(["near", "behind", "with"]))
            self.noun(self.rng.random() < 0.5)

    def clause(self, hard: bool) -> None:
        plural, kind = self.rng.random() < 0.5, self.rng.randrange(5)
        if kind == 0:
            self.add(("does", "do")[plural], ("does", "do")[not plural])
            self.noun(plural)
            self.add(verb := self.rng.choice(TRANSITIVE), verb + "s")
            self.noun(self.rng.random() < 0.5)
            return
        self.subject(plural, hard)
        if kind == 1:
            self.verb(INTRANSITIVE, plural)
        elif kind == 2:
            self.add(("is", "are")[plural], ("is", "are")[not plural])
            self.add(self.rng.choice(ADJECTIVES))
        elif kind == 3:
            self.verb(TRANSITIVE, plural)
            forms = ("itself", "themselves")
            self.add(forms[plural], forms[not plural])
        else:
            self.verb(TRANSITIVE, plural)
            self.noun(self.rng.random() < 0.5)

    def text(self) -> str:
        text = " ".join(self.words)
        return text[0].upper() + text[1:] + ("?" if self.words[0] in ("do", "does") else ".")


def grammatical(rng: random.Random) -> str:
    """One simple sentence."""
    sentence = Sentence(rng)
    sentence.clause(hard=False)
    return sentence.text()


def judgement(rng: random.Random, index: int) -> dict:
    """One row in the columns of GLUE's CoLA, of a simple sentence or one with a clause inside; 1 is acceptable."""
    sentence, label = Sentence(rng), rng.randint(0, 1)
    sentence.clause(hard=True)
    if label == 0:
        place, wrong = rng.choice(sentence.mistakes)
        sentence.words[place] = wrong
    return {"sentence": sentence.text(), "label": label, "idx": index}
