"""The reference's own tokenising and masking of a JSON file of rows, for `bench_data.py`; runs in the reference's environment.

usage: reference_encode.py ROWS.json TOKENIZER_FOLDER MAX_LENGTH; prints counts as JSON on its last line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import transformers
from fastchat.train.train import preprocess

BATCH = 100


def main() -> None:
    """Encode in batches, as a data loader would, and keep what training keeps."""
    file, folder, max_length = sys.argv[1], sys.argv[2], int(sys.argv[3])
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, model_max_length=max_length, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token
    rows = [row["conversations"] for row in json.loads(Path(file).read_text(encoding="utf-8"))]
    kept = []
    untrained = cells = tokens = trained = 0
    for start in range(0, len(rows), BATCH):
        encoded = preprocess(rows[start : start + BATCH], tokenizer)
        kept.append(encoded)
        targets = encoded["labels"] != -100
        untrained += int((~targets.any(dim=1)).sum())
        trained += int(targets.sum())
        cells += encoded["input_ids"].numel()
        tokens += int(encoded["attention_mask"].sum())
    print(
        json.dumps(
            {
                "rows": len(rows),
                "tokens": tokens,
                "trained_tokens": trained,
                "untrained_rows": untrained,
                "padding_share": 1 - tokens / cells,
            }
        )
    )


if __name__ == "__main__":
    main()
