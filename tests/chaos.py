"""Break runs of ``dpo train`` at random, and see that they end in the same files.

    python tests/chaos.py --faults 50 --seed 0

A case is one run, broken one to three times in a row and then left in peace. Every broken start
must end as its kind of fault allows, with one message and no traceback; the last one must end in
the very bytes of a run that nothing broke, and leave nothing under a temporary name. Prints a line
of JSON; the exit code is 1 if anything was lost. To add a fault, add a line to ``FAULTS``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch._dynamo  # a forked run is not to spend its time on imports
from torch.nn.modules.module import register_module_forward_pre_hook

import dpo.reference
import dpo.run
from dpo.cli import main as command_line
from dpo.files import write_json
from dpo.models import init_model, parse_config, save_model
from dpo.tokenizer import byte_tokenizer

PLACES = ("RUN/checkpoints", "RUN/model", "RUN", "reference", "tokens")  # parts of paths
OPTIONS = (
    "--threads 1 --device cpu --batch-size 4 --steps 5 --save-every 1 --keep 2 --eval-split 0.25 "
    "--eval-every 2 --keep-best --learning-rate 0.01 --micro-batch-size 2"
)
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
LONG_AGO = 7 * 86_400.0  # seconds: what is as old as that under a temporary name has no writer


@dataclass(frozen=True)
class Fault:
    """A way to break a run.

    Attributes:
        strike: is called within a run at a random event of the file system; None: nothing is.
        exits: exit codes that a start so broken may have; negative ones are signals.
        spoil: is called with a file of the run or a cache before the start.
        is_timed: the parent kills the run after a random time.
    """

    exits: frozenset[int]
    strike: Callable[[random.Random], None] | None = None
    spoil: Callable[[Path, random.Random], None] | None = None
    is_timed: bool = False


def kill(_random: random.Random) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(choice: random.Random) -> None:
    os.kill(os.getpid(), choice.choice(STOPS))


def kill_in_a_write(choice: random.Random) -> None:
    """Let the kernel end the process in the middle of a write, when a file passes a size."""
    fill_disk(choice)  # of whose signal ``Watch.call`` has taken Python's own handling away


def fill_disk(choice: random.Random) -> None:
    """Let no file grow beyond a size, as on a full disk; Python turns the signal into an error."""
    size = int(2 ** choice.uniform(0, 16))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def set_clock(choice: random.Random) -> None:
    """Let the wall clock jump by up to a year, back or forth."""
    clock, jump = time.time, choice.choice((-1, 1)) * 10 ** choice.uniform(0, 7.5)
    time.time = lambda: clock() + jump


def fill_memory(_random: random.Random) -> None:
    """Let no further forward pass find memory, however small."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    register_module_forward_pre_hook(fail)


def flip_bit(path: Path, choice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
    path.write_bytes(content)


def cut(path: Path, choice: random.Random) -> None:
    os.truncate(path, choice.randrange(path.stat().st_size))


_ENDED = frozenset({0, 1})  # it does not matter any more, or it does, and the run says so
_STOPPED = frozenset({0, *(128 + number for number in STOPS), *(-number for number in STOPS)})
FAULTS: Mapping[str, Fault] = {
    "kill at an event": Fault(frozenset({-signal.SIGKILL}), strike=kill),
    "kill in a write": Fault(frozenset({0, -signal.SIGXFSZ}), strike=kill_in_a_write),
    "kill at a time": Fault(frozenset({0, -signal.SIGKILL}), is_timed=True),
    "full disk": Fault(_ENDED, strike=fill_disk),
    "stop signal": Fault(_STOPPED, strike=stop),
    "clock": Fault(frozenset({0}), strike=set_clock),
    "memory": Fault(_ENDED, strike=fill_memory),
    "flipped bit": Fault(frozenset({0, 1, 2}), spoil=flip_bit),
    "truncation": Fault(frozenset({0, 1, 2}), spoil=cut),
}


class Lost(AssertionError):
    """A run that a fault broke did not end as it should."""


@dataclass
class Tally:
    """What has been tried.

    Attributes:
        struck: how often each kind of fault has struck.
        places: how often something struck while the run was at work on each part of its files.
        cases: runs that were broken and ended in the same files.
        refused: starts that refused to go on, with one message.
    """

    struck: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    cases: int = 0
    refused: int = 0


class Chaos:
    """A run that is broken again and again, in a folder of its own."""

    def __init__(self, place: Path, seed: int, more: str = "") -> None:
        self.place, self.run, self.cache = place, place / "RUN", place / "cache"
        self.choice = random.Random(seed)
        self.tally = Tally()
        self.events: Mapping[str, int] = {}
        self.seconds = 0.0
        os.environ["XDG_CACHE_HOME"] = str(self.cache)
        self.arguments = (
            f"--model {place / 'base'} --data {place / 'pairs.jsonl'} {OPTIONS} {more}".split()
        )
        make_inputs(place)
        begun = time.monotonic()
        code, said, _ = self.start(count_events=True)
        self.seconds = time.monotonic() - begun
        if code != 0:
            raise Lost(said)
        self.events = json.loads((place / "events.json").read_text())
        self.unbroken = self.result()

    def case(self) -> None:
        """Break a new run up to three times, and see that it ends as one that nothing broke."""
        for folder in (self.run, self.cache):
            shutil.rmtree(folder)
        for _ in range(self.choice.randint(1, 3)):
            self.break_once(self.choice.choice([*FAULTS]))
        for rubbish in self.rubbish():  # its writer is dead, though caches wait to be sure of it
            for path in (rubbish, *rubbish.rglob("*")):
                os.utime(path, (0, time.time() - LONG_AGO))
        code, said, _ = self.start()
        if code != 0:
            self.check("being left in peace", frozenset({1, 2}), code, said)
            shutil.rmtree(self.run)
            code, said, _ = self.start()
        if code != 0 or self.rubbish() or self.result() != self.unbroken:
            changed = [
                name for name, value in self.result().items() if value != self.unbroken[name]
            ]
            raise Lost(f"exit {code}, changed {changed}, left {self.rubbish()}:\n{said}")
        self.tally.cases += 1

    def break_once(self, kind: str) -> None:
        """Start or resume the run under a fault, and see that it ends as such a one may."""
        fault, before = FAULTS[kind], self.rubbish()
        if fault.spoil is not None and not self.spoil(fault.spoil):
            return
        code, said, has_struck = self.start(fault)
        has_struck |= fault.spoil is not None
        self.tally.struck[kind] += has_struck
        self.check(kind, fault.exits if has_struck else frozenset({0}), code, said)
        if code >= 0 and (left := self.rubbish() - before):
            raise Lost(f"{kind} left {left}:\n{said}")

    def spoil(self, spoil: Callable[[Path, random.Random], None]) -> bool:
        """Spoil a file of a checkpoint or a cache; say whether there was one."""
        found = [*self.run.glob("checkpoints/step-??????/*"), *self.cache.glob("dpo-engine/*/*/*")]
        files = [path for path in sorted(found) if path.is_file() and path.stat().st_size]
        if files:
            path = self.choice.choice(files)
            spoil(path, self.choice)
            self.tally.places[place_of(path)] += 1
        return bool(files)

    def check(self, kind: str, exits: frozenset[int], code: int, said: str) -> None:
        messages = said.count("Error: ")
        if code not in exits or "Traceback" in said or messages != (code in (1, 2)):
            raise Lost(f"{kind}: exit {code} with {messages} messages:\n{said}")
        self.tally.refused += messages

    def start(
        self, fault: Fault | None = None, *, count_events: bool = False
    ) -> tuple[int, str, bool]:
        """Begin or resume the run in a process of its own, which ``fault`` breaks.

        Returns:
            The exit code, what was said, and whether the fault has struck.
        """
        place = self.choice.choice(PLACES)
        instant = self.choice.randrange(self.events[place]) if fault else 0
        (heard, saying), (told, telling) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(saying, 2)
            strike = fault.strike if fault else None
            watch = Watch(str(self.place), strike, place, instant, self.choice, telling)
            code = watch.call(self.command())
            if count_events:
                write_json(self.place / "events.json", watch.events)
            sys.stderr.flush()
            os._exit(code)
        for descriptor in (saying, telling):
            os.close(descriptor)
        seconds = self.choice.uniform(0, self.seconds)
        timer = threading.Timer(seconds, lambda: os.kill(child, signal.SIGKILL))
        if fault is not None and fault.is_timed:
            timer.start()
        with os.fdopen(heard, encoding="utf-8", errors="replace") as stream:
            said = stream.read()
        with os.fdopen(told, "rb") as stream_of_strikes:
            has_struck = bool(stream_of_strikes.read())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        timer.cancel()
        if has_struck:
            self.tally.places[place] += 1
        return code, said, has_struck or code == -signal.SIGKILL

    def command(self) -> list[str]:
        """Return the arguments of ``dpo``: either way of going on, if there is something."""
        if (self.run / "config.toml").exists() and self.choice.random() < 0.5:
            return ["resume", str(self.run)]
        return ["train", *self.arguments, "--out", str(self.run), "--resume", "auto"]

    def result(self) -> Mapping[str, object]:
        """Return what must be the same after whatever happened."""
        text = (self.run / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        names = ("config.toml", "data.json", "eval_pairs.jsonl")
        files = [self.run / name for name in names if (self.run / name).exists()]
        files += sorted((self.run / "model").iterdir())
        return {
            "losses": [(line["step"], line.get("loss"), line.get("eval/loss")) for line in lines],
            **{path.name: path.read_bytes() for path in files},
        }

    def rubbish(self) -> set[Path]:
        """Return what lies under a temporary name."""
        found = [*self.run.rglob("*"), *self.cache.rglob("*")]
        return {path for path in found if ".tmp-" in path.name or path.name.endswith(".old")}


def place_of(about: object) -> str:
    """Return which of ``PLACES`` a path or what is asked about it belongs to; "" for none."""
    return next((place for place in PLACES if f"/{place}" in str(about)), "")


@dataclass
class Watch:
    """Strikes within a run, at the n-th thing that it asks of the system in one of its places.

    Attributes:
        root: folder of everything.
        strike: what to do; None: only count.
        place: one of ``PLACES``.
        instant: which of its events is meant, from 0.
        choice: makes the strike's own choices.
        telling: a descriptor to which is written that it has struck.
        events: how many there were in each place.
    """

    root: str
    strike: Callable[[random.Random], None] | None
    place: str
    instant: int
    choice: random.Random
    telling: int
    events: Counter[str] = field(default_factory=Counter)

    def call(self, arguments: list[str]) -> int:
        """Run a command, and return its exit code."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        dpo.reference.FLUSH_TOKENS = 64  # several shards, though there are few pairs
        os.fsync = lambda fd: None  # a killed process needs no disk
        if self.strike is kill_in_a_write:  # which may strike in a thread, where it cannot be set
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        sys.addaudithook(self.hear)
        try:
            command_line(arguments)
        except SystemExit as end:
            return int(end.code or 0)
        except BaseException:  # a defect: the parent finds the traceback
            traceback.print_exc()
        return 70

    def hear(self, event: str, about: object) -> None:
        """Count an event, and strike if it is the one."""
        if event.partition(".")[0] not in ("open", "os", "shutil") or self.root not in str(about):
            return
        place = place_of(about)
        self.events[place] += 1
        is_here = place == self.place and self.events[place] == self.instant + 1
        if is_here and self.strike is not None:
            os.write(self.telling, b"!")
            self.strike(self.choice)


def make_inputs(place: Path) -> None:
    """Write a tiny model and pairs."""
    tokenizer = byte_tokenizer()
    config = {
        "model_type": "llama", "vocab_size": tokenizer.vocab_size, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    (place / "base").mkdir()
    save_model(init_model(parse_config(config), seed=0), place / "base")
    tokenizer.save(place / "base")
    rows = [{"prompt": f"say {n}", "chosen": f" yes {n % 5}", "rejected": " no"} for n in range(16)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> int:
    """Break runs until as many faults have struck as were asked for."""
    parser = argparse.ArgumentParser(description="Break runs at random; see the file's first lines")
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", default="", help="further options of the runs")
    given = parser.parse_args()
    for number in STOPS:  # which are heeded only by those whose callers do not ignore them
        signal.signal(number, signal.SIG_DFL)
    begun, lost = time.monotonic(), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder), given.seed, given.more)
        tally = chaos.tally
        while tally.struck.total() < given.faults and not lost:
            try:
                chaos.case()
            except Lost as error:
                lost.append(str(error))
    told = {
        "seed": given.seed,
        "faults": tally.struck.total(),
        "kinds": tally.struck,
        "places": tally.places,
        "runs": tally.cases,
        "refused": tally.refused,
        "lost": lost,
        "seconds": round(time.monotonic() - begun),
    }
    sys.stdout.write(json.dumps(told) + "\n")
    return len(lost)


if __name__ == "__main__":
    sys.exit(main())
