"""What a conversation is, how it is written as text, and how that text becomes token ids with a loss mask."""

from chaccu.conversation.encode import (
    Encoded,
    Measured,
    TokenSpan,
    encode_conversation,
    encode_conversations,
    guard_tokenizer,
    measure_conversations,
    pack_conversations,
)
from chaccu.conversation.format import ChatFormat, Rendering, Segment, list_formats, load_format
from chaccu.conversation.identity import check_format, check_token_identity
from chaccu.conversation.message import (
    Conversation,
    Message,
    check_conversation,
    conversation_from_openai,
    parse_conversation,
    text_of_content,
)
from chaccu.conversation.template_export import export_template, writes_same
from chaccu.conversation.template_format import TOKENIZER_FORMAT, load_template_format, read_template, resolve_format
from chaccu.conversation.tokenizer import TOKENIZER_FILES, TextTokenizer
from chaccu.conversation.tool_chat import ToolCallDelta, ToolChat

__all__ = [
    "TOKENIZER_FILES",
    "TOKENIZER_FORMAT",
    "ChatFormat",
    "Conversation",
    "Encoded",
    "Measured",
    "Message",
    "Rendering",
    "Segment",
    "TextTokenizer",
    "TokenSpan",
    "ToolCallDelta",
    "ToolChat",
    "check_conversation",
    "check_format",
    "check_token_identity",
    "conversation_from_openai",
    "encode_conversation",
    "encode_conversations",
    "export_template",
    "guard_tokenizer",
    "list_formats",
    "load_format",
    "load_template_format",
    "measure_conversations",
    "pack_conversations",
    "parse_conversation",
    "read_template",
    "resolve_format",
    "text_of_content",
    "writes_same",
]
