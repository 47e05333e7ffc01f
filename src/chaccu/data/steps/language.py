"""Language: keep or skip conversations by their main language. Its defaults keep all.

A language is named by the code that the detector has, which the ledger and the report show, or by today's code where the
detector has an old one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar, Literal

from chaccu.conversation import Conversation
from chaccu.data.language import UNKNOWN, detect_language
from chaccu.data.outcome import Drop, Outcome, Step
from chaccu.errors import RecipeError, did_you_mean

# Today's codes of languages for which the detector has an old or a wider one.
_MODERN = {"he": "iw", "jv": "jw", "fil": "tl", "nb": "no", "zh-Hans": "zh"}


class Language(Step, frozen=True):
    """`keep`: ISO 639 codes to keep (empty: all); `skip`: codes to drop; `unknown`: what becomes of text of no certain
    language. Raises `RecipeError` for a code that no language has."""

    name: ClassVar[str] = "language"

    keep: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    unknown: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        if self.keep or self.skip:
            _as_detected(self.keep)
            _as_detected(self.skip)

    def __call__(self, conversation: Conversation) -> Outcome:
        if not self.keep and not self.skip and self.unknown == "keep":
            return conversation
        language = detect_language(conversation)
        if language == UNKNOWN:
            return conversation if self.unknown == "keep" else Drop("language unknown")
        if language in _as_detected(self.skip) or (self.keep and language not in _as_detected(self.keep)):
            return Drop(f"language {language}")
        return conversation


@lru_cache(maxsize=16)
def _as_detected(codes: tuple[str, ...]) -> frozenset[str]:
    """The codes as the detector has them."""
    known = _known_codes() if codes else {}
    for code in codes:
        if code not in known:
            plain = code.lower()
            meant = next((one for one, name in known.items() if plain in (name, one.lower())), None)
            raise RecipeError(
                f"language: no language has the code {code!r}.",
                remedy=did_you_mean(plain, known) if meant is None else f"did you mean {meant!r}?",
            )
    return frozenset(_MODERN.get(code, code) for code in codes)


@lru_cache(maxsize=1)
def _known_codes() -> dict[str, str]:
    """The languages' names, in small letters, by their codes."""
    import pycld2

    # Scripts and jokes have names that begin with X, as have a few languages that are met.
    not_met = {"Ignore", *(name for name, _ in pycld2.LANGUAGES if name.startswith("X_"))}.difference(pycld2.DETECTED_LANGUAGES)
    names = {code: name.lower() for name, code in pycld2.LANGUAGES if name not in not_met}
    return names | {code: names[old] for code, old in _MODERN.items()}
