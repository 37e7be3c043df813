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

from easy_vqa_data import GERMAN, Question, load
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


STYLES: dict[str, Callable[[Image.Image], Image.Image]] = {"negative": negative, "hue": hue, "blurred": blurred}


def shift_picture(picture: Image.Image, style: str, amount: float) -> Image.Image:
    """The picture blended with its styled self: amount 0 leaves it, 1 replaces it."""
    picture = picture.convert("RGB")
    return Image.blend(picture, STYLES[style](picture), amount)


def shift_answers(amount: float) -> dict[str, str]:
    """Answer -> answer to give: the first `amount` of the 13 answers, in a fixed mixed order, are in German."""
    mixed = sorted(GERMAN, key=lambda answer: GERMAN[answer][::-1])
    translated = set(mixed[: round(amount * len(mixed))])
    return {answer: GERMAN[answer] if answer in translated else answer for answer in GERMAN}


def write_split(
    questions: list[Question],
    name: str,
    folder: Path,
    args: argparse.Namespace,
) -> None:
    """Writes images/NAME-*.png and NAME.json."""
    answers = shift_answers(args.tongue)
    items = []
    for number, question in enumerate(questions):
        image = f"images/{name}-{question.picture.stem}.png"
        if not (folder / image).exists():
            with Image.open(question.picture) as picture:
                shift_picture(picture, args.style, args.eye).save(folder / image)
        turns = [
            {"from": "human", "value": f"<image>\n{question.text}"},
            {"from": "gpt", "value": answers[question.answer]},
        ]
        items.append({"id": f"{name}-{number}", "image": image, "conversations": turns})
    (folder / f"{name}.json").write_text(json.dumps(items, ensure_ascii=False, indent=1), encoding="utf-8")


def choose(questions: list[Question], pictures: list[Path], count: int, rng: random.Random) -> list[Question]:
    """`count` questions about these pictures, drawn without replacement."""
    wanted = set(pictures)
    return rng.sample([question for question in questions if question.picture in wanted], count)


def main() -> None:
    """Parses the arguments and writes the three splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/data"), help="folder to write")
    parser.add_argument("--eye", type=float, default=1.0, help="how far pictures are shifted, 0 to 1")
    parser.add_argument("--style", choices=STYLES, default="hue", help="style that pictures shift to")
    parser.add_argument("--tongue", type=float, default=0.4, help="share of the answers that are in German, 0 to 1")
    parser.add_argument("--train", type=int, default=2048, help="training samples")
    parser.add_argument("--validation", type=int, default=256, help="validation samples")
    parser.add_argument("--test", type=int, default=400, help="test samples")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pictures and questions")
    args = parser.parse_args()
    for name in ("eye", "tongue"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} is {getattr(args, name)}; allowed: 0 to 1")
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    train, test = load("train"), load("test")
    pictures = sorted({question.picture for question in train})
    rng.shuffle(pictures)
    held_out = len(pictures) // 10
    write_split(choose(train, pictures[held_out:], args.train, rng), "train", args.out, args)
    write_split(choose(train, pictures[:held_out], args.validation, rng), "validation", args.out, args)
    write_split(choose(test, [question.picture for question in test], args.test, rng), "test", args.out, args)
    print(
        f"wrote {args.out}: {args.train} training, {args.validation} validation, {args.test} test samples; "
        f"pictures {args.style} by {args.eye:g}, answers in German by {args.tongue:g}"
    )


if __name__ == "__main__":
    main()
