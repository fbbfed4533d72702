from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from dpo.files import sha256_file
from dpo.ranks import Place
from dpo.tensor_files import StoredTensors, read_tensors, write_tensors


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


def test_file_is_that_of_the_library_byte_for_byte(tmp_path: Path) -> None:
    kinds = [*DTYPES, torch.bool, torch.int32, torch.int16, torch.int8, torch.float8_e5m2]
    tensors = {
        f"{number}ä": torch.arange(24, dtype=torch.uint8).view(kind)[:3].clone()
        for number, kind in enumerate(kinds)
    } | {"scalar": torch.tensor(2.0), "b": torch.zeros(0, 3), "rows": torch.eye(3)[1:]}
    entry = write_tensors(tmp_path / "a", tensors)
    save_file(tensors, tmp_path / "b", {"format": "pt"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert entry == {
        "sha256": sha256_file(tmp_path / "a"), "bytes": (tmp_path / "a").stat().st_size,
    }  # fmt: skip


CUTS = st.lists(st.integers(0, 7), max_size=3).map(lambda cuts: sorted({0, 7, *cuts}))


@settings(max_examples=30, deadline=None)
@given(CUTS, CUTS, st.lists(st.integers(0, 7), min_size=4, max_size=4))
def test_any_part_of_a_tensor_is_read_from_pieces_of_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int], columns: list[int], ends: list[int]
) -> None:
    folder, whole = tmp_path_factory.mktemp("pieces"), torch.arange(49.0).view(7, 7)
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            place = Place((top, left), (7, 7))
            part = {"a": whole[top:bottom, left:right], "b": torch.tensor(top + left)}
            write_tensors(folder / f"{top}-{left}", part if top + left == 0 else {"a": part["a"]},
                          {"a": place})  # fmt: skip
    stored = StoredTensors(sorted(folder.iterdir()))
    (top, bottom), (left, right) = sorted(ends[:2]), sorted(ends[2:])
    found = stored.region("a", Place((top, left), (7, 7)), (bottom - top, right - left))
    assert torch.equal(found, whole[top:bottom, left:right])
    assert same(stored, {"a": whole, "b": torch.tensor(0)})


def test_pieces_that_make_no_tensor_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"a": torch.ones(2, 3)}, {"a": Place((1, 0), (4, 3))})
    write_tensors(tmp_path / "b", {"a": torch.ones(2, 3)}, {"a": Place((3, 0), (4, 3))})
    with pytest.raises(ValueError, match=r"a: the pieces of a make no tensor"):
        StoredTensors([tmp_path / "a"])
    with pytest.raises(ValueError, match=r"b: the piece of a lies outside of it"):
        StoredTensors([tmp_path / "b"])


def test_part_of_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"a": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"a is of shape \(2, 3\), expected \(4, 3\)"):
        StoredTensors([tmp_path / "a"]).region("a", Place((0, 0), (4, 3)), (2, 3))


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
    with full_disk(1000), pytest.raises(OSError, match=r"File too large: .*/a"):
        write_tensors(tmp_path / "a", {"a": torch.ones(1000)})
