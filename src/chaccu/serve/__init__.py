"""Engines to one service: workers that join a gateway, and the wire between them."""
