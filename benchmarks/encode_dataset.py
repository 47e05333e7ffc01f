"""Encode every conversation of a JSONL file: token ids and loss masks, packed into rows. Prints counts as JSON.

usage: encode_dataset.py FILE.jsonl TOKENIZER_FOLDER FORMAT MAX_TOKENS ROW_TOKENS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from chaccu.conversation import TextTokenizer, load_format
from chaccu.train.encode import encode_sources
from chaccu.train.pack import pack_rows
from chaccu.train.recipe import DataSource


def main() -> None:
    """Encode, pack and count."""
    file, tokenizer, chat_format = sys.argv[1:4]
    max_tokens, row_tokens = map(int, sys.argv[4:])
    encoded = encode_sources(
        [DataSource(path=file)],
        load_format(chat_format),
        TextTokenizer.load(Path(tokenizer)),
        sequence_len=max_tokens,
        seed=0,
    )
    rows = pack_rows(encoded, row_tokens, seed=0)
    tokens = sum(len(row.ids_T) for row in rows)
    counts = {
        "conversations": len(encoded),
        "tokens": tokens,
        "trained_tokens": sum(row.trained_tokens for row in rows),
        "untrained_conversations": sum(not any(one.mask[1:]) for one in encoded),
        "rows": len(rows),
        "padding_share": 1 - tokens / (len(rows) * row_tokens),
    }
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
