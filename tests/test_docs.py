"""The architecture page: what it links to is there, and its words are those of the registries."""

import re
from pathlib import Path

import pytest

from mars_jax.adapters.registry import METHODS
from mars_jax.data.formats.registry import FORMATS
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
    (listed,) = re.findall(rf"`{name}`: ([a-z0-9_, ]+) \|", PAGE)
    assert tuple(listed.split(", ")) == REGISTRIES[name].names
