"""One self-contained HTML page (and the same as JSON) from the files of a run directory."""
