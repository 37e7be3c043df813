"""What the fuzzer tries: for each kind of input a damaged one, the call that reads it, and what holds if it is taken.

An input is a pure function of (kind, number): `Trials.run(kind, number)` makes it in a scratch folder and tries it.
"""

import json
import os
import random
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file, save_file

from benchmarks.compat.fuzz_mutations import (
    damage_file,
    damage_header,
    damaged_bytes,
    damaged_document,
    damaged_tensor,
    damaged_text,
    header_of,
    json_text,
)
from mars_jax.errors import MarsError
from tests.data.formats.test_registry import EXAMPLES
from tests.helpers import report_run, tiny_data, tiny_job, tiny_llava

KINDS = ("rows", "config", "checkpoint", "adapter", "run")
_TEXT = re.compile(r"zq\d+")
_TRACEBACK = re.compile(r"traceback is in (\S+\.txt)")
_DIFFERENT = ("seconds", "started", "ended", "time", "run_dir", "peak_memory_bytes")


@dataclass(frozen=True)
class Trial:
    """What came of one input.

    Attributes:
        kind: of the input.
        number: of the input, from which it follows.
        outcome: "accepted", "refused", "traceback", or "silent": taken, but not as it stands, and nothing warned.
        damage: what was done to the input.
        detail: the message of a refusal, the end of a traceback, or what a silent damage changed.
    """

    kind: str
    number: int
    outcome: str
    damage: str
    detail: str


class Silent(Exception):
    """An input was accepted, and what came of it is not what the input says."""


class Trials:
    """The undamaged inputs in a folder, and how each kind is damaged and tried."""

    def __init__(self, folder: Path, finished: Path | None = None) -> None:
        """Makes the undamaged inputs.

        Args:
            folder: is made; later ones with the same folder find them there.
            finished: a run directory that `mars run` finished; None: a made-up one, of which only reports are tried.
        """
        self.folder = folder
        self.real = finished is not None
        if not (folder / "made").exists():
            tiny_job.checkpoint(folder / "base")
            tiny_job.records(folder / "data", 60)
            for number, name in enumerate(("validation", "test"), start=1):
                tiny_job.records(folder / "data", 12, seed=number, name=name)
            tiny_data.save_picture(folder / "data" / "a.png", seed=1)
            self._write_adapter()
            if finished is None:
                self._write_made_up_run()
            (folder / "made").touch()
        self.finished = finished or folder / "finished"
        self._sound: dict[str, Any] = {}

    def run(self, kind: str, number: int, seed: int = 0) -> Trial:
        """Makes input `number` of a kind and tries it."""
        rng = random.Random(f"{seed} {kind} {number}")
        trials: dict[str, Callable[[random.Random, Path], tuple[str, Callable[[], str]]]] = {
            "rows": self._rows,
            "config": self._config,
            "checkpoint": self._checkpoint,
            "adapter": self._adapter,
            "run": self._run_directory,
        }
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            damage, attempt = trials[kind](rng, Path(scratch))
            try:
                outcome, detail = "accepted", attempt()
            except MarsError as error:
                outcome, detail = "refused", str(error)
            except Silent as error:
                outcome, detail = "silent", str(error)
            except Exception:  # what is counted
                outcome, detail = "traceback", traceback.format_exc()[-1500:]
        return Trial(kind, number, outcome, damage, detail.encode(errors="backslashreplace").decode()[:1500])

    # Rows: each text of an accepted row is in what the model reads, unless a note says what isn't.

    def _rows(self, rng: random.Random, scratch: Path) -> tuple[str, Callable[[], str]]:
        name = rng.choice(sorted(EXAMPLES))
        rows = [_marked(EXAMPLES[name], iter(range(20 * i, 20 * i + 20))) for i in range(rng.randint(1, 3))]
        for number, row in enumerate(rows):
            row.update({key: type(row[key])(number) for key in ("id", "index") if key in row})
        place = rng.randrange(len(rows))
        rows[place] = damaged_document(rng, rows[place])
        content = json_text(rng, rows)
        suffix = rng.choice(("json", "json", "jsonl"))
        if suffix == "jsonl":
            content = b"\n".join(json_text(rng, row) for row in rows)
        if torn := rng.random() < 0.15:
            content = damaged_bytes(rng, content)
        file = scratch / f"rows.{suffix}"
        file.write_bytes(content)

        def attempt() -> str:
            document, warned = self.check(scratch, train=file)
            read = _squeezed("".join(sample["id"] + sample["text"] for sample in document["samples"]))
            # Where bytes were damaged, nobody knows what the file should say.
            markers = [] if torn else _TEXT.findall(json.dumps(_texts(rows)))
            missing = sorted({marker for marker in markers if marker not in read})
            if missing and not warned:
                raise Silent(f"not in what the model reads, and nothing warned of it: {missing}")
            return warned

        return f"{name} row {place}", attempt

    # Configs: each setting of an accepted file is read as it stands there.

    def _config(self, rng: random.Random, scratch: Path) -> tuple[str, Callable[[], str]]:
        sound = tiny_job.config(scratch / "a.yaml", self.folder / "base", self._train, scratch / "run")
        document = damaged_document(rng, yaml.safe_load(sound.read_text()), most=2)
        file, as_text = scratch / "b.yaml", rng.random() < 0.4
        try:
            text = yaml.safe_dump(document, allow_unicode=rng.random() < 0.5)
        except (yaml.YAMLError, ValueError):
            text = json.dumps(document)
        content = text.encode(errors="surrogatepass")
        if as_text:
            content = rng.choice(
                (
                    damaged_bytes(rng, content),
                    damaged_text(rng, text).encode(errors="surrogatepass"),
                    content + b"\n<<: &a {b: *a}",
                )
            )
        file.write_bytes(content)
        key = rng.choice(("probe.seeds", "seed", "data", "lora.modules.llm", "x.y", "optimizer.learning_rate"))
        overrides = [f"{key}={damaged_text(rng, '[1, {a: 2}]')}"] if rng.random() < 0.2 else []
        command = rng.choice(("check", "plan"))

        def attempt() -> str:
            from mars_jax.config.load import load_config

            config = load_config(file, overrides)
            if not as_text and not overrides:
                _compare_settings(document, config.model_dump(mode="json"))
            return self.mars(command, file, *overrides)[1]

        return "text" if as_text else "values", attempt

    # Checkpoints: what `mars check` accepts has the tensors that the sound one has.

    def _checkpoint(self, rng: random.Random, scratch: Path) -> tuple[str, Callable[[], str]]:
        base = scratch / "base"
        shutil.copytree(self.folder / "base", base)
        name = rng.choice(
            ("config.json", "config.json", "model.safetensors", *sorted(p.name for p in base.glob("*.j*")))
        )
        if name == "model.safetensors":
            damage = f"header: {damage_header(rng, base / name)}"
        elif name.endswith(".jinja"):
            (base / name).write_text(damaged_text(rng, (base / name).read_text()), errors="replace")
            damage = "text of " + name
        else:
            damage = damage_file(rng, base / name)

        def attempt() -> str:
            warned = self.check(scratch, base=base)[1]
            if (
                name == "model.safetensors"
                and header_of(base / name) != header_of(self.folder / "base" / name)
                and not warned
            ):
                raise Silent("tensors of other names, shapes, types or places were taken")
            return warned

        return damage, attempt

    # Adapters: an accepted one holds the file's own tensors, finite, and a scale of its settings.

    def _adapter(self, rng: random.Random, scratch: Path) -> tuple[str, Callable[[], str]]:
        folder = scratch / "adapter"
        shutil.copytree(self.folder / "adapter", folder)
        weights = folder / "adapter_model.safetensors"
        kind = rng.choice(("settings", "settings", "tensors", "header"))
        if kind == "settings":
            damage = damage_file(rng, folder / "adapter_config.json")
        elif kind == "header":
            damage = f"header: {damage_header(rng, weights)}"
        else:
            tensors = load_file(weights)
            key = rng.choice(sorted(tensors))
            tensors[key] = damaged_tensor(rng, tensors[key])
            save_file(tensors, weights)
            damage = "tensor"

        def attempt() -> str:
            from mars_jax.hub.adapter import read_adapter
            from mars_jax.hub.read import read_config
            from mars_jax.runtime.trees import flatten

            tree, ranks = read_adapter(folder, read_config(self.folder / "base"))
            flat = flatten(tree)
            if not all(np.isfinite(leaf).all() for leaf in flat.values()):
                raise Silent("NaN or infinity was taken")
            numbers = sum(leaf.size for path, leaf in flat.items() if not path.endswith("/scale"))
            stored = sum(tensor.size for tensor in load_file(weights).values())
            if numbers != stored or any(rank < 1 for rank in ranks.values()):
                raise Silent(f"{numbers} numbers were read of {stored}, ranks {ranks}")
            if any((leaf <= 0).any() for path, leaf in flat.items() if path.endswith("/scale")):
                raise Silent("a scale of 0 or less was taken")
            return ""

        return damage, attempt

    # Run directories: a damaged file is named, or the results are those of the sound one.

    def _run_directory(self, rng: random.Random, scratch: Path) -> tuple[str, Callable[[], str]]:
        run = scratch / "run"
        shutil.copytree(self.finished, run, symlinks=True)
        files = sorted(path for path in run.rglob("*") if path.is_file() and path.parts[len(run.parts)] in _INPUTS)
        file = rng.choice(files)
        before = file.read_bytes()
        damage = damage_file(rng, file).replace(file.name, str(file.relative_to(run)))
        command = rng.choice(_COMMANDS if self.real else _COMMANDS[:2])

        def attempt() -> str:
            found, warned = self.mars(command, run)
            if self.real:
                if command not in self._sound:
                    with tempfile.TemporaryDirectory(dir=self.folder) as other:
                        sound = Path(other) / "run"
                        shutil.copytree(self.finished, sound, symlinks=True)
                        self._sound[command] = _without_paths(self.mars(command, sound)[0])
                unchanged = file.is_file() and file.read_bytes() == before
                if _without_paths(found) != self._sound[command] and not warned and not unchanged:
                    raise Silent(f"mars {command} has another result, and warned nothing")
            return warned

        return f"{damage}, then {command}", attempt

    # Calls.

    @property
    def _train(self) -> Path:
        return self.folder / "data" / "train.json"

    def check(self, scratch: Path, base: Path | None = None, train: Path | None = None) -> tuple[dict[str, Any], str]:
        """The document of `mars check`, and what it warned besides."""
        held_out = [str(self.folder / "data" / f"{name}.json") for name in ("validation", "test")]
        config = tiny_job.config(
            scratch / "check.yaml",
            base or self.folder / "base",
            train or self._train,
            scratch / "run",
            data={"image_root": str(self.folder / "data"), "validation": held_out[0], "test": held_out[1]},
            lora={"modules": {"llm": {"targets": ["llm/layers/self_attn/v_proj"], "ranks": [2]}}},
            optimizer={"warmup_steps": 0},
            finetune={"warmup_steps": 0},
        )
        return self.mars("check", config, "--show", "30")

    def mars(self, *arguments: object) -> tuple[dict[str, Any], str]:
        """The document of a command in this process, and the warnings that it printed.

        Raises:
            MarsError: with the message of a refusal.
            RuntimeError: with the traceback of a bug.
        """
        from typer.testing import CliRunner

        from mars_jax.cli import BUG, app

        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        if result.exit_code == BUG or "the memory is full" in result.stderr:
            file = _TRACEBACK.search(result.stderr)
            text = result.stderr
            if file and Path(file[1]).is_file():
                text = Path(file[1]).read_text()
                Path(file[1]).unlink()
            raise RuntimeError(text)
        if result.exit_code:
            raise MarsError(result.stderr)
        warned = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
        document = json.loads(result.stdout)
        notes = document.get("data", {}).get("notes", []) if isinstance(document.get("data"), dict) else []
        return document, "\n".join([*warned, *map(str, notes)])

    def _write_made_up_run(self) -> None:
        from mars_jax.config.load import RESOLVED_CONFIG, load_config

        run = report_run.make_run(self.folder / "finished")
        config = tiny_job.config(self.folder / "finished.yaml", self.folder / "base", self._train, run)
        (run / RESOLVED_CONFIG).write_text(load_config(config).resolved_yaml())

    def _write_adapter(self) -> None:
        from mars_jax.hub.adapter import write_adapter
        from mars_jax.hub.read import read_checkpoint

        config, params = read_checkpoint(self.folder / "base", "float32")
        ranks = {"vision": 2, "projector": 3, "llm": 4}
        adapters = tiny_llava.random_adapters(params, ranks)
        write_adapter(self.folder / "adapter", adapters, ranks, config, base_name="org/base", provenance={})


# Of a run directory; the first two also take a made-up one.
_COMMANDS = ("status", "report", "fit", "select", "export", "evaluate")
# Folders and files of a run that commands read.
_INPUTS = (
    *("state.json", "config.resolved.yaml", "data.json", "plan.json", "laws.json", "selection.json", "evaluation.json"),
    *("probes", "sweep", "finetune", "events.jsonl", "samples.jsonl", "adapter"),
)


def _marked(row: Any, numbers: Any, key: str = "") -> Any:
    """A row each of whose texts ends in a marker of its own."""
    if isinstance(row, dict):
        return {name: _marked(value, numbers, name) for name, value in row.items()}
    if isinstance(row, list):
        return [_marked(value, numbers, key) for value in row]
    if isinstance(row, str) and key in ("value", "text", "content", "question", "choices", "hint") and row:
        # Before the options, which are parts of the question.
        head, line, options = row.partition("\n")
        return f"{head} zq{next(numbers)}{line}{options}"
    return row


def _texts(rows: Any) -> Any:
    """The values of rows, without names of keys."""
    if isinstance(rows, dict):
        return [_texts(value) for value in rows.values()]
    return [_texts(value) for value in rows] if isinstance(rows, list) else str(rows)


def _without_paths(document: Any) -> Any:
    """A command's document without run directories, times and other texts that differ between two runs of it."""
    if isinstance(document, dict):
        return {key: _without_paths(value) for key, value in document.items() if key not in _DIFFERENT}
    if isinstance(document, list):
        return [_without_paths(value) for value in document]
    return re.sub(r"\S*/run\b", "RUN", document) if isinstance(document, str) else document


def _squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def _compare_settings(written: Any, read: Any, path: str = "") -> None:
    """Raises `Silent` where a setting of a file is another in what was read."""
    if isinstance(written, dict) and isinstance(read, dict):
        for key, value in written.items():
            _compare_settings(value, read.get(key), f"{path}.{key}")
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        for place, (value, other) in enumerate(zip(written, read, strict=True)):
            _compare_settings(value, other, f"{path}.{place}")
    elif written != read and not (isinstance(written, str) and isinstance(read, str) and os.path.isabs(read)):
        raise Silent(f"{path[1:]} is {written!r:.80} in the file and was read as {read!r:.80}")
