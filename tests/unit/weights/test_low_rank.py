"""Thin factors: exact where the rank suffices, nearly the best where it does not, and the same each time."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.weights import low_rank  # noqa: E402 (torch may be absent)
from chaccu.weights.low_rank import factorize, squared_singular_values  # noqa: E402


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (700, 600), (600, 1500)])
def test_a_product_of_that_rank_is_found_again(shape: tuple[int, int]) -> None:
    matrix = draw(shape[0], 5) @ draw(5, shape[1], seed=1)
    low, high = factorize(matrix, 5)
    assert (low.shape, high.shape) == ((5, shape[1]), (shape[0], 5))
    torch.testing.assert_close(high @ low, matrix, rtol=1e-3, atol=1e-3)


def test_random_projection_keeps_nearly_what_the_best_product_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # As flat a spectrum as there is: the hardest case.
    matrix = draw(300, 200)
    best = squared_singular_values(matrix)
    monkeypatch.setattr(low_rank, "_EXACT_SIDE", 0)
    low, high = factorize(matrix, 20)
    left = ((matrix - high @ low) ** 2).sum()
    assert float(best[20:].sum()) <= float(left) < 1.02 * float(best[20:].sum())
    again = factorize(matrix, 20)
    assert torch.equal(low, again[0])
    assert torch.equal(high, again[1])


def test_a_rank_above_a_side_is_filled_with_zeros() -> None:
    matrix = draw(3, 8)
    low, high = factorize(matrix, 5)
    assert (low.shape, high.shape) == ((5, 8), (3, 5))
    torch.testing.assert_close(high @ low, matrix, rtol=1e-4, atol=1e-5)
    assert not low[3:].any()


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_squared_singular_values_are_those_of_the_decomposition(shape: tuple[int, int]) -> None:
    matrix = draw(*shape)
    torch.testing.assert_close(squared_singular_values(matrix).float(), torch.linalg.svdvals(matrix) ** 2, rtol=1e-4, atol=1e-4)
