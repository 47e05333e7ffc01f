"""The fused loss against torch's own, in value and in both gradients."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from chaccu.train import loss as loss_module  # noqa: E402 (torch may be absent)
from chaccu.train.loss import summed_cross_entropy  # noqa: E402

T, D, V = 13, 8, 29


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("chunk", [1, 4, 13, 1000])
def test_value_and_gradients_equal_torch(monkeypatch: pytest.MonkeyPatch, softcap: float, chunk: int) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 4 * V * chunk)
    generator = torch.Generator().manual_seed(1)
    hidden_TD = torch.randn(T, D, generator=generator, dtype=torch.float32).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float32).requires_grad_()
    labels_T = torch.randint(V, (T,), generator=generator)
    # A factor behind the sum: the gradient from above must reach both.
    ours = summed_cross_entropy(hidden_TD, weight_VD, labels_T, softcap=softcap) / 7
    ours_grads = torch.autograd.grad(ours, (hidden_TD, weight_VD))
    logits_TV = hidden_TD @ weight_VD.T
    if softcap:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    theirs = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum") / 7
    theirs_grads = torch.autograd.grad(theirs, (hidden_TD, weight_VD))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours_grads, theirs_grads, rtol=1e-4, atol=1e-5)


def test_a_frozen_projection_gets_no_gradient() -> None:
    hidden_TD = torch.randn(T, D).requires_grad_()
    weight_VD = torch.randn(V, D)
    summed_cross_entropy(hidden_TD, weight_VD, torch.arange(T)).backward()
    assert weight_VD.grad is None
    assert hidden_TD.grad is not None
    assert hidden_TD.grad.abs().sum() > 0


def test_without_gradients_the_value_is_the_same_and_inputs_are_untouched() -> None:
    hidden_TD, weight_VD = torch.randn(T, D), torch.randn(V, D)
    copies = hidden_TD.clone(), weight_VD.clone()
    labels_T = torch.arange(T)
    expected = torch.nn.functional.cross_entropy(hidden_TD @ weight_VD.T, labels_T, reduction="sum")
    with torch.no_grad():
        torch.testing.assert_close(summed_cross_entropy(hidden_TD, weight_VD, labels_T), expected)
    assert torch.equal(hidden_TD, copies[0])
    assert torch.equal(weight_VD, copies[1])


def test_bfloat16_stays_near_float32() -> None:
    hidden_TD, weight_VD, labels_T = torch.randn(T, D), torch.randn(V, D), torch.arange(T)
    exact = summed_cross_entropy(hidden_TD, weight_VD, labels_T)
    coarse = summed_cross_entropy(hidden_TD.bfloat16(), weight_VD, labels_T)
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, exact, rtol=0.02, atol=0.0)
