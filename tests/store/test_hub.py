"""Downloads by name, against a local HTTP server with the hub's interface."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch

from oneblock.errors import OneblockError
from oneblock.lineage.commands import label, spec_of
from oneblock.model import Decoder
from oneblock.spec import FAMILIES
from oneblock.store import resolve, resolve_architecture, save_model

COMMITS = {"main": "a" * 40, "v2": "b" * 40, "a" * 40: "a" * 40, "b" * 40: "b" * 40}


@dataclass
class Hub:
    """One repository, `tiny/llama`, with two revisions; `tiny/private` requires the token "secret"."""

    files: dict[str, bytes]
    address: str = ""
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)


def answer(hub: Hub, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the API calls that a download makes."""
    parts = unquote(path).partition("?")[0].strip("/").split("/")
    api = parts[:2] == ["api", "models"]
    repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
    if repo == "tiny/private" and token != "Bearer secret":
        return 401, {"X-Error-Code": "GatedRepo"}, b"{}"
    if repo not in ("tiny/llama", "tiny/private"):
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
    revision = rest[1] if len(rest) > 1 else "main"
    if revision not in COMMITS:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
    sha = COMMITS[revision]
    if api and rest[0] == "tree":
        entries = [
            {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for name, body in hub.files.items()
        ]
        return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
    if api:
        info = {"_id": "0", "id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in hub.files]}
        info |= {"private": False, "tags": [], "downloads": 0, "likes": 0}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
    name = "/".join(rest[2:])
    body = hub.files[name] + (b" " if sha == COMMITS["v2"] and name.endswith(".json") else b"")
    hub.asked.append(name)
    return 200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": sha}, body


def serve(hub: Hub) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def respond(self, with_body: bool) -> None:
            hub.tokens.add(self.headers.get("Authorization", ""))
            status, headers, body = answer(hub, self.path, self.headers.get("Authorization", ""))
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def do_GET(self) -> None:
            self.respond(True)

        def do_HEAD(self) -> None:
            self.respond(False)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("repository") / "llama"
    torch.manual_seed(0)
    save_model(folder, Decoder(FAMILIES["llama"](vocab=11, dim=8, n_heads=2, n_layers=1, hidden_dim=8)))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"tokenizer.json": b"{}", "tokenizer.model": b"x", "merges.txt": b"x", "chat_template.jinja": b"x"}
    ignored = ("pytorch_model.bin", "modeling.py", "original/params.json", "README.md", "consolidated.safetensors")
    repository = Hub(files | dict.fromkeys(ignored, b"no"))
    server = serve(repository)
    yield repository
    server.shutdown()
    server.server_close()


LOAD = """
import sys
from oneblock.errors import OneblockError
from oneblock.store import load_model, resolve
try:
    folder = resolve(sys.argv[1])
    load_model(folder)
    print(folder)
except OneblockError as error:
    print(error)
    sys.exit(1)
"""


SPEC_OF = """
import sys
from oneblock.errors import OneblockError
from oneblock.cli import main
from oneblock.store import resolve_architecture
try:
    print(resolve_architecture(sys.argv[1]))
    main(["diff", sys.argv[1], "llama", "--json"])
except OneblockError as error:
    print(error)
    sys.exit(1)
"""


def ask(name: str, home: Path, address: str, code: str = LOAD, **environment: str) -> tuple[int, str]:
    """Exit status and output of a new process: huggingface_hub reads its settings at import."""
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5"}
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    run = subprocess.run(
        [sys.executable, "-c", code, name], env=clean | settings | environment, capture_output=True, text=True
    )
    assert "Traceback" not in run.stderr, run.stderr
    return run.returncode, run.stdout.strip()


def test_a_downloaded_model_loads_offline(hub: Hub, tmp_path: Path) -> None:
    status, folder = ask("tiny/llama", tmp_path, hub.address)
    assert status == 0, folder
    assert Path(folder).is_relative_to(tmp_path)
    names = {path.name for path in Path(folder).rglob("*")}
    assert names == {
        *("config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer.model", "merges.txt", "chat_template.jinja"),
    }
    assert "pytorch_model.bin" not in hub.asked
    nowhere = "http://127.0.0.1:1"
    assert ask("tiny/llama", tmp_path, nowhere, HF_HUB_OFFLINE="1") == (0, folder)


def test_revisions_have_their_own_folders(hub: Hub, tmp_path: Path) -> None:
    folders = [
        ask(name, tmp_path, hub.address)[1] for name in ("tiny/llama", "tiny/llama@v2", "tiny/llama@" + "b" * 40)
    ]
    assert Path(folders[0]).name == COMMITS["main"]
    assert Path(folders[1]).name == Path(folders[2]).name == COMMITS["v2"]


def test_the_token_is_sent(hub: Hub, tmp_path: Path) -> None:
    assert ask("tiny/private", tmp_path, hub.address, HF_TOKEN="secret")[0] == 0
    assert "Bearer secret" in hub.tokens
    status, message = ask("tiny/private", tmp_path / "other", hub.address)
    assert status == 1
    assert message == "tiny/private: is gated; accept its licence on its page, and set HF_TOKEN"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny/llama@v3", "tiny/llama@v3: the revision does not exist"),
        ("tiny/nothing", "tiny/nothing: no such local folder, and no such model on the hub"),
    ],
)
def test_unknown_names(name: str, message: str, hub: Hub, tmp_path: Path) -> None:
    status, output = ask(name, tmp_path, hub.address)
    assert status == 1
    assert output.startswith(message)
    assert "\n" not in output


@pytest.mark.parametrize("offline", ["0", "1"])
def test_an_unreachable_hub(offline: str, tmp_path: Path) -> None:
    status, output = ask("tiny/llama", tmp_path, "http://127.0.0.1:1", HF_HUB_OFFLINE=offline)
    assert status == 1
    assert output.startswith("tiny/llama: no such local folder, not in the cache, and the hub cannot be reached")
    assert "\n" not in output


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~") == tmp_path
    for name in ("/no/where", "./nowhere", "../a/b", "nowhere", "a/b/c", "~/nowhere", "model.safetensors", "a/.b", ""):
        if name:
            with pytest.raises(OneblockError, match="no such folder; give a model folder, or an org/name on the hub"):
                resolve(name)
    with pytest.raises(OneblockError, match="no such folder"):
        resolve(tmp_path / "org")


def test_architectures_of_the_hub_download_their_configuration_alone(hub: Hub, tmp_path: Path) -> None:
    status, output = ask("tiny/llama@v2", tmp_path, hub.address, SPEC_OF)
    assert status == 0, output
    path, changes = Path(output.partition("\n")[0]), json.loads(output.partition("\n")[2])
    assert path.name == "config.json"
    assert [file.name for file in path.parent.iterdir()] == ["config.json"]
    assert changes
    status, output = ask("tiny/unknown", tmp_path, hub.address, SPEC_OF)
    assert status == 1
    assert output.startswith("tiny/unknown: no such local folder, and no such model on the hub")


def test_a_published_name_wins_over_a_folder_of_the_same_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rule for compare, diff, train --model, load and --init; ./name is the folder."""
    save_model(tmp_path / "gpt2", Decoder(FAMILIES["llama"](dim=8, n_heads=2, n_layers=1, hidden_dim=8)))
    monkeypatch.chdir(tmp_path)
    assert resolve_architecture("gpt2") is None
    assert spec_of("gpt2").dim == 768
    note = "gpt2: taking the published model; give ./gpt2 for the local folder\n"
    assert capsys.readouterr().err == 2 * note
    assert spec_of("./gpt2").dim == spec_of(str(tmp_path / "gpt2")).dim == 8
    assert [label(name) for name in ("gpt2", "./gpt2", "gpt2/config.json")] == ["gpt2", "./gpt2", "gpt2/config.json"]
    assert resolve("./gpt2") == Path("gpt2")
    assert resolve(Path("gpt2")) == Path("gpt2")
    with pytest.raises(OneblockError, match=r"^gpt2 is a published architecture, which .* give \./gpt2 for the local"):
        resolve("gpt2")
    with pytest.raises(OneblockError, match=r"^llama-3-8b is a published architecture, which .* give a model folder"):
        resolve("llama-3-8b")
    assert capsys.readouterr().err == ""


def test_paths_of_architectures(tmp_path: Path) -> None:
    assert resolve_architecture(str(tmp_path)) == tmp_path
    assert resolve_architecture("lama-3-8b") is None  # get_spec suggests the nearest name
    for name in ("/no/where", "./nowhere", "../a/b", "a/b/c", "~/nowhere", "nowhere.json"):
        with pytest.raises(OneblockError, match=r"no such file or folder; give a config\.json, its folder, or a model"):
            resolve_architecture(name)
