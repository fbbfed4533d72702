"""``dpo push`` against a server that keeps what it is sent, with tokens that may and may not."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest

from dpo.errors import InputError
from dpo.push import model_of

WRITER, READER = "hf_writerwriterwriter", "hf_readerreaderreader"
DRIVER = """
import json, os, sys
from click.testing import CliRunner
from dpo.cli import main
for line in sys.stdin:
    arguments, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    result = CliRunner().invoke(main, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    print(json.dumps([result.exit_code, result.stdout, result.stderr]), flush=True)
"""


@dataclass
class Repository:
    """A model on the server: files by branch."""

    is_private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


class Hub(BaseHTTPRequestHandler):
    """The few endpoints of the Hub that a push uses."""

    repositories: ClassVar[dict[str, Repository]] = {}
    objects: ClassVar[dict[str, bytes]] = {}  # large files by hash
    commits: ClassVar[int] = 0

    def do_GET(self) -> None:
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)", self._path())
        if found and found[1] in self.repositories:
            private = self.repositories[found[1]].is_private
            self._answer(200, {"id": found[1], "sha": "a" * 40, "private": private})
        else:
            self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        self.objects[self._path().rpartition("/")[2]] = self._body()
        self._answer(200, {})

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        token = self.headers["Authorization"].removeprefix("Bearer ")
        if path == "/api/validate-yaml":
            is_bad = "license: [" in json.loads(body)["content"]
            errors = {"errors": [{"message": "the licence is no text"}]} if is_bad else {}
            self._answer(400 if is_bad else 200, errors)
        elif token != WRITER:
            self._answer(403, {"error": "You don't have the rights"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self._choose_places(json.loads(body))
        else:
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path)
            assert found, path
            repository = self.repositories[found[1]]
            if found[2] == "branch":
                repository.branches[found[3]] = dict(repository.branches["main"])
                self._answer(201, {})
            elif found[2] == "preupload":
                self._choose_modes(json.loads(body))
            else:
                self._commit(repository.branches[found[3]], body, found[1])

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "broken":
            self._answer(500, {"error": "out of order"})
            return
        is_private = asked.get("private") or asked.get("visibility") == "private"
        self.repositories[name] = Repository(bool(is_private))
        self._answer(200, {"url": f"{self._here()}/{name}", "name": name})

    def _choose_modes(self, asked: dict[str, Any]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self._answer(200, {"files": modes})

    def _choose_places(self, asked: dict[str, Any]) -> None:
        objects = [
            {
                **item,
                "actions": {"upload": {"href": f"{self._here()}/objects/{item['oid']}"}},
            }
            for item in asked["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, files: dict[str, bytes], body: bytes, name: str) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        type(self).commits += 1
        oid = "c" * 40
        url = f"{self._here()}/{name}/commit/{oid}"
        self._answer(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def _path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _here(self) -> str:
        return f"http://{self.headers['Host']}"

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Keep stderr quiet."""


Push = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def push(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Push]:
    """``dpo push`` in a process of its own: huggingface-hub reads its environment on import."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    process = start(f"http://127.0.0.1:{server.server_port}", tmp_path_factory.mktemp("home"))
    yield lambda *arguments, token=WRITER: ask(process, ["push", *map(str, arguments)], token)
    process.communicate()
    server.shutdown()
    server.server_close()
    thread.join()


def start(endpoint: str, home: Path) -> "subprocess.Popen[str]":
    names = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[1],
        env={name: os.environ[name] for name in names if name in os.environ}
        | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )


def ask(
    process: "subprocess.Popen[str]", arguments: list[str], token: str | None
) -> tuple[int, str, str]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([arguments, token]) + "\n")
    process.stdin.flush()
    code, out, err = json.loads(process.stdout.readline())
    assert WRITER not in out + err
    assert READER not in out + err
    return code, out, err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_model_folder: Callable[..., Path]) -> Path:
    """A run that has a model with a card."""
    folder = tmp_path_factory.mktemp("run")
    make_model_folder(folder / "model")
    (folder / "model/README.md").write_text("---\nlicense: mit\n---\n# It\n", encoding="utf-8")
    (folder / "model/.hidden").write_text("not to be pushed", encoding="utf-8")
    return folder


def files_of(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name[0] != "."
    }


def pushed(name: str, branch: str = "main") -> dict[str, str]:
    files = Hub.repositories[name].branches[branch]
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_every_file_of_a_runs_model_is_pushed_in_one_commit(push: Push, run: Path) -> None:
    before = Hub.commits
    code, out, err = push(run, "org/plain")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"http://[^/]+/org/plain/commit/c{40}\n", out)
    assert pushed("org/plain") == files_of(run / "model")
    assert Hub.commits == before + 1
    assert not Hub.repositories["org/plain"].is_private


def test_model_folder_goes_to_a_branch_of_a_private_repository(push: Push, run: Path) -> None:
    code, _, err = push(run / "model", "org/hidden", "--private", "--revision", "seed-1")
    assert (code, err) == (0, "")
    assert Hub.repositories["org/hidden"].is_private
    assert pushed("org/hidden", "seed-1") == files_of(run / "model")
    assert pushed("org/hidden") == {}


def test_public_repository_is_not_taken_for_a_private_one(push: Push, run: Path) -> None:
    Hub.repositories["org/public"] = Repository(is_private=False)
    code, _, err = push(run, "org/public", "--private")
    assert (code, err) == (
        2, "Error: org/public is there already and public: nothing was pushed\n",
    )  # fmt: skip
    assert pushed("org/public") == {}


@pytest.mark.parametrize(
    ("name", "token", "code", "message"),
    [
        ("org/new", None, 2, r"there is no token for the Hub: set HF_TOKEN, or call hf auth login"),
        ("org/new", READER, 2, r"the Hub lets this token not write to org/new \(403\)"),
        ("org/a--b", WRITER, 2, r"push to org/a--b: "),
        ("broken/new", WRITER, 1, r"push to broken/new: the Hub answered: .*500"),
    ],
)
def test_refusal_is_one_message(
    push: Push, run: Path, name: str, token: str | None, code: int, message: str
) -> None:
    found, out, err = push(run, name, token=token)
    assert (found, out) == (code, "")
    assert re.match(rf"Error: {message}", err), err


def test_card_that_the_hub_refuses_is_named(
    push: Push, tmp_path: Path, make_model_folder: Callable[..., Path]
) -> None:
    folder = make_model_folder(tmp_path)
    (folder / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")
    code, _, err = push(folder, "org/card")
    assert code == 2
    assert "Invalid metadata in README.md" in err


def test_network_that_is_gone_is_told(tmp_path: Path, run: Path) -> None:
    process = start("http://127.0.0.1:1", tmp_path)
    answer = ask(process, ["push", str(run), "org/plain"], WRITER)
    assert answer == (1, "", "Error: push to org/plain: the Hub cannot be reached\n")
    process.communicate()


def test_run_without_a_model_and_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is neither the folder of a model nor of a run"):
        model_of(tmp_path)
    (tmp_path / "config.toml").touch()
    with pytest.raises(InputError, match=r"has not written its model yet: dpo resume"):
        model_of(tmp_path)


def test_adapter_is_a_model(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    assert model_of(tmp_path) == tmp_path
