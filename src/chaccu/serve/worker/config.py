"""`WorkerConfig`: what a worker is told at its start."""

from __future__ import annotations

from pathlib import Path

import msgspec

from chaccu.engine import EngineOptions


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`model`: a model spec; `gateways`: http(s) URLs, each of which is joined, `dns+http://…` for every address of a name;
    `name` and `chat_format` override the model's own. `model_url`: where a server has the model.

    `adapters`: names and folders of those to serve over the model; `allow_load`: gateways may have more loaded from below this
    folder, None: none.

    `drain_s`: how long a worker that was told to end may finish what it has. `weight`, `priority`: its share of the model's
    requests among other workers, as in `ModelOffer`. `tls_ca`: PEM file of the authority to trust instead of the system's;
    `tls_cert`, `tls_key`: what the worker shows to a gateway that asks for a certificate.
    """

    model: str
    gateways: tuple[str, ...]
    name: str | None = None
    engine: str = "auto"
    chat_format: str | None = None
    model_url: str | None = None
    adapters: tuple[tuple[str, Path], ...] = ()
    allow_load: Path | None = None
    options: EngineOptions = EngineOptions()
    join_token: str = ""
    drain_s: float = 30.0
    weight: float = 1.0
    priority: int = 0
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
