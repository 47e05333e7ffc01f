"""Personal data in texts: e-mail addresses, phone numbers, payment cards, secrets such as API keys, IP addresses; each left
alone, masked or a reason to drop the round.

Patterns find candidates, and what has a rule of its own must keep it: cards the Luhn sum and their makers' prefixes, phone
numbers the numbering plan of their country (Google's libphonenumber), IP addresses their syntax and not be those that every
manual uses. What examples are made of (example.com, 127.0.0.1) stays. Questions are touched only when asked for. Names and
postal addresses are not looked for.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, ClassVar, Literal, cast

from chaccu.conversation import Conversation, Message
from chaccu.data.outcome import Changed, Drop, Outcome, Step
from chaccu.data.rounds import Round, join_rounds, split_rounds
from chaccu.errors import MissingDependencyError

Action = Literal["off", "mask", "drop"]
Find = tuple[int, int]

# A backslash before a mark is Markdown's.
_EMAIL = re.compile(
    r"(?<![\w.+\\-])(?!git@)(?:[\w+-]|\\_)(?:[\w.+-]|\\[_.+-]){0,63}@((?:[a-z0-9][a-z0-9-]{0,62}\.)+[a-z]{2,24})\b",
    re.IGNORECASE,
)
_EXAMPLE_DOMAIN = re.compile(
    r"(?:^|\.)(?:example|test|invalid|localhost|domain|yourdomain|mydomain|email|company|yourcompany)\.[a-z.]+$|\.(?:example|test|invalid|local)$",
    re.IGNORECASE,
)
_PHONE = re.compile(
    r"(?<![\w.,:/$€£#@=&+-])"
    r"(?:\+\d[\d ().-]{7,19}\d|\(\d{2,4}\)[ -]?\d[\d -]{5,10}\d|\d{2,4}[ .-]\d{3,4}[ .-]\d{3,5})"
    r"(?![\w/]|[.,-]\d)"
)
# As one run of digits, or grouped as they stand on the cards.
_CARD = re.compile(
    r"(?<![\w.-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|3\d{3}([ -])\d{6}\2\d{4,5})(?![\w-]|[ .]\d)"
)
_CARD_PREFIX = re.compile(r"4|5[1-5]|2[2-7]|3[47]|6(?:011|4|5)|35|3[068]")
_TEST_CARDS = frozenset({"4111111111111111", "4242424242424242", "5555555555554444", "378282246310005", "4012888888881881"})
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-f]{1,4}:){3,7}(?::?[0-9a-f]{1,4}){1,4}(?![\w:])", re.IGNORECASE)
# What every secret has in it: told far faster than the pattern below.
_SECRET_MARKS = (
    "AKIA",
    "ASIA",
    "AIza",
    "ghp_",
    "gho_",
    "ghu_",
    "ghs_",
    "ghr_",
    "github_pat_",
    "glpat-",
    "xox",
    "sk-",
    "k_live_",
    "hf_",
    "SG.",
    "npm_",
    "eyJ",
    "PRIVATE KEY",
)
_SECRET = re.compile(
    r"\bAKIA[0-9A-Z]{16}\b"
    r"|\bASIA[0-9A-Z]{16}\b"
    r"|\bAIza[\w-]{35}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{36,255}\b"
    r"|\bgithub_pat_[A-Za-z0-9_]{60,100}\b"
    r"|\bglpat-[\w-]{20}\b"
    r"|\bxox[abprs]-[A-Za-z0-9-]{20,200}\b"
    r"|\bsk-(?:proj-|ant-[a-z0-9]+-)?[A-Za-z0-9_-]{32,200}\b"
    r"|\b[sr]k_live_[A-Za-z0-9]{20,100}\b"
    r"|\bhf_[A-Za-z0-9]{34}\b"
    r"|\bSG\.[\w-]{22}\.[\w-]{43}\b"
    r"|\bnpm_[A-Za-z0-9]{36}\b"
    r"|\beyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{10,1000}\b"
    r"|-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----[A-Za-z0-9+/=\s]{100,20000}-----END (?:[A-Z]+ )*PRIVATE KEY-----"
)
_HAS_DIGIT = re.compile(r"\d")
# What a placeholder has in place of a secret: the same character over and over, or words that say so.
_PLACEHOLDER = re.compile(r"(.)\1{5,}|your|example|xxxx|1234567890|abcdef", re.IGNORECASE)


class Pii(Step, frozen=True):
    """For each kind `off`, `mask` (each find becomes `[EMAIL]`, `[PHONE]`, `[CARD]`, `[SECRET]`, `[IP]`) or `drop` (the round
    goes). `questions`: whether questions count too. `phone_regions`: countries whose numbers are known without the `+` and
    country code, such as `[US, DE]`."""

    name: ClassVar[str] = "pii"

    email: Action = "off"
    phone: Action = "off"
    card: Action = "off"
    secret: Action = "off"
    ip: Action = "off"
    questions: bool = False
    phone_regions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.phone != "off":
            _load_phonenumbers()

    def __call__(self, conversation: Conversation) -> Outcome:
        active = [(kind, action) for kind in FINDERS if (action := getattr(self, kind)) != "off"]
        reasons: list[str] = []
        rounds: list[Round] = []
        for turns in split_rounds(conversation.messages):
            kept = self._scrub_round(turns, active, reasons)
            if kept is not None:
                rounds.append(kept)
        if not reasons:
            return conversation
        return Changed((join_rounds(conversation, rounds),), tuple(reasons)) if rounds else Drop(reasons[-1])

    def _scrub_round(self, turns: Round, active: list[tuple[str, Action]], reasons: list[str]) -> Round | None:
        """The round with what is to be masked masked, or None when it has to go."""
        kept: list[Message] = []
        masked: list[str] = []
        for message in turns:
            text = message.content or ""
            if message.role == "user" and not self.questions:
                kept.append(message)
                continue
            for kind, action in active:
                finds = list(FINDERS[kind](text, self.phone_regions))
                if finds and action == "drop":
                    reasons.append(f"{kind} found")
                    return None
                if finds:
                    masked.append(f"{kind} masked")
                    text = _mask(text, finds, f"[{kind.upper()}]")
            kept.append(message if text == message.content else Message(message.role, text))
        reasons += masked
        return tuple(kept)


def _mask(text: str, finds: list[Find], mark: str) -> str:
    for start, end in reversed(finds):
        text = text[:start] + mark + text[end:]
    return text


def find_emails(text: str, _: tuple[str, ...] = ()) -> Iterator[Find]:
    """E-mail addresses, those of example domains left out."""
    if "@" in text:
        yield from (found.span() for found in _EMAIL.finditer(text) if not _EXAMPLE_DOMAIN.search(found[1]))


def find_phones(text: str, regions: tuple[str, ...] = ()) -> Iterator[Find]:
    """Phone numbers that exist by the numbering plan of their country code, or of one of `regions`."""
    for found in _PHONE.finditer(text):
        if _is_phone(found[0], regions):
            yield found.span()


def find_cards(text: str, _: tuple[str, ...] = ()) -> Iterator[Find]:
    """Payment card numbers: 13 to 19 digits with a maker's prefix and a true Luhn sum; the makers' test numbers left out."""
    for found in _CARD.finditer(text):
        digits = re.sub(r"\D", "", found[0])
        if _CARD_PREFIX.match(digits) and digits not in _TEST_CARDS and len(set(digits)) > 3 and has_luhn_sum(digits):
            yield found.span()


def find_secrets(text: str, _: tuple[str, ...] = ()) -> Iterator[Find]:
    """Keys and tokens whose makers gave them a form of their own, private keys, JSON web tokens; placeholders left out."""
    for found in _SECRET.finditer(text) if any(mark in text for mark in _SECRET_MARKS) else ():
        if found[0].startswith("-----") or (_HAS_DIGIT.search(found[0]) and not _PLACEHOLDER.search(found[0])):
            yield found.span()


def find_ips(text: str, _: tuple[str, ...] = ()) -> Iterator[Find]:
    """Addresses of the public internet; private, local and documentation ranges are no one's, and four numbers that are all
    below 20 are a version or a heading."""
    candidates = [*_IPV4.finditer(text), *(_IPV6.finditer(text) if text.count(":") > 3 else ())]
    for found in sorted(candidates, key=re.Match.start):
        try:
            address = ipaddress.ip_address(found[0])
        except ValueError:
            # Numbers with dots that are no address, such as 999.1.1.1.
            continue
        numbered = address.version == 4 and all(part < 20 for part in address.packed)
        if address.is_global and not address.is_multicast and not numbered:
            yield found.span()


FINDERS: dict[str, Callable[[str, tuple[str, ...]], Iterator[Find]]] = {
    # Secrets first: what is masked in one is not found again as something else.
    "secret": find_secrets,
    "email": find_emails,
    "card": find_cards,
    "ip": find_ips,
    "phone": find_phones,
}


def has_luhn_sum(digits: str) -> bool:
    """The check sum of payment cards (ISO/IEC 7812-1): every second digit from the right doubled, digits added, ends in 0."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def _is_phone(text: str, regions: tuple[str, ...]) -> bool:
    phonenumbers = _load_phonenumbers()
    for region in (None,) if text.startswith("+") else regions:
        try:
            number = phonenumbers.parse(text, region)
        except phonenumbers.NumberParseException:
            # Digits in the shape of a number that no plan knows.
            continue
        if phonenumbers.is_valid_number(number):
            return True
    return False


@lru_cache(maxsize=1)
def _load_phonenumbers() -> Any:
    try:
        import phonenumbers
    except ImportError as error:
        raise MissingDependencyError("phonenumberslite", extra="pii", needed_for="data step 'pii' with phone") from error
    return cast(Any, phonenumbers)


__all__ = ["FINDERS", "Pii", "find_cards", "find_emails", "find_ips", "find_phones", "find_secrets", "has_luhn_sum"]
