"""Picture files of rows: which are read, from where, within which bounds."""

import base64
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mars_jax.data.images import FORMATS, MAX_BYTES, PictureBytes, PictureError, image_size, load_rgb
from mars_jax.data.records import load_records
from mars_jax.errors import DataError
from tests.helpers.rows import fault, read
from tests.helpers.tiny_data import save_picture

ASKED = {"question": "what?", "answer": "x"}


def refused(folder, source):
    """The fault of a row with this picture."""
    return fault(folder, [ASKED | {"id": "p", "image": source}])


# What is opened.


def test_a_picture_that_is_eps_started_a_program(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "x.png").write_bytes(eps)
    for source in ("x.png", f"data:image/png;base64,{base64.b64encode(eps).decode()}"):
        assert "cannot be decoded: it is no picture in one of the formats PNG, JPEG, MPO" in refused(tmp_path, source)
    with pytest.raises(PictureError, match="no picture in one of the formats"):
        load_rgb(tmp_path / "x.png")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["EPS", "PCX", "ICO", "SGI", "TGA", "PDF", "DDS"])
def test_formats_that_are_not_listed_are_not_opened(tmp_path, name):
    assert name not in FORMATS
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", format=name)
    assert "no picture in one of the formats" in refused(tmp_path, "x.png")


ORIENTED = ("PNG", "JPEG", "WEBP", "TIFF")


@settings(deadline=None, max_examples=80)
@given(
    name=st.sampled_from([name for name in FORMATS if name != "MPO"]),
    orientation=st.sampled_from(range(1, 9)),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    embedded=st.booleans(),
)
def test_a_rotated_tiff_had_the_size_of_its_header(tmp_path_factory, name, orientation, height, width, embedded):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, name, **({"exif": exif} if name in ORIENTED else {}))
    picture = PictureBytes(file.getvalue())
    if not embedded:
        picture = tmp_path_factory.mktemp("p") / "x"
        picture.write_bytes(file.getvalue())
    upright = load_rgb(picture).size
    assert image_size(picture) == upright[::-1]
    turned = name in ORIENTED and orientation > 4
    assert upright == ((height, width) if turned else (width, height))


# Where it is.


@pytest.mark.parametrize("root", ["pictures", "", "/"])
def test_absolute_paths_below_the_image_folder_were_refused_as_outside(tmp_path, root):
    picture = save_picture(tmp_path / "pictures" / "a.png")
    (record,), _ = read(tmp_path, [ASKED | {"image": str(picture)}], image_root=tmp_path / root)
    assert record.images == (picture,)


def test_absolute_paths_through_a_link_to_the_image_folder_are_below_it(tmp_path):
    picture = save_picture(tmp_path / "real" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for written, root in ((picture, "link"), (tmp_path / "link" / "a.png", "real")):
        (record,), _ = read(tmp_path, [ASKED | {"image": str(written)}], image_root=tmp_path / root)
        assert record.images[0].samefile(picture)


@pytest.mark.parametrize("source", ["/etc/passwd", "../outside.png", "sub/../../outside.png", "/"])
def test_paths_outside_the_image_folder_are_refused_truthfully(tmp_path, source):
    save_picture(tmp_path / "outside.png")
    save_picture(tmp_path / "root" / "sub" / "a.png")
    (tmp_path / "d.json").write_text(json.dumps([ASKED | {"image": source}]))
    with pytest.raises(
        DataError, match=r"points outside the image folder .*root. Use a path below it, or set data.image"
    ):
        load_records(tmp_path / "d.json", tmp_path / "root")


def test_dots_that_stay_within_the_image_folder_are_read(tmp_path):
    save_picture(tmp_path / "sub" / "a.png")
    (record,), _ = read(tmp_path, [ASKED | {"image": "sub/../a.png"}])
    assert record.images == (tmp_path / "a.png",)


def test_links_within_the_image_folder_are_followed_wherever_they_lead(tmp_path):
    real = save_picture(tmp_path / "elsewhere" / "a.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "coco").symlink_to(real.parent)
    (root / "one.png").symlink_to(real)
    rows = [ASKED | {"image": "coco/a.png"}, ASKED | {"image": "one.png"}]
    records, _ = read(tmp_path, rows, image_root=root)
    assert [record.images for record in records] == [(root / "coco" / "a.png",), (root / "one.png",)]
    assert records[0].group == records[1].group


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("x" * 10_000, "cannot be read (File name too long)"),
        ("a\0b.png", "holds a NUL character, which no path can"),
        ("~nosuchuser/a.png", "does not exist in"),
        ("https://x.org/a.png", "is an address. Download the picture and give its path"),
        ("file:///data/a.png", "is an address of a file. Give its path alone"),
        ("C:\\a.png", "points outside the image folder"),
        ("..\\a.png", "points outside the image folder"),
        ("data:image/png;base64,\u00e9\u00e9", "is no base64 (string argument should contain only ASCII characters)"),
        ("data:image/png;base64,?", "is no base64"),
        ("iVBORw0KGgo" + "\u00e9" * 100, "is no base64"),
        ("cut\ud83d.png", "image: character 3 is '\\ud83d', half of a surrogate pair"),
        ("hf://datasets/x/y/a.png", "is an address. Download the picture"),
        ({"url": "a.png"}, "(object); a path relative to the image folder is expected. Of an object, 'path' or"),
        ({"bytes": None, "path": 3}, "image is 3 (number); a path relative to the image folder is expected"),
        ({"path": "a.png", "max_pixels": 100}, "a picture of 'image': 'max_pixels' is 100: pictures have no sizes of"),
        ([["a.png"]], "image is ['a.png'] (list); a path relative to the image folder is expected"),
        (["a.png", None], "image is None; a path relative to the image folder is expected"),
    ],
)
def test_sources_that_are_no_pictures_are_faults_with_short_messages(tmp_path, source, text):
    message = refused(tmp_path, source)
    assert text in message
    assert "item 0 (id 'p')" in message
    assert len(message) < 700
    message.encode()


def test_pictures_under_other_names_were_left_out(tmp_path):
    for key, value in {"image_1": "a.png", "img": "a.png", "image_path": "a.png", "picture": ["a.png"]}.items():
        message = fault(tmp_path, [ASKED | {key: value}])
        assert f"{key!r} is {value!r}: pictures are read from 'image' and 'images'" in message
    _, notes = read(tmp_path, [ASKED | {"image": "a.png", "image_path": "COCO/a.png"}])
    assert notes == ["data.json: keys not read: image_path 1x"]


def test_base64_without_its_scheme_made_a_message_of_19_megabytes(tmp_path):
    content = save_picture(tmp_path / "a.png", 200, 200).read_bytes()
    text = base64.b64encode(content).decode()
    (record,), _ = read(tmp_path, [ASKED | {"image": text}])
    assert record.images == (PictureBytes(content),)
    lines = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    (record,), _ = read(tmp_path, [ASKED | {"image": f"data:image/png;base64,{lines}"}])
    assert record.images == (PictureBytes(content),)
    assert len(fault(tmp_path, [ASKED | {"id": str(n), "image": text[:-7] + "\u00e9"} for n in range(12)])) < 3_000


# Bounds.


def huge(path: Path, width: int, height: int) -> Path:
    """A black PNG of 1 bit a pixel."""
    Image.new("1", (width, height)).save(path)
    return path


def test_a_picture_of_more_pixels_than_the_limit_is_refused(tmp_path):
    huge(tmp_path / "x.png", 8001, 8000)
    message = refused(tmp_path, "x.png")
    assert "image 'x.png' has 8001x8000 pixels, over the safety limit of 64,000,000 pixels. Scale it down" in message
    with pytest.raises(PictureError, match="over the safety limit"):
        image_size(tmp_path / "x.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width", [12_000, 20_000])  # Pillow warns, and refuses
def test_decompression_bombs_are_refused(tmp_path, width):
    huge(tmp_path / "x.png", width, 10_000)
    assert "over the safety limit" in refused(tmp_path, "x.png")


def test_a_file_larger_than_any_picture_is_refused_unread(tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert "image 'x.png' has 536,870,913 bytes, more than 536,870,912" in refused(tmp_path, "x.png")


def test_pictures_of_one_row_are_bounded_together(tmp_path):
    huge(tmp_path / "x.png", 8000, 8000)
    (tmp_path / "y.png").write_bytes((tmp_path / "x.png").read_bytes())
    message = refused(tmp_path, ["x.png"] * 5)
    assert "its pictures have 320,000,000 pixels, more than 256,000,000. Scale them down" in message


_PEAK = """
import resource, sys, threading
from pathlib import Path
from mars_jax.data.images import load_rgb
path = Path(sys.argv[1])
load_rgb(path)
alone = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
threads = [threading.Thread(target=load_rgb, args=(path,)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(alone, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_threads_decoded_huge_pictures_all_at_once(tmp_path):
    Image.new("RGB", (8000, 4500), "red").save(tmp_path / "x.bmp")
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "x.bmp")], capture_output=True, text=True, check=True
    )
    alone, together = map(int, done.stdout.split())
    # 36 megapixels: one at a time. A second one would add some 300 MB.
    assert together < alone + 250_000


def test_room_is_given_back_where_a_picture_is_broken(tmp_path):
    Image.new("L", (8000, 4500)).save(tmp_path / "whole.bmp")
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "whole.bmp").read_bytes()[:10_000])
    sizes = []

    def work():
        for _ in range(3):
            with pytest.raises(OSError, match="truncated"):
                load_rgb(tmp_path / "cut.bmp")
        sizes.append(load_rgb(tmp_path / "whole.bmp").size)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert sizes == [(8000, 4500)]


def test_bytes_that_json_holds_as_base64_are_read(tmp_path):
    encoded = base64.b64encode(save_picture(tmp_path / "c.png").read_bytes()).decode()
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]
    (record,), _ = read(tmp_path, [{"image": {"bytes": encoded, "path": "elsewhere.png"}, "conversations": turns}])
    assert record.images == (PictureBytes(base64.b64decode(encoded)),)
