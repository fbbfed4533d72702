"""Fixtures of the benchmarks, and the lines about work per second that they print at the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dpo.bench.machine import commit, cpu_model, peak_mib

LINES: pytest.StashKey[list[str]] = pytest.StashKey()
Measure = Callable[..., None]


@pytest.fixture
def measure(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Measure:
    """Time ``work`` after a warm-up, and report what it does per second and its memory.

    Keywords are amounts that one call of ``work`` processes; ``pairs=8`` reports pairs/s. The
    memory of work that ``is_elsewhere``, in another process, is not known.
    """

    def measure(
        work: Callable[[], object], *, rounds: int = 5, is_elsewhere: bool = False, **amounts: float
    ) -> None:
        memory = peak_mib(work)  # of the first call, which warms up
        benchmark.extra_info["peak_mib"] = None if is_elsewhere else memory
        # pytest-benchmark has no types
        benchmark.pedantic(work, rounds=rounds, warmup_rounds=0 if is_elsewhere else 1)  # type: ignore[no-untyped-call]
        assert benchmark.stats is not None
        seconds = float(benchmark.stats["median"])
        rates = {f"{name}_per_s": amount / seconds for name, amount in amounts.items()}
        benchmark.extra_info.update(rates)
        lines = request.config.stash.setdefault(LINES, [])
        memory = benchmark.extra_info["peak_mib"]
        cells = [f"{seconds * 1000:10.2f} ms"]
        cells += [f"{rate:12,.1f} {name.removesuffix('_per_s')}/s" for name, rate in rates.items()]
        cells += [] if memory is None else [f"{memory:8.1f} MiB above rest"]
        lines.append(f"{request.node.name:50}" + "  ".join(cells))

    return measure


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the lines, medians."""
    if lines := config.stash.get(LINES, []):
        terminalreporter.section(f"work per second, medians: {commit()}, {cpu_model()}")
        for line in lines:
            terminalreporter.write_line(line)
