"""Cron expressions in time zones, on paper: no database, no clock."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest

from greenjobs.cron import ON_TIME, Timetable

UTC = timezone.utc


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def ticks(cron: str, zone: str, after: str, until: str) -> list[str]:
    """The ticks as the zone's clock shows them, with its offset."""
    found = Timetable(cron, zone).ticks_between(at(after), at(until))
    return [tick.astimezone(ZoneInfo(zone)).isoformat(" ", "minutes") for tick in found]


PARIS, NEW_YORK, LORD_HOWE = "Europe/Paris", "America/New_York", "Australia/Lord_Howe"


@pytest.mark.parametrize(
    ("cron", "zone", "day", "expected"),
    [
        # The night of the gap: 02:00 to 03:00 does not exist.
        ("30 2 * * *", PARIS, "2026-03-29", ["03:00+02:00"]),
        ("0,15,30,45 2 * * *", PARIS, "2026-03-29", ["03:00+02:00"]),
        ("30 1,2,3 * * *", PARIS, "2026-03-29", ["01:30+01:00", "03:00+02:00", "03:30+02:00"]),
        ("0 2,3 * * *", PARIS, "2026-03-29", ["03:00+02:00"]),
        ("*/30 2 * * *", PARIS, "2026-03-29", []),
        ("*/30 1-3 * * *", PARIS, "2026-03-29", ["01:00+01:00", "01:30+01:00", "03:00+02:00", "03:30+02:00"]),
        ("30 2 * * *", NEW_YORK, "2026-03-08", ["03:00-04:00"]),
        # Half an hour only: 02:00 to 02:30.
        ("15 2 * * *", LORD_HOWE, "2026-10-04", ["02:30+11:00"]),
        ("45 2 * * *", LORD_HOWE, "2026-10-04", ["02:45+11:00"]),
        ("*/15 3 * * *", LORD_HOWE, "2026-10-04", ["03:00+11:00", "03:15+11:00", "03:30+11:00", "03:45+11:00"]),
        ("*/15 2 * * *", LORD_HOWE, "2026-10-04", ["02:30+11:00", "02:45+11:00"]),
        # The night of the repeated hour: 02:00 to 03:00 comes twice.
        ("30 2 * * *", PARIS, "2026-10-25", ["02:30+02:00"]),
        ("30 2,3 * * *", PARIS, "2026-10-25", ["02:30+02:00", "03:30+01:00"]),
        ("*/30 2 * * *", PARIS, "2026-10-25", ["02:00+02:00", "02:30+02:00", "02:00+01:00", "02:30+01:00"]),
        ("30 1 * * *", NEW_YORK, "2026-11-01", ["01:30-04:00"]),
        # 01:30 to 02:00 comes twice.
        ("45 1 * * *", LORD_HOWE, "2026-04-05", ["01:45+11:00"]),
        ("*/15 1 * * *", LORD_HOWE, "2026-04-05",
         ["01:00+11:00", "01:15+11:00", "01:30+11:00", "01:45+11:00", "01:30+10:30", "01:45+10:30"]),
        ("*/15 3 * * *", LORD_HOWE, "2026-04-05", ["03:00+10:30", "03:15+10:30", "03:30+10:30", "03:45+10:30"]),
        # The gap is at midnight.
        ("0 0 * * *", "Africa/Cairo", "2026-04-24", ["01:00+03:00"]),
        ("0 */12 * * *", "Africa/Cairo", "2026-04-24", ["12:00+03:00"]),
    ],
)  # fmt: skip
def test_when_the_clock_changes(cron: str, zone: str, day: str, expected: list[str]) -> None:
    noon = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone), hour=20)
    evening_before = (noon - timedelta(days=1)).replace(hour=21)
    found = ticks(cron, zone, evening_before.isoformat(), noon.isoformat())
    assert [tick.partition(" ")[2] for tick in found] == expected


# A few hours on both sides of a change of the clock.
CHANGES = [
    (PARIS, "2026-03-28T22:00+00:00", "2026-03-29T04:00+00:00"),
    (PARIS, "2026-10-24T22:00+00:00", "2026-10-25T04:00+00:00"),
    (NEW_YORK, "2026-03-08T04:00+00:00", "2026-03-08T10:00+00:00"),
    (NEW_YORK, "2026-11-01T03:00+00:00", "2026-11-01T09:00+00:00"),
    (LORD_HOWE, "2026-10-03T12:00+00:00", "2026-10-03T18:00+00:00"),
    (LORD_HOWE, "2026-04-04T12:00+00:00", "2026-04-04T18:00+00:00"),
    ("Africa/Cairo", "2026-04-23T20:00+00:00", "2026-04-24T02:00+00:00"),
]


@pytest.mark.parametrize(("zone", "begin", "end"), CHANGES)
@pytest.mark.parametrize("cron", ["*/15 * * * *", "7 * * * *", "30 */2 * * *", "15,45 1,2,3 * * *", "0 0 * * *"])
def test_the_next_tick_from_any_minute_is_the_next_of_the_list(cron: str, zone: str, begin: str, end: str) -> None:
    """A runner goes on from any tick, also in the midst of a repeated hour: no tick comes again, and none is lost."""
    timetable = Timetable(cron, zone)
    listed = list(timetable.ticks_between(at(begin), at(end) + timedelta(days=2)))
    assert listed == sorted(set(listed))
    minutes = int((at(end) - at(begin)).total_seconds()) // 60
    for instant in (at(begin) + timedelta(minutes=minute) for minute in range(0, minutes, 5)):
        assert timetable.next_after(instant) == next(tick for tick in listed if tick > instant)


@pytest.mark.parametrize(("zone", "begin", "end"), CHANGES)
def test_every_quarter_of_an_hour_is_a_tick_when_the_clock_changes(zone: str, begin: str, end: str) -> None:
    found = list(Timetable("*/15 * * * *", zone).ticks_between(at(begin), at(end)))
    assert [tick - at(begin) for tick in found] == [timedelta(minutes=15) * count for count in range(1, 25)]


@pytest.mark.parametrize("zone", [PARIS, NEW_YORK, LORD_HOWE])
def test_a_fixed_time_is_one_tick_on_every_day_of_the_year(zone: str) -> None:
    found = Timetable("10 2 * * *", zone).ticks_between(at("2026-01-01T12:00+00:00"), at("2027-01-01T12:00+00:00"))
    assert len([tick.astimezone(ZoneInfo(zone)).date() for tick in found]) == 365


def test_a_tick_is_later_than_the_instant_it_is_asked_from() -> None:
    assert Timetable("0 * * * *").next_after(at("2026-01-01T12:00+00:00")) == at("2026-01-01T13:00+00:00")


def test_fractions_of_a_second_lose_no_tick() -> None:
    assert Timetable("0 12 * * *").next_after(at("2026-01-01T11:59:59.999999+00:00")) == at("2026-01-01T12:00+00:00")


def test_a_sixth_field_in_front_is_for_seconds() -> None:
    found = ticks("*/20 0 12 * * *", "UTC", "2026-01-01T00:00+00:00", "2026-01-02T00:00+00:00")
    assert len(found) == 3


def test_a_nickname_stands_for_its_fields() -> None:
    assert Timetable("@daily", PARIS).next_after(at("2026-07-01T12:00+02:00")) == at("2026-07-02T00:00+02:00")


def test_a_day_that_comes_every_four_years_is_found() -> None:
    assert Timetable("0 0 29 2 *").next_after(at("2096-03-01T00:00+00:00")) == at("2104-02-29T00:00+00:00")


@pytest.mark.parametrize(
    "cron",
    ["", "* * * *", "60 * * * *", "* 24 * * *", "a b c d e", "0 0 30 2 *", "0 0 31 4,6 *", "@often", "*/0 * * * *",
     "5-1 * * * *", "-1 * * * *", "* * * * * * *", None, 5],
)  # fmt: skip
def test_what_is_no_cron_expression_is_refused(cron: str) -> None:
    with pytest.raises(ValueError, match=r"^cron is "):
        Timetable(cron)


@pytest.mark.parametrize(
    "zone", ["", "Paris", "Europe", "Europe/Pariss", "/etc/passwd", "../UTC", None, 1, "Europe/Paris\0", [], "x" * 9999]
)
def test_what_is_no_time_zone_is_refused(zone: str) -> None:
    with pytest.raises(ValueError, match=r"^timezone is "):
        Timetable("* * * * *", zone)


@pytest.mark.parametrize("wrong", [{"catch_up": "some"}, {"catch_up": None}, {"overlap": "no"}, {"overlap": None}])
def test_a_wrong_option_is_refused_with_its_name(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is .*allowed"):
        Timetable("* * * * *", **wrong)  # type: ignore[arg-type]


def test_an_instant_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="no time zone"):
        Timetable("* * * * *").next_after(datetime(2026, 1, 1))


NOW = at("2026-01-02T12:00:30+00:00")


@pytest.mark.parametrize(("catch_up", "hours"), [("none", []), ("last", [10]), ("all", [7, 8, 9, 10])])
def test_of_missed_ticks_those_are_due_that_catch_up_says(catch_up: str, hours: list[int]) -> None:
    timetable = Timetable("0 0-10 * * *", catch_up=catch_up)
    assert [tick.hour for tick in timetable.due_ticks(at("2026-01-02T07:00+00:00"), NOW)] == hours


@pytest.mark.parametrize(("catch_up", "count"), [("none", 1), ("last", 1), ("all", 13)])
def test_a_tick_less_than_a_minute_late_is_not_missed(catch_up: str, count: int) -> None:
    found = list(Timetable("0 * * * *", catch_up=catch_up).due_ticks(at("2026-01-02T00:00+00:00"), NOW))
    assert (len(found), found[-1]) == (count, at("2026-01-02T12:00+00:00"))


@pytest.mark.parametrize("catch_up", ["none", "last", "all"])
def test_every_tick_of_the_last_minute_is_due(catch_up: str) -> None:
    """So that a schedule of seconds loses nothing to a runner that is busy for one."""
    timetable = Timetable("*/10 * * * * *", catch_up=catch_up)
    since = NOW - timedelta(seconds=20)
    assert list(timetable.due_ticks(since, NOW)) == [NOW - timedelta(seconds=seconds) for seconds in (20, 10, 0)]


@pytest.mark.parametrize("catch_up", ["none", "last", "all"])
def test_the_first_instant_of_the_last_minute_is_on_time(catch_up: str) -> None:
    timetable = Timetable("0 * * * *", catch_up=catch_up)
    tick = at("2026-01-02T12:00+00:00")
    assert list(timetable.due_ticks(tick, tick + ON_TIME)) == [tick]


def test_the_last_of_a_year_of_seconds_is_found_without_counting_them() -> None:
    """31 million ticks would take minutes, more than a test may."""
    timetable = Timetable("* * 0-7 * * *", catch_up="last")
    assert list(timetable.due_ticks(at("2025-01-01T00:00+00:00"), at("2025-12-31T09:00+00:00"))) == [
        at("2025-12-31T07:59:59+00:00")
    ]


def test_nothing_is_due_before_its_time() -> None:
    assert list(Timetable("0 * * * *", catch_up="all").due_ticks(NOW + timedelta(hours=1), NOW)) == []
