"""The benchmarks measure what they say: every case at a tiny size, with real programs against a real server.

No test looks at how fast anything is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent

# The benchmarks are not installed. Behind everything else, as greenjobs may be, and is then what is tested.
sys.path.append(str(ROOT))

from benchmarks import machine, picture, report, targets  # noqa: E402
from benchmarks.backlog import Backlog  # noqa: E402
from benchmarks.case import METRICS, BenchmarkFailed, Figure, Measurement, Side, Sizes, Values, figures, measure  # noqa: E402
from benchmarks.cases import CASES  # noqa: E402
from benchmarks.measure import Runners, drain, enqueue, percentile  # noqa: E402
from benchmarks.peers.comparison import PEERS, comparisons  # noqa: E402
from benchmarks.server import Database, Server  # noqa: E402

RAW = Runners("benchmarks.programs.raw")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.joinpath(report.LINES).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def database(server_url: str) -> Iterator[Database]:
    with Server(server_url).database() as database:
        yield database


@pytest.mark.parametrize("case", CASES)
def test_each_case_measures_all_its_sides(case: str, server_url: str, tmp_path: Path) -> None:
    ended = run(
        *("--cases", case, "--scale", "0.001", "--rounds", "1"),
        *("--database-url", server_url, "--output", str(tmp_path)),
    )
    assert ended.returncode == 0, ended.stderr
    _, *measured = records(tmp_path)
    sides = [side.name for side in CASES[case].sides(Sizes(0.001))]
    assert list(dict.fromkeys(each["side"] for each in measured)) == sides
    # A runner may ask nothing within a moment, and two jobs may find all the memory they take in the process already.
    nothing = [(each["side"], each["metric"]) for each in measured if each["value"] <= 0]
    assert {metric for _, metric in nothing} <= {"queries_per_second", "kb_per_greenlet"}, nothing
    assert CASES[case].title in tmp_path.joinpath(report.PAGE).read_text(encoding="utf-8")


def test_without_a_server_named_one_is_started_that_is_durable(tmp_path: Path) -> None:
    ended = run("--cases", "enqueue_one", "--scale", "0.01", "--rounds", "2", "--output", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    head, *measured = records(tmp_path)
    assert "fsync = on" in head["facts"]["settings"]
    assert "synchronous_commit = on" in head["facts"]["settings"]
    assert [(each["side"], each["round"]) for each in measured] == [
        ("greenjobs", 1),
        ("greenjobs", 2),
        ("raw INSERT", 1),
        ("raw INSERT", 2),
    ]
    assert "≥ 0.9 × raw INSERT" in tmp_path.joinpath(report.PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cases", "drain,fly"), "no such case: fly; there are: enqueue_one, "),
        (("--rounds", "0"), "invalid positive int value: '0'"),
        (("--scale", "nan"), "invalid positive float value: 'nan'"),
        (("--scale", "-1"), "invalid positive float value: '-1'"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(arguments: Sequence[str], message: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert message in ended.stderr


def test_a_server_that_does_not_answer_is_one_line_of_error(tmp_path: Path) -> None:
    ended = run("--database-url", f"postgresql:///none?host={tmp_path}", "--output", str(tmp_path))
    assert ended.returncode == 2
    assert ended.stderr.startswith("benchmarks: ")
    assert "Traceback" not in ended.stderr


# --- work that was not done has no figure -----------------------------------------------------------------------------


def test_a_drain_that_leaves_the_rows_is_no_measurement(database: Database) -> None:
    Backlog(100).fill(database)
    Backlog(100).fill_bare(database)
    with pytest.raises(BenchmarkFailed, match="100 jobs were to be run, 100 were, 0 rows are gone"):
        drain(database, RAW, table="background_jobs", jobs=100)


def test_a_drain_of_more_than_was_asked_for_is_no_measurement(database: Database) -> None:
    Backlog(200).fill_bare(database)
    with pytest.raises(BenchmarkFailed, match="100 jobs were to be run, 200 were, 200 rows are gone"):
        drain(database, RAW, table="bare_jobs", jobs=100)


def test_enqueuing_into_another_table_is_no_measurement(database: Database) -> None:
    Backlog(0).fill_bare(database)
    order = {"side": "greenjobs", "mode": "one", "jobs": 20, "concurrency": 1, "payload_bytes": 0}
    with pytest.raises(BenchmarkFailed, match="20 jobs were to be enqueued, 0 rows have come"):
        enqueue(database, order, module="benchmarks.programs.enqueuer", table="bare_jobs")


def test_a_program_that_does_not_start_is_reported_with_its_last_words(database: Database) -> None:
    Backlog(1).fill_bare(database)
    with pytest.raises(BenchmarkFailed, match=r"benchmarks\.programs\.none did not get ready:\n.*No module named"):
        drain(database, Runners("benchmarks.programs.none"), table="bare_jobs", jobs=1)


def test_a_drain_reports_every_job_once_and_a_mark_for_each_tenth(database: Database) -> None:
    Backlog(1000).fill_bare(database)
    measured = drain(database, RAW, table="bare_jobs", jobs=1000, marks=10)
    assert (measured.jobs, len(measured.marks)) == (1000, 10)
    assert measured.first_at < measured.marks[0] < measured.marks[-1]


def test_scheduled_jobs_are_enqueued_first_or_last(database: Database) -> None:
    def first_state(backlog: Backlog) -> str:
        backlog.fill(database)
        assert database.count("background_jobs WHERE state = 'scheduled'") == 3
        return "scheduled" if database.count("background_jobs WHERE id = 1 AND state = 'scheduled'") else "available"

    assert first_state(Backlog(2, scheduled=3)) == "scheduled"
    assert first_state(Backlog(2, scheduled=3, scheduled_first=False)) == "available"


# --- from values to figures -------------------------------------------------------------------------------------------


class Counting:
    """A case whose sides give 1, 2, 3, …; the one called `broken` fails in the second round."""

    name = "counting"
    title = "counting"

    def __init__(self, *names: str) -> None:
        self._names = names
        self.turns: list[str] = []

    def sides(self, sizes: Sizes) -> Sequence[Side]:
        return [Side(name, self._measured_as(name), migrated=False) for name in self._names]

    def _measured_as(self, name: str) -> Any:
        def measured(database: Database) -> Values:
            self.turns.append(name)
            if name == "broken" and self.turns.count(name) == 2:
                raise BenchmarkFailed("broken")
            return {"rate": float(len(self.turns))}

        return measured


def measure_counting(case: Counting, server_url: str) -> tuple[list[Measurement], list[str]]:
    failed: list[str] = []
    measured = measure(
        case,
        Server(server_url),
        sizes=Sizes(),
        rounds=3,
        on_side=lambda side, round: None,
        on_failure=lambda side, error: failed.append(side),
    )
    return measured, failed


def test_sides_take_turns_in_each_round(server_url: str) -> None:
    case = Counting("a", "b")
    measure_counting(case, server_url)
    assert case.turns == ["a", "b"] * 3


def test_a_side_that_fails_is_left_out_and_the_others_go_on(server_url: str) -> None:
    case = Counting("a", "broken", "b")
    measured, failed = measure_counting(case, server_url)
    assert failed == ["broken"]
    assert [(each.side, each.round) for each in measured] == [(side, round) for side in "ab" for round in (1, 2, 3)]


def test_without_its_first_side_a_case_has_no_figures(server_url: str) -> None:
    assert measure_counting(Counting("broken", "a"), server_url) == ([], ["broken"])


def values(**sides: Sequence[float]) -> list[Measurement]:
    return [
        Measurement("drain", side, round, "rate", value)
        for side, of_side in sides.items()
        for round, value in enumerate(of_side)
    ]


def test_a_figure_is_the_median_and_a_ratio_that_of_the_rounds() -> None:
    """The ratio of the medians would be 0.5: the slow third round, slow for both, would count."""
    ours, theirs = figures(values(ours=[50, 80, 10], theirs=[100, 100, 12.5]))
    assert ours == Figure("drain", "ours", "rate", 50, None)
    assert theirs == Figure("drain", "theirs", "rate", 100, 0.8)


def test_a_percentile_is_one_of_the_values() -> None:
    assert [percentile([3, 1, 2, 4], share) for share in (0.0, 0.5, 0.99)] == [1, 3, 4]


def test_every_target_is_about_a_side_and_a_metric_that_exist() -> None:
    for target in targets.TARGETS:
        sides = [side.name for side in CASES[target.case].sides(Sizes(0.001))]
        assert target.metric in METRICS
        assert not target.of or target.of in sides


@pytest.mark.parametrize(("rate", "is_reached"), [(45_000, True), (44_999, False)])
def test_a_target_is_reached_at_its_bound(rate: float, is_reached: bool) -> None:
    (judgement,) = targets.judge(figures(values(greenjobs=[rate])))
    assert (judgement.target.wanted(), judgement.is_reached) == ("≥ 45,000 jobs/s", is_reached)


def test_a_ratio_is_judged_by_the_side_it_is_to() -> None:
    rates = {"greenjobs": [90_000], "bare gevent loop": [100_000], "raw SQL": [1]}
    judgements = targets.judge(figures(values(**rates)))
    assert [(each.measured, each.is_reached) for each in judgements] == [
        ("90,000", True),
        ("0.90 × bare gevent loop", True),
    ]


def results(*, is_durable: bool = True, scale: float = 1.0, remarks: Sequence[str] = ()) -> report.Results:
    facts: Mapping[str, str] = {"machine": "2 × a|b", "command": "python -m benchmarks"}
    measured = values(greenjobs=[45_000], raw=[90_000])
    return report.Results(facts, {"drain": "drain <all>"}, measured, remarks, is_durable, scale)


def test_the_page_shows_figures_ratios_targets_and_what_was_left_out() -> None:
    page = report.page(results(remarks=["huey: not here"]))
    assert "| machine | 2 × a\\|b |" in page
    assert "| drain <all> | jobs/s | 45,000 | raw 90,000 (0.50) |" in page
    assert "| drain <all> | ≥ 45,000 jobs/s | 45,000 | reached |" in page
    assert "- huey: not here" in page


def test_a_server_that_may_lose_jobs_is_not_compared_with_the_targets() -> None:
    page = report.page(results(is_durable=False))
    assert "nothing is compared with the targets" in page
    assert "reached" not in page.partition("## Targets")[2]


def test_a_smaller_size_is_said_beside_the_targets() -> None:
    assert "Measured at 0.5 of the full size" in report.page(results(scale=0.5))


def test_the_picture_has_a_bar_for_each_side_as_long_as_its_rate() -> None:
    drawn = picture.draw(figures(results().measurements), {"drain": "drain <all>"})
    rectangles = list(ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}rect"))
    _, ours, theirs = (float(rectangle.attrib["width"]) for rectangle in rectangles)
    assert ours == pytest.approx(theirs / 2, abs=0.1)


def test_the_command_hides_the_address_of_the_server() -> None:
    assert machine.command(["--rounds", "1", "--database-url", "postgresql://u:secret@h/d"]) == (
        "python -m benchmarks --rounds 1 --database-url …"
    )
    assert "secret" not in machine.command(["--database-url=postgresql://u:secret@h/d"])


def test_a_peer_is_measured_or_said_to_be_left_out() -> None:
    cases, remarks = comparisons(sys.executable)
    left_out = {remark.partition(":")[0] for remark in remarks}
    measured = {side.name.rpartition(" ")[0] for case in cases for side in case.sides(Sizes(0.001))}
    assert [peer.name for peer in PEERS if (peer.name in left_out) == (peer.name in measured)] == []
