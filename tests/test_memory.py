"""Peak memory against allocations of a known size, in processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from elastune.errors import BadRecipe
from elastune.memory import peak_memory


def prepare_allocation(held_mb: int, used_mb: int) -> Callable[[], None]:
    """Hold some memory, and return work that needs more for a moment."""
    held = torch.ones(held_mb, 2**18)
    loading = torch.ones(2 * used_mb, 2**18)  # a peak before the work, which is not the work's
    del loading

    def work() -> None:
        sys.stdout.write("what the work prints is not its answer")
        torch.ones(used_mb, 2**18).sum()
        held.sum()

    return work


def prepare_failure() -> Callable[[], None]:
    raise ValueError("no such cake")


def test_the_peak_is_what_the_work_allocates_above_what_was_there() -> None:
    found = peak_memory("test_memory:prepare_allocation", {"held_mb": 64, "used_mb": 200})
    assert found.device == "cpu"
    assert found.peak_mb - found.start_mb == pytest.approx(200, abs=20)
    assert found.start_mb > 64 + 50  # with the interpreter and torch


def test_work_that_fails_is_reported_with_its_last_words() -> None:
    with pytest.raises(BadRecipe, match=r"prepare_failure failed .*no such cake"):
        peak_memory("test_memory:prepare_failure")
    with pytest.raises(BadRecipe, match="module:function"):
        peak_memory("test_memory.prepare_failure")


def test_work_that_takes_too_long_is_ended() -> None:
    with pytest.raises(BadRecipe, match=r"did not end within 0\.5 s"):
        peak_memory("test_memory:prepare_failure", timeout_s=0.5)
