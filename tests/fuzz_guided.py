"""Let coverage guide the inputs of the fuzzing program: needs ``pip install atheris`` (Linux).

    python tests/fuzz_guided.py config.json --runs 100000 --seed 0

Begins with the sound inputs of a reader of ``tests/fuzz.py`` and keeps each change that reaches
code which none before has reached. Ends at the first input that is neither read nor refused, with
its traceback; libFuzzer writes it to a file ``crash-...``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

atheris: Any = import_module("atheris")  # whose types are not all told

with atheris.instrument_imports(include=["dpo"]):
    from dpo.errors import InputError, RunError
    from tests.fuzz import READERS, Mutation


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz a reader; see the file's first lines")
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    reader = READERS[given.reader]

    def read(content: bytes) -> None:
        with suppress(InputError, RunError):
            reader.read(place, content)

    def change(content: bytes, most: int, seed: int) -> bytes:
        """Change values or bytes as the program does, or as libFuzzer does."""
        if seed % 2:
            mutated: bytes = atheris.Mutate(content, most)
            return mutated
        return Mutation(seed).of(content, is_json=reader.is_json)[:most]

    with tempfile.TemporaryDirectory() as folder:
        place, corpus = Path(folder) / "place", Path(folder) / "corpus"
        for path in (place, corpus):
            path.mkdir()
        for number, content in enumerate(reader.seeds(place)):
            (corpus / f"seed-{number}").write_bytes(content)
        options = [f"-runs={given.runs}", f"-seed={given.seed}", "-max_len=65536", "-timeout=60"]
        atheris.Setup([sys.argv[0], str(corpus), *options], read, custom_mutator=change)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
