"""A PostgreSQL server of the tests' own, and one store of every kind."""

import getpass
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from dpo.data.stores import FeedbackStore, open_store

STORES = ("jsonl", "jsonl.gz", "sqlite", "postgres")
_NO_SERVER = (
    "these tests start a PostgreSQL server of their own and found no binaries of one: "
    "install it (Debian: apt-get install postgresql)"
)
_PASSWORD = secrets.token_hex(8)
_schemas = itertools.count()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a server on loopback that asks for a password."""
    binaries = _postgres_binaries()
    if binaries is None:
        if os.environ.get("CI"):
            pytest.fail(_NO_SERVER)
        pytest.skip(_NO_SERVER)
    user = "postgres" if os.geteuid() == 0 else getpass.getuser()  # it refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="dpo-postgres-"))
    try:
        shutil.chown(folder, user)
        (folder / "password").write_text(_PASSWORD)
        shutil.chown(folder / "password", user)
        options = [
            *("-U", "dpo", "-A", "scram-sha-256", f"--pwfile={folder / 'password'}"),
            *("--no-sync", "--encoding=UTF8", "--locale=C.UTF-8"),
        ]
        subprocess.run(
            [binaries / "initdb", "-D", folder / "data", *options],
            check=True,
            user=user,
            cwd="/",
            stdout=subprocess.DEVNULL,
        )
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": folder,
            "fsync": "off",
        }
        flags = [f"-c{name}={value}" for name, value in settings.items()]
        server = subprocess.Popen(
            [binaries / "postgres", "-D", folder / "data", *flags],
            user=user,
            cwd="/",
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"postgresql://dpo:{_PASSWORD}@127.0.0.1:{port}/postgres"
            _wait_for(url)
            yield url
        finally:
            server.send_signal(signal.SIGQUIT)  # at once: nothing is kept
            server.wait(60)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def postgres_source(postgres_url: str) -> str:
    """The URL of an empty place in the server's database."""
    schema = f"test_{next(_schemas)}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {schema}".encode())
    return f"{postgres_url}?options=-csearch_path%3D{schema}"


@pytest.fixture(params=STORES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What `open_store` takes, for each kind of store; there is none there yet."""
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_source"))
    return str(tmp_path / f"feedback.{request.param}")


@pytest.fixture
def store(source: str) -> Iterator[FeedbackStore]:
    """An empty store of each kind."""
    with open_store(source, create=True) as store:
        yield store


def _postgres_binaries() -> Path | None:
    if found := shutil.which("postgres"):
        return Path(found).parent
    folders = Path("/usr/lib/postgresql").glob("*/bin")
    return max(folders, key=lambda folder: int(folder.parent.name), default=None)


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
