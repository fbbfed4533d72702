"""Saves models in parts, reads them, and tells what each rank wrote and what its host held.

Usage: python -m tests.ranks.shares COUNT FOLDER CASES, with CASES in JSON: options of ``Case`` by
name. Prints ``Found`` by case; bytes are by rank. Linux only: the peak of a process is reset. What
is freed is seen if the allocator gives it back, with MALLOC_MMAP_THRESHOLD_ in the environment.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpo.checkpoint import load_checkpoint, save_checkpoint
from dpo.ranks import Ranks
from dpo.trainer import Trainer
from tests.ranks.equality import Case, forked, kind_of, make_trainer

Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Found:
    """What was seen of a case.

    Attributes:
        state: bytes of all that was saved.
        largest: of its tensors.
        written: by each rank.
        held_writing: by each rank beside what it had before, at the peak.
        held_reading: the same beside what it had afterwards.
        files: of the checkpoint.
        is_whole: a process that is alone reads what ranks together put together, bit for bit.
        is_same: ranks that go on have what those before had, bit for bit.
        is_divided_again: so have ranks that go on from one process.
    """

    state: int
    largest: int
    written: list[int]
    held_writing: list[int]
    held_reading: list[int]
    files: list[str]
    is_whole: bool
    is_same: bool
    is_divided_again: bool


def memory(kind: str) -> int:
    """Return the bytes of this process, VmRSS, or their peak, VmHWM."""
    found = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def peak() -> Iterator[dict[str, int]]:
    """Tell the peak of this process within, and what it had before and afterwards."""
    Path("/proc/self/clear_refs").write_text("5")
    found = {"before": memory("VmRSS")}
    yield found
    found |= {"peak": memory("VmHWM"), "after": memory("VmRSS")}


@contextmanager
def no_exchange_of_tensors() -> Iterator[None]:
    """Refuse what would send a part of the state: texts of the files are smaller than that."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor is exchanged")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("gather", "broadcast", "all_gather_into_tensor"):
            patch.setattr(dist, name, refused)
        patch.setattr(DTensor, "full_tensor", refused)
        patch.setattr(DTensor, "redistribute", refused)
        yield


def put_together(tensors: Tensors, ranks: Ranks) -> Tensors:
    return {
        stem: {name: ranks.whole(t, name.partition("/")[0]).clone() for name, t in named.items()}
        for stem, named in tensors.items()
    }


def are_equal(found: Tensors, expected: Tensors, ranks: Ranks) -> bool:
    """Say whether what this rank holds of two states is the same."""
    return found.keys() == expected.keys() and all(
        found[stem].keys() == named.keys()
        and all(
            torch.equal(
                ranks.piece(found[stem][name], name.partition("/")[0]).part,
                ranks.piece(tensor, name.partition("/")[0]).part,
            )
            for name, tensor in named.items()
        )
        for stem, named in expected.items()
    )


def restore(trainer: Trainer, path: Path, ranks: Ranks) -> Trainer:
    checkpoint = load_checkpoint(path, ranks)
    trainer.restore(checkpoint.tensors, checkpoint.state)
    return trainer


def look_at(case: Case, folder: Path, joined: Ranks) -> Found:
    ranks = kind_of(case, joined)
    trainer = make_trainer(case, ranks)
    trainer.train_step()
    whole = put_together(trainer.tensors(), ranks)
    with peak() as writing, no_exchange_of_tensors():
        path = save_checkpoint(folder / "parts", 1, trainer.tensors(), trainer.state(), ranks)
    ranks.wait()
    fresh = make_trainer(case, ranks)
    with peak() as reading, no_exchange_of_tensors():
        restore(fresh, path, ranks)
    if ranks.is_first:
        save_checkpoint(folder / "alone", 1, whole, trainer.state())
    ranks.wait()
    again = restore(make_trainer(case, ranks), folder / "alone/step-000001", ranks)
    alone = load_checkpoint(path).tensors if ranks.is_first else whole
    held = [tensor for named in whole.values() for tensor in named.values()]
    suffix = f"-{ranks.process + 1:05}-of-"
    own = [file for file in path.glob("*.safetensors") if suffix in file.name]
    plain = [file for file in path.glob("*.safetensors") if "-of-" not in file.name]
    told = ranks.texts(
        json.dumps(
            {
                "written": sum(f.stat().st_size for f in own + (plain if ranks.is_first else [])),
                "held_writing": writing["peak"] - writing["before"],
                "held_reading": reading["peak"] - reading["after"],
                "is_same": are_equal(fresh.tensors(), trainer.tensors(), ranks),
                "is_divided_again": are_equal(again.tensors(), trainer.tensors(), ranks),
            }
        )
    )
    of_ranks = [json.loads(text) for text in told]
    return Found(
        state=sum(tensor.nbytes for tensor in held),
        largest=max(tensor.nbytes for tensor in held),
        written=[each["written"] for each in of_ranks],
        held_writing=[each["held_writing"] for each in of_ranks],
        held_reading=[each["held_reading"] for each in of_ranks],
        files=sorted(file.name for file in path.iterdir()),
        is_whole=are_equal(alone, whole, Ranks()),
        is_same=all(each["is_same"] for each in of_ranks),
        is_divided_again=all(each["is_divided_again"] for each in of_ranks),
    )


def main() -> None:
    count, folder, cases = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])

    def work(ranks: Ranks) -> None:
        found = {
            name: asdict(look_at(Case(**options), folder / name, ranks))
            for name, options in cases.items()
        }
        if ranks.is_first:
            print(json.dumps(found))

    torch.set_num_threads(1)
    sys.exit(max(forked(count, "cpu", work)))


if __name__ == "__main__":
    main()
