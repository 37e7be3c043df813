"""Resolves addresses of models and data sets on the Hugging Face hub to local folders.

`hf://OWNER/NAME` is a model and `hf://datasets/OWNER/NAME` a data set. `@REVISION` pins either; a path within it and a
`#split` may follow. They are downloaded once into the hub's cache, which also serves them without a network.
"""

from pathlib import Path, PurePosixPath

from mars_jax.errors import ConfigError, DataError

# The files of a model that are downloaded: not the same weights in other formats.
_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.bpe", "*.spm"]


def on_hub(path: Path) -> bool:
    """Whether a path is an address on the hub."""
    return path.parts[:1] == ("hf:",)


def repository(path: Path) -> str:
    """`OWNER/NAME` of an address on the hub; any other path as it is."""
    return _parse(path)[1] if on_hub(path) else str(path)


def revision(path: Path, folder: Path) -> str | None:
    """The revision of a model on the hub that a run read; None for a folder.

    Args:
        path: the address of the model.
        folder: where `local` found it: the hub's cache keeps each commit in `snapshots/COMMIT`.

    Returns:
        The revision that the address pins, or else the commit that its default branch was at.
    """
    if not on_hub(path):
        return None
    pinned = _parse(path)[2]
    parts = folder.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None
    return pinned or commit


def local(path: Path) -> Path:
    """The local folder of an address on the hub, downloaded if needed; any other path as it is.

    Raises:
        ConfigError: the address is malformed, or the model cannot be downloaded.
        DataError: the data set cannot be downloaded.
    """
    if not on_hub(path):
        return path
    from huggingface_hub import snapshot_download

    kind, name, revision, within, split = _parse(path)
    # The pictures of a file are in the same folder.
    folder = PurePosixPath(within).parent if within.endswith((".json", ".jsonl", ".parquet")) else PurePosixPath(within)
    patterns = [f"{folder}/*"] if folder.name else _MODEL_FILES if kind == "model" else None
    try:
        target = Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns)) / within
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        error_type = ConfigError if kind == "model" else DataError
        raise error_type(
            f"{_written(path)}: can't be downloaded from the hub ({reason}). Check the name, the network and, for what "
            "needs a login, `hf auth login`; or download it elsewhere and give the folder."
        ) from error
    return target.with_name(f"{target.name}#{split}") if split else target


def _parse(path: Path) -> tuple[str, str, str | None, str, str]:
    """Kind, OWNER/NAME, revision, path within the repository, and split."""
    address, _, split = "/".join(path.parts[1:]).partition("#")
    kind = "dataset" if address.startswith("datasets/") else "model"
    owner, _, rest = address.removeprefix("datasets/").partition("/")
    name, _, within = rest.partition("/")
    name, _, revision = name.partition("@")
    if not owner or not name or ".." in PurePosixPath(address).parts:
        raise ConfigError(
            f"{_written(path)}: is no address of a model (hf://OWNER/NAME) or a data set (hf://datasets/OWNER/NAME)."
        )
    return kind, f"{owner}/{name}", revision or None, within, split


def _written(path: Path) -> str:
    """The address as users write it; `Path` drops one of the two slashes."""
    return "hf://" + "/".join(path.parts[1:])
