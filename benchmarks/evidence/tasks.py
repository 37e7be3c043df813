"""Tasks of the tabular benchmark: shifts of easy-VQA, of pictures, language and style, that fine-tuning makes good.

They were chosen before any strategy was replayed on them; `negative` alone served to find a setting with little noise.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Task(NamedTuple):
    """A shift of the pictures and answers that the demo base knows.

    Attributes:
        name: of the task.
        style: that pictures shift to.
        eye: how far, 0 to 1.
        tongue: share of the answers in German, which the base gives only where it is asked for.
        sentences: share of the answers that are sentences, in one of several wordings.
        describe: share of requests to describe the picture.
    """

    name: str
    style: str
    eye: float
    tongue: float
    sentences: float
    describe: float

    @property
    def shift(self) -> list[str]:
        """Arguments of scripts/make_demo_data.py."""
        amounts = {"eye": self.eye, "tongue": self.tongue, "sentences": self.sentences, "describe": self.describe}
        return ["--style", self.style, *(f"--{name}={amount}" for name, amount in amounts.items())]


_TASKS = (
    Task("negative", "negative", 0.7, 0.5, 0.5, 0.3),
    Task("warm", "warm", 1.0, 0.3, 0.5, 0.3),
    Task("grainy", "grainy", 1.0, 0.2, 0.3, 0.3),
    Task("german", "hue", 0.0, 1.0, 1.0, 0.3),
    Task("hue", "hue", 1.0, 0.3, 0.5, 0.3),
    Task("dim", "dim", 1.0, 0.5, 0.5, 0.3),
    Task("slight", "negative", 0.4, 0.2, 0.3, 0.1),
    Task("describe", "warm", 0.5, 1.0, 0.0, 1.0),
    Task("blurred", "blurred", 1.0, 0.3, 0.5, 0.3),
    Task("words", "negative", 1.0, 0.0, 0.0, 0.0),
    Task("sentences", "hue", 0.0, 0.0, 1.0, 0.3),
    Task("both", "negative", 1.0, 1.0, 1.0, 0.3),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _TASKS}

LONG_TASKS = ("negative", "warm", "german")
"""Those that are also recorded at the longer length."""
