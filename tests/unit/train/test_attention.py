"""Packed attention: each conversation as if it were alone, whichever way the kernels are called."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train.attention import attends_at_once, pack_lengths, packed_attention  # noqa: E402 (torch may be absent)

LENGTHS = (5, 1, 9, 3)


def states(heads: int, groups: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, count, sum(LENGTHS), 16, generator=generator).to(device, dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]


def attend_plainly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """Softmax over what each token may see, written out."""
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(sum(LENGTHS))
    seen = (owner[:, None] == owner) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
    scores = (query @ key.transpose(2, 3)) * 0.3
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("groups", [4, 2])
def test_conversations_of_a_row_never_meet(groups: int, window: int | None) -> None:
    inputs = states(4, groups)
    packed = pack_lengths(LENGTHS, longest=9)
    ours, weights = packed_attention(None, *inputs, None, packed=packed, scaling=0.3, sliding_window=window)
    theirs = attend_plainly(*inputs, window)
    assert weights is None
    torch.testing.assert_close(ours, theirs)
    pull = torch.randn_like(theirs)
    for one, other in zip(torch.autograd.grad(ours, inputs, pull), torch.autograd.grad(theirs, inputs, pull), strict=True):
        torch.testing.assert_close(one, other)


def test_without_lengths_a_row_is_one_conversation() -> None:
    inputs = states(2, 2)
    packed = pack_lengths((sum(LENGTHS),), longest=sum(LENGTHS))
    alone, _ = packed_attention(None, *inputs, None, scaling=0.3)
    assert torch.equal(alone, packed_attention(None, *inputs, None, packed=packed, scaling=0.3)[0])


def test_starts_come_in_few_sizes() -> None:
    packed = pack_lengths(LENGTHS, longest=9)
    assert packed.starts_N.tolist() == [0, 5, 6, 15, *[18] * 12]
    assert len(pack_lengths([1] * 40, longest=9).starts_N) % len(packed.starts_N) == 0


def test_soft_caps_are_refused() -> None:
    with pytest.raises(ValueError, match="soft caps"):
        packed_attention(None, *states(2, 2), None, softcap=50.0)


def test_autocast_sets_the_dtype() -> None:
    query, key, value = states(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, _ = packed_attention(None, query, key, value.bfloat16(), None, scaling=0.3)
    assert ours.dtype == torch.bfloat16


def test_dropout_reaches_the_kernel() -> None:
    inputs = states(2, 2)
    dropped, _ = packed_attention(None, *inputs, None, scaling=0.3, dropout=0.5)
    assert not torch.allclose(dropped, packed_attention(None, *inputs, None, scaling=0.3)[0])
    assert not attends_at_once(torch.device("cpu"), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("groups", [4, 2])
def test_the_gpu_s_kernels_agree(groups: int, window: int | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    inputs = states(4, groups, "cuda", torch.bfloat16)
    packed = pack_lengths(LENGTHS, longest=9)
    packed = packed._replace(lengths=(), starts_N=packed.starts_N.cuda())
    ours, _ = packed_attention(None, *inputs, None, packed=packed, scaling=0.3, sliding_window=window)
    exact = [one.detach().cpu().float().requires_grad_() for one in inputs]
    theirs = attend_plainly(*exact, window)
    torch.testing.assert_close(ours.cpu().float(), theirs, atol=2e-2, rtol=2e-2)
    pull = torch.randn_like(theirs)
    ours_back = torch.autograd.grad(ours, inputs, pull.cuda().bfloat16())
    for one, other in zip(ours_back, torch.autograd.grad(theirs, exact, pull), strict=True):
        torch.testing.assert_close(one.cpu().float(), other, atol=5e-2, rtol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "groups", "width"), [(32, 4, 64), (8, 8, 128), (4, 1, 256)])
def test_the_gpu_s_kernels_agree_at_the_sizes_of_real_models(heads: int, groups: int, width: int, window: int | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    lengths, longest = (700, 1, 64, 300, 129, 854), 1024
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, count, sum(lengths), width, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
        for count in (heads, groups, groups)
    ]
    packed = pack_lengths(lengths, longest=longest)
    packed = packed._replace(starts_N=packed.starts_N.cuda())
    exact = [one.detach().float().requires_grad_() for one in inputs]
    ours, _ = packed_attention(None, *inputs, None, packed=packed, sliding_window=window)
    # In float32 the kernels are not used: one conversation after another.
    theirs, _ = packed_attention(None, *exact, None, packed=packed, sliding_window=window)
    torch.testing.assert_close(ours.float(), theirs, atol=2e-2, rtol=2e-2)
    pull = torch.randn(theirs.shape, generator=generator).cuda()
    grads = torch.autograd.grad(ours, inputs, pull.bfloat16()), torch.autograd.grad(theirs, exact, pull)
    for one, other in zip(*grads, strict=True):
        assert float((one.float() - other).norm() / other.norm()) < 0.02
