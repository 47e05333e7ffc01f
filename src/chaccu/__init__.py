"""Chaccu: gather conversations, train a chat model, set it free as a service, and judge it."""

__version__ = "0.1.0"
