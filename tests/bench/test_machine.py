"""What measurements say about the machine."""

from pathlib import Path

import numpy as np
import pytest

from dpo.bench.machine import commit, cpu_model, peak_mib


def test_machine_has_a_name() -> None:
    assert cpu_model()


def test_commit_is_one_word() -> None:
    found = commit()
    assert found is None or (found and " " not in found)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux forgets peaks")
def test_peak_is_that_of_the_work_alone() -> None:
    np.ones(200 * 2**17).sum()  # 200 MiB, before
    found = peak_mib(lambda: np.ones(100 * 2**17).sum())  # 100 MiB
    assert found == pytest.approx(100, abs=15)
