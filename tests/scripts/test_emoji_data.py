"""scripts/make_emoji_data.py on a small package in the layout of the real one."""

import io
import json
import tarfile

import make_emoji_data
import pytest
from PIL import Image

from mars_jax.data.records import load_records

KINDS = {"face-smiling": "face", "face-tongue": "face", "animal-bird": "bird", "food-fruit": "fruit", "keycap": None}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Twenty pictures of each subcategory, one of them twice, and one that this set of pictures lacks."""
    path = tmp_path_factory.mktemp("npm") / "emoji.tgz"
    with tarfile.open(path, "w:gz") as archive:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        listed = []
        for order in range(20 * len(KINDS)):
            subcategory = list(KINDS)[order % len(KINDS)]
            picture = io.BytesIO()
            Image.new("RGBA", (64, 64), (order, 2 * order, 200, 255)).save(picture, "PNG")
            listed.append(
                {
                    "name": f"{subcategory.upper()} {order}",
                    "image": f"{order:x}.png",
                    "subcategory": subcategory,
                    "sort_order": order,
                    "has_img_google": True,
                }
            )
            add(f"img/google/64/{order:x}.png", picture.getvalue())
        listed.append({**listed[0], "image": "absent.png", "has_img_google": False})
        # Norway's flag is that of two islands too; one of them was in test, the other in train.
        listed.append({**listed[0], "image": "again.png", "name": "THE SAME PICTURE", "sort_order": 1000})
        first = io.BytesIO()
        Image.new("RGBA", (64, 64), (0, 0, 200, 255)).save(first, "PNG")
        add("img/google/64/again.png", first.getvalue())
        add("emoji.json", json.dumps(listed).encode())
    return path


def test_no_picture_is_in_two_splits_and_none_that_is_held_out_is_named(package, tmp_path):
    counts = make_emoji_data.write(package, tmp_path, seed=0)
    records = {name: load_records(tmp_path / f"{name}.json", tmp_path) for name in counts}
    assert {name: len(some) for name, some in records.items()} == counts
    assert counts == {"names": 68, "train": 48, "validation": 12, "test": 20}
    pictures = {name: {digest for record in some for digest in record.digests} for name, some in records.items()}
    held_out = pictures["validation"] | pictures["test"]
    assert not held_out & pictures["train"]
    assert not held_out & pictures["names"]
    assert len(pictures["validation"] & pictures["test"]) == 0
    answers = [record.turns[-1].text for record in records["test"]]
    assert {kind: answers.count(kind) for kind in set(answers)} == {"face": 10, "bird": 5, "fruit": 5}
    assert records["names"][0].turns[-1].text.startswith(("face-", "animal-", "food-", "keycap"))


def test_another_file_than_the_one_that_was_examined_is_refused(package):
    with pytest.raises(SystemExit, match=r"emoji\.tgz has sha256 [0-9a-f]{64}; fb5fd131.* is expected\. Download it"):
        make_emoji_data.check(package)
