"""Models and data sets that are named by their address on the Hugging Face hub, as folders of this machine.

`hf://OWNER/NAME` is a model and `hf://datasets/OWNER/NAME` a data set; `@REVISION` pins either, and a folder or file of
it and a `#split` may follow. They are downloaded once, into the hub's own cache; without a network the cache answers.
"""

from pathlib import Path, PurePosixPath

from mars_jax.errors import ConfigError, DataError

# What of a model's files is read here: not the same weights in other formats.
_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def on_hub(path: Path) -> bool:
    """Whether a path is an address on the hub."""
    return path.parts[:1] == ("hf:",)


def repository(path: Path) -> str:
    """`OWNER/NAME` of an address on the hub; any other path as it is."""
    return _parse(path)[1] if on_hub(path) else str(path)


def local(path: Path) -> Path:
    """The folder of this machine that holds what an address names; any other path as it is.

    Raises:
        ConfigError: it isn't an address of a model or data set, or that model can't be had.
        DataError: that data set can't be had.
    """
    if not on_hub(path):
        return path
    from huggingface_hub import snapshot_download

    kind, name, revision, within, split = _parse(path)
    # The pictures that a file names lie beside it.
    folder = PurePosixPath(within).parent if within.endswith((".json", ".jsonl", ".parquet")) else PurePosixPath(within)
    patterns = [f"{folder}/*"] if folder.name else _MODEL_FILES if kind == "model" else None
    try:
        found = Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns)) / within
    except (OSError, ValueError) as error:
        what = str(error).strip().partition("\n")[0]
        wrong = ConfigError if kind == "model" else DataError
        raise wrong(
            f"{_written(path)}: can't be had from the hub ({what}). Check the name, the network and, for what needs a "
            "login, `hf auth login`; or download it elsewhere and give the folder."
        ) from error
    return found.with_name(f"{found.name}#{split}") if split else found


def _parse(path: Path) -> tuple[str, str, str | None, str, str]:
    """Kind, OWNER/NAME, revision, place within it, and split."""
    address, _, split = "/".join(path.parts[1:]).partition("#")
    kind = "dataset" if address.startswith("datasets/") else "model"
    owner, _, rest = address.removeprefix("datasets/").partition("/")
    name, _, within = rest.partition("/")
    name, _, revision = name.partition("@")
    if not owner or not name:
        raise ConfigError(
            f"{_written(path)}: is no address of a model (hf://OWNER/NAME) or a data set (hf://datasets/OWNER/NAME)."
        )
    return kind, f"{owner}/{name}", revision or None, within, split


def _written(path: Path) -> str:
    """An address as people write it: paths have no double slash."""
    return "hf://" + "/".join(path.parts[1:])
