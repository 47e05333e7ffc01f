"""The one address for clients: workers join it, OpenAI clients talk to it."""

from chaccu.serve.gateway.app import create_gateway
from chaccu.serve.gateway.config import GatewayConfig, Upstream, parse_upstream
from chaccu.serve.gateway.server import serve_gateway

__all__ = ["GatewayConfig", "Upstream", "create_gateway", "parse_upstream", "serve_gateway"]
