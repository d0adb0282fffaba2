"""What @job and .options take about uniqueness, and which calls are the same by it. No database is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import pytest
import running

from greenjobs import job
from greenjobs.errors import JobDefinitionError, OptionError, PayloadError, UniquenessError
from greenjobs.job import Job
from greenjobs.uniqueness import Uniqueness


@pytest.fixture(autouse=True)
def _application() -> Iterator[None]:
    registry = running._job_module._registry  # type: ignore[attr-defined]
    declared = dict(registry)
    registry.clear()
    yield
    registry.clear()
    registry.update(declared)


@dataclass
class Invoice:
    number: int
    note: str = ""


def report(customer_id: int, month: date = date(2026, 1, 1), *, draft: bool = False) -> None: ...


def send(invoice: Invoice) -> None: ...


def rule_of(declared: Job[Any, Any]) -> Uniqueness:
    assert declared.uniqueness is not None
    return declared.uniqueness


def identity(declared: Job[Any, Any], *args: Any, **kwargs: Any) -> str | None:
    return rule_of(declared).identity(declared.codec.encode(args, kwargs, max_bytes=10_000))


def joined(waiting: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {**waiting, **new}


# --- which calls are the same -----------------------------------------------------------------------------------------


def test_named_arguments_alone_count() -> None:
    declared = job(unique=("customer_id", "draft"))(report)
    same = identity(declared, 1, date(2026, 2, 1))
    assert identity(declared, customer_id=1) == same
    assert identity(declared, 2, date(2026, 2, 1)) != same
    assert identity(declared, 1, draft=True) != same


def test_argument_left_to_its_default_is_the_same_as_one_given_that_value() -> None:
    declared = job(unique=["month"])(report)
    assert identity(declared, 1) == identity(declared, 2, date(2026, 1, 1))
    assert identity(declared, 1) != identity(declared, 1, date(2026, 1, 2))


def test_default_that_cannot_be_stored_is_the_same_as_itself_only() -> None:
    unset: Any = object()

    @job(unique=("b",))
    def work(a: int, b: Any = unset) -> None: ...

    assert identity(work, 1) == identity(work, 2) != identity(work, 1, None)


def test_star_arguments_can_be_named() -> None:
    @job(unique=("rest",))
    def work(a: int, *rest: int) -> None: ...

    assert identity(work, 1) == identity(work, 2) != identity(work, 1, 3)
    assert identity(work, 1, 3) == identity(work, 2, 3)


def test_fields_of_the_one_dataclass_can_be_named_as_well_as_the_whole() -> None:
    by_number = job(name="a", unique=("number",))(send)
    assert (
        identity(by_number, Invoice(1)) == identity(by_number, Invoice(1, "again")) != identity(by_number, Invoice(2))
    )
    by_all = job(name="b", unique=("invoice",))(send)
    assert identity(by_all, Invoice(1)) != identity(by_all, Invoice(1, "again"))


@pytest.mark.parametrize(
    "unique_key",
    [
        "report-{customer_id}-{month.year}",
        lambda customer_id, month, draft: f"report-{customer_id}-{month.year}",
        lambda customer_id, month, **_: f"report-{customer_id}-{month.year}",
    ],
    ids=["format", "function", "function of some"],
)
def test_key_is_made_of_the_arguments_as_the_function_gets_them(unique_key: Any) -> None:
    """The month is a date, and there when it was left to its default."""
    declared = job(unique_key=unique_key)(report)
    assert identity(declared, 1) == identity(declared, 1, date(2026, 12, 31)) == '"report-1-2026"'
    assert identity(declared, 1, date(2025, 1, 1)) == '"report-1-2025"'


def test_key_of_a_dataclass_is_made_of_its_instance() -> None:
    by_format = job(name="a", unique_key="invoice-{invoice.number}")(send)
    by_function = job(name="b", unique_key=lambda invoice: f"invoice-{invoice.number}")(send)
    assert identity(by_format, Invoice(7)) == identity(by_function, Invoice(7, "x")) == '"invoice-7"'


def test_function_is_called_by_position_where_the_job_is() -> None:
    @job(unique_key=lambda number, *rest, **extra: f"{number} {rest} {sorted(extra)}")
    def work(number: int, /, *rest: int, **extra: int) -> None: ...

    assert identity(work, 1, 2, 3, b=4, a=5) == "\"1 (2, 3) ['a', 'b']\""


def test_call_whose_key_is_none_is_not_unique() -> None:
    declared = job(unique_key=lambda customer_id, **_: str(customer_id) if customer_id else None)(report)
    assert identity(declared, 0) is None
    assert identity(declared, 1) == '"1"'


def test_any_text_is_a_key() -> None:
    @job(unique_key=lambda text: text + "\ud800")
    def work(text: str) -> None: ...

    assert identity(work, "\n") != identity(work, "\t")


@pytest.mark.parametrize("returned", ["", 5, b"key", ["key"]], ids=repr)
def test_key_that_is_none_is_refused_and_names_the_job(returned: Any) -> None:
    declared = job(unique_key=lambda **_: returned)(report)
    with pytest.raises(UniquenessError, match=r"^report: unique_key returned .*allowed: a text that is not empty"):
        identity(declared, 1)


def test_key_that_cannot_be_made_is_refused_with_the_cause() -> None:
    def broken(**_: Any) -> str:
        raise LookupError("no such customer")

    declared = job(unique_key=broken)(report)
    with pytest.raises(UniquenessError, match=r"^report: unique_key failed: LookupError: no such customer") as caught:
        identity(declared, 1)
    assert isinstance(caught.value.__cause__, LookupError)


def test_payload_that_does_not_fit_has_no_key() -> None:
    """As a schedule may keep it from a former release."""
    with pytest.raises(UniquenessError, match="report.*lacks the argument 'customer_id'"):
        rule_of(job(unique_key="{customer_id}")(report)).identity("{}")


# --- merging ----------------------------------------------------------------------------------------------------------


def merged(merge: Callable[..., Any], waiting: str, new: str, max_bytes: int = 1000) -> str:
    rule = rule_of(job(unique=("customer_id",), on_conflict="merge", merge=merge)(report))
    merger = rule.merger(max_bytes)
    assert merger is not None
    return merger(waiting, new)


def test_merge_gets_arguments_as_the_function_does_and_what_it_returns_is_stored() -> None:
    def latest(waiting: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        assert "draft" not in waiting  # it was left to its default
        return {**new, "month": max(waiting["month"], new["month"])}

    text = merged(latest, '{"customer_id": 1, "month": "2026-03-01"}', '{"customer_id": 1, "month": "2026-02-01"}')
    assert text == '{"customer_id":1,"month":"2026-03-01"}'


def merge_calls(declared: Job[Any, Any], waiting: str, new: str) -> str:
    merger = rule_of(declared).merger(1000)
    assert merger is not None
    return merger(waiting, new)


def test_dataclass_is_merged_as_an_instance() -> None:
    def both(waiting: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        return {"invoice": Invoice(new["invoice"].number, f"{waiting['invoice'].note} {new['invoice'].note}")}

    declared = job(unique=("number",), on_conflict="merge", merge=both)(send)
    text = merge_calls(declared, '{"number": 1, "note": "a"}', '{"number": 1, "note": "b"}')
    assert text == '{"number":1,"note":"a b"}'


def test_arguments_that_go_by_position_are_merged_by_name() -> None:
    def both(waiting: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        return {**new, "rest": (*waiting["rest"], *new["rest"])}

    @job(unique=True, on_conflict="merge", merge=both)
    def work(number: int, /, *rest: int, **extra: int) -> None: ...

    text = merge_calls(work, '{"number": 1, "rest": [2]}', '{"number": 1, "rest": [3], "x": 4}')
    assert text == '{"number":1,"rest":[2,3],"x":4}'


@pytest.mark.parametrize(
    "returned, problem",
    [
        (None, "returned None; allowed: a dict of arguments by name"),
        ([("customer_id", 1)], "allowed: a dict of arguments by name"),
        ({1: 2}, "allowed: a dict of arguments by name"),
        ({}, "do not fit: .*lacks the argument 'customer_id'"),
        ({"customer_id": 1, "colour": 2}, "do not fit: .*'colour'"),
    ],
)
def test_merge_that_returns_no_arguments_of_the_job_is_refused_and_names_it(returned: Any, problem: str) -> None:
    with pytest.raises(UniquenessError, match=rf"^report: merge returned .*{problem}|^report: merge {problem}"):
        merged(lambda waiting, new: returned, '{"customer_id": 1}', '{"customer_id": 1}')


def test_merge_that_returns_what_cannot_be_stored_is_refused_with_the_path() -> None:
    with pytest.raises(PayloadError, match="merge of report: month is of type str, where date is annotated") as caught:
        merged(lambda waiting, new: {**new, "month": "May"}, '{"customer_id": 1}', '{"customer_id": 1}')
    assert caught.value.path == "month"


def test_merge_that_returns_too_much_is_refused() -> None:
    with pytest.raises(PayloadError, match="merge of report: the payload is .* max_payload_bytes limits to 20"):
        merged(joined, '{"customer_id": 1}', '{"customer_id": 1234567890}', max_bytes=20)


def test_merge_that_fails_is_refused_with_the_cause() -> None:
    with pytest.raises(UniquenessError, match=r"^report: merge failed: KeyError: 'draft'"):
        merged(lambda waiting, new: waiting["draft"], '{"customer_id": 1}', '{"customer_id": 1}')


def test_waiting_payload_of_another_release_cannot_be_merged() -> None:
    with pytest.raises(UniquenessError, match="cannot be merged: report: .*'colour'"):
        merged(joined, '{"customer_id": 1, "colour": 2}', '{"customer_id": 1}')


# --- what is refused --------------------------------------------------------------------------------------------------

_WRONG = [
    ({"unique": "customer_id"}, "unique is 'customer_id'; allowed: True, False, or a tuple of names"),
    ({"unique": ()}, r"unique is \(\); allowed"),
    ({"unique": (1,)}, r"unique is \(1,\); allowed"),
    ({"unique": ("customer",)}, "unique names 'customer'.*there are customer_id, month, draft"),
    ({"unique": True, "unique_key": "x"}, "give unique or unique_key, not both"),
    ({"unique_key": ""}, "unique_key is ''; allowed"),
    ({"unique_key": 5}, "unique_key is 5; allowed: a function, or a text"),
    ({"unique_key": "{customer}"}, "'customer' is no parameter; there are customer_id, month, draft"),
    ({"unique_key": "{}"}, "'' is no parameter"),
    ({"unique_key": "{customer_id"}, "is no format string: expected '}'"),
    ({"unique_key": lambda customer_id: ""}, "by name, but it cannot be: got an unexpected keyword argument 'month'"),
    ({"unique": True, "until": "done"}, "until is 'done'; allowed: 'started', 'finished', a number of seconds"),
    ({"unique": True, "until": 0}, "until is 0; allowed: more than 0"),
    ({"unique": True, "until": timedelta(-1)}, "until is .*; allowed: more than 0"),
    ({"unique": True, "until": float("nan")}, "until is nan; allowed: more than 0"),
    ({"unique": True, "until": True}, "until is True; allowed"),
    ({"unique": True, "on_conflict": "raise"}, "on_conflict is 'raise'; allowed: 'keep', 'replace', 'extend', 'merge'"),
    ({"unique": True, "on_conflict": ["keep"]}, r"on_conflict is \['keep'\]; allowed"),
    ({"unique": True, "on_conflict": "merge"}, "give both, or neither"),
    ({"until": "finished"}, "until is for unique jobs"),
    ({"on_conflict": "replace"}, "on_conflict is for unique jobs"),
]

_WRONG_MERGES = [
    ({"unique": True, "merge": joined}, "give both, or neither"),
    ({"unique": True, "on_conflict": "replace", "merge": joined}, "give both, or neither"),
    ({"on_conflict": "merge", "merge": joined}, "on_conflict is for unique jobs"),
    ({"unique": True, "on_conflict": "merge", "merge": 5}, "merge is 5; allowed: a function of two dicts, but is no"),
    ({"unique": True, "on_conflict": "merge", "merge": lambda one: one}, "but it cannot be: too many positional"),
]


@pytest.mark.parametrize("settings, problem", _WRONG + _WRONG_MERGES, ids=repr)
def test_wrong_setting_is_refused_at_import_and_names_the_job(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(JobDefinitionError, match=rf"^report: .*{problem}"):
        job(**settings)(report)


@pytest.mark.parametrize("settings, problem", _WRONG, ids=repr)
def test_wrong_option_of_a_call_is_refused_and_names_the_job(settings: dict[str, Any], problem: str) -> None:
    declared = job(report)
    with pytest.raises(OptionError, match=rf"^report: .*{problem}"):
        declared.options(**settings)


def test_name_of_what_double_star_takes_is_refused() -> None:
    with pytest.raises(JobDefinitionError, match="unique names 'extra'"):

        @job(unique=("extra",))
        def work(**extra: int) -> None: ...


def test_dataclass_and_its_fields_are_refused_together() -> None:
    with pytest.raises(JobDefinitionError, match="name 'invoice', or fields of it, not both"):
        job(unique=("invoice", "number"))(send)


# --- one call ---------------------------------------------------------------------------------------------------------


def rule_of_call(declared: Job[Any, Any], **options: Any) -> Uniqueness | None:
    return declared.options(**options)._options.uniqueness


def test_call_is_as_its_job_is_declared() -> None:
    declared = job(unique=True, until="finished", on_conflict="replace")(report)
    assert rule_of_call(declared) is rule_of_call(declared, priority=1) is declared.uniqueness


def test_call_may_say_one_thing_otherwise() -> None:
    declared = job(unique=("customer_id",), until="finished", on_conflict="merge", merge=joined)(report)
    window = rule_of_call(declared, until=timedelta(minutes=1))
    assert window is not None and window.merge is not None
    assert (window.until_finished, window.window_seconds, window.on_conflict) == (False, 60.0, "merge")
    kept = rule_of_call(declared, on_conflict="keep", unique_key="{month}")
    assert kept is not None
    assert (kept.until_finished, kept.on_conflict, kept.merge) == (True, "keep", None)
    assert kept.identity('{"customer_id": 1}') == '"2026-01-01"'


def test_call_of_an_ordinary_job_may_be_unique_and_the_other_way_round() -> None:
    assert rule_of_call(job(name="a")(report), unique=True, until=5) is not None
    declared = job(name="b", unique=True, until="finished")(report)
    assert rule_of_call(declared, unique=False) is None
    with pytest.raises(OptionError, match="until is for unique jobs"):
        declared.options(unique=False, until=5)
