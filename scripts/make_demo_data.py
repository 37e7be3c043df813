"""Writes the demo task: easy-VQA with pictures and answers shifted, as LLaVA JSON and PNG files.

The eye has to adapt to pictures in another style and the tongue to answers in German, each by an adjustable amount.
Training and validation pictures come from the published training split (other pictures for each), test pictures from
the published test split, which the demo base has never seen. Same arguments, same files.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from easy_vqa_data import GERMAN, Question, described, load, said
from PIL import Image, ImageFilter, ImageOps


def negative(picture: Image.Image) -> Image.Image:
    """The photographic negative with the colour channels rotated."""
    red, green, blue = ImageOps.invert(picture).split()
    return Image.merge("RGB", (green, blue, red))


def hue(picture: Image.Image) -> Image.Image:
    """The colour channels rotated: shapes and brightness stay, colours lie."""
    red, green, blue = picture.split()
    return Image.merge("RGB", (green, blue, red))


def blurred(picture: Image.Image) -> Image.Image:
    """Out of focus."""
    return picture.filter(ImageFilter.GaussianBlur(4))


def warm(picture: Image.Image) -> Image.Image:
    """As under a warm lamp: less green, little blue."""
    return picture.convert("RGB", (1, 0, 0, 0, 0, 0.6, 0, 0, 0, 0, 0.3, 0))


def dim(picture: Image.Image) -> Image.Image:
    """As at night: a quarter of the light."""
    return picture.point(lambda value: value // 4)


def grainy(picture: Image.Image) -> Image.Image:
    """With the grain of a film, the same on every picture."""
    noise = np.random.default_rng(0).normal(0.0, 60.0, (picture.height, picture.width, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


STYLES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "negative": negative,
    "hue": hue,
    "blurred": blurred,
    "warm": warm,
    "dim": dim,
    "grainy": grainy,
}


def shift_picture(picture: Image.Image, style: str, amount: float) -> Image.Image:
    """The picture blended with its styled self: amount 0 leaves it, 1 replaces it."""
    picture = picture.convert("RGB")
    return Image.blend(picture, STYLES[style](picture), amount)


def in_german(answer: str, amount: float) -> bool:
    """Whether an answer is among the first `amount` of the 13, in a fixed mixed order; descriptions go by the shape."""
    mixed = sorted(GERMAN, key=lambda answer: GERMAN[answer][::-1])
    return answer.split()[0] in mixed[: round(amount * len(mixed))]


def write_split(
    questions: list[Question],
    name: str,
    folder: Path,
    args: argparse.Namespace,
) -> None:
    """Writes images/NAME-*.png and NAME.json."""
    items, rng = [], random.Random(f"{args.seed} {name}")
    for number, question in enumerate(questions):
        answer = said(
            question.answer,
            rng,
            german=in_german(question.answer, args.tongue),
            sentence=rng.random() < args.sentences,
        )
        image = f"images/{name}-{question.picture.stem}.png"
        if not (folder / image).exists():
            with Image.open(question.picture) as picture:
                shift_picture(picture, args.style, args.eye).save(folder / image)
        turns = [
            {"from": "human", "value": f"<image>\n{question.text}"},
            {"from": "gpt", "value": answer},
        ]
        items.append({"id": f"{name}-{number}", "image": image, "conversations": turns})
    (folder / f"{name}.json").write_text(json.dumps(items, ensure_ascii=False, indent=1), encoding="utf-8")


def choose(
    questions: list[Question], pictures: list[Path], count: int, described_share: float, rng: random.Random
) -> list[Question]:
    """`count` questions about these pictures, drawn without replacement, a share of which ask for descriptions.

    There is a description of each picture at most, so larger shares draw them again.
    """
    wanted = set(pictures)
    asked = [question for question in questions if question.picture in wanted]
    descriptions = round(described_share * count)
    chosen = rng.sample(asked, count - descriptions)
    if descriptions:
        chosen += rng.choices(described(asked), k=descriptions)
        rng.shuffle(chosen)
    return chosen


def main() -> None:
    """Parses the arguments and writes the three splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/data"), help="folder to write")
    parser.add_argument("--eye", type=float, default=1.0, help="how far pictures are shifted, 0 to 1")
    parser.add_argument("--style", choices=STYLES, default="hue", help="style that pictures shift to")
    parser.add_argument("--tongue", type=float, default=0.4, help="share of the answers that are in German, 0 to 1")
    parser.add_argument("--sentences", type=float, default=0.0, help="share of answers that are sentences")
    parser.add_argument("--describe", type=float, default=0.0, help="share of requests to describe the picture")
    parser.add_argument("--train", type=int, default=4096, help="training samples")
    parser.add_argument("--validation", type=int, default=256, help="validation samples")
    parser.add_argument("--test", type=int, default=400, help="test samples")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pictures and questions")
    args = parser.parse_args()
    for name in ("eye", "tongue", "sentences", "describe"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} is {getattr(args, name)}; allowed: 0 to 1")
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    train, test = load("train"), load("test")
    pictures = sorted({question.picture for question in train})
    rng.shuffle(pictures)
    held_out = len(pictures) // 10
    write_split(choose(train, pictures[held_out:], args.train, args.describe, rng), "train", args.out, args)
    write_split(choose(train, pictures[:held_out], args.validation, args.describe, rng), "validation", args.out, args)
    write_split(
        choose(test, [question.picture for question in test], args.test, args.describe, rng), "test", args.out, args
    )
    print(
        f"wrote {args.out}: {args.train} training, {args.validation} validation, {args.test} test samples; "
        f"pictures {args.style} by {args.eye:g}, answers in German by {args.tongue:g}"
    )


if __name__ == "__main__":
    main()
