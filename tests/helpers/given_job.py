"""A tiny job with one rank a module, finished once for all tests of a session; its runs are copied and spoilt."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from typer.testing import CliRunner

from mars_jax.cli import app
from tests.helpers import tiny_job

PHASES = ("data", "select", "finetune", "evaluate", "export", "merge")
_SECTIONS = {
    "lora": {
        "modules": {
            "vision": {"ranks": [0]},
            "projector": {"targets": ["projector/linear_2"], "ranks": [3]},
            "llm": {"targets": ["llm/layers/.*_proj"], "ranks": [16]},
        }
    },
    "finetune": {"steps": 4, "look_every": 2, "warmup_steps": 1},
    "evaluate": {"controls": False, "max_samples": 4},
    "export": {"merged": True},
}


@dataclass(frozen=True)
class Job:
    """Base, data and the finished run of the job, in one folder."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def train(self) -> Path:
        return self.folder / "train.json"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def config(self, run: Path, **sections: dict[str, object]) -> Path:
        """Writes the config of a run directory."""
        return tiny_job.config(run.with_suffix(".yaml"), self.base, self.train, run, **{**_SECTIONS, **sections})


@cache
def make(place: Path) -> Job:
    """The job, made and run once for all tests of a session, which have one place for temporary files."""
    job = Job(place / "given_job")
    tiny_job.checkpoint(job.base)
    tiny_job.records(job.folder, 40)
    assert process("run", job.config(job.run)).returncode == 0
    return job


def process(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, as work that trains needs; `before` is Python for it to begin with."""
    command = tiny_job.command(*arguments)
    command[2] = before + command[2]
    # One folder of compiled programs for the whole test session.
    environment = tiny_job.environment(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)


def mars(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process, which trains nothing; a traceback fails the test."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """Another content of a file while the block runs."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def flipped(content: bytes, share: float = 0.5) -> bytes:
    """The content with one bit changed."""
    place = int(len(content) * share)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def contents(run: Path) -> dict[str, bytes]:
    """What the phases of a run left, by file."""
    left = [path for path in run.rglob("*") if path.is_file() and not {"report", "checkpoints"} & {*path.parts}]
    names = {path: path.relative_to(run).as_posix() for path in left}
    own = ("state.json", "events.jsonl", "lock", "sources.json", "config.resolved.yaml")
    return {name: path.read_bytes() for path, name in names.items() if name not in own}
