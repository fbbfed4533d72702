"""A flipped bit or a truncation in any file that a run keeps: it ends the same, or says what is."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dpo.cli import main
from dpo.files import sha256_file

FILES = {
    "model": "RUN/checkpoints/step-000004/model.safetensors",
    "optimizer": "RUN/checkpoints/step-000004/optimizer.safetensors",
    "random state": "RUN/checkpoints/step-000004/random.safetensors",
    "state of the loss": "RUN/checkpoints/step-000004/loss.safetensors",
    "state": "RUN/checkpoints/step-000004/state.json",
    "manifest": "RUN/checkpoints/step-000004/manifest.json",
    "tokens": "cache/dpo-engine/tokens/*/columns.safetensors",
    "rows of tokens": "cache/dpo-engine/tokens/*/rows.json",
    "manifest of tokens": "cache/dpo-engine/tokens/*/manifest.json",
    "reference": "cache/dpo-engine/reference/*/shard-*.safetensors",
    "note on the reference": "cache/dpo-engine/reference/*/info.json",
}


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder with a run that is done and its caches."""
    place = tmp_path_factory.mktemp("finished")
    rows = [{"prompt": f"say {n}", "chosen": f" yes {n}", "rejected": " no"} for n in range(16)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = f"--model {model_folder} --data {place / 'pairs.jsonl'} --out {place / 'RUN'}"
    options = "--batch-size 4 --steps 4 --save-every 2 --keep 3 --threads 1 --device cpu"
    environment = {"XDG_CACHE_HOME": str(place / "cache")}
    arguments = ["train", *given.split(), *options.split(), "--learning-rate", "0.01"]
    result = CliRunner().invoke(main, arguments, env=environment)
    assert result.exit_code == 0, result.output
    return place


@pytest.fixture
def place(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to be spoilt."""
    copy = shutil.copytree(finished, tmp_path / "place")
    monkeypatch.setenv("XDG_CACHE_HOME", str(copy / "cache"))
    return Path(copy)


def resume(run: Path) -> Result:
    return CliRunner().invoke(main, ["resume", str(run)])


def result_of(run: Path) -> dict[str, object]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = {path.name: sha256_file(path) for path in (run / "model").iterdir()}
    return {"losses": [(line["step"], line["loss"]) for line in lines], **files}


@pytest.mark.parametrize(
    "damage",
    [flip_bit, *(pytest.param(each, marks=pytest.mark.slow) for each in (cut, empty))],
)
@pytest.mark.parametrize("file", FILES)
def test_run_with_a_damaged_file_ends_the_same(
    place: Path, finished: Path, file: str, damage: Callable[[Path], None]
) -> None:
    (path,) = place.glob(FILES[file])
    damage(path)
    (place / "RUN/model/model.safetensors").unlink()
    result = resume(place / "RUN")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert result_of(place / "RUN") == result_of(finished / "RUN")
    assert not list(place.rglob("*.tmp-*"))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{}\n", b"[1]\n", b"3\n", b'{"step": "x"}\n'])
def test_line_of_metrics_that_is_none_is_told_and_left_out(
    place: Path, finished: Path, content: bytes
) -> None:
    path = place / "RUN/metrics.jsonl"
    path.write_bytes(path.read_bytes() + content)
    result = resume(place / "RUN")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert result_of(place / "RUN") == result_of(finished / "RUN")
    assert f"{path}: 1 damaged lines left out" in result.stderr


@pytest.mark.parametrize("damage", ["a bit", "cut off", "nothing left"])
def test_damaged_config_is_refused_in_one_message(place: Path, damage: str) -> None:
    path = place / "RUN/config.toml"
    content = path.read_text(encoding="utf-8")
    middle = content.index("=", len(content) // 2)  # wherever it is, less is no TOML
    flipped = content[:middle] + chr(ord("=") ^ 1) + content[middle + 1 :]
    damaged = {"a bit": flipped, "cut off": content[: middle + 1], "nothing left": ""}
    path.write_text(damaged[damage], encoding="utf-8")
    result = resume(place / "RUN")
    assert result.exit_code == 2
    assert result.stderr.count("Error: ") == 1
