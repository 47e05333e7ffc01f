"""`draw_texts`: texts that try a tokenizer: words, scripts, code, runs of spaces, and what looks like control tokens."""

from __future__ import annotations

import numpy as np

SCRIPTS = ("latin naïve Zürich", "Ωμέγα приве́т", "漢字かな 한국어", "العربية עברית", "ไทย हिन्दी", "🦙 👩‍🚀 🏳️‍🌈 ❤️", "½ ² Ⅷ ٣ 一")
CODE = (
    "def f(x):\n\treturn x",
    "if (a && b) { c->d[0] += 1; }",
    "<div class='x'>\r\n</div>",
    "x = 0xFF_00  # ok",
    "SELECT * FROM t;",
)
SPACES = ("  ", "    ", "\t", "\n", "\n\n", " \n ", "\r\n", "\u00a0", "\u2003", " " * 15)
CONTROL = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<bos>", "<end_of_turn>", "[INST]", "<0x0A>", "<unused1>", "▁")
WORDS = (
    "the",
    "The",
    "story",
    "llama",
    "'s",
    "I'LL",
    "don't",
    "1984",
    "3.14",
    "12345678",
    "...",
    "!?",
    "a",
    "Straße",
    "e\u0301",
)


def draw_texts(count: int) -> list[str]:
    """The same ones on every call: pieces of all kinds joined in any way, a third of them with characters from anywhere."""
    generator = np.random.default_rng(7)
    pools = (WORDS, WORDS, SCRIPTS, CODE, SPACES, SPACES, CONTROL)
    texts = []
    for _ in range(count):
        pieces: list[str] = []
        for pool in generator.integers(0, len(pools), generator.integers(1, 9)):
            pieces += [str(generator.choice(pools[pool])), str(generator.choice(["", " ", " "]))]
        if generator.random() < 0.3:
            points = generator.integers(0x20, 0x2FFF, generator.integers(1, 12))
            pieces.append("".join(map(chr, points)))
        texts.append("".join(pieces))
    return texts
