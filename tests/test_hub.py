import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import pytest

from dpo.errors import InputError
from dpo.hub import choose_split, commit_of, fetch_model, is_dataset_id, split_files

COMMIT, OLD_COMMIT = "a" * 40, "b" * 40
PAIR = b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n'
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "models/org/tiny": {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "chat_template.jinja": b"x",
        "tokenizer.model": b"sentencepiece",
        "README.md": b"about",
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"weights again",
        "onnx/config.json": b"{}",
        "modeling_tiny.py": b"code",
    },
    "datasets/org/pairs": {
        "README.md": b"about",
        "data/train-00000-of-00002.jsonl": PAIR,
        "data/train-00001-of-00002.jsonl": PAIR.replace(b'"p"', b'"q"'),
        "data/test-00000-of-00001.jsonl.gz": gzip.compress(PAIR),
        "loader.py": b"code",
    },
}
DRIVER = """
import json, sys
from dpo import hub, preferences
for line in sys.stdin:
    name, arguments = json.loads(line)
    try:
        if name == "read_pairs":
            loaded = preferences.load_pairs(**arguments)
            answer = [[pair.prompt for pair in loaded.pairs], loaded.revision]
        else:
            found = getattr(hub, name)(**arguments)
            answer = [str(path) for path in (found if isinstance(found, list) else [found])]
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), flush=True)
"""


class Hub(BaseHTTPRequestHandler):
    """The few endpoints of the Hub that downloads use."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        api = re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(\w+)/([^/]+).*)?", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            self._describe(api[1], api[2], api[3] or "main")
        elif file:
            content = REPOSITORIES[f"{file[1] or 'models/'}{file[2]}"][file[4]]
            etag = hashlib.sha256(content).hexdigest()
            self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": file[3]})
        else:
            self._answer(404, b"")

    def _describe(self, name: str, what: str, revision: str) -> None:
        if name.endswith("/gated"):
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif name.endswith("/broken"):
            self._answer(400, b'{"error": "out of order"}')
        elif name not in REPOSITORIES:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", COMMIT, OLD_COMMIT):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif what == "tree":
            self._answer_json(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                    for path, content in REPOSITORIES[name].items()
                ]
            )
        else:
            sha = OLD_COMMIT if revision in ("v1", OLD_COMMIT) else COMMIT
            siblings = [{"rfilename": path} for path in REPOSITORIES[name]]
            kind, _, id_ = name.partition("/")
            self._answer_json({"id": id_, "sha": sha, "siblings": siblings, "kind": kind})

    def _answer_json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Keep stderr quiet."""


@dataclass
class Client:
    """``dpo.hub`` in a process of its own: huggingface-hub reads its environment on import."""

    process: subprocess.Popen[str]

    def call(self, function: str, **arguments: str | None) -> object:
        """Return what the function returns, or its error as text."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([function, arguments]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def paths(self, function: str, **arguments: str | None) -> list[Path]:
        """Return the paths that the function returns."""
        answer = self.call(function, **arguments)
        assert isinstance(answer, list), answer
        return [Path(path) for path in answer]


def start_client(endpoint: str, home: Path, **environment: str) -> Client:
    names = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[1],
        env={name: os.environ[name] for name in names if name in os.environ}
        | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        | environment,
    )
    return Client(process)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(home: Path) -> Iterator[Client]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    client = start_client(f"http://127.0.0.1:{server.server_port}", home)
    yield client
    client.process.communicate()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def offline(client: Client, home: Path) -> Iterator[Client]:
    """A client without network whose cache holds what the other has fetched."""
    client.paths("fetch_model", name="org/tiny")
    client.paths("fetch_dataset_files", name="org/pairs")
    offline = start_client("http://127.0.0.1:1", home, HF_HUB_OFFLINE="1")
    yield offline
    offline.process.communicate()


@pytest.fixture(scope="module")
def unreachable(client: Client, home: Path) -> Iterator[Client]:
    """A client that is not told to be offline, but gets no answer."""
    client.paths("fetch_dataset_files", name="org/pairs")
    unreachable = start_client("http://127.0.0.1:1", home)
    yield unreachable
    unreachable.process.communicate()


def test_model_is_fetched_without_code_or_pickles(client: Client) -> None:
    (folder,) = client.paths("fetch_model", name="org/tiny")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wanted = {"config.json", "model.safetensors", "chat_template.jinja", "tokenizer.model"}
    assert files == {*wanted, "README.md"}
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert commit_of(folder) == COMMIT


def test_revision_chooses_the_commit(client: Client) -> None:
    (folder,) = client.paths("fetch_model", name="org/tiny", revision="v1")
    assert commit_of(folder) == OLD_COMMIT


def test_files_of_a_split_are_fetched_alone(client: Client) -> None:
    paths = client.paths("fetch_dataset_files", name="org/pairs", split="test")
    assert [path.name for path in paths] == ["test-00000-of-00001.jsonl.gz"]
    assert gzip.decompress(paths[0].read_bytes()) == PAIR
    assert commit_of(paths[0]) == COMMIT
    assert not any("loader.py" in path for path in Hub.asked)


def test_pairs_are_read_from_the_hub_with_their_commit(client: Client) -> None:
    assert client.call("read_pairs", source="org/pairs") == [["p", "q"], COMMIT]
    test = client.call("read_pairs", source="org/pairs", revision="v1", split="test")
    assert test == [["p"], OLD_COMMIT]


@pytest.mark.parametrize("function", ["fetch_model", "fetch_dataset_files"])
@pytest.mark.parametrize(
    ("name", "revision", "fault"),
    [
        ("org/absent", None, "InputError: .*'org/absent' is neither here nor on the Hub"),
        ("org/gated", None, "InputError: .*'org/gated' is gated: accept its terms"),
        ("org/a--b", None, "InputError: .*'org/a--b' is neither here nor a valid id"),
        ("org/broken", None, "(InputError|RunError): .*'org/broken'.*(the Hub answered|reached)"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(
    client: Client, function: str, name: str, revision: str | None, fault: str
) -> None:
    answer = client.call(function, name=name, revision=revision)
    assert isinstance(answer, str)
    assert re.match(fault, answer), answer


def test_absent_revision_is_named(client: Client) -> None:
    for function, what in (("fetch_model", "model"), ("fetch_dataset_files", "data set")):
        name = "org/tiny" if what == "model" else "org/pairs"
        answer = client.call(function, name=name, revision="none")
        assert (
            answer
            == f"InputError: {what} '{name}' at revision 'none': the Hub has no such revision"
        )


def test_absent_split_is_named(client: Client) -> None:
    answer = client.call("fetch_dataset_files", name="org/pairs", split="dev")
    assert answer == "InputError: org/pairs: no split 'dev'; there are test, train"


def test_cache_serves_without_a_network(offline: Client, unreachable: Client) -> None:
    for client in (offline, unreachable):
        assert client.call("read_pairs", source="org/pairs") == [["p", "q"], COMMIT]
    assert commit_of(offline.paths("fetch_model", name="org/tiny")[0]) == COMMIT


def test_what_is_not_in_the_cache_needs_a_network(offline: Client, unreachable: Client) -> None:
    for client in (offline, unreachable):
        for function, what in (("fetch_model", "model"), ("fetch_dataset_files", "data set")):
            answer = client.call(function, name="org/other")
            assert answer == (
                f"InputError: {what} 'org/other' is neither here nor in the cache, and the Hub "
                "cannot be reached"
            )


def test_local_folder_stays_what_it_is(tmp_path: Path) -> None:
    assert fetch_model(tmp_path) == tmp_path
    assert fetch_model(str(tmp_path)) == tmp_path
    assert commit_of(tmp_path / "model.safetensors") is None
    with pytest.raises(InputError, match="revision 'main' has no meaning for the local folder"):
        fetch_model(tmp_path, "main")


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "../x", "a b"])
def test_path_that_is_no_id_is_not_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        fetch_model(name)
    assert not is_dataset_id(name)


def test_data_set_ids_name_an_owner() -> None:
    assert is_dataset_id("Anthropic/hh-rlhf")
    assert not is_dataset_id("pairs")


class TestSplits:
    HH = ("harmless-base/test.jsonl.gz", "harmless-base/train.jsonl.gz", "helpful/train.jsonl.gz")

    @pytest.mark.parametrize(
        ("names", "split", "chosen"),
        [
            (["a.jsonl"], None, ["a.jsonl"]),
            (["train.jsonl", "test.jsonl"], None, ["train.jsonl"]),
            (["data/train-1-of-2.json", "data/train-0-of-2.json", "x.json"], None, [
                "data/train-0-of-2.json", "data/train-1-of-2.json",
            ]),
            (["train/1.parquet", "train/2.parquet", "test/1.parquet"], None, [
                "train/1.parquet", "train/2.parquet",
            ]),
            (HH, "test", ["harmless-base/test.jsonl.gz"]),
            (HH, "helpful/train", ["helpful/train.jsonl.gz"]),
            (HH, "helpful", ["helpful/train.jsonl.gz"]),
            (["train_sft.jsonl", "train.jsonl"], "train_sft", ["train_sft.jsonl"]),
            (["a.jsonl", "dataset_info.json", ".cache/b.jsonl", "README.md"], None, ["a.jsonl"]),
        ],
    )  # fmt: skip
    def test_are_told_from_names(self, names: list[str], split: str, chosen: list[str]) -> None:
        assert choose_split(names, split, "here") == chosen

    @pytest.mark.parametrize(
        ("names", "split", "fault"),
        [
            ([], None, "here: no files of pairs; known types are .jsonl, "),
            (["a.csv"], None, "here: no files of pairs; known types are .jsonl, "),
            (["a.jsonl", "b.jsonl"], None, "here: no split 'train'; there are a, b"),
            (["a.jsonl"], "test", "here: no split 'test'; there are a"),
            (
                ["train-1-of-3.jsonl", "train-0-of-3.jsonl"],
                "train",
                "here: split 'train' has 2 of 3 files",
            ),
            (HH, None, "here: several splits 'train'; there are harmless-base/test, harmless-"),
        ],
    )
    def test_that_cannot_be_told_are_refused(
        self, names: list[str], split: str, fault: str
    ) -> None:
        with pytest.raises(InputError, match=re.escape(fault)):
            choose_split(names, split, "here")

    def test_of_a_local_folder(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "train.jsonl").touch()
        assert split_files(tmp_path, None) == [tmp_path / "data" / "train.jsonl"]
