"""`ask_worker`: what a worker answers in one piece and not in a stream: token ids of a text, a text of token ids, vectors.

Invariants: a question changes nothing at a worker, so one that was lost with it is followed by another one that is asked the
same; when the caller leaves, the worker is told. It ignores what is asked.
"""

from __future__ import annotations

from collections.abc import Callable

from chaccu.serve.gateway.errors import ApiError, from_failure, worker_lost
from chaccu.serve.gateway.workers.prefix_table import Prefix
from chaccu.serve.gateway.workers.race import Race
from chaccu.serve.gateway.workers.registry import WorkerRegistry
from chaccu.serve.gateway.workers.remote_worker import WorkerLostError
from chaccu.serve.link import Piece, Question


async def ask_worker(
    registry: WorkerRegistry,
    question: Question,
    *,
    needs: frozenset[str],
    wait_s: float,
    max_attempts: int,
    on_tried: Callable[[str], None],
) -> Piece:
    """The piece that answers `question`, of a worker that has the abilities it `needs`; `on_tried` is told each one's name.

    Raises `ApiError`: no worker, a question that the worker refused, a failed engine, too many workers lost.
    """
    model = question.model
    for _ in range(max_attempts):
        worker = await registry.acquire(Prefix(model), tokens=0.0, needs=needs, wait_s=wait_s)
        race = Race(worker, question, 0.0, None)
        on_tried(worker.identity)
        try:
            piece = (await race.take())[-1]
        except WorkerLostError:
            continue
        finally:
            race.leave()
        if piece.failure is not None and piece.failure.kind == "not_served":
            continue
        if piece.failure is not None:
            raise from_failure(piece.failure)
        if piece.end != "stop":
            message = f"the worker ended its answer as {piece.end!r}."
            raise ApiError(500, message, kind="server_error", code="engine_failed")
        return piece
    raise worker_lost(model, f"so were the others that were asked the same ({max_attempts} in all)")
