"""Read damaged and hostile input at random, and see that each is read or refused in order.

    python tests/fuzz.py --inputs 100000 --seed 0

An input is a sound one with a few changes: of its bytes, or of the values in its JSON. A reader
must return or raise ``InputError`` or ``RunError`` within a second of processor time, and the
memory of the program must stay within a bound. Prints a line of JSON; the exit code is 1 if
anything else happened. To add a reader, add a line to ``READERS``.
"""

from __future__ import annotations

import argparse
import faulthandler
import gzip
import io
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import parquet

from dpo.adapter_files import read_adapter
from dpo.checkpoint import load_checkpoint, save_checkpoint
from dpo.config import RunConfig
from dpo.data.simulate import simulate
from dpo.data.stores import open_store
from dpo.errors import InputError, RunError
from dpo.files import JSON, write_manifest
from dpo.models import init_model, load_model, parse_config, save_model
from dpo.models.architectures import ARCHITECTURES
from dpo.models.config import read_config
from dpo.preferences import load_pairs
from dpo.run_folder import read_metrics
from dpo.settings import read_settings, resolve
from dpo.template_process import answer_all
from dpo.templates import CHATML, ChatTemplate
from dpo.tokenizer import byte_tokenizer, load_tokenizer

MOST_SECONDS = 1.0  # of a processor, for one input
MOST_BYTES = 2**30  # that the program may grow by while it reads all inputs
HANG_SECONDS = 120  # until a reader that does not come back is ended with its traceback

MODEL: dict[str, Any] = {
    "model_type": "llama", "vocab_size": byte_tokenizer().vocab_size, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "head_dim": 4,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "eos_token_id": 257,
    "layer_types": ["full_attention", "full_attention"], "sliding_window": 8,
}  # fmt: skip
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
ROWS: Sequence[Mapping[str, object]] = (
    {"prompt": "a", "chosen": "b", "rejected": "c", "weight": 1.5, "margin": 0, "id": "1"},
    {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": [{**MESSAGES[1], "content": "n"}]},
    {"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "no"}]},
    {"prompt": "a", "answers": ["b", "c", "d"], "scores": [1, 2.5, 2.5], "source": "s"},
    {"prompt": "a", "completion": "b", "label": True, "tools": [{"type": "function"}]},
    {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]},
)
TEMPLATES = (
    CHATML,
    "{% for m in messages %}{{ m.role | upper }}: {{ m['content'] | trim }}\n{% endfor %}",
    "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{{ m | tojson(indent=2) }}{{ ns.n }}{% endfor %}{{ strftime_now('%Y') }}",
    "{% macro turn(m, n=2) %}{{ m.content * n }}{% endmacro %}{{ turn(messages[0]) }}",
)
HOSTILE_VALUES: Sequence[object] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1e308, -0.5, float("inf"), float("nan"), "",
    "x", "..", "/etc/passwd", "a\0b", "\ud800", "é" * 99, "{{ 7 * 7 }}", [], {}, [[]], [None], [1],
    ["x"], {"x": 1}, {"": None}, [[[[1]]]],
)  # fmt: skip
HOSTILE_BYTES = (
    b"\0", b"\xff", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"null", b"-", b"e999",
    b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"\\ud800", b"\xef\xbb\xbf", b"{{", b"{%", b"%}",
    b"NaN", b"../", b" " * 5000,
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A way in for what others wrote.

    Attributes:
        seeds: sound inputs.
        read: reads an input, for which a folder of its own is kept.
        share: of all inputs, relative to the others: less where one takes longer.
        is_json: whether the values of inputs can be changed, beside their bytes.
    """

    seeds: Callable[[Path], Sequence[bytes]]
    read: Callable[[Path, bytes], object]
    share: float = 1.0
    is_json: bool = True


def file_reader(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    """Make a reader of a file out of a function of its path."""

    def read_content(place: Path, content: bytes) -> None:
        path = place / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        read(path)

    return read_content


def rows_as_json(_place: Path) -> Sequence[bytes]:
    return [json.dumps(row).encode() for row in ROWS]


def rows_as_parquet(place: Path) -> Sequence[bytes]:
    contents = []
    for row in (ROWS[0], ROWS[3]):
        parquet.write_table(pyarrow.Table.from_pylist([dict(row)]), place / "seed.parquet")
        contents.append((place / "seed.parquet").read_bytes())
    return contents


def feedback(place: Path) -> Sequence[bytes]:
    with open_store(place / "seed.jsonl", create=True) as store:
        store.record_decisions(simulate("extraction", 20, 0, situations=5))
    return (place / "seed.jsonl").read_bytes().splitlines(keepends=True)


def read_feedback(path: Path) -> None:
    with open_store(path) as store:
        for _ in store.decisions():
            pass


def configs(_place: Path) -> Sequence[bytes]:
    return [RunConfig(model="m", data="d", out="o").to_toml().encode()]


def checkpoint_files(place: Path) -> Sequence[bytes]:
    state: dict[str, JSON] = {"step": 1, "loss": "x", "best_step": None}
    path = save_checkpoint(place, 1, {"model": {"a": torch.ones(3), "b": torch.ones(2)}}, state)
    return [(path / name).read_bytes() for name in ("state.json", "model.safetensors")]


def read_checkpoint(place: Path, content: bytes) -> None:
    """Read a checkpoint of which a file was changed, and whose hashes are right all the same."""
    checkpoint_files(place)
    path = place / "step-000001"
    name = "state.json" if content.lstrip()[:1] in b"{[" else "model.safetensors"
    (path / name).write_bytes(content)
    write_manifest(path)
    load_checkpoint(path)


def model_configs(_place: Path) -> Sequence[bytes]:
    return [json.dumps(MODEL | {"model_type": name}).encode() for name in ARCHITECTURES]


def model_folder(place: Path) -> Path:
    folder = place / "model"
    if not folder.exists():
        folder.mkdir()
        save_model(init_model(parse_config(MODEL), seed=0), folder)
        byte_tokenizer().save(folder)
    return folder


def files_of_model(*names: str) -> Callable[[Path], Sequence[bytes]]:
    return lambda place: [(model_folder(place) / name).read_bytes() for name in names]


def read_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path.parent)
    tokenizer.decode(tokenizer.encode("hello wörld <|im_end|>"))


def indexes(place: Path) -> Sequence[bytes]:
    (model_folder(place) / "model.safetensors").unlink(missing_ok=True)
    return [json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}}).encode()]


def adapters(_place: Path) -> Sequence[bytes]:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    return [json.dumps(config | {"bias": "none", "base_model_name_or_path": "b"}).encode()]


def metrics(_place: Path) -> Sequence[bytes]:
    return [json.dumps({"step": 1, "loss": 0.7, "grad_norm": None}).encode() + b"\n"]


def templates(_place: Path) -> Sequence[bytes]:
    return [template.encode() for template in TEMPLATES]


def render(_place: Path, content: bytes) -> None:
    source = content.decode(errors="replace")
    ChatTemplate(source, name="template", variables={"bos_token": "<s>"}).render(MESSAGES)


def render_here(_place: Path, content: bytes) -> None:
    """Do what the process of a template does; a small change makes no bomb of a template."""
    lines = [content.decode(errors="replace"), {"messages": MESSAGES, "bos_token": "<s>"}]
    answer_all(io.StringIO("".join(json.dumps(line) + "\n" for line in lines)), io.StringIO())


READERS: Mapping[str, Reader] = {
    "pairs.jsonl": Reader(rows_as_json, file_reader("a.jsonl", load_pairs), share=4),
    "pairs.json": Reader(
        lambda place: [b"[" + b",".join(rows_as_json(place)[:1]) + b"]"],
        file_reader("a.json", load_pairs),
        share=2,
    ),
    "pairs.jsonl.gz": Reader(
        lambda place: [gzip.compress(row) for row in rows_as_json(place)],
        file_reader("a.jsonl.gz", load_pairs),
        is_json=False,
    ),
    "pairs.parquet": Reader(
        rows_as_parquet, file_reader("a.parquet", load_pairs), share=0.5, is_json=False
    ),
    "feedback": Reader(feedback, file_reader("a.jsonl", read_feedback), share=2),
    "config.toml": Reader(
        configs, file_reader("a.toml", lambda path: resolve(read_settings(path))), is_json=False
    ),
    "checkpoint": Reader(checkpoint_files, read_checkpoint),
    "metrics.jsonl": Reader(
        metrics, file_reader("metrics.jsonl", lambda path: read_metrics(path.parent))
    ),
    "config.json": Reader(
        model_configs,
        file_reader("config.json", lambda path: read_config(path.parent)),
        share=4,
    ),
    "model.safetensors": Reader(
        files_of_model("model.safetensors"),
        file_reader("model/model.safetensors", lambda path: load_model(path.parent)),
        share=0.3,
        is_json=False,
    ),
    "index": Reader(
        indexes,
        file_reader("model/model.safetensors.index.json", lambda path: load_model(path.parent)),
        share=0.3,
    ),
    "tokenizer.json": Reader(
        files_of_model("tokenizer.json"), file_reader("model/tokenizer.json", read_tokenizer)
    ),
    "tokenizer_config.json": Reader(
        files_of_model("tokenizer_config.json"),
        file_reader("model/tokenizer_config.json", read_tokenizer),
        share=0.5,
    ),
    "adapter_config.json": Reader(
        adapters, file_reader("adapter_config.json", lambda path: read_adapter(path.parent))
    ),
    "template, in this process": Reader(templates, render_here, is_json=False),
    "template": Reader(templates, render, share=0.02, is_json=False),
}


class Mutation:
    """Makes hostile inputs out of sound ones."""

    def __init__(self, seed: int) -> None:
        self.choice = random.Random(seed)

    def of(self, content: bytes, *, is_json: bool) -> bytes:
        """Change values of a text of JSON, or bytes, one to four times."""
        for _ in range(self.choice.choice((1, 1, 1, 2, 3))):
            if is_json and self.choice.random() < 0.6:
                try:
                    content = json.dumps(self._in_value(json.loads(content))).encode()
                    continue
                except (ValueError, RecursionError):
                    pass  # it is no JSON any more
            content = self._in_bytes(content)
        return content

    def _in_value(self, value: Any) -> Any:
        """Replace, remove, double or add something at a random depth."""
        at_once = self.choice.random() < 0.08 or not value
        if isinstance(value, dict) and not at_once:
            key = self.choice.choice([*value])
            change = self.choice.random()
            if change < 0.1:
                return {name: item for name, item in value.items() if name != key}
            if change < 0.2:
                return value | {key + "x": value[key]}
            return value | {key: self._in_value(value[key])}
        if isinstance(value, list) and not at_once:
            index = self.choice.randrange(len(value))
            change = self.choice.random()
            if change < 0.1:
                return value[:index] + value[index + 1 :]
            if change < 0.2:
                return [*value, value[index]]
            return [*value[:index], self._in_value(value[index]), *value[index + 1 :]]
        return self.choice.choice(HOSTILE_VALUES)

    def _in_bytes(self, content: bytes) -> bytes:
        """Flip, insert, remove or repeat bytes."""
        begin = self.choice.randrange(len(content) + 1)
        end = min(len(content), begin + int(2 ** self.choice.uniform(0, 8)))
        middle = self.choice.choice(
            (
                self.choice.choice(HOSTILE_BYTES),
                bytes([self.choice.randrange(256)]),
                content[begin:end] * 2,
                b"",
                self.choice.choice(HOSTILE_BYTES) + content[begin:end],
            )
        )
        return content[:begin] + middle + content[end:]


@dataclass
class Tally:
    """What became of the inputs of one reader."""

    read: int = 0
    refused: int = 0
    slowest_seconds: float = 0.0
    escaped: list[str] = field(default_factory=list)


def fuzz(name: str, inputs: int, seed: int, place: Path) -> Tally:
    """Give a reader so many inputs."""
    reader, tally, mutation = READERS[name], Tally(), Mutation(seed)
    seeds = reader.seeds(place)
    for _ in range(inputs):
        content = mutation.of(mutation.choice.choice(seeds), is_json=reader.is_json)
        begun = time.process_time()
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=sys.stdout)
        try:
            reader.read(place, content)
            tally.read += 1
        except (InputError, RunError):
            tally.refused += 1
        except BaseException as error:  # a panic of Rust is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            tally.escaped.append(f"{type(error).__name__}: {error} of {content[:300]!r}"[:600])
        seconds = time.process_time() - begun
        tally.slowest_seconds = max(tally.slowest_seconds, round(seconds, 3))
        if seconds > MOST_SECONDS:
            tally.escaped.append(f"{seconds:.1f} s for {content[:300]!r}"[:600])
    faulthandler.cancel_dump_traceback_later()
    return tally


def main() -> int:
    """Divide the inputs over the readers."""
    parser = argparse.ArgumentParser(description="Read hostile input; see the file's first lines")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, help="one of them alone")
    given = parser.parse_args()
    names = [given.reader] if given.reader else [*READERS]
    shares = sum(READERS[name].share for name in names)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where Rust writes of its panics
    tallies = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in names:
        count = max(1, round(given.inputs * READERS[name].share / shares))
        with tempfile.TemporaryDirectory() as folder:
            tallies[name] = fuzz(name, count, given.seed, Path(folder))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    escaped = sum(len(tally.escaped) for tally in tallies.values())
    told = {
        "seed": given.seed,
        "inputs": sum(
            tally.read + tally.refused + len(tally.escaped) for tally in tallies.values()
        ),
        "escaped": escaped,
        "grown_mib": grown // 2**20,
        "readers": {name: vars(tally) for name, tally in tallies.items()},
    }
    sys.stdout.write(json.dumps(told) + "\n")
    return int(escaped > 0 or grown > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())
