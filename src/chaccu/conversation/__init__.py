"""What a conversation is, how it is written as text, and how that text becomes token ids with a loss mask."""

from chaccu.conversation.encode import Encoded, TokenSpan, encode_conversation, encode_conversations
from chaccu.conversation.format import ChatFormat, Rendering, Segment, list_formats, load_format
from chaccu.conversation.message import (
    Conversation,
    Message,
    check_conversation,
    conversation_from_openai,
    parse_conversation,
)
from chaccu.conversation.tokenizer import TextTokenizer

__all__ = [
    "ChatFormat",
    "Conversation",
    "Encoded",
    "Message",
    "Rendering",
    "Segment",
    "TextTokenizer",
    "TokenSpan",
    "check_conversation",
    "conversation_from_openai",
    "encode_conversation",
    "encode_conversations",
    "list_formats",
    "load_format",
    "parse_conversation",
]
