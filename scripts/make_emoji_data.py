"""Writes two small sets of real pictures with words from a package: what an emoji is called, and what kind it is.

    python scripts/make_emoji_data.py --out data/emoji

The pictures are Noto's (Apache-2.0) as the npm package emoji-datasource-google has them, 64 pixels wide. It is
downloaded by npm, or taken from `--package FILE.tgz`; its checksum is verified, and nothing of it is part of this
project. Written are `names.json` (1,600 pictures and their names, to align a fresh projector with) and `train.json`,
`validation.json` and `test.json` (which of twenty kinds). No picture of validation or test is among the names.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

PACKAGE = "emoji-datasource-google@16.0.0"
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
MOST_OF_A_KIND = 60
SHARES = {"train": 0.6, "validation": 0.15, "test": 0.25}
# The package's subcategories (all that begin so) to the word that the model is to say.
KINDS = {
    "country-flag": "flag",
    "face-": "face",
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "transport-ground": "vehicle",
    "sky & weather": "weather",
    "clothing": "clothing",
    "food-prepared": "dish",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "drink": "drink",
    "alphanum": "letter",
    "geometric": "shape",
    "arrow": "arrow",
    "heart": "heart",
    "time": "clock",
    "sport": "sport",
    "place-building": "building",
    "tool": "tool",
    "household": "household",
}


def main() -> None:
    """Reads the arguments and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the data")
    parser.add_argument("--package", type=Path, help=f"the file of {PACKAGE}; default: npm downloads it")
    parser.add_argument("--seed", type=int, default=0, help="of the splits")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        package = args.package or download(Path(folder))
        check(package)
        counts = write(package, args.out, args.seed)
    print(f"wrote {args.out}: {', '.join(f'{count} {name}' for name, count in counts.items())}", file=sys.stderr)


def download(folder: Path) -> Path:
    """The package, fetched by npm."""
    try:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"make_emoji_data: npm could not download {PACKAGE} ({error}). Give its file with --package.")
    return next(folder.glob("*.tgz"))


def check(package: Path) -> None:
    """Ends the script where the file has other bytes than the one that was examined."""
    with package.open("rb") as file:
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    if seen != SHA256:
        sys.exit(f"make_emoji_data: {package} has sha256 {seen}; {SHA256} of {PACKAGE} is expected. Download it again.")


def write(package: Path, out: Path, seed: int) -> dict[str, int]:
    """Writes pictures and samples of a package; returns the number of samples by file."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    with tarfile.open(package) as archive:
        listed = json.loads(content(archive, "package/emoji.json"))
        emoji, seen = [], set()
        for one in sorted((one for one in listed if one["has_img_google"]), key=lambda one: one["sort_order"]):
            picture = content(archive, f"package/img/google/64/{one['image']}")
            # Some have two names, such as flags of islands: the second would be a test picture that was learned.
            if picture not in seen:
                seen.add(picture)
                emoji.append(one)
                (out / "images" / one["image"]).write_bytes(picture)
    splits = split(emoji, np.random.default_rng(seed))
    held_out = {one["image"] for name in ("validation", "test") for one, _ in splits[name]}
    samples = {
        "names": [sample(one, "What is this?", one["name"].lower()) for one in emoji if one["image"] not in held_out],
        **{name: [sample(one, "Which kind of thing is this?", kind) for one, kind in splits[name]] for name in SHARES},
    }
    for name, some in samples.items():
        (out / f"{name}.json").write_text(json.dumps(some, indent=1, ensure_ascii=False), encoding="utf-8")
    return {name: len(some) for name, some in samples.items()}


def content(archive: tarfile.TarFile, member: str) -> bytes:
    """The bytes of a file of the package."""
    file = archive.extractfile(member)
    assert file is not None, member  # only folders have none
    return file.read()


def split(emoji: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """Emoji with their kinds by split, so many of every kind in each."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for one in emoji:
        kind = next((word for begin, word in KINDS.items() if one["subcategory"].startswith(begin)), None)
        if kind:
            by_kind.setdefault(kind, []).append(one)
    splits: dict[str, list[tuple[dict[str, Any], str]]] = {name: [] for name in SHARES}
    for kind, members in sorted(by_kind.items()):
        chosen = rng.permutation(len(members))[:MOST_OF_A_KIND]
        ends = np.cumsum([round(share * len(chosen)) for share in list(SHARES.values())[:-1]])
        for name, places in zip(SHARES, np.split(chosen, ends), strict=True):
            splits[name] += [(members[place], kind) for place in places]
    return {name: [some[place] for place in rng.permutation(len(some))] for name, some in splits.items()}


def sample(one: dict[str, Any], question: str, answer: str) -> dict[str, Any]:
    """A picture with a question and its answer, as LLaVA's files have it."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": one["image"].removesuffix(".png"), "image": f"images/{one['image']}", "conversations": turns}


if __name__ == "__main__":
    main()
