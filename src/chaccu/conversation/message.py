"""What a conversation is: `Message` and `Conversation`, and their JSON form.

Invariants: roles are `user`, `assistant` or `tool`; a `system` text belongs to the conversation, not to its messages; only the
last message may be pending (`content` is None) or unfinished, and only when it is the assistant's. `parse_conversation` checks
them; the types themselves are plain records.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from chaccu.errors import ConversationError

Role = Literal["user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn. `content` is None for an answer that is still pending.

    A window of an answer that is too long for one training row: the first `trained_from` characters are only read, because
    another window trains them, and an `unfinished` one has no end of turn.
    """

    role: Role
    content: str | None
    trained_from: int = 0
    unfinished: bool = False


class Conversation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Messages in order, with the system text beside them (None = the chat format's default).

    `id` names the conversation and `source` the raw record it came from; parts split from one record share their `source`.
    """

    messages: tuple[Message, ...]
    system: str | None = None
    id: str = ""
    source: str = ""

    @property
    def is_pending(self) -> bool:
        """Whether the next thing to come is an assistant's answer."""
        return bool(self.messages) and (self.messages[-1].role != "assistant" or self.messages[-1].content is None)

    def pending_at(self, turn: int) -> Conversation:
        """The conversation as it stood when assistant message number `turn` (an index of `messages`) was awaited."""
        awaited = Message("assistant", None)
        return msgspec.structs.replace(self, messages=(*self.messages[:turn], awaited))


def check_conversation(conversation: Conversation) -> Conversation:
    """Return `conversation` if it can be rendered.

    Raises `ConversationError` naming the message: empty list, a pending or unfinished message that is not the last or not the
    assistant's, `trained_from` outside an assistant's text.
    """
    messages = conversation.messages
    if not messages:
        raise ConversationError(
            "the conversation has no messages.", remedy='give "messages": [{"role": "user", "content": …}, …]'
        )
    for index, message in enumerate(messages):
        if message.content is None and (message.role != "assistant" or index != len(messages) - 1):
            raise ConversationError(
                f"message {index} ({message.role}) has content null.",
                remedy="only the last message may be pending, and only an assistant's",
            )
        if message.unfinished or message.trained_from:
            _check_window(message, index, is_last=index == len(messages) - 1)
    return conversation


def _check_window(message: Message, index: int, *, is_last: bool) -> None:
    if message.role != "assistant" or message.content is None or (message.unfinished and not is_last):
        raise ConversationError(
            f"message {index} ({message.role}) is marked as a window of an answer.",
            remedy="only an assistant's text has `trained_from`, and only the last message may be `unfinished`",
        )
    if not 0 <= message.trained_from < len(message.content):
        raise ConversationError(
            f"message {index} is trained from character {message.trained_from} of {len(message.content)}.",
            remedy="`trained_from` lies within the text, so that something of it is trained",
        )


def parse_conversation(data: bytes | str) -> Conversation:
    """A conversation from JSON: `{"system": str | null, "messages": [{"role": …, "content": str | null}]}`.

    Raises `ConversationError` for bad JSON, unknown roles and misplaced pending messages.
    """
    try:
        return check_conversation(_DECODER.decode(data))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConversationError(
            f"this is not a conversation: {error}.",
            remedy='the form is {"system": str | null, "messages": [{"role": "user", "content": str | null}, …]}; '
            'roles are "user", "assistant" and "tool"',
        ) from error


def conversation_from_openai(messages: list[dict[str, Any]]) -> Conversation:
    """A conversation from OpenAI-style messages; `system` and `developer` messages are joined into the system text.

    A content given as a list of parts is accepted when every part is text. Raises `ConversationError` naming the message.
    """
    system: list[str] = []
    turns: list[Message] = []
    for index, message in enumerate(messages):
        role, text = message.get("role"), text_of_content(message.get("content"), index)
        if role in ("system", "developer"):
            system.append(text)
        elif role in ROLES:
            turns.append(Message(role, text))
        else:
            known = ", ".join(("system", "developer", *ROLES))
            raise ConversationError(f"message {index} has the role {role!r}.", remedy=f"use one of: {known}")
    return check_conversation(Conversation(messages=tuple(turns), system="\n\n".join(system) if system else None))


def text_of_content(content: Any, index: int) -> str:
    """The text of an OpenAI-style content, of message `index`. Raises `ConversationError` where it is no text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    raise ConversationError(f"the content of message {index} is not text.", remedy="give a string, or a list of text parts")


_DECODER = msgspec.json.Decoder(Conversation)
