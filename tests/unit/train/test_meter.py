"""What a step costs, as it is measured."""

from __future__ import annotations

import msgspec
import pytest

from chaccu.train.pack import PackedRow
from chaccu.train.recipe import Recipe

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from chaccu.train.flops import count_model_flops  # noqa: E402 (torch may be absent)
from chaccu.train.meter import StepMeter  # noqa: E402
from chaccu.train.model import TrainableModel  # noqa: E402
from chaccu.train.processes import Processes  # noqa: E402

ROWS = [PackedRow([1] * 30, [1] * 30, [10, 20]), PackedRow([1] * 50, [1] * 50, [50])]


def test_speed_and_share_of_the_peak_count_the_tokens_of_conversations_over_all_chips(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chaccu.train.meter.find_device_peak", lambda device: 1e9)
    model = TrainableModel(msgspec.structs.replace(recipe, method="full"), torch.device("cpu"))
    flops = count_model_flops(model.causal).count([10, 20, 50])
    one = StepMeter(model).finish(ROWS, 0.5)
    assert one.tokens_per_s == 160
    assert one.mfu == pytest.approx(flops / 0.5 / 1e9)
    model.processes = Processes(count=4)
    assert StepMeter(model).finish(ROWS, 0.5).mfu == pytest.approx(flops / 0.5 / 4e9)


def test_on_a_cpu_memory_is_what_the_process_holds_and_no_share_is_told(recipe: Recipe) -> None:
    meter = StepMeter(TrainableModel(recipe, torch.device("cpu")))
    meter.begin()
    before = meter.finish(ROWS, 1.0)
    assert before.mfu is None
    held = torch.ones(50_000_000)
    assert meter.finish(ROWS, 1.0).memory_bytes - before.memory_bytes == pytest.approx(held.nbytes, rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_memory_is_the_most_of_the_step(recipe: Recipe) -> None:
    meter = StepMeter(TrainableModel(recipe, torch.device("cuda")))
    torch.ones(300_000_000, device="cuda")
    meter.begin()
    before = torch.cuda.memory_allocated()
    del_me = torch.ones(50_000_000, device="cuda")
    size = del_me.nbytes
    del del_me
    assert meter.finish(ROWS, 1.0).memory_bytes - before == pytest.approx(size, rel=0.01)
