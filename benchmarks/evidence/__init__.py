"""Whether the search picks well: tasks whose best ranks are known."""
