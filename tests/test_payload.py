"""Arguments to JSON and back: what is stored, what comes back, what is refused, and with which words."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import inspect
import json
import pprint
import subprocess
import sys
import typing
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import InitVar, dataclass, field
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NamedTuple, NewType, Optional, TypeVar, Union
from uuid import UUID

import pytest
from dataclasses_json import CatchAll, DataClassJsonMixin, LetterCase, Undefined, config, dataclass_json, global_config
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from typing_extensions import TypeAliasType, TypeVarTuple, Unpack
from werkzeug.datastructures import MultiDict
from werkzeug.local import LocalProxy

from greenjobs.errors import JobDefinitionError, PayloadError, PayloadMismatch
from greenjobs.payload import Codec

if TYPE_CHECKING:
    from some_models import User

LIMIT = 1024 * 1024
UNTIMED = settings(deadline=None)


def codec_of(function: Callable[..., Any]) -> Codec:
    return Codec(function, job_name="mail")


def job_taking(annotation: Any) -> Callable[[Any], Any]:
    """A job with one parameter, named value."""

    def job(value):
        return value

    job.__annotations__["value"] = annotation
    return job


def taking(annotation: Any) -> Codec:
    return codec_of(job_taking(annotation))


def encode(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    return codec_of(function).encode(args, kwargs, max_bytes=LIMIT)


def stored(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return json.loads(encode(function, *args, **kwargs))


def call_after_storing(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    codec = codec_of(function)
    args, kwargs = codec.decode(codec.encode(args, kwargs, max_bytes=LIMIT))
    return function(*args, **kwargs)


def exactly(value: Any) -> str:
    """Its repr, but for the order of sets: equal ones may have several, when hashes of their elements collide."""
    return pprint.pformat(value, width=1)


def round_trip(annotation: Any, value: Any) -> Any:
    codec = taking(annotation)
    _, kwargs = codec.decode(codec.encode((value,), {}, max_bytes=LIMIT))
    return kwargs["value"]


def refusal(annotation: Any, value: Any) -> PayloadError:
    with pytest.raises(PayloadError) as raised:
        taking(annotation).encode((value,), {}, max_bytes=LIMIT)
    return raised.value


def mismatch(annotation: Any, data: Any) -> PayloadMismatch:
    with pytest.raises(PayloadMismatch) as raised:
        taking(annotation).decode(json.dumps({"value": data}))
    return raised.value


def send_email(to, subject="Hi", body=""):
    return to, subject, body


# What is stored


def test_data_is_one_object_of_the_arguments_by_parameter_name():
    assert encode(send_email, "a@example.com", body="...") == '{"to":"a@example.com","body":"..."}'


def test_arguments_left_to_their_defaults_are_not_stored():
    assert stored(send_email, "a@example.com") == {"to": "a@example.com"}


def test_call_without_arguments_stores_an_empty_object():
    def clean_up(): ...

    assert encode(clean_up) == "{}"
    assert call_after_storing(clean_up) is None


def test_equal_calls_give_equal_text_by_position_and_by_name():
    texts = {
        encode(send_email, "a", "b", "c"),
        encode(send_email, "a", body="c", subject="b"),
        encode(send_email, body="c", subject="b", to="a"),
    }
    assert texts == {'{"to":"a","subject":"b","body":"c"}'}


def test_equal_dicts_give_equal_text_whatever_the_order_of_their_keys():
    assert encode(send_email, {"b": {"y": 1, "x": 2}, "a": 1}) == encode(send_email, {"a": 1, "b": {"x": 2, "y": 1}})


def test_equal_extra_arguments_give_equal_text_whatever_their_order():
    def log(**extra): ...

    assert encode(log, b=1, a=2) == encode(log, a=2, b=1)


def test_parameters_are_named_in_the_order_of_the_signature():
    def job(a, /, b, *rest, c, **extra): ...

    assert codec_of(job).parameters == ("a", "b", "rest", "c", "extra")


# Binding


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"send_email\(\) missing a required argument: 'to'"),
        (("a", "b", "c", "d"), {}, r"send_email\(\) too many positional arguments"),
        (("a",), {"to": "b"}, r"send_email\(\) multiple values for argument 'to'"),
        (("a",), {"cc": "b"}, r"send_email\(\) got an unexpected keyword argument 'cc'"),
    ],
)
def test_wrong_call_raises_type_error_as_python_words_it(args, kwargs, message):
    with pytest.raises(TypeError, match=message):
        encode(send_email, *args, **kwargs)


def test_positional_only_parameters_are_passed_by_position():
    def job(a, b=2, /, c=3):
        return a, b, c

    assert stored(job, 7, c=8) == {"a": 7, "c": 8}
    assert call_after_storing(job, 7, c=8) == (7, 2, 8)


def test_positional_only_argument_missing_before_another_gets_its_default():
    def job(a=1, b=2, /):
        return a, b

    args, kwargs = codec_of(job).decode('{"b": 5}')
    assert job(*args, **kwargs) == (1, 5)


def test_positional_only_parameter_is_not_taken_by_name():
    def job(a, /): ...

    with pytest.raises(TypeError, match=r"job\(\).*positional.only"):
        encode(job, a=1)


def test_rest_is_stored_as_a_list_under_its_name():
    def job(a, b=2, *rest, c=3):
        return a, b, rest, c

    assert stored(job, 1, 5, 6, 7, c=8) == {"a": 1, "b": 5, "rest": [6, 7], "c": 8}
    assert call_after_storing(job, 1, 5, 6, 7, c=8) == (1, 5, (6, 7), 8)


def test_rest_that_is_empty_is_not_stored():
    def job(a, *rest):
        return a, rest

    assert stored(job, 1) == {"a": 1}
    assert call_after_storing(job, 1) == (1, ())


def test_rest_without_the_arguments_before_it_gets_their_defaults():
    def job(a=1, *rest):
        return a, rest

    args, kwargs = codec_of(job).decode('{"rest": [2, 3]}')
    assert job(*args, **kwargs) == (1, (2, 3))


def test_rest_that_is_not_an_array_does_not_fit():
    def job(*rest): ...

    with pytest.raises(PayloadMismatch, match="rest is not an array") as raised:
        codec_of(job).decode('{"rest": 5}')
    assert raised.value.path == "rest"


def test_annotated_rest_comes_back_as_annotated():
    def job(*days: date):
        return days

    assert call_after_storing(job, date(2024, 2, 29), date(2025, 1, 1)) == (date(2024, 2, 29), date(2025, 1, 1))


def test_refused_item_of_the_rest_is_named_by_its_place():
    def job(*days: date): ...

    with pytest.raises(PayloadError) as raised:
        encode(job, date(2024, 2, 29), "tomorrow")
    assert raised.value.path == "days[1]"


def test_extra_arguments_are_stored_beside_the_others():
    def job(a, **extra):
        return a, extra

    assert stored(job, 1, b=2) == {"a": 1, "b": 2}
    assert call_after_storing(job, 1, b=2) == (1, {"b": 2})


def test_extra_argument_named_like_the_extra_parameter_is_one_of_them():
    def job(**extra):
        return extra

    assert call_after_storing(job, extra=1) == {"extra": 1}


def test_extra_argument_named_like_a_positional_only_parameter_is_refused():
    def job(a, /, **extra): ...

    with pytest.raises(PayloadError, match=r"a is given to \*\*extra") as raised:
        encode(job, 1, a=2)
    assert raised.value.path == "a"


def test_extra_argument_named_like_the_rest_is_refused():
    def job(*rest, **extra): ...

    with pytest.raises(PayloadError, match=r"rest is given to \*\*extra"):
        encode(job, 1, rest=2)


def test_annotated_extra_arguments_come_back_as_annotated():
    def job(**days: date):
        return days

    assert call_after_storing(job, a=date(2024, 2, 29)) == {"a": date(2024, 2, 29)}


@pytest.mark.parametrize("name", ["a\x00b", "\ud800"])
def test_extra_argument_whose_name_cannot_be_stored_is_refused(name):
    def job(**extra): ...

    with pytest.raises(PayloadError, match="the name .* of an argument contains"):
        encode(job, **{name: 1})


PARAMETERS = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from(list(inspect._ParameterKind)), st.booleans()),
    unique_by=lambda parameter: parameter[0],
    max_size=5,
)


def signature_from(parameters: list[tuple[str, Any, bool]]) -> inspect.Signature:
    """A valid signature: sorted by kind, one *rest and one **extra at most, defaults at the end."""
    ordered = sorted(parameters, key=lambda parameter: parameter[1])
    result = []
    seen = set()
    defaults_began = False
    for name, kind, has_default in ordered:
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            if kind not in seen:
                result.append(inspect.Parameter(name, kind))
            seen.add(kind)
            continue
        positional = kind is not inspect.Parameter.KEYWORD_ONLY
        defaults_began = defaults_began or (positional and has_default)
        default = 0 if (defaults_began if positional else has_default) else inspect.Parameter.empty
        result.append(inspect.Parameter(name, kind, default=default))
    return inspect.Signature(result)


@UNTIMED
@given(
    PARAMETERS.map(signature_from),
    st.lists(st.integers(1, 9), max_size=5),
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 9), max_size=5),
)
def test_calls_are_bound_as_python_binds_them(signature, args, kwargs):
    def job(*args, **kwargs): ...

    job.__signature__ = signature
    try:
        expected = signature.bind(*args, **kwargs)
    except TypeError as error:
        with pytest.raises(TypeError) as raised:
            encode(job, *args, **kwargs)
        assert str(raised.value) == f"job() {error}"
        return
    codec = codec_of(job)
    try:
        text = codec.encode(tuple(args), kwargs, max_bytes=LIMIT)
    except PayloadError as error:
        assert "is a parameter as well" in str(error)
        return
    restored_args, restored_kwargs = codec.decode(text)
    restored = signature.bind(*restored_args, **restored_kwargs)
    # A default that had to be passed by position is the same argument as one that was left out.
    expected.apply_defaults()
    restored.apply_defaults()
    assert restored.arguments == expected.arguments


# Plain JSON

TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(TEXT, children, max_size=4),
    max_leaves=20,
)


@UNTIMED
@given(JSON, JSON)
def test_whatever_is_json_comes_back_equal(to, subject):
    assert call_after_storing(send_email, to, subject=subject) == (to, subject, "")


@UNTIMED
@given(
    st.recursive(
        st.from_type(type).flatmap(lambda kind: st.from_type(kind) if kind is not type else st.just(kind))
        | st.text(st.characters())
        | st.floats()
        | st.integers()
        | st.complex_numbers(),
        lambda children: st.lists(children) | st.dictionaries(st.text() | st.integers(), children),
        max_leaves=5,
    )
)
def test_whatever_is_not_json_is_refused_with_payload_error_only(value):
    try:
        text = encode(send_email, value)
    except PayloadError as error:
        assert error.path.startswith("to")
    else:
        json.loads(text)


class Hostile:
    """Answers every question with an error."""

    def __getattribute__(self, name):
        raise RuntimeError(name)

    __repr__ = __str__ = __eq__ = __hash__ = __bool__ = __len__ = __iter__ = __getattribute__


@pytest.mark.parametrize("annotation", [Any, datetime, float, list[datetime], Optional[UUID], Union[int, datetime]])
def test_object_that_raises_whatever_is_done_with_it_is_refused(annotation):
    assert refusal(annotation, Hostile()).path == "value"


def test_tuple_without_an_annotation_comes_back_as_a_list():
    assert call_after_storing(send_email, (1, (2, 3)))[0] == [1, [2, 3]]


@pytest.mark.parametrize(
    "value",
    [
        collections.OrderedDict(b=1, a=2),
        collections.defaultdict(list, a=[1]),
        collections.Counter("aab"),
    ],
)
def test_dicts_of_the_collections_module_come_back_as_dict(value):
    result = call_after_storing(send_email, value)[0]
    assert result == dict(value)
    assert type(result) is dict


class Cents(int):
    pass


class Ratio(float):
    pass


@pytest.mark.parametrize(("value", "plain"), [(Markup("<b>"), "<b>"), (Cents(5), 5), (Ratio(0.5), 0.5)])
def test_subclasses_of_str_int_and_float_come_back_as_what_they_extend(value, plain):
    result = call_after_storing(send_email, value)[0]
    assert result == plain
    assert type(result) is type(plain)


def test_keys_of_a_subclass_of_str_come_back_as_str():
    (key,) = call_after_storing(send_email, {Markup("a"): 1})[0]
    assert type(key) is str


@pytest.mark.parametrize("value", [-(2**63), 2**64 - 1, 1e16, 1.7976931348623157e308, 5e-324, -0.0])
def test_numbers_at_the_edges_come_back_equal(value):
    assert call_after_storing(send_email, value)[0] == value


def test_large_float_is_written_so_that_jsonb_makes_no_integer_of_it():
    """As 4.397738565085685e16, which is orjson's way, jsonb would store 43977385650856850, another number."""
    assert encode(send_email, [4.397738565085685e16, -1e16]) == '{"to":[43977385650856848.0,-10000000000000000.0]}'


def test_backslash_before_u0000_is_just_text():
    assert call_after_storing(send_email, "\\u0000")[0] == "\\u0000"


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Mood(str, enum.Enum):
    GOOD = "good"


class Point(NamedTuple):
    x: int
    y: int


class Words(list):
    pass


@dataclass
class Item:
    name: str
    amount: int = 1


@dataclass
class Node:
    name: str
    children: list[Node] = field(default_factory=list)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (float("nan"), "is nan, which JSON does not have"),
        (float("inf"), "is inf"),
        (float("-inf"), "is -inf"),
        (Ratio("nan"), "is nan"),
        (2**64, "more than 64 bits: pass it as str"),
        (-(2**63) - 1, "more than 64 bits"),
        ("a\x00b", r"contains \u0000"),
        ("\ud800", "lone surrogate (at index 0)"),
        ({"a\x00b": 1}, r"has a key that contains \u0000"),
        ({"\udfff": 1}, "has a key that contains a lone surrogate"),
        ({1: 1}, "has a key of type int; keys in JSON are text"),
        ({None: 1}, "has a key of type NoneType"),
        ({Mood.GOOD: 1}, "has a key of type Mood"),
        (b"x", "is of type bytes, which JSON does not have: pass text"),
        (bytearray(b"x"), "base64"),
        ({1}, "is of type set, which JSON does not have: annotate it as set, or pass a list"),
        (frozenset(), "annotate it as frozenset"),
        (datetime(2024, 1, 1), "annotate it as datetime, or pass .isoformat()"),
        (date(2024, 1, 1), "annotate it as date, or pass .isoformat()"),
        (time(1), "annotate it as time"),
        (timedelta(1), "annotate it as timedelta, or pass .total_seconds()"),
        (uuid.UUID(int=1), "annotate it as UUID, or pass str(...)"),
        (Decimal(1), "annotate it as Decimal, or pass str(...)"),
        (Color.RED, "annotate it as Color, or pass its .value"),
        (Level.LOW, "annotate it as Level, or pass its .value"),
        (Mood.GOOD, "annotate it as Mood, or pass its .value"),
        (Item("a"), "annotate it as Item"),
        (Point(1, 2), "is of type Point, which JSON does not have: pass list(...) of it"),
        (Words(), "pass list(...) of it"),
        (MultiDict([("a", 1), ("a", 2)]), "is of type MultiDict, which JSON does not have: pass dict(...) of it"),
        (LocalProxy(lambda: "text"), "._get_current_object()"),
        (object(), "is of type object, which JSON does not have: pass its id"),
        (range(3), "is of type range"),
        (1j, "is of type complex"),
    ],
)
def test_what_json_cannot_carry_is_refused_with_a_way_out(value, hint):
    error = refusal(Any, [value])
    assert hint in str(error)
    assert str(error).startswith("mail: value[0] ")
    assert error.path == "value[0]"


def test_number_of_numpy_is_refused_with_a_way_out():
    class int64:
        def __index__(self):
            return 5

    assert "pass int(...) of it" in str(refusal(Any, int64()))


def test_path_leads_through_lists_and_dicts():
    assert refusal(Any, {"x": [0, {"y": (1, b"")}]}).path == "value['x'][1]['y'][1]"


def test_path_cuts_a_long_key():
    assert refusal(Any, {"k" * 1000: b""}).path == f"value['{'k' * 40}'...]"


def test_path_to_a_list_of_dataclasses():
    error = refusal(list[Item], [Item("a"), Item("b"), Item(b"")])
    assert error.path == "value[2].name"


def test_list_that_contains_itself_is_refused_as_such():
    value: list[Any] = [1]
    value.append({"again": value})
    error = refusal(Any, {"list": value})
    assert "value['list'] contains itself" in str(error)
    assert error.path == "value['list']"


def test_dataclass_that_contains_itself_is_refused_as_such():
    node = Node("a")
    node.children.append(node)
    assert "value.children contains itself" in str(refusal(Optional[Node], node))


def nested(levels: int) -> Any:
    return functools.reduce(lambda inner, _: [inner], range(levels), 0)


def test_lists_nested_ninety_nine_levels_deep_are_stored():
    assert call_after_storing(send_email, nested(99))[0] == nested(99)


def test_lists_nested_too_deep_are_refused():
    assert "nested more than 100 levels deep" in str(refusal(Any, nested(101)))


def test_two_keys_that_are_stored_alike_are_refused():
    class Lying(str):
        __hash__ = object.__hash__

        def __eq__(self, other):
            return self is other

    assert "two keys that are both stored as 'a'" in str(refusal(Any, {Lying("a"): 1, Lying("a"): 2}))


def test_payload_of_the_largest_size_is_stored():
    assert codec_of(send_email).encode(("ä",), {}, max_bytes=len('{"to":"ä"}'.encode()))


def test_payload_over_the_largest_size_is_refused_with_size_limit_and_option():
    with pytest.raises(PayloadError) as raised:
        codec_of(send_email).encode(("ä",), {}, max_bytes=10)
    assert "the payload is 11 bytes of JSON, which max_payload_bytes limits to 10" in str(raised.value)
    assert raised.value.path == ""


# Annotations that make the round trip

CEST = timezone(timedelta(hours=2))
UserId = NewType("UserId", UUID)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Flags(enum.IntFlag):
    READ = 1
    WRITE = 2


class Mixed(enum.Enum):
    TEXT = "1"
    NUMBER = 1
    HALF = 0.5


@pytest.mark.parametrize(
    ("annotation", "value", "as_json"),
    [
        (datetime, datetime(2024, 2, 29, 12, 30, 15, 1), "2024-02-29T12:30:15.000001"),
        (datetime, datetime(2024, 2, 29, 12, tzinfo=timezone.utc), "2024-02-29T12:00:00+00:00"),
        (datetime, datetime(2024, 2, 29, 12, tzinfo=CEST), "2024-02-29T12:00:00+02:00"),
        (date, date(2024, 2, 29), "2024-02-29"),
        (time, time(23, 59, 59, 5), "23:59:59.000005"),
        (time, time(23, 59, tzinfo=CEST), "23:59:00+02:00"),
        (timedelta, timedelta(days=-1), -86400),
        (timedelta, timedelta(seconds=1, microseconds=500_001), 1.500001),
        (timedelta, timedelta.max - timedelta(microseconds=999_999), 86399999999999),
        (UUID, UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (Decimal, Decimal("19.90"), "19.90"),
        (Decimal, Decimal("1E+400"), "1E+400"),
        (Decimal, Decimal("-Infinity"), "-Infinity"),
        (Color, Color.RED, "red"),
        (Level, Level.HIGH, 2),
        (Mood, Mood.GOOD, "good"),
        (Flags, Flags.READ | Flags.WRITE, 3),
        (Mixed, Mixed.NUMBER, 1),
        (Mixed, Mixed.TEXT, "1"),
        (float, 1e16, 1e16),
        (Optional[datetime], None, None),
        (Optional[date], date(2024, 2, 29), "2024-02-29"),
        (Union[datetime, int], 5, 5),
        (Union[datetime, int], datetime(2024, 1, 1), "2024-01-01T00:00:00"),
        (Union[list[date], date, None], [date(2024, 1, 1)], ["2024-01-01"]),
        (Union[list[date], date, None], date(2024, 1, 1), "2024-01-01"),
        (Union[Item, str], "a", "a"),
        (Union[Item, str], Item("a"), {"name": "a", "amount": 1}),
        (list[UUID], [UUID(int=1)], ["00000000-0000-0000-0000-000000000001"]),
        (Sequence[date], [date(2024, 1, 1)], ["2024-01-01"]),
        (Iterable[date], [date(2024, 1, 1)], ["2024-01-01"]),
        (typing.List[date], [date(2024, 1, 1)], ["2024-01-01"]),  # noqa: UP006
        (dict[str, Decimal], {"a": Decimal("1.0")}, {"a": "1.0"}),
        (Mapping[str, list[date]], {"a": [date(2024, 1, 1)]}, {"a": ["2024-01-01"]}),
        (dict[Color, int], {Color.RED: 1}, {"red": 1}),
        (dict[UUID, Decimal], {UUID(int=0): Decimal(1)}, {"00000000-0000-0000-0000-000000000000": "1"}),
        (dict[Literal["a"], date], {"a": date(2024, 1, 1)}, {"a": "2024-01-01"}),
        (tuple, (1, "a"), [1, "a"]),
        (typing.Tuple, (1, "a"), [1, "a"]),  # noqa: UP006
        (tuple[()], (), []),
        (typing.Tuple[()], (), []),  # noqa: UP006
        (tuple[int, Unpack[Ts]], (1, "a"), [1, "a"]),
        (Union[float, str], 1.0, 1.0),
        (Union[float, list[date]], [date(2024, 1, 1)], ["2024-01-01"]),
        (TypeAliasType("Days", list[date]), [date(2024, 1, 1)], ["2024-01-01"]),
        (TypeAliasType("When", Annotated[date, "when"]), date(2024, 1, 1), "2024-01-01"),
        (Union[TypeAliasType("Maybe", Optional[date]), list[int]], None, None),
        (Union[TypeAliasType("Maybe", Optional[date]), list[int]], [1], [1]),
        (Union[TypeAliasType("Maybe", Optional[date]), list[int]], date(2024, 1, 1), "2024-01-01"),
        (Union[TypeAliasType("Either", Union[date, int]), list[date]], 5, 5),
        (tuple[int, ...], (1, 2), [1, 2]),
        (tuple[date, int], (date(2024, 1, 1), 5), ["2024-01-01", 5]),
        (list[tuple[int, int]], [(1, 2)], [[1, 2]]),
        (set, {3, 1, 2}, [1, 2, 3]),
        (set[str], {"b", "a"}, ["a", "b"]),
        (frozenset[date], frozenset({date(2024, 1, 2), date(2024, 1, 1)}), ["2024-01-01", "2024-01-02"]),
        (AbstractSet[int], {1}, [1]),
        (set[tuple[int, int]], {(1, 2)}, [[1, 2]]),
        (Literal["a", 1], "a", "a"),
        (Literal[Color.RED], Color.RED, "red"),
        (Annotated[date, "when"], date(2024, 1, 1), "2024-01-01"),
        (list[Annotated[date, "when"]], [date(2024, 1, 1)], ["2024-01-01"]),
        (UserId, UserId(UUID(int=0)), "00000000-0000-0000-0000-000000000000"),
        (list[Item], [Item("a", 2)], [{"name": "a", "amount": 2}]),
        (dict[str, Item], {"x": Item("a", 2)}, {"x": {"name": "a", "amount": 2}}),
        (Optional[Item], Item("a", 2), {"name": "a", "amount": 2}),
    ],
    ids=repr,
)
def test_annotated_value_comes_back_as_itself(annotation, value, as_json):
    codec = taking(annotation)
    text = codec.encode((value,), {}, max_bytes=LIMIT)
    assert json.loads(text) == {"value": as_json}
    _, kwargs = codec.decode(text)
    assert kwargs["value"] == value
    assert exactly(kwargs["value"]) == exactly(value)  # 1 == 1.0 == True, and Decimal("1") == Decimal("1.0")


@pytest.mark.parametrize(
    "annotation",
    [
        Any,
        object,
        T,
        "what the job is about",
        str,
        int,
        bool,
        None,
        list,
        dict,
        list[str],
        dict[str, Any],
        Mapping,
        Sequence[int],
        Iterable,
        typing.Hashable,
        typing.Dict,  # noqa: UP006
        typing.SupportsInt,
        int | str | None,
        Union[int, float],
        Literal["a"],
        typing.TypedDict("Options", {"size": int}),
    ],
    ids=repr,
)
def test_annotation_that_asks_for_no_conversion_is_not_enforced(annotation):
    for value in ("text", 5, 1.5, None, [1], {"a": [1, None]}):
        assert round_trip(annotation, value) == value


def test_protocol_that_cannot_be_asked_is_plain_json():
    class HasName(typing.Protocol):
        name: str

    assert round_trip(HasName, "x") == "x"


def test_float_that_jsonb_made_an_integer_comes_back_as_float():
    _, kwargs = taking(list[float]).decode('{"value": [10000000000000000, 1, 1.5]}')
    assert repr(kwargs["value"]) == "[1e+16, 1.0, 1.5]"


def test_integer_stays_one_where_a_float_may_stand_as_well():
    _, kwargs = taking(Union[int, float]).decode('{"value": 1}')
    assert repr(kwargs["value"]) == "1"


def test_instant_in_a_named_zone_comes_back_as_the_same_instant():
    from zoneinfo import ZoneInfo

    value = datetime(2024, 7, 1, 12, tzinfo=ZoneInfo("Europe/Berlin"))
    result = round_trip(datetime, value)
    assert result == value
    assert result.utcoffset() == timedelta(hours=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-01-01T00:00:00Z", datetime(2024, 1, 1, tzinfo=timezone.utc)),
        ("2024-01-01T00:00:00.123456789Z", datetime(2024, 1, 1, microsecond=123456, tzinfo=timezone.utc)),
        ("2024-01-01T00:00:00.12345+00:00", datetime(2024, 1, 1, microsecond=123450, tzinfo=timezone.utc)),
        ("2024-01-01 00:00:00.5+02", datetime(2024, 1, 1, microsecond=500_000, tzinfo=CEST)),
        ("2024-01-01T00:00:00+0200", datetime(2024, 1, 1, tzinfo=CEST)),
    ],
)
def test_instants_are_read_as_rust_and_postgresql_write_them(text, expected):
    _, kwargs = taking(datetime).decode(json.dumps({"value": text}))
    assert kwargs["value"] == expected


def test_time_is_read_as_postgresql_writes_it():
    _, kwargs = taking(time).decode('{"value": "12:00:00.5"}')
    assert kwargs["value"] == time(12, 0, 0, 500_000)


def test_decimal_is_read_from_a_number_by_its_shortest_text():
    _, kwargs = taking(Decimal).decode('{"value": 19.99}')
    assert kwargs["value"] == Decimal("19.99")


def test_subclass_of_datetime_is_written_in_the_one_format():
    class Odd(datetime):
        def isoformat(self, *args):
            return "odd"

    assert round_trip(datetime, Odd(2024, 1, 1)) == datetime(2024, 1, 1)


def test_default_of_none_makes_an_annotated_parameter_optional():
    def job(when=None):
        return when

    job.__annotations__["when"] = datetime
    assert call_after_storing(job, None) is None
    assert call_after_storing(job) is None


def test_lists_may_be_passed_where_tuples_are_annotated():
    assert round_trip(tuple[int, ...], [1, 2]) == (1, 2)


def test_annotations_are_taken_from_a_wrapped_function():
    def job(when: date):
        return when

    @functools.wraps(job)
    def wrapper(*args, **kwargs):
        return job(*args, **kwargs)

    assert call_after_storing(wrapper, date(2024, 1, 1)) == date(2024, 1, 1)


def test_annotation_imported_for_type_checking_only_is_plain_json():
    def job(user: User, when: date):
        return user, when

    assert call_after_storing(job, 5, date(2024, 1, 1)) == (5, date(2024, 1, 1))


def test_refusal_says_that_an_annotation_was_not_used_because_it_could_not_be_resolved():
    def job(user: User): ...

    with pytest.raises(PayloadError, match=r"annotation, User, could not be resolved .* not under TYPE_CHECKING"):
        encode(job, object())


def test_type_alias_that_refers_to_itself_is_plain_json_there():
    class TypeAliasType:
        """What `type Nested = list[Nested] | int` makes in Python 3.12."""

        __name__ = "Nested"

    alias: Any = TypeAliasType()
    alias.__value__ = Union[list[alias], int]
    assert round_trip(alias, [[1]]) == [[1]]


def test_type_alias_that_cannot_be_resolved_is_plain_json():
    class TypeAliasType:
        """What `type Users = list[User]` makes in Python 3.12, with User imported for type checking only."""

        __name__ = "Users"

        @property
        def __value__(self):
            raise NameError("User")

    alias: Any = TypeAliasType()
    assert round_trip(alias, [5]) == [5]
    assert "its annotation, Users, could not be resolved" in str(refusal(alias, object()))


# Values that are not what is annotated


@pytest.mark.parametrize(
    ("annotation", "value", "hint"),
    [
        (datetime, "2024-01-01T00:00:00", "value is of type str, where datetime is annotated"),
        (datetime, date(2024, 1, 1), "is of type date, where datetime is annotated"),
        (date, datetime(2024, 1, 1), "is of type datetime, where date is annotated"),
        (datetime, None, "is None, where datetime is annotated: annotate it as datetime | None"),
        (UUID, "0" * 32, "is of type str, where UUID is annotated"),
        (Decimal, 1.5, "is of type float, where Decimal is annotated"),
        (Decimal, Decimal("NaN"), "is NaN or NaT"),
        (Decimal, Decimal("sNaN"), "cannot be written as Decimal: InvalidOperation"),
        (timedelta, timedelta(days=365_000, microseconds=1), "too long to be kept to the microsecond"),
        (Color, "red", "is of type str, where Color is annotated"),
        (Level, 1, "is of type int, where Level is annotated"),
        (list[date], date(2024, 1, 1), "is of type date, where list[datetime.date] is annotated"),
        (list[date], {date(2024, 1, 1)}, "is of type set, where list[datetime.date] is annotated"),
        (set[int], [1], "is of type list, where set[int] is annotated"),
        (set, {(1, 2)}, "holds tuples, which come back as lists"),
        (tuple[int, int], (1, 2, 3), "has 3 items, where tuple[int, int] is annotated"),
        (tuple[int, int], 5, "is of type int, where tuple[int, int] is annotated"),
        (tuple[int, ...], Point(1, 2), "is of type Point, where tuple[int, ...] is annotated"),
        (dict[str, date], [1], "is of type list, where dict[str, datetime.date] is annotated"),
        (dict[Color, int], {"red": 1}, "is of type str, where Color is annotated"),
        (Item, {"name": "a"}, "is of type dict, where Item is annotated"),
        (Optional[date], "2024", "is of type str, where date is annotated"),
        (date, LocalProxy(lambda: date(2024, 1, 1)), "is of type LocalProxy, where date is annotated"),
    ],
    ids=repr,
)
def test_value_that_is_not_what_is_annotated_is_refused(annotation, value, hint):
    error = refusal(annotation, value)
    assert hint in str(error)
    assert error.path == "value"


@pytest.mark.parametrize(
    ("annotation", "value", "path"),
    [
        (list[date], [date(2024, 1, 1), None], "value[1]"),
        (dict[str, list[date]], {"a": [5]}, "value['a'][0]"),
        (tuple[int, date], (1, 2), "value[1]"),
        (Union[list[date], None], [1], "value[0]"),
    ],
    ids=repr,
)
def test_path_leads_to_the_item_that_is_not_what_is_annotated(annotation, value, path):
    assert refusal(annotation, value).path == path


def test_time_zone_that_fails_is_refused_with_its_error():
    from datetime import tzinfo

    class Broken(tzinfo):
        def utcoffset(self, when):
            raise KeyError("no such zone")

    assert "cannot be written as datetime: KeyError" in str(refusal(datetime, datetime(2024, 1, 1, tzinfo=Broken())))


# Declarations that are refused


class Account:
    pass


class Email(str):
    pass


class NoJson(enum.Enum):
    THING = object()


class Absent(enum.Enum):
    NOTHING = None


class Empty(enum.Enum):
    pass


@dataclass
class Box(Generic[T]):
    content: T


@pytest.mark.parametrize(
    ("annotation", "hint"),
    [
        (Account, "Account, which JSON cannot carry: pass its id"),
        (bytes, "annotated as bytes, which JSON cannot carry: annotate it as str and pass text"),
        (complex, "which JSON cannot carry"),
        (Path, "which JSON cannot carry"),
        (Callable[[], None], "which JSON cannot carry"),
        (type[int], "which JSON cannot carry"),
        (typing.Iterator[int], "which JSON cannot carry"),
        (Email, "annotate it as str, and convert it in the job"),
        (collections.OrderedDict, "annotate it as dict"),
        (Point, "annotate it as tuple[...], or make it a dataclass"),
        (list[Account], "which JSON cannot carry"),
        (Optional[Account], "which JSON cannot carry"),
        (dict[str, bytes], "which JSON cannot carry"),
        (dict[int, str], "annotated as dict[int, str], but keys in JSON are text"),
        (dict[Level, str], "keys in JSON are text"),
        (dict[Optional[Color], str], "keys in JSON are text"),
        (NoJson, "whose values lead nowhere"),
        (Absent, "whose values lead nowhere"),
        (Empty, "whose values lead nowhere"),
        (Literal[b"x"], "which is neither all str, int, bool and None, nor all of one Enum"),
        (Literal["a", Color.RED], "which is neither"),
        (Literal[Color.RED, Level.LOW], "which is neither"),
        (Union[date, datetime], "but date and datetime are both stored as a string, and nothing would tell them apart"),
        (Union[str, UUID], "but str and UUID are both stored as a string"),
        (Union[Item, dict], "but Item and dict are both stored as an object"),
        (Union[Item, Node], "but Item and Node are both stored as an object"),
        (Union[tuple[int, ...], list[int]], "are both stored as an array"),
        (Union[timedelta, float], "are both stored as a number"),
        (Union[Any, date], "are both stored as a string"),
        (Box[int], "which is generic: annotate a dataclass that has the types written out"),
    ],
    ids=repr,
)
def test_annotation_that_cannot_make_the_round_trip_is_refused_when_declared(annotation, hint):
    with pytest.raises(JobDefinitionError) as raised:
        taking(annotation)
    assert str(raised.value).startswith("job 'mail': the parameter 'value' is annotated as ")
    assert hint in str(raised.value)


class Greeter:
    def greet(self, name): ...

    @staticmethod
    def wave(hand):
        return hand


async def asynchronous(): ...


async def asynchronous_generator():
    yield


def generator():
    yield


@pytest.mark.parametrize(
    ("function", "hint"),
    [
        (asynchronous, "is an async function; a job is a plain one: declare it with def"),
        (asynchronous_generator, "is an async function"),
        (generator, "is a generator function, and calling one runs nothing"),
        (lambda: None, "is a lambda, and so has no name to be stored by: declare it with def"),
        (Greeter, "is of type type, not a function"),
        (Greeter().greet, "is of type method, not a function"),
        (Greeter.greet, "is a method, whose object cannot be stored: make it a function outside of the class"),
        (functools.partial(send_email, "a"), "is of type partial, not a function"),
        (len, "not a function: declare a function that calls it"),
        (5, "is of type int, not a function"),
    ],
    ids=repr,
)
def test_what_is_not_a_plain_synchronous_function_is_refused(function, hint):
    with pytest.raises(JobDefinitionError) as raised:
        codec_of(function)
    assert str(raised.value).startswith("job 'mail' is ")
    assert hint in str(raised.value)


def test_static_method_is_a_plain_function():
    assert call_after_storing(Greeter.wave, "left") == "left"


# Payloads that do not fit any more


@pytest.mark.parametrize(
    ("text", "message", "path"),
    [
        ("{", "the stored payload is not JSON", ""),
        ("[]", "the stored payload is not a JSON object", ""),
        ("null", "the stored payload lacks the argument 'to'", "to"),
        ("{}", "the stored payload lacks the argument 'to'", "to"),
        ('{"subject": 1}', "the stored payload lacks the argument 'to'", "to"),
        ('{"to": 1, "cc": 2}', r"the stored payload has the argument 'cc', which send_email\(\) does not take", "cc"),
    ],
)
def test_payload_that_does_not_fit_the_signature_is_a_mismatch(text, message, path):
    with pytest.raises(PayloadMismatch, match=f"mail: {message}") as raised:
        codec_of(send_email).decode(text)
    assert raised.value.path == path


@pytest.mark.parametrize(
    ("annotation", "data", "message"),
    [
        (datetime, 5, "value is a number in the stored payload, where datetime is annotated"),
        (datetime, None, "value is null in the stored payload, where datetime is annotated"),
        (datetime, "tomorrow", r"value cannot be read as datetime \(ValueError\)"),
        (datetime, "2024-13-01T00:00:00Z", "cannot be read as datetime"),
        (date, True, "is a boolean"),
        (time, "noon", "cannot be read as time"),
        (UUID, "xyz", "cannot be read as UUID"),
        (Decimal, "a lot", r"cannot be read as Decimal \(InvalidOperation\)"),
        (timedelta, "5", "is a string"),
        (timedelta, 1e300, r"cannot be read as timedelta \(OverflowError\)"),
        (Color, "green", r"cannot be read as Color \(ValueError\)"),
        (Color, ["red"], "is an array"),
        (list[date], {}, "is an object in the stored payload, where list"),
        (set[int], [[1]], "holds what cannot be in set"),
        (set[int], 1, "is a number"),
        (tuple[int, int], [1], "has 1 items, where tuple"),
        (tuple[int, int], "ab", "is a string"),
        (dict[str, date], [], "is an array"),
        (Optional[date], 5, "is a number in the stored payload, where date is annotated"),
        (Union[list[date], date], 5, "is a number"),
    ],
    ids=repr,
)
def test_stored_value_that_is_not_what_is_annotated_is_a_mismatch(annotation, data, message):
    error = mismatch(annotation, data)
    assert error.path == "value"
    with pytest.raises(PayloadMismatch, match=message):
        raise error


@pytest.mark.parametrize(
    ("annotation", "data", "path"),
    [
        (list[date], ["2024-01-01", 5], "value[1]"),
        (tuple[int, date], [1, 5], "value[1]"),
        (dict[str, list[date]], {"a": [5]}, "value['a'][0]"),
        (dict[Color, int], {"green": 5}, "value['green']"),
    ],
    ids=repr,
)
def test_path_leads_to_the_stored_value_that_does_not_fit(annotation, data, path):
    assert mismatch(annotation, data).path == path


def test_mismatch_of_an_extra_argument_is_named_by_its_own_name():
    def job(**days: date): ...

    with pytest.raises(PayloadMismatch) as raised:
        codec_of(job).decode('{"monday": 5}')
    assert raised.value.path == "monday"


def test_stored_payload_nested_beyond_recursion_is_a_mismatch():
    data: Any = {"name": "end"}
    for _ in range(400):
        data = {"name": "x", "children": [data]}
    text = json.dumps({"value": data})
    codec = taking(Optional[Node])
    with pytest.raises(PayloadMismatch, match="nested too deeply"):
        codec.decode(text)


# Items of delay_many


@dataclass
class SendEmail:
    to: str
    subject: str = "Hi"


def send(email: SendEmail):
    return email


@pytest.mark.parametrize("item", [("a", "b"), {"to": "a", "subject": "b"}])
def test_item_is_a_tuple_or_a_dict_of_arguments(item):
    assert codec_of(send_email).encode_item(item, max_bytes=LIMIT) == '{"to":"a","subject":"b"}'


@pytest.mark.parametrize("item", [SendEmail("a"), (SendEmail("a"),), {"email": SendEmail("a")}])
def test_item_of_a_dataclass_job_is_its_dataclass_bare_in_a_tuple_or_by_name(item):
    assert codec_of(send).encode_item(item, max_bytes=LIMIT) == '{"to":"a","subject":"Hi"}'


def test_bare_item_is_passed_by_name_to_a_keyword_only_parameter():
    def job(*, email: SendEmail):
        return email

    codec = codec_of(job)
    assert codec.encode_item(SendEmail("a"), max_bytes=LIMIT) == '{"to":"a","subject":"Hi"}'
    args, kwargs = codec.decode('{"to":"a"}')
    assert job(*args, **kwargs) == SendEmail("a")


@pytest.mark.parametrize("item", ["a", ["a", "b"], None, 5, Item("a"), {1: 2}])
def test_any_other_item_is_a_type_error_that_names_the_three_forms(item):
    message = "a tuple of positional arguments, a dict of keyword arguments, or an instance of SendEmail; not "
    with pytest.raises(TypeError, match=message + type(item).__name__):
        codec_of(send).encode_item(item, max_bytes=LIMIT)


def test_dataclass_is_no_item_for_a_job_without_one():
    with pytest.raises(TypeError, match="or an instance of the dataclass that is its one parameter; not SendEmail"):
        codec_of(send_email).encode_item(SendEmail("a"), max_bytes=LIMIT)


def test_item_that_does_not_fit_the_signature_is_a_type_error():
    with pytest.raises(TypeError, match="missing a required argument: 'to'"):
        codec_of(send_email).encode_item({"subject": "b"}, max_bytes=LIMIT)


# Dataclasses


def test_one_dataclass_parameter_stores_its_fields_as_data():
    assert codec_of(send).dataclass is SendEmail
    assert encode(send, SendEmail("a")) == '{"to":"a","subject":"Hi"}'
    assert call_after_storing(send, SendEmail("a", "b")) == SendEmail("a", "b")


def test_one_positional_only_dataclass_parameter_is_passed_by_position():
    def job(email: SendEmail, /):
        return email

    assert call_after_storing(job, SendEmail("a")) == SendEmail("a")


def test_dataclass_among_others_is_nested_under_its_name():
    def job(email: SendEmail, copies: int):
        return email, copies

    assert codec_of(job).dataclass is None
    assert stored(job, SendEmail("a"), 2) == {"email": {"to": "a", "subject": "Hi"}, "copies": 2}
    assert call_after_storing(job, SendEmail("a"), 2) == (SendEmail("a"), 2)


def test_dataclass_parameter_with_a_default_is_nested_under_its_name():
    def job(email: SendEmail = None):
        return email

    assert codec_of(job).dataclass is None
    assert call_after_storing(job, SendEmail("a")) == SendEmail("a")
    assert call_after_storing(job) is None


def test_plain_parameter_is_no_dataclass():
    assert codec_of(send_email).dataclass is None


@dataclass
class Base:
    id: UUID


@dataclass
class Everything(Base):
    at: datetime
    day: date
    clock: time
    wait: timedelta
    price: Decimal
    color: Color
    level: Level
    ratio: float
    item: Item
    items: list[Item]
    by_color: dict[Color, list[Item]]
    days: set[date]
    pair: tuple[int, Decimal]
    maybe: Optional[datetime] = None
    other: Optional[Item] = None
    plain: Any = None
    many: list[Optional[Item]] = field(default_factory=list)


def everything() -> Everything:
    return Everything(
        id=UUID(int=7),
        at=datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=timezone.utc),
        day=date(2024, 2, 29),
        clock=time(12, 30),
        wait=timedelta(minutes=5),
        price=Decimal("19.90"),
        color=Color.BLUE,
        level=Level.HIGH,
        ratio=1e16,
        item=Item("a", 1),
        items=[Item("b", 2), Item("c", 3)],
        by_color={Color.RED: [Item("d", 4)]},
        days={date(2024, 1, 2), date(2024, 1, 1)},
        pair=(1, Decimal("2.50")),
        maybe=datetime(2024, 1, 1),
        other=Item("e"),
        plain={"x": [1, None]},
        many=[None, Item("f")],
    )


def test_fields_of_a_dataclass_come_back_as_themselves():
    def job(value: Everything):
        return value

    assert exactly(call_after_storing(job, everything())) == exactly(everything())


def test_fields_of_a_dataclass_have_the_text_that_arguments_have():
    def job(value: Everything): ...

    data = stored(job, everything())
    assert data["at"] == "2024-02-29T12:00:00.123456+00:00"
    assert data["price"] == "19.90"
    assert data["color"] == "blue"
    assert data["wait"] == 300
    assert data["by_color"] == {"red": [{"name": "d", "amount": 4}]}
    assert data["days"] == ["2024-01-01", "2024-01-02"]


def test_dataclass_that_refers_to_itself_comes_back():
    tree = Node("a", [Node("b", [Node("c")]), Node("d")])
    assert round_trip(Optional[Node], tree) == tree


def test_dataclass_declared_in_a_function_may_refer_to_itself():
    @dataclass
    class Local:
        at: date
        child: Optional[Local] = None

    value = Local(date(2024, 1, 1), Local(date(2024, 1, 2)))
    assert round_trip(list[Local], [value]) == [value]


@dataclass(frozen=True)
class Frozen:
    at: date


@dataclass(slots=True)
class Slotted:
    at: date
    name: str = "x"


@dataclass(kw_only=True)
class KeywordOnly:
    at: date
    name: str = "x"


@dataclass(frozen=True, slots=True)
class Computed:
    name: str
    slug: str = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "slug", self.name.lower())


@dataclass
class OwnInit:
    name: str

    def __init__(self, name, **others):
        self.name = name.strip()


@dataclass
class Shouting:
    schema: str
    to_dict: str = ""


@pytest.mark.parametrize(
    "value",
    [
        Frozen(date(2024, 1, 1)),
        Slotted(date(2024, 1, 1), "y"),
        KeywordOnly(at=date(2024, 1, 1)),
        Computed("A"),
        OwnInit("a"),
        Shouting("a", "b"),
        dataclasses.make_dataclass("Made", [("at", date)])(date(2024, 1, 1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_dataclass_of_any_make_comes_back_equal(value):
    assert round_trip(Optional[type(value)], value) == value


def test_field_that_init_does_not_take_is_stored_and_set_again():
    value = Computed("A")
    object.__setattr__(value, "slug", "changed")
    assert round_trip(Optional[Computed], value).slug == "changed"


def test_field_that_init_does_not_take_is_computed_where_it_was_not_stored():
    _, kwargs = taking(Computed).decode('{"name": "A"}')
    assert kwargs["value"].slug == "a"


def test_field_that_was_never_set_is_not_stored():
    @dataclass
    class Late:
        name: str
        result: str = field(init=False)

    assert stored(job_taking(Late), Late("a")) == {"name": "a"}


def test_missing_field_gets_its_default():
    assert codec_of(send).decode('{"to": "a"}') == ((), {"email": SendEmail("a", "Hi")})


def test_missing_field_without_a_default_is_a_mismatch():
    with pytest.raises(PayloadMismatch, match="email lacks the field 'to', which SendEmail needs"):
        codec_of(send).decode('{"subject": "a"}')


def test_field_that_the_class_does_not_know_is_ignored():
    assert codec_of(send).decode('{"to": "a", "cc": "b"}') == ((), {"email": SendEmail("a")})


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"at": None}, "value.at"),
        ({"items": [{"name": "a"}, 5]}, "value.items[1]"),
        ({"items": [{"name": "a"}, {}]}, "value.items[1]"),
        ({"by_color": {"red": [{"name": "a", "amount": 1}, []]}}, "value.by_color['red'][1]"),
        ({"price": "a lot"}, "value.price"),
        ({"item": {"amount": 5}}, "value.item"),
    ],
)
def test_path_leads_to_the_field_that_does_not_fit(data, path):
    fields = stored(job_taking(Everything), everything())
    with pytest.raises(PayloadMismatch) as raised:
        taking(Everything).decode(json.dumps({**fields, **data}))
    assert raised.value.path == path


def test_path_leads_to_the_field_that_cannot_be_stored():
    value = everything()
    value.items[1].name = {"x": [object()]}  # type: ignore[assignment]
    assert refusal(Everything, value).path == "value.items[1].name['x'][0]"


def test_field_that_is_not_what_is_annotated_is_refused():
    assert "value.at is of type str, where date is annotated" in str(refusal(Frozen, Frozen("today")))


def test_instance_of_a_subclass_is_refused_for_what_it_would_lose():
    @dataclass
    class Urgent(SendEmail):
        level: int = 1

    assert "is of type Urgent, where SendEmail is annotated" in str(refusal(SendEmail, Urgent("a")))


def test_dataclass_is_refused_when_its_payload_is_no_object():
    with pytest.raises(PayloadMismatch, match="not a JSON object"):
        codec_of(send).decode("[]")


@dataclass
class Picky:
    amount: int

    def __post_init__(self):
        if self.amount < 0:
            raise ValueError("the amount is negative")


def test_error_of_post_init_is_a_mismatch_with_its_words():
    with pytest.raises(PayloadMismatch, match="value is refused by Picky: ValueError: the amount is negative"):
        taking(Picky).decode('{"amount": -1}')


def test_property_that_fails_is_refused_with_its_words():
    @dataclass
    class Lazy:
        name: str

    value = Lazy("a")
    Lazy.name = property(lambda self: 1 / 0)  # type: ignore[assignment,method-assign]
    assert "cannot be written as Lazy: ZeroDivisionError" in str(refusal(Lazy, value))


@dataclass
class EitherDataclass:
    content: Union[Item, SendEmail]


@dataclass
class HoldsAccount:
    account: Account


@dataclass
class Nests:
    inner: HoldsAccount


@dataclass
class HoldsBox:
    box: Box[int]


@dataclass
class NeedsSecret:
    name: str
    secret: InitVar[str]


@dataclass
class Forgetful:
    name: str

    def __init__(self):
        self.name = "always the same"


@dataclass
class Excludable:
    name: str = field(metadata=config(exclude=lambda value: True))


@dataclass
class Twins:
    one: str = field(metadata=config(field_name="same"))
    two: str = field(metadata=config(field_name="same"))


@dataclass
class OneWay:
    account: Account = field(metadata=config(encoder=str))


@dataclass_json(undefined=Undefined.INCLUDE)
@dataclass
class CatchesNothing:
    name: str


@pytest.mark.parametrize(
    ("annotation", "hint"),
    [
        (EitherDataclass, "the field EitherDataclass.content is annotated as .* are both stored as an object"),
        (
            HoldsAccount,
            "the field HoldsAccount.account is annotated as .*Account, which JSON cannot carry: pass its id",
        ),
        (Nests, "the field HoldsAccount.account is annotated as"),
        (HoldsBox, "the field HoldsBox.box is annotated as .*, which is generic"),
        (NeedsSecret, r"NeedsSecret is made from 'secret' \(an InitVar\?\), which is not a field"),
        (Forgetful, "the __init__ of Forgetful does not take its field 'name'"),
        (Excludable, "the field Excludable.name can be excluded from JSON, but has no default"),
        (Twins, "two fields of Twins are both named 'same' in JSON"),
        (OneWay, "the field OneWay.account is annotated as"),
        (CatchesNothing, "CatchesNothing is to include undefined fields: give it one field annotated CatchAll"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_dataclass_that_cannot_make_the_round_trip_is_refused_when_declared(annotation, hint):
    for declared in (annotation, list[annotation]):
        with pytest.raises(JobDefinitionError, match=f"job 'mail': {hint}"):
            taking(declared)


# Dataclasses with wishes for dataclasses-json


@dataclass_json(letter_case=LetterCase.CAMEL)
@dataclass
class Camel:
    first_name: str
    born_at: date
    nick: str = field(default="", metadata=config(field_name="alias"))


def test_letter_case_and_alias_are_kept():
    def job(value: Camel):
        return value

    value = Camel("Ada", date(1815, 12, 10), "A")
    assert stored(job, value) == {"firstName": "Ada", "bornAt": "1815-12-10", "alias": "A"}
    assert call_after_storing(job, value) == value


def test_missing_field_is_named_as_in_json():
    with pytest.raises(PayloadMismatch, match="lacks the field 'firstName'"):
        taking(Camel).decode('{"bornAt": "1815-12-10"}')


@dataclass
class Coded(DataClassJsonMixin):
    at: datetime = field(metadata=config(encoder=datetime.timestamp, decoder=lambda t: datetime.fromtimestamp(t, CEST)))
    where: Path = field(metadata=config(encoder=str, decoder=Path))
    text: str = field(default="", metadata=config(encoder=str.upper, decoder=str.lower))


def test_encoder_and_decoder_of_a_field_are_kept():
    def job(value: Coded):
        return value

    value = Coded(datetime(2024, 1, 1, tzinfo=CEST), Path("/a"), "x")
    assert stored(job, value) == {"at": 1704060000.0, "where": "/a", "text": "X"}
    assert call_after_storing(job, value) == value


def test_error_of_an_encoder_is_a_refusal_with_its_words():
    error = refusal(Coded, Coded("today", Path("/a")))
    assert "value.at is refused by the encoder of Coded.at: TypeError" in str(error)


def test_error_of_a_decoder_is_a_mismatch_with_its_words():
    with pytest.raises(PayloadMismatch, match=r"value\.at is refused by the decoder of Coded\.at: TypeError"):
        taking(Coded).decode('{"at": "today", "where": "/a"}')


def test_encoder_must_write_json():
    @dataclass
    class Bytes:
        raw: bytes = field(metadata=config(encoder=bytes, decoder=bytes))

    assert refusal(Bytes, Bytes(b"x")).path == "value.raw"


@dataclass
class Sparse:
    name: str
    note: Optional[str] = field(default=None, metadata=config(exclude=lambda value: value is None))


def test_excluded_field_is_not_stored_and_comes_back_as_its_default():
    def job(value: Sparse):
        return value

    assert stored(job, Sparse("a")) == {"name": "a"}
    assert stored(job, Sparse("a", "b")) == {"name": "a", "note": "b"}
    assert call_after_storing(job, Sparse("a")) == Sparse("a")


@dataclass_json(undefined=Undefined.RAISE)
@dataclass
class Strict:
    name: str


def test_field_that_a_strict_class_does_not_know_is_a_mismatch():
    with pytest.raises(PayloadMismatch, match="value has fields that Strict does not know: 'other'"):
        taking(Strict).decode('{"name": "a", "other": 1}')


@dataclass_json(undefined=Undefined.INCLUDE)
@dataclass
class Open:
    name: str
    others: CatchAll = field(default_factory=dict)


@dataclass_json(undefined=Undefined.INCLUDE)
@dataclass
class OpenWithoutDefault:
    name: str
    others: CatchAll


@pytest.mark.parametrize("open_class", [Open, OpenWithoutDefault])
def test_undefined_fields_are_kept_where_the_class_asks_for_it(open_class):
    job = job_taking(open_class)
    codec = codec_of(job)
    value = open_class(name="a", others={"x": [1]})
    assert stored(job, value) == {"name": "a", "x": [1]}
    assert codec.decode('{"name": "a", "x": [1]}')[1]["value"] == value
    assert codec.decode('{"name": "a"}')[1]["value"] == open_class(name="a", others={})


def test_undefined_fields_that_would_overwrite_a_field_are_refused():
    error = refusal(Open, Open("a", others={"name": "b"}))
    assert "value.others has the key 'name', which is a field already" in str(error)


def test_undefined_fields_may_be_none():
    value = Open("a")
    value.others = None
    assert stored(job_taking(Open), value) == {"name": "a"}


def test_undefined_fields_must_be_a_dict():
    value = Open("a")
    value.others = ["x"]  # type: ignore[assignment]
    assert "value.others is of type list; undefined fields are kept in a dict" in str(refusal(Open, value))


def test_undefined_fields_must_be_json():
    assert refusal(Open, Open("a", others={"x": b""})).path == "value.others['x']"


@dataclass
class SelfMade(DataClassJsonMixin):
    x: int
    y: int

    def to_dict(self, encode_json=False):
        return {"point": f"{self.x}/{self.y}"}

    @classmethod
    def from_dict(cls, data, *, infer_missing=False):
        x, y = data["point"].split("/")
        return cls(int(x), int(y))


def test_own_to_dict_and_from_dict_of_a_class_are_used():
    def job(value: SelfMade):
        return value

    assert codec_of(job).dataclass is SelfMade
    assert stored(job, SelfMade(1, 2)) == {"point": "1/2"}
    assert call_after_storing(job, SelfMade(1, 2)) == SelfMade(1, 2)


def test_error_of_an_own_from_dict_is_a_mismatch():
    with pytest.raises(PayloadMismatch, match="value is refused by SelfMade.from_dict: KeyError: 'point'"):
        taking(SelfMade).decode("{}")


def test_payload_for_an_own_from_dict_must_be_an_object():
    assert "value[0] is an array in the stored payload" in str(mismatch(list[SelfMade], [[]]))


def test_error_of_an_own_to_dict_is_a_refusal():
    class Failing(SelfMade):
        def to_dict(self, encode_json=False):
            raise ValueError("not today")

    assert "value is refused by Failing.to_dict: ValueError: not today" in str(refusal(Failing, Failing(1, 2)))


def test_own_to_dict_must_return_a_dict():
    class Listing(SelfMade):
        def to_dict(self, encode_json=False):
            return [self.x, self.y]

    assert "is written by Listing.to_dict as list, not as a dict" in str(refusal(Listing, Listing(1, 2)))


def test_dataclass_with_own_to_dict_is_not_taken_for_another():
    assert "is of type Item, where SelfMade is annotated" in str(refusal(SelfMade, Item("a")))


def test_own_to_dict_is_used_only_where_the_class_belongs_to_dataclasses_json():
    @dataclass
    class Stranger:
        name: str

        def to_dict(self):
            return {"other": 1}

    job = job_taking(Stranger)
    assert stored(job, Stranger("a")) == {"name": "a"}


def test_global_coders_of_dataclasses_json_are_used(monkeypatch):
    monkeypatch.setitem(global_config.encoders, Path, str)
    monkeypatch.setitem(global_config.decoders, Path, Path)

    @dataclass
    class Located:
        where: Path

    assert round_trip(Optional[Located], Located(Path("/a"))) == Located(Path("/a"))


def test_classes_and_configuration_of_the_user_are_not_touched():
    before = (dict(vars(SendEmail)), dict(vars(Camel)), dict(vars(global_config)))
    call_after_storing(send, SendEmail("a"))
    round_trip(Optional[Camel], Camel("a", date(2024, 1, 1)))
    assert (dict(vars(SendEmail)), dict(vars(Camel)), dict(vars(global_config))) == before


# What a user's process pays


def test_plain_jobs_do_not_load_dataclasses_json():
    program = (
        "import sys\n"
        "from greenjobs.payload import Codec\n"
        "def job(to: str, at: 'list[int] | None' = None): ...\n"
        "codec = Codec(job, job_name='job')\n"
        "codec.decode(codec.encode(('a',), {}, max_bytes=100))\n"
        "sys.exit('dataclasses_json' in sys.modules or 'marshmallow' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_null_is_the_payload_of_a_job_without_arguments() -> None:
    """The crate writes null for a unit struct."""

    def nightly() -> None: ...

    assert Codec(nightly, job_name="nightly").decode("null") == ((), {})
