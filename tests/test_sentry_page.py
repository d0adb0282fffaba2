"""docs/sentry.md: every command and every snippet on it is run, in order, and what it says of them holds."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import databases
import pages
import pytest
import sentry_receiver
from sentry_sdk.consts import DEFAULT_QUEUE_SIZE, ClientConstructor

from greenjobs.contrib import sentry, sentry_events

PAGE = "sentry.md"
TEXT = (pages.DOCS / PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def arrived(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sentry_receiver.Receiver]:
    """What arrives from somebody who follows the page."""
    with (
        databases.fresh(server_url) as url,
        sentry_receiver.receiver() as receiver,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("SENTRY_DSN", receiver.dsn)
        pages.follow(PAGE, tmp_path_factory.mktemp("page"), url)
        yield receiver


def test_only_the_last_attempt_is_reported_with_what_was_said(arrived: sentry_receiver.Receiver) -> None:
    (event,) = arrived.errors()
    tags = {"order": "A1", "region": "eu", "job_type": "charge", "attempt": "2", "outcome": "failed"}
    assert tags.items() <= event["tags"].items()
    assert event["exception"]["values"][0]["value"] == "the card was refused, attempt 2"
    assert {"id", "max_retries", "priority", "created_at"} <= event["contexts"]["job"].keys()


def test_both_attempts_are_in_the_trace_of_the_request(arrived: sentry_receiver.Receiver) -> None:
    (request,) = arrived.transactions("pay")
    attempts = arrived.transactions("charge")
    assert [each["contexts"]["trace"]["trace_id"] for each in attempts] == [
        request["contexts"]["trace"]["trace_id"]
    ] * 2


def test_options_are_those_of_the_integration() -> None:
    options = inspect.signature(sentry.GreenjobsIntegration).parameters
    assert list(options) == ["report_retries", "propagate_traces", "monitor_cron_jobs"]
    assert all(f"            {name}=" in TEXT for name in options)


def test_numbers_are_those_of_the_code() -> None:
    assert sentry_events._MOST_ARGUMENT_CHARACTERS == 10_000 and "10,000 characters" in TEXT
    assert DEFAULT_QUEUE_SIZE == 100 and "`transport_queue_size` (100)" in TEXT
    timeout = inspect.signature(ClientConstructor).parameters["shutdown_timeout"].default
    assert timeout == 2 and "`shutdown_timeout` (2 seconds)" in TEXT
    assert sentry._TELL_AGAIN_SECONDS == 60 and "once a minute" in TEXT
