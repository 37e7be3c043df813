"""Random damage to documents, texts and files, each a pure function of a random generator. Nothing is tried here."""

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mars_jax.runtime.faults import Location, value_at

# Values of other types and sizes than any setting or key expects.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 1.5, -0.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")),
    *(10**9, 2**31, 2**63, 10**30, -(10**30), "", " ", "0", "8", "null", "x" * 5000, "\x00", "\x1b[31m", "\u202e"),
    *("\ud800", "caf\xe9 \U0001f600", "<script>", "../../etc/passwd", "/dev/zero", "~nosuchuser", "${HOME}", "{{ 7 }}"),
    *("(a+)+$", "(", "%s%n", "a\nb", "<image>", "<image>" * 50, "[INST]", "</s>", "Infinity", "1e5", "hf://a/b"),
    *([], {}, [[]], [None], [1, 2], ["a"], {"a": 1}, [{}], {"": None}, list(range(300)), {"type": "image"}),
)
_KEYS = ("id", "image", "type", "text", "loss", "weight", "video", "label", "value", "", "name", "extra_key", "\x1b[2J")
_BYTES = (
    *(b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"}", b"[" * 2000, b'"', b"\n", b"\r\n", b",", b"9" * 5000),
    *(b"null", b"NaN"),
)


def paths(document: Any, within: Location = ()) -> list[Location]:
    """The places of all values of a document, itself first."""
    found = [within]
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        found += paths(value, (*within, key))
    return found


def damaged_document(rng: random.Random, document: Any, most: int = 2) -> Any:
    """A copy with one to `most` values replaced, keys renamed, dropped or added, values nested, swapped or repeated."""
    result = copy.deepcopy(document)
    for _ in range(rng.randint(1, most)):
        places = [path for path in paths(result) if path]
        if not places:
            return rng.choice(ODD)
        path = rng.choice(places)
        parent, key = value_at(result, path[:-1]), path[-1]
        value = parent[key]
        kind = rng.choice(("odd", "odd", "odd", "drop", "rename", "add", "wrap", "swap", "repeat", "number", "text"))
        if kind == "drop":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            parent[rng.choice(_KEYS)] = parent.pop(key)
        elif kind == "add" and isinstance(parent, dict):
            parent[rng.choice(_KEYS)] = rng.choice(ODD)
        elif kind == "wrap":
            parent[key] = rng.choice(([value], {"a": value}, [value, value]))
        elif kind == "swap":
            other = rng.choice(places)
            if other[: len(path)] != path and path[: len(other)] != other:
                parent[key] = copy.deepcopy(value_at(result, other))
        elif kind == "repeat" and isinstance(parent, list):
            parent.insert(int(key), copy.deepcopy(value))
        elif kind == "number" and isinstance(value, int | float) and not isinstance(value, bool):
            parent[key] = rng.choice(
                (value + 1, value - 1, -value, value * 2, value / 2, value * 10**6, str(value), [value])
            )
        elif kind == "text" and isinstance(value, str):
            parent[key] = damaged_text(rng, value)
        else:
            parent[key] = copy.deepcopy(rng.choice(ODD))
    return result


def damaged_text(rng: random.Random, text: str) -> str:
    """A text with a piece cut, doubled, replaced or put in."""
    start, end = sorted(rng.randint(0, len(text)) for _ in range(2))
    odd = rng.choice([value for value in ODD if isinstance(value, str)])
    return rng.choice(
        (text[:start] + text[end:], text[:end] + text[start:], text[:start] + odd + text[end:], text[::-1])
    )


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """Content with one to three pieces flipped, cut, zeroed, doubled or put in."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, max(0, len(data) - 1))
        length = rng.choice((1, 1, 2, 8, 64, len(data) // 2))
        kind = rng.choice(("flip", "flip", "cut", "zero", "double", "insert", "truncate"))
        if kind == "flip" and data:
            data[at] ^= 1 << rng.randint(0, 7)
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "zero":
            data[at : at + length] = bytes(min(length, len(data) - at))
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "truncate":
            del data[at:]
        else:
            data[at:at] = rng.choice(_BYTES)
    return bytes(data)


def json_text(rng: random.Random, document: Any) -> bytes:
    """JSON of a document; now and then in another spelling, nested without end, or with a key twice."""
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    kind = rng.random()
    if kind < 0.03:
        text = text.replace("{", '{"id": 1, "id": 2, ', 1)
    elif kind < 0.05:
        text = "[" * 10**5 + text
    elif kind < 0.07:
        text = text.replace(": ", ": " + "9" * 5000 + ", ", 1)
    encoding = rng.choice(("utf-8",) * 9 + ("utf-16", "utf-8-sig", "latin-1"))
    return text.encode(encoding, errors="surrogatepass" if encoding.startswith("utf") else "replace")


def damage_file(rng: random.Random, file: Path) -> str:
    """Damages a file where it is: its JSON, its bytes, or what kind of file it is. Returns what was done."""
    kinds: dict[str, Callable[[], object]] = {
        "bytes": lambda: file.write_bytes(damaged_bytes(rng, file.read_bytes())),
        "document": lambda: _damage_json(rng, file),
        "place": lambda: _replace(rng, file),
    }
    kind = rng.choices(list(kinds), (4, 5, 1))[0]
    kinds[kind]()
    return f"{kind} of {file.name}"


def _damage_json(rng: random.Random, file: Path) -> None:
    lines = file.read_bytes().splitlines() if file.suffix == ".jsonl" else [file.read_bytes()]
    number = rng.randrange(len(lines)) if lines else 0
    try:
        document = json.loads(lines[number])
    except (ValueError, IndexError):
        file.write_bytes(damaged_bytes(rng, file.read_bytes()))
        return
    lines[number] = json_text(rng, damaged_document(rng, document))
    if file.suffix == ".jsonl" and rng.random() < 0.3:
        lines[number:number] = rng.choice(([lines[number]], [b"{}"], [b"null"], [b""]))
    file.write_bytes(b"\n".join(lines) + b"\n" * (file.suffix == ".jsonl"))


def _replace(rng: random.Random, file: Path) -> None:
    """Another kind of file in a file's place, or none."""
    file.unlink()
    kind = rng.choice(("gone", "folder", "empty", "fifo", "device", "loop", "locked"))
    if kind == "folder":
        file.mkdir()
    elif kind == "empty":
        file.touch()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind in ("device", "loop"):
        file.symlink_to("/dev/zero" if kind == "device" else file.name)
    elif kind == "locked":
        file.touch(0o000)


def header_of(file: Path) -> dict[str, Any]:
    """Names, types, shapes and places of the tensors of a safetensors file."""
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {
        name: {key: value.get(key) for key in ("dtype", "shape", "data_offsets")}
        for name, value in header.items()
        if name != "__metadata__"
    }


def damage_header(rng: random.Random, file: Path) -> str:
    """Damages the header of a safetensors file, whose tensors stay."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = rng.choice(("document", "document", "bytes", "length", "truncated"))
    text = content[8 : 8 + length]
    if kind == "document":
        name = rng.choice(sorted(header))
        header[name] = damaged_document(rng, header[name])
        text = json.dumps(header).encode()
    elif kind == "bytes":
        text = damaged_bytes(rng, text)
    elif kind == "truncated":
        rest = rest[: rng.randint(0, len(rest))]
    size = rng.choice((0, 1, 2**32, 2**63, length - 1, length + 1)) if kind == "length" else len(text)
    file.write_bytes(size.to_bytes(8, "little") + text + rest)
    return kind


def damaged_tensor(rng: random.Random, tensor: np.ndarray) -> np.ndarray:
    """A copy with one odd value, or of another type or shape."""
    damaged = tensor.copy()
    kind = rng.choice(("value", "value", "dtype", "shape"))
    if kind == "value":
        damaged.flat[rng.randrange(damaged.size)] = rng.choice((np.nan, np.inf, -np.inf, 1e38))
        return damaged
    if kind == "dtype":
        return damaged.astype(rng.choice((np.int8, np.int64, bool, np.float16, np.float64, np.uint16)))
    return rng.choice((damaged[..., :-1], damaged[None], damaged.T, damaged[:0], damaged.ravel())).copy()
