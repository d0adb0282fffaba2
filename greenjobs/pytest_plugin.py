"""The fixtures and the marker of greenjobs for pytest, which finds them by itself where greenjobs is installed.

    @pytest.mark.greenjobs("inline")
    def test_order_is_confirmed(client): ...

Loading it is all that happens in tests that use neither: what needs the driver is imported by the fixtures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

    from greenjobs.testing import Inline, Ran, Recording

_MARKER = (
    'greenjobs(mode, **options): what .delay() does in this test. "inline": run the job here and now (options: '
    'raise_errors, context); "recording": only note it; "database": store it in the transaction of the fixture '
    "greenjobs_connection."
)

_FIXTURES = {
    "inline": "greenjobs_inline",
    "recording": "greenjobs_recorded",
    "database": "greenjobs_database",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Have a test with the marker use the fixture of its mode, before all others of its own."""
    marker = item.get_closest_marker("greenjobs")
    if marker is None:
        return
    mode = _mode(marker)
    names = getattr(item, "fixturenames", None)
    if names is None:
        raise pytest.UsageError(f"{item.nodeid}: the marker greenjobs is for tests that can have fixtures")
    if _FIXTURES[mode] not in names:
        names.insert(0, _FIXTURES[mode])


@pytest.fixture
def greenjobs_inline(request: pytest.FixtureRequest) -> Iterator[Inline]:
    """`.delay()` runs the job here and now; see greenjobs.testing.inline. `.ran` has the attempts that were made."""
    from greenjobs import testing

    with testing.inline(**_options(request, "inline")) as mode:
        yield mode


@pytest.fixture
def greenjobs_recorded(request: pytest.FixtureRequest) -> Iterator[Recording]:
    """`.delay()` only notes what was enqueued; see greenjobs.testing.recording. `.jobs` has it."""
    from greenjobs import testing

    with testing.recording(**_options(request, "recording")) as mode:
        yield mode


@pytest.fixture
def greenjobs_connection() -> Iterator[Connection]:
    """A connection to the database of the settings, rolled back at the end. Override it to give that of your tests."""
    from greenjobs import testing

    with testing.rolled_back() as connection:
        yield connection


@pytest.fixture
def greenjobs_database(request: pytest.FixtureRequest, greenjobs_connection: Any) -> Iterator[Connection]:
    """`.delay()` joins the transaction of greenjobs_connection, which it gives; see greenjobs.testing.using."""
    from greenjobs import testing

    with testing.using(greenjobs_connection, **_options(request, "database")):
        yield greenjobs_connection


@pytest.fixture
def greenjobs_drain(greenjobs_database: Any) -> Callable[..., list[Ran]]:
    """Runs what is due in greenjobs_database; see greenjobs.testing.drain."""
    from greenjobs import testing

    return testing.drain


def _mode(marker: pytest.Mark) -> str:
    modes = [*marker.args, *([marker.kwargs["mode"]] if "mode" in marker.kwargs else [])]
    if len(modes) != 1 or modes[0] not in _FIXTURES:
        given = ", ".join(map(repr, modes)) or "missing"
        raise pytest.UsageError(f"the mode of the marker greenjobs is {given}; allowed: {', '.join(_FIXTURES)}")
    return str(modes[0])


def _options(request: pytest.FixtureRequest, mode: str) -> dict[str, Any]:
    """What the marker says beside the mode, for the fixture of that mode."""
    marker = request.node.get_closest_marker("greenjobs")
    if marker is None or _mode(marker) != mode:
        return {}
    return {name: value for name, value in marker.kwargs.items() if name != "mode"}
