"""Servers that the gateway asks itself, and streams that outlive one of them."""
