"""One engine that joins a gateway: prompts, the connection, its end."""

from chaccu.serve.worker.config import WorkerConfig
from chaccu.serve.worker.run import run_worker

__all__ = ["WorkerConfig", "run_worker"]
