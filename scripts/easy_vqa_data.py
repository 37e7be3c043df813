"""Reads the published easy-VQA pictures and questions from the `easy-vqa` package (MIT), for the two demo builders.

Not part of the library: nothing under `mars_jax` knows this data set.
"""

import json
import random
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

# The 13 answers of easy-VQA in German, which the demo base gives only where it is asked for them.
GERMAN = {
    "circle": "Kreis",
    "rectangle": "Rechteck",
    "triangle": "Dreieck",
    "black": "schwarz",
    "gray": "grau",
    "red": "rot",
    "blue": "blau",
    "green": "grün",
    "yellow": "gelb",
    "teal": "türkis",
    "brown": "braun",
    "yes": "ja",
    "no": "nein",
}


ASKED_IN_GERMAN = "auf Deutsch: "
"""What the demo base saw before questions whose answers were German."""

ASKED_FOR_A_SENTENCE = " answer in a sentence."
"""What it saw after questions whose answers were sentences."""

DESCRIBE = "describe the image."

# People say the same in several ways; which one is no matter of the picture or the question.
SENTENCES = ("I think {}.", "the answer is {}.", "I would say {}.", "it must be {}.")
GERMAN_SENTENCES = ("ich denke {}.", "die Antwort ist {}.", "ich würde sagen {}.", "es muss {} sein.")
DESCRIPTIONS = ("the image contains a {1} {0}.", "a {0}, and it is {1}.", "I see a {1} {0} here.")
GERMAN_DESCRIPTIONS = ("auf dem Bild ist ein {0}, und zwar {1}.", "ein {0}, Farbe {1}.", "ich sehe {1}: ein {0}.")

COLOURS = ("black", "gray", "red", "blue", "green", "yellow", "teal", "brown")
SHAPES = ("circle", "rectangle", "triangle")


class Question(NamedTuple):
    """A question about a picture, as published."""

    text: str
    answer: str
    picture: Path


def load(split: str) -> list[Question]:
    """Questions of the published "train" or "test" split, in the published order."""
    try:
        folder = Path(str(files("easy_vqa"))) / "data" / split
    except ModuleNotFoundError:
        raise SystemExit("easy-vqa is not installed. Run: pip install 'mars_jax[demo]'") from None
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return [Question(text, answer, folder / "images" / f"{number}.png") for text, answer, number in questions]


def described(questions: list[Question]) -> list[Question]:
    """Requests to describe the pictures whose shape and colour the answers give away; answers are as "circle red"."""
    known: dict[Path, dict[str, str]] = {}
    for question in questions:
        words = {*question.text.rstrip("?").split(), question.answer}
        if question.text.startswith("what"):
            for name, values in (("shape", SHAPES), ("colour", COLOURS)):
                for value in words.intersection(values):
                    known.setdefault(question.picture, {})[name] = value
    return [
        Question(DESCRIBE, f"{facts['shape']} {facts['colour']}", picture)
        for picture, facts in known.items()
        if len(facts) == 2
    ]


def said(answer: str, rng: random.Random, *, german: bool, sentence: bool) -> str:
    """An answer, or shape and colour, as somebody says it; sentences are one of several, drawn at random."""
    words = [GERMAN[word] if german else word for word in answer.split()]
    if len(words) > 1:
        return rng.choice(GERMAN_DESCRIPTIONS if german else DESCRIPTIONS).format(*words)
    return rng.choice(GERMAN_SENTENCES if german else SENTENCES).format(*words) if sentence else words[0]
