"""The system's browser, for the tests of pages, and its PostgreSQL, for those of records; a client of a module's gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from chaccu.testing.postgres import Postgres, find_postgres, running_postgres
from chaccu.testing.processes import Service

_CHROMIUM = Path("/usr/bin/chromium")
_ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A running Chromium; the tests that use it are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not _CHROMIUM.exists():
        pytest.skip(f"there is no {_CHROMIUM}")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=str(_CHROMIUM), args=_ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL; the tests that use it are skipped where it is not installed."""
    programs = find_postgres()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    with running_postgres(programs) as server:
        yield server


@pytest_asyncio.fixture
async def http(gateway: Service) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the gateway that the test's module starts."""
    async with aiohttp.ClientSession(gateway.url) as session:
        yield session
