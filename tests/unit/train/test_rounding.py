"""Stochastic rounding is right in expectation, and what is not a number stays one."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train.rounding import BLOCK, decode_blocks, encode_blocks, round_stochastically  # noqa: E402 (torch may be absent)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_bfloat16_is_one_of_both_neighbours_as_often_as_the_value_is_close() -> None:
    step = 2.0**-7
    for share in (0.0, 0.1, 0.5, 0.9):
        values = torch.full((20_000,), 1.0 + share * step)
        rounded = round_stochastically(values, torch.bfloat16, generator()).float()
        assert set(rounded.tolist()) <= {1.0, 1.0 + step}
        # The share of a coin's heads in 20,000 throws: five standard deviations are 0.018.
        assert (rounded > 1.0).float().mean().item() == pytest.approx(share, abs=0.018)


def test_what_bfloat16_holds_is_kept_and_other_dtypes_are_converted() -> None:
    values = torch.randn(1000, generator=generator())
    held = values.bfloat16().float()
    assert torch.equal(round_stochastically(held, torch.bfloat16, generator(1)).float(), held)
    assert round_stochastically(values, torch.float32, generator()) is values
    assert torch.equal(round_stochastically(values, torch.float16, generator()), values.half())


def test_what_is_not_finite_stays_so() -> None:
    # A NaN of all ones is what GPUs make: a carry out of its bits would turn it into -0.
    nan = torch.full((100,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert round_stochastically(nan, torch.bfloat16, generator()).isnan().all()
    assert round_stochastically(torch.full((100,), float("-inf")), torch.bfloat16, generator()).eq(float("-inf")).all()


@pytest.mark.parametrize(("top", "power"), [(127, 4), (255, 2)])
def test_codes_are_right_in_expectation_and_within_a_gap(top: int, power: int) -> None:
    values = torch.randn(3 * BLOCK + 17, generator=generator()) ** 3
    decoded = torch.stack(
        [decode_blocks(*encode_blocks(values, top, power, generator(seed)), top, power) for seed in range(400)]
    )
    largest = encode_blocks(values, top, power, generator())[1].repeat_interleave(BLOCK)[: len(values)]
    code = (top * (values.abs() / largest) ** (1 / power)).floor().clamp_max(top - 1)
    gap = largest * ((code + 1) ** power - code**power) / top**power
    assert ((decoded - values).abs() <= gap * 1.001).all()
    # A coin between both ends of the gap: at most half of it is one standard deviation, and the mean of 400 has a twentieth.
    assert ((decoded.mean(dim=0) - values).abs() <= 5 * gap / 2 / 20).all()
    assert (decoded.sign() * values.sign() >= 0).all()
