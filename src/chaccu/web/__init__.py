"""Pages for people: a chat page that is only a client of the gateway.

Gradio is imported when a page is made, not before.
"""

from chaccu.web.config import WebConfig
from chaccu.web.page import create_page
from chaccu.web.server import create_web_app, serve_web

__all__ = ["WebConfig", "create_page", "create_web_app", "serve_web"]
