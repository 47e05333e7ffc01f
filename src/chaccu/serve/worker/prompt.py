"""`PromptBuilder`: from what a client asked to token ids, through the one renderer.

Invariants: prompt ids are those that training saw before the same reply (`encode_conversation` with the reply awaited); a
reply that has begun is encoded as one piece of its own, as training cuts it, and only the format's own text before a reply (a
space, say) is hidden from clients and put back when the reply goes on. It ignores sampling.
"""

from __future__ import annotations

import msgspec

from chaccu.conversation import ChatFormat, Conversation, Message, TextTokenizer, encode_conversation, guard_tokenizer
from chaccu.engine import WrongRequestError
from chaccu.serve.link import Generate, Tokenize


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """Ids to go on after. `reply_prefix`: format text that a fresh reply begins with, and that is not the client's to see."""

    prompt_ids: list[int]
    reply_ids: list[int] = []
    reply_prefix: str = ""
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()


class PromptBuilder:
    """Prompts for one model: its chat format with its tokenizer."""

    def __init__(self, chat_format: ChatFormat, tokenizer: TextTokenizer) -> None:
        self._format = chat_format
        # What a reply has said so far is text, whatever it spells.
        self._tokenizer = guard_tokenizer(tokenizer, chat_format)
        self._eos_ids = _known_ids(tokenizer, [tokenizer.eos_token])
        self._reply_prefix, reply_end = _reply_frame(chat_format, tokenizer)
        control = [part for part in tokenizer.split_control(reply_end) if isinstance(part, int)]
        # Without a control token in it, the end of a turn is plain text, and only a stop string can end there.
        plain_end = (reply_end,) if reply_end.strip() and not control else ()
        self._turn_stop = tuple(dict.fromkeys((*chat_format.stop, *plain_end)))
        self._turn_stop_ids = tuple(
            sorted({*control[:1], *_known_ids(tokenizer, chat_format.stop), *self._eos_ids}),
        )

    @property
    def vocab_size(self) -> int:
        """Ids of tokens are below it."""
        return self._tokenizer.vocab_size

    def tokenize(self, question: Tokenize) -> list[int]:
        """The ids of a prompt. Raises as `build` does."""
        conversation = question.asked.conversation
        if conversation is None:
            return self._encode_raw(question.asked.prompt, adds_bos=question.adds_bos)
        if question.awaits_reply:
            prompt = self.build(question.asked)
            return prompt.prompt_ids + prompt.reply_ids
        if conversation.messages[-1].content is None:
            # A reply that is not awaited is one that the client gave in full.
            given = Message("assistant", question.asked.begun)
            conversation = msgspec.structs.replace(conversation, messages=(*conversation.messages[:-1], given))
        return encode_conversation(conversation, self._format, self._tokenizer, pending=False).ids

    def detokenize(self, ids: list[int]) -> str:
        """The text of `ids`, control tokens included. Raises `WrongRequestError` for one that is no token's."""
        return self._tokenizer.decode(self._check_ids(ids, "tokens"))

    def encode_inputs(self, inputs: list[str | list[int]]) -> list[list[int]]:
        """The ids of texts to embed; text never becomes a control token. Raises `WrongRequestError` for ids that are none."""
        return [self._encode_text(one) if isinstance(one, str) else self._check_ids(one, "input") for one in inputs]

    def _encode_text(self, text: str) -> list[int]:
        bos_id = self._tokenizer.bos_id
        bos = [bos_id] if self._tokenizer.adds_bos and bos_id is not None else []
        return bos + self._tokenizer.encode_texts([text], first=[True])[0]

    def _check_ids(self, ids: list[int], parameter: str) -> list[int]:
        unknown = [token for token in ids if not 0 <= token < self.vocab_size]
        if unknown:
            message = f"there is no token {unknown[0]:,}; the vocabulary has {self.vocab_size:,}, from 0."
            raise WrongRequestError(message, parameter=parameter)
        return ids

    def build(self, request: Generate) -> Prompt:
        """The prompt of `request`. Raises `FormatError` or `ConversationError` when the format refuses the conversation."""
        if request.conversation is None:
            return self._raw(request)
        encoded = encode_conversation(request.conversation, self._format, self._tokenizer, pending=True)
        reply_ids = self._encode_parts(self._reply_prefix, request.begun) if request.begun else []
        return Prompt(
            prompt_ids=encoded.ids,
            reply_ids=reply_ids,
            reply_prefix="" if request.begun else self._reply_prefix,
            stop=(*request.sampling.stop, *self._turn_stop),
            stop_ids=self._turn_stop_ids,
        )

    def _raw(self, request: Generate) -> Prompt:
        """A prompt given as text, of which the client writes the control tokens itself, or as ids. Raises `WrongRequestError`
        for one that is no token's.
        """
        if request.prompt_ids:
            ids = self._check_ids(request.prompt_ids, "prompt")
        else:
            ids = self._encode_raw(request.prompt, adds_bos=True)
        begun = self._encode_parts("", request.begun) if request.begun else []
        return Prompt(prompt_ids=ids, reply_ids=begun, stop=request.sampling.stop, stop_ids=tuple(sorted(self._eos_ids)))

    def _encode_raw(self, text: str, *, adds_bos: bool) -> list[int]:
        ids: list[int] = []
        parts = self._tokenizer.split_control(text)
        bos_id = self._tokenizer.bos_id
        if adds_bos and self._tokenizer.adds_bos and bos_id is not None and parts[:1] != [bos_id]:
            ids.append(bos_id)
        for index, part in enumerate(parts):
            ids.extend([part] if isinstance(part, int) else self._tokenizer.encode_texts([part], first=[index == 0])[0])
        return ids

    def _encode_parts(self, prefix: str, content: str) -> list[int]:
        """Ids of a reply's text after the format's own `prefix`; only the prefix may hold control tokens."""
        parts = self._tokenizer.split_control(prefix)
        tail = parts.pop() if parts and isinstance(parts[-1], str) else ""
        texts = [*parts, f"{tail}{content}"]
        ids: list[int] = []
        for text in texts:
            ids.extend([text] if isinstance(text, int) else self._tokenizer.encode_texts([text], first=[False])[0])
        return ids


def _reply_frame(chat_format: ChatFormat, tokenizer: TextTokenizer) -> tuple[str, str]:
    """The format's own text inside a reply, before and after its content."""
    probe = Conversation(messages=(Message("user", "?"), Message("assistant", "!")))
    rendering = chat_format.render(probe, bos_token=tokenizer.bos_token or None, eos_token=tokenizer.eos_token or None)
    before, after, seen = "", "", False
    for segment in rendering.segments:
        if segment.reply is None:
            continue
        if segment.content:
            seen = True
        elif seen:
            after += segment.text
        else:
            before += segment.text
    return before, after


def _known_ids(tokenizer: TextTokenizer, texts: tuple[str, ...] | list[str]) -> set[int]:
    return {token_id for token_id in (tokenizer.token_id(text) for text in texts if text) if token_id is not None}
