"""Reads the published easy-VQA pictures and questions from the `easy-vqa` package (MIT), for the two demo builders.

Not part of the library: nothing under `mars_jax` knows this data set.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

# The 13 answers of easy-VQA in German, a language that the demo base never produces.
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
