"""Addresses on the hub: parsed, downloaded once, from a server on this machine; and what is said when they can't be."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mars_jax.config.load import load_config
from mars_jax.errors import ConfigError
from mars_jax.hub.paths import local, repository, revision
from tests.helpers import tiny_data

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs: what a repository is, its tree, its files."""

    repositories: dict[str, Path]  # "datasets/OWNER/NAME" or "models/OWNER/NAME" -> folder
    asked: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0].removeprefix("/api").strip("/")
        self.asked.append(path)
        for name, folder in self.repositories.items():
            if path in (name, f"{name}/revision/main", f"{name}/revision/v1"):
                return self._send(json.dumps({"id": name.partition("/")[2], "sha": COMMIT}).encode())
            if path == f"{name}/tree/{COMMIT}":
                files = sorted(file for file in folder.rglob("*") if file.is_file())
                tree = [
                    {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": digest(f)}
                    for f in files
                ]
                return self._send(json.dumps(tree).encode())
            begin = f"{name.removeprefix('models/')}/resolve/{COMMIT}/"
            if path.startswith(begin) and (folder / path.removeprefix(begin)).is_file():
                file = folder / path.removeprefix(begin)
                return self._send(file.read_bytes(), {"ETag": f'"{digest(file)}"', "X-Repo-Commit": COMMIT})
        self._send(b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, status=404)

    def _send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path):
    """A server with a data set of conversations and a model; its address, what it was asked, the client's settings."""
    data, model = tmp_path / "data", tmp_path / "model"
    file = tiny_data.conversations(data / "samples")
    file.rename(data / "samples" / "train.json")
    tiny_data.checkpoint(model)
    (model / "pytorch_model.bin").write_bytes(b"the same weights again")
    handler = type("Hub", (_Hub,), {"repositories": {"datasets/a/pets": data, "models/a/tiny": model}, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        yield handler.asked, {**os.environ, **environment}
        server.shutdown()


def python(code: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    """Runs code with the client's settings, which it reads when it is imported."""
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


def test_a_data_set_is_downloaded_once_and_then_needs_no_network(hub):
    asked, environment = hub
    code = (
        "import sys; from pathlib import Path; from mars_jax.data.records import load_records\n"
        "for record in load_records(Path(sys.argv[1])): print(record.id, len(record.images))"
    )
    first = python(code, environment, "hf://datasets/a/pets@v1/samples/train.json")
    assert first.returncode == 0, first.stderr
    assert [line.split()[1] for line in first.stdout.splitlines()] == ["1", "2", "0", "2"]
    assert any("train.json" in path for path in asked)
    asked.clear()
    again = python(code, {**environment, "HF_HUB_OFFLINE": "1"}, "hf://datasets/a/pets@v1/samples/train.json")
    assert (again.stdout, asked) == (first.stdout, []), again.stderr


def test_a_model_comes_without_the_files_that_are_not_read(hub):
    _, environment = hub
    code = (
        "from pathlib import Path; from mars_jax.hub.paths import local; folder = local(Path('hf://a/tiny'))\n"
        "print(*sorted(file.name for file in folder.iterdir()))"
    )
    done = python(code, environment)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "tokenizer.json"} <= set(done.stdout.split())
    assert "pytorch_model.bin" not in done.stdout


def test_what_the_hub_does_not_have_is_said(hub):
    _, environment = hub
    code = (
        "import sys; from pathlib import Path; from mars_jax.hub.paths import local\n"
        "try: local(Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    for address, kind in (("hf://a/nothing", "ConfigError"), ("hf://datasets/a/nothing@v2", "DataError")):
        done = python(code, environment, address)
        assert done.stdout.startswith(f"{kind} {address}: can't be downloaded from the hub (404"), (
            done.stdout + done.stderr
        )
        assert "download it elsewhere and give the folder" in done.stdout


def test_addresses_that_name_nothing_are_refused():
    with pytest.raises(
        ConfigError, match=r"hf://datasets/pets: is no address of a model \(hf://OWNER/NAME\) or a data"
    ):
        local(Path("hf://datasets/pets"))


def test_a_config_keeps_addresses_and_an_adapter_names_the_repository(tmp_path):
    text = "model: {checkpoint: hf://a/tiny@v1}\ndata: {train: hf://datasets/a/pets#train}\nrun_dir: run\n"
    (tmp_path / "config.yaml").write_text(text)
    config = load_config(tmp_path / "config.yaml")
    assert config.model.checkpoint == Path("hf://a/tiny@v1")
    assert config.data.train == Path("hf://datasets/a/pets#train")
    assert repository(config.model.checkpoint) == "a/tiny"
    assert repository(tmp_path) == str(tmp_path)


def test_the_revision_of_a_base_is_its_pin_or_else_the_commit_that_the_cache_resolved():
    folder = Path("/cache/models--org--tiny/snapshots") / COMMIT
    assert revision(Path("hf://org/tiny@v1"), folder) == "v1"
    assert revision(Path(f"hf://org/tiny@{COMMIT}"), folder) == COMMIT
    assert revision(Path("hf://org/tiny"), folder) == COMMIT
    assert revision(Path("hf://org/tiny/part"), folder / "part") == COMMIT
    assert revision(Path("bases/tiny"), Path("bases/tiny")) is None
