"""llama.cpp's own server on a GGUF, for as long as this process runs: what the serving bench compares with.

    python benchmarks/bare_llamacpp.py MODEL.gguf --slots 8 --context-tokens 2048 --threads 2

Prints its URL.
"""

from __future__ import annotations

import argparse
import signal

import xllamacpp


def main() -> None:
    """Serve until SIGTERM."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("gguf")
    cli.add_argument("--slots", type=int, default=8)
    cli.add_argument("--context-tokens", type=int, default=2048, help="of each slot")
    cli.add_argument("--threads", type=int, default=2)
    options = cli.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = options.gguf
    params.n_parallel = options.slots
    params.n_ctx = options.slots * options.context_tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.n_threads_http = options.slots + 2
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.verbosity = -1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
