"""The only caller of chat APIs: what is asked, what comes back, and what can go wrong."""

from chaccu.client.chat_client import ChatClient, api_root
from chaccu.client.chats import ChatDelta, Completion, Messages, Sampling, Usage
from chaccu.client.errors import (
    AccessDeniedError,
    AnswerTimeoutError,
    ChatError,
    ContextFullError,
    InvalidAnswerError,
    LimitReachedError,
    NoWorkerError,
    RequestRefusedError,
    ServerFailedError,
    ServerUnreachableError,
    UnknownModelError,
    WorkerLostError,
)

__all__ = [
    "AccessDeniedError",
    "AnswerTimeoutError",
    "ChatClient",
    "ChatDelta",
    "ChatError",
    "Completion",
    "ContextFullError",
    "InvalidAnswerError",
    "LimitReachedError",
    "Messages",
    "NoWorkerError",
    "RequestRefusedError",
    "Sampling",
    "ServerFailedError",
    "ServerUnreachableError",
    "UnknownModelError",
    "Usage",
    "WorkerLostError",
    "api_root",
]
