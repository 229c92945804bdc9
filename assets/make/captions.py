"""Which captions the pipeline learns, and the word-level tokenizer that reads them."""

import re

from augment import SETS, STYLES
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# Kept out of the fine-tuning set, and asked for when the result is judged.
VALIDATION_PROMPTS = (
    "red apple", "cat face", "dog face", "sailboat", "automobile", "rocket", "guitar", "strawberry",
    "tulip", "deciduous tree", "penguin", "fish", "pizza", "house", "airplane", "umbrella",
)  # fmt: skip

CATEGORIES = {"Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects", "Smileys & Emotion"}

# Few strangers could name these from a 64x64 picture, or tell them from another one here.
OBSCURE = """
abacus, admission tickets, aerial tramway, airplane arrival, airplane departure, alembic, anger symbol, barber pole,
beverage box, bookmark tabs, brick, briefs, broken chain, canned food, card index, carp streamer, clamp, clutch bag,
computer disk, construction, control knobs, convenience store, coral, crutch, curling stone, curry rice, custard, dango,
dashing away, department store, derelict house, e-mail, falafel, fax machine, flat shoe, flying disc, fog, foggy,
fondue, funeral urn, ginger root, goal net, hair pick, hamsa, hindu temple, hole, hook, hut, identification card,
inbox tray,
incoming envelope, kaaba, knot, lab coat, label, ledger, level slider, light rail, link, linked paperclips, long drum,
lotion bottle, love hotel, low battery, maracas, mate, microbe, military medal, milky way, mirror ball, monorail,
moon cake, motorway, mountain cableway, mountain railway, mouse trap, nazar amulet, oden, oil drum, optical disk,
outbox tray, oyster, pager, petri dish, pine decoration, placard, postal horn, prayer beads, radio button,
railway car, railway track, receipt, red envelope, reminder ribbon, rice cracker, root vegetable, round pushpin,
safety pin, safety vest, salt, seat, spiral notepad, station, stuffed flatbread, suspension railway, tamale,
tanabata tree, thong sandal, tokyo tower, trackball, tram car, trolleybus, videocassette, wedding, white cane,
wind face, wood, x-ray
"""


def words(caption: str) -> list[str]:
    """The caption's words, as the tokenizer splits them."""
    return [word for word in re.split("[ :,-]+", caption.lower()) if word]


def is_known(row: dict) -> bool:
    """Whether the base model learns this metadata row: a thing or a coloured shape, in one or two words."""
    caption = row["text"]
    if len(words(caption)) > 2 or caption.endswith(("o'clock", "-thirty")) or caption in OBSCURE_CAPTIONS:
        return False
    return row["category"] in CATEGORIES or row["subcategory"] == "geometric"


def is_held_out(row: dict, known_words: set[str]) -> bool:
    """Whether the row makes a fair test: never trained on, though each of its words was."""
    return not is_known(row) and row["category"] in CATEGORIES and set(words(row["text"])) <= known_words


def word_tokenizer(captions: list[str], special: list[str]) -> Tokenizer:
    """A tokenizer of the special tokens (among them <unk>), the captions' words, and the names of styles and sets."""
    known = {word for caption in captions for word in words(caption)}
    vocabulary = special + sorted(known | set(STYLES) | set(SETS) | {"style"})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(mark, "removed") for mark in " :,-"])
    return tokenizer


def new_tokenizer(captions: list[str], length: int = 12) -> PreTrainedTokenizerFast:
    """The word-level tokenizer with <start> and <end>, padded to `length` with its end token."""
    tokenizer = word_tokenizer(captions, ["<start>", "<end>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<end>",
        unk_token="<unk>",
        model_max_length=length,
    )


OBSCURE_CAPTIONS = set(re.split(r",\s+", OBSCURE.strip()))
