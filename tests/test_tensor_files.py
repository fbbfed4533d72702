from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo.tensor_files import read_tensors, write_tensors


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and every bit agree."""
    return left.keys() == right.keys() and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.flatten().contiguous().view(torch.uint8), b.flatten().contiguous().view(torch.uint8)
        )
        for a, b in ((left[name], right[name]) for name in left)
    )


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text("abc._/", min_size=1, max_size=5),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    )
)
def test_tensors_are_read_bit_for_bit_as_written(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    tensors = {name: (torch.randn(shape) * 9).to(dtype) for name, (dtype, shape) in shapes.items()}
    write_tensors(path, tensors)
    assert same(read_tensors(path), tensors)


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    weight = torch.randn(1000, 10)
    write_tensors(tmp_path / "a", {"embed": weight, "other": torch.ones(1), "head": weight})

    found = read_tensors(tmp_path / "a")

    assert (tmp_path / "a").stat().st_size < 1.1 * weight.nbytes
    assert found["embed"] is found["head"]
    assert torch.equal(found["head"], weight)


def test_views_of_one_memory_keep_their_values(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"rows": whole[1:], "first": whole[:2], "whole": whole, "column": whole[:, 1]}
    write_tensors(tmp_path / "a", tensors)
    assert same(read_tensors(tmp_path / "a"), tensors)


def test_file_has_the_usual_permissions(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"a": torch.ones(2)})
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_full_disk_is_an_os_error_that_names_the_file(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    with full_disk(1000), pytest.raises(OSError, match=r"a: .*File too large"):
        write_tensors(tmp_path / "a", {"a": torch.ones(1000)})
