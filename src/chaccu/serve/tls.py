"""TLS contexts of gateways and workers, from PEM files.

Invariants: nothing older than TLS 1.2; a file that does not hold what it should is one clear error before anything listens or
loads. It ignores sockets.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from chaccu.errors import UsageError


def build_server_context(cert: Path, key: Path | None, client_ca: Path | None) -> ssl.SSLContext:
    """For a server that shows `cert` (with its chain; `key` may be in the same file) and, with a `client_ca`, takes only
    clients with a certificate of that authority. Raises `UsageError`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_pair(context, cert, key)
    if client_ca is not None:
        _load_authority(context, client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def build_client_context(ca: Path | None, cert: Path | None, key: Path | None) -> ssl.SSLContext:
    """For a client that trusts `ca` instead of the system's authorities, and shows `cert` where it is asked for one. Raises
    `UsageError`.
    """
    context = ssl.create_default_context()
    if ca is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        _load_authority(context, ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert is not None:
        _load_pair(context, cert, key)
    return context


def _load_pair(context: ssl.SSLContext, cert: Path, key: Path | None) -> None:
    try:
        # An encrypted key would ask for its password on the terminal.
        context.load_cert_chain(cert, key, password="")
    except (OSError, ssl.SSLError) as error:
        shown = str(cert) if key is None else f"{cert} and {key}"
        raise UsageError(
            f"{shown}: no certificate with its key ({_reason(error)}).",
            remedy="PEM files: the certificate with its chain, and the key that belongs to it, not encrypted",
        ) from error


def _load_authority(context: ssl.SSLContext, ca: Path) -> None:
    try:
        context.load_verify_locations(ca)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"{ca}: no certificate of an authority ({_reason(error)}).", remedy="a PEM file") from error


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or "unreadable"
