"""Ways to log-probs that ``bench/test_kernels.py`` times."""

import pytest
import torch

from dpo.bench.heads import HEADS, head_memory, head_problem

EXACT = [name for name in HEADS if name != "bare-products"]


@pytest.mark.parametrize("name", EXACT)
def test_heads_are_the_same_function(name: str) -> None:
    results = []
    for each in ("naive", name):
        hidden, weight, targets = head_problem(40, 16, 50, torch.float64)
        log_probs = HEADS[each](hidden, weight, targets)
        (log_probs * torch.arange(40)).sum().backward()  # each answer has a factor of its own
        results.append((log_probs.detach().double(), hidden.grad, weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_memory_of_the_naive_head_is_that_of_the_logits() -> None:
    logits = 4 * 512 * 32768
    found = head_memory(HEADS["naive"], 512, 64, 32768)
    assert 2 * logits < found < 4 * logits


def test_memory_of_the_head_does_not_grow_with_the_vocabulary() -> None:
    small, large = (head_memory(HEADS["tiled"], 2048, 64, size) for size in (8192, 65536))
    assert large < 1.05 * small
    assert large < 4 * 2048 * 65536 / 20  # of the logits


def test_memory_of_the_head_grows_with_the_tokens_alone() -> None:
    few, many = (head_memory(HEADS["tiled"], tokens, 64, 16384) for tokens in (1024, 2048))
    assert (many - few) / 1024 < 4 * 16384 / 50  # bytes: a fiftieth of a token's logits
