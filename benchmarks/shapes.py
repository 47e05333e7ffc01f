"""Shapes of the LLaMA models with random weights that are measured on a GPU."""

from __future__ import annotations

# Hidden width, layers, heads, heads of keys and values, width of the feed-forward part.
SHAPES = {
    "tiny": (64, 2, 4, 2, 128),  # for tests
    "1b": (2048, 22, 32, 4, 5632),
    "7b": (4096, 32, 32, 32, 11008),
    "13b": (5120, 40, 40, 40, 13824),
}
VOCABULARY, SEQUENCE_LEN = 32000, 2048
