"""The pages: what they link to is there, and their words are those of the registries and limits."""

import re
from pathlib import Path

import pytest

from mars_jax.adapters.registry import METHODS
from mars_jax.data.chat_template import MAX_CHARACTERS as MAX_RENDERED
from mars_jax.data.chat_template import SECONDS
from mars_jax.data.conversations import MAX_CHARACTERS, MAX_TURNS
from mars_jax.data.files.row import MAX_ID, MAX_ROWS, MAX_TEXT_BYTES
from mars_jax.data.files.tables import FREE_BYTES, MOST_GROWTH
from mars_jax.data.formats.keys import COMMON, CONVERSATIONS, LEARN
from mars_jax.data.formats.registry import FORMATS
from mars_jax.data.images import FORMATS as PICTURES
from mars_jax.data.images import MAX_BYTES, MAX_PIXELS
from mars_jax.data.records import MAX_PICTURES, MAX_ROW_PIXELS
from mars_jax.laws.convergence.registry import RULES
from mars_jax.models.families.registry import FAMILIES
from mars_jax.search.strategies.registry import STRATEGIES

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "architecture.md").read_text()
LINKS = re.findall(r"\[(`?)([^]`]+)`?\]\((\.\./[^)]+)\)", PAGE)


@pytest.mark.parametrize(("quoted", "name", "target"), LINKS, ids=[name for _, name, _ in LINKS])
def test_what_the_architecture_page_links_to_is_there(quoted, name, target):
    path = (DOCS / target).resolve()
    assert path.exists()
    if path.suffix == ".py" and not name.endswith(".py"):
        assert re.search(rf"^(async )?(def|class) {name}\b", path.read_text(), re.MULTILINE)


REGISTRIES = {"METHODS": METHODS, "RULES": RULES, "FAMILIES": FAMILIES, "FORMATS": FORMATS, "STRATEGIES": STRATEGIES}


@pytest.mark.parametrize("name", REGISTRIES)
def test_the_architecture_page_lists_the_members_of_every_registry(name):
    (listed,) = re.findall(rf"`{name}`: ([a-z0-9_+, ]+) \|", PAGE)
    assert tuple(listed.split(", ")) == REGISTRIES[name].names


DATA_PAGE = (DOCS / "data.md").read_text()


@pytest.mark.parametrize(
    "limit",
    [
        f"| a picture | {MAX_PIXELS:,} pixels, {MAX_BYTES // 2**20} MiB of file |",
        f"| pictures decoded at a time, over all threads | {MAX_PIXELS:,} pixels",
        f"| a row | {MAX_PICTURES:,} pictures, {MAX_ROW_PIXELS:,} pixels, {MAX_TURNS:,} turns, {MAX_CHARACTERS:,} char",
        f"| a file | {MAX_ROWS:,} rows; JSON, CSV and TSV: {MAX_TEXT_BYTES // 2**30} GiB |",
        f"| a parquet or Arrow file | in memory {MOST_GROWTH} times its size, at least {FREE_BYTES // 2**30} GiB |",
        f"An id is a text or number of at most {MAX_ID} characters",
        f"within {SECONDS:g} seconds of processor time and {MAX_RENDERED:,} characters",
    ],
)
def test_the_page_on_data_gives_the_limits_as_they_are(limit):
    assert limit in DATA_PAGE


def test_the_page_on_data_names_the_formats_of_pictures_and_the_keys():
    read = re.search(r"^(.*) are read, by their content", DATA_PAGE, re.MULTILINE)[1]
    assert re.findall(
        r"\w+", read.replace("JPEG 2000", "JPEG2000").replace("WebP", "WEBP").replace(" and ", " ")
    ) == list(PICTURES)
    named = set(re.findall(r"`(\w+)`", DATA_PAGE))
    assert named >= {*COMMON, *LEARN, *CONVERSATIONS}


def test_the_readme_links_the_page_on_data():
    assert "[docs/data.md](docs/data.md)" in (DOCS.parent / "README.md").read_text()
