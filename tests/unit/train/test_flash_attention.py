"""FlashAttention 4's kernels as operators: what they are asked for, and that a compiled graph takes them in; the kernels' own
numbers are compared on a GPU in test_attention.py."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.errors import TrainError  # noqa: E402 (torch may be absent)
from chaccu.train import attention, flash_attention  # noqa: E402

LENGTHS = (5, 1, 9)
STARTS = (0, 5, 6, 15, 15)


def scores_of(query: Any, key: Any, starts: Any, scale: float, window: int) -> Any:
    """(H, T, T), with minus infinity where a token may not look."""
    owner = torch.bucketize(torch.arange(len(query)), starts[1:], right=True)
    gap = torch.arange(len(query))[:, None] - torch.arange(len(query))
    seen = (owner[:, None] == owner) & (gap >= 0) & ((gap < window) if window else True)
    scores = torch.einsum("qhe,khe->hqk", query, repeat(key, query)) * scale
    return scores.masked_fill(~seen, float("-inf"))


def repeat(states: Any, query: Any) -> Any:
    return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)


def attend_plainly(query: Any, key: Any, value: Any, starts: Any, scale: float, window: int) -> Any:
    scores = scores_of(query, key, starts, scale, window)
    return torch.einsum("hqk,khe->qhe", scores.softmax(-1), repeat(value, query)), scores.logsumexp(-1)


class PlainKernels:
    """The two functions of the package, in plain PyTorch."""

    def _flash_attn_fwd(self, query: Any, key: Any, value: Any, **options: Any) -> tuple[Any, ...]:
        assert options["cu_seqlens_q"] is options["cu_seqlens_k"]
        assert options["return_lse"]
        window = self.window(options)
        out, log_sum = attend_plainly(query, key, value, options["cu_seqlens_q"], options["softmax_scale"], window)
        return out.contiguous(), log_sum.contiguous(), None, None, None

    def _flash_attn_bwd(
        self, query: Any, key: Any, value: Any, out: Any, grad: Any, log_sum: Any, **options: Any
    ) -> tuple[Any, ...]:
        scale, groups = options["softmax_scale"], key.shape[1]
        scores = scores_of(query, key, options["cu_seqlens_q"], scale, self.window(options))
        weights = (scores - log_sum[:, :, None]).exp()
        slopes = torch.einsum("qhe,khe->hqk", grad, repeat(value, query)) - (grad * out).sum(-1).T[:, :, None]
        slopes = weights * slopes * scale
        options["dq"].copy_(torch.einsum("hqk,khe->qhe", slopes, repeat(key, query)))
        for place, left, right in (("dk", slopes, query), ("dv", weights, grad)):
            options[place].copy_(torch.einsum("hqk,qhe->khe", left, right).unflatten(1, (groups, -1)).sum(2))
        return options["dq"], options["dk"], options["dv"]

    @staticmethod
    def window(options: dict[str, Any]) -> int:
        if options.get("causal"):
            return 0
        assert options["window_size_right"] == 0
        return int(options["window_size_left"]) + 1


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "_kernels", PlainKernels)


def states() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    # As a layer gives them: heads first in memory.
    return [torch.randn(heads, sum(LENGTHS), 16, generator=generator).transpose(0, 1).requires_grad_() for heads in (4, 2, 2)]


def attend(query: Any, key: Any, value: Any, window: int) -> Any:
    starts = torch.tensor(STARTS, dtype=torch.int32)
    return flash_attention.attend(query, key, value, starts, longest=9, scale=0.3, window=window)


@pytest.mark.parametrize("window", [0, 4])
def test_forward_and_backward_are_attention_inside_each_conversation(window: int) -> None:
    inputs = states()
    out = attend(*inputs, window)
    plain, _ = attend_plainly(*inputs, torch.tensor(STARTS), 0.3, window)
    torch.testing.assert_close(out, plain)
    pull = torch.randn_like(plain)
    for one, other in zip(torch.autograd.grad(out, inputs, pull), torch.autograd.grad(plain, inputs, pull), strict=True):
        torch.testing.assert_close(one, other)


def test_the_operators_tell_the_compiler_the_truth() -> None:
    starts = torch.tensor(STARTS, dtype=torch.int32)
    torch.library.opcheck(torch.ops.chaccu.flash_attention.default, (*states(), starts, 9, 0.3, 0))
    with torch.no_grad():
        out, sums = torch.ops.chaccu.flash_attention(*states(), starts, 9, 0.3, 0)
        backward = torch.ops.chaccu.flash_attention_backward.default
        torch.library.opcheck(
            backward, (torch.randn(out.shape), *(one.detach() for one in states()), out, sums, starts, 9, 0.3, 0)
        )
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    inputs = states()
    pull = torch.randn(sum(LENGTHS), 4, 16)
    for one, other in zip(
        torch.autograd.grad(compiled(*inputs, 4), inputs, pull),
        torch.autograd.grad(attend(*inputs, 4), inputs, pull),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_a_layer_that_chooses_its_kernels_is_one_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The answers of a GPU that has them; what is asked on the way must not cut the graph.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention, "attends_at_once", lambda *_: True)
    monkeypatch.setattr(flash_attention, "_LEAST_WIDTH", 16)
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    for asked in (flash_attention._is_hopper, flash_attention._is_installed):
        monkeypatch.setattr(flash_attention, asked.__name__, asked.__wrapped__)
    packed = attention.pack_lengths(LENGTHS, longest=9)

    def attend_row(*inputs: Any) -> Any:
        return attention.packed_attention(None, *inputs, None, packed=packed._replace(lengths=()), scaling=0.3)[0]

    inputs = [one.detach().transpose(0, 1)[None].requires_grad_() for one in states()]
    out = torch.compile(attend_row, backend="aot_eager", fullgraph=True)(*inputs)
    plain, _ = attend_plainly(*(one[0].transpose(0, 1) for one in inputs), packed.starts_N, 0.3, 0)
    torch.testing.assert_close(out[0], plain)


def test_heads_that_the_kernels_are_wrong_for_are_not_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    served = [width for width in range(4, 300, 4) if flash_attention.serves_width(width, 0)]
    assert served == list(range(32, 257, 8))


def test_attention_is_counted_as_work() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = states()
    with FlopCounterMode(display=False) as counter:
        attend(*inputs, 0).sum().backward()
    # Two products forward, five backward, each of 2 T x longest x E a head and half of it masked.
    assert counter.get_total_flops() == (2 + 5) * 15 * 9 * 16 * 4


def test_a_package_that_does_not_load_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    flash_attention._kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    with pytest.raises(TrainError, match="does not load"):
        flash_attention._kernels()
