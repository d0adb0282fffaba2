"""`python -m benchmarks`: runs the cases, prints each figure as it comes, and writes page, picture and data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psycopg2

from benchmarks import machine, report
from benchmarks.case import BenchmarkFailed, Case, Measurement, Sizes, figures, measure, shown
from benchmarks.cases import CASES
from benchmarks.peers.comparison import comparisons
from benchmarks.server import Server, server
from greenjobs.errors import GreenjobsError


def main() -> int:
    """Run what the command line asks for; 1 when something of it could not be measured, whatever the figures."""
    arguments = _parse(sys.argv[1:])
    cases, remarks = _chosen(arguments)
    failures: list[str] = []
    try:
        with server(arguments.database_url) as measured_on:
            results = _run(cases, measured_on, arguments, remarks, failures)
    except (GreenjobsError, psycopg2.OperationalError) as error:
        print(f"benchmarks: {str(error).strip()}", file=sys.stderr)
        return 2
    report.write(results, arguments.output)
    print(f"\n{report.targets_text(results)}\n\nwritten to {arguments.output / report.PAGE}")
    return 1 if failures else 0


def _run(
    cases: Mapping[str, Case],
    on: Server,
    arguments: argparse.Namespace,
    remarks: Sequence[str],
    failures: list[str],
) -> report.Results:
    facts = machine.facts(on, sys.argv[1:])
    titles: dict[str, str] = {}
    measurements: list[Measurement] = []
    for name, case in cases.items():
        print(f"\n{name}: {case.title}", flush=True)

        def note(side: str, error: BenchmarkFailed, title: str = case.title) -> None:
            print(f"  {side} failed: {error}", file=sys.stderr, flush=True)
            failures.append(f"{title}: {side} could not be measured: {str(error).splitlines()[0].rstrip(':')}")

        of_case = measure(
            case,
            on,
            sizes=Sizes(arguments.scale),
            rounds=arguments.rounds,
            on_side=_show_progress,
            on_failure=note,
        )
        if of_case:
            titles[name] = case.title
            measurements += of_case
            _show_figures(of_case)
    return report.Results(facts, titles, measurements, [*remarks, *failures], on.is_durable(), arguments.scale)


def _show_progress(side: str, round: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K  round {round}: {side}", end="\r", file=sys.stderr, flush=True)


def _show_figures(measurements: Sequence[Measurement]) -> None:
    for figure in figures(measurements):
        ratio = "" if figure.ratio is None else f"  (greenjobs by it: {figure.ratio:.2f})"
        print(f"  {figure.side:32} {figure.metric:20} {shown(figure.metric, figure.value):>12}{ratio}", flush=True)


def _chosen(arguments: argparse.Namespace) -> tuple[Mapping[str, Case], list[str]]:
    """The cases to run, and what is to be said about those that cannot be."""
    chosen: dict[str, Case] = {name: CASES[name] for name in arguments.cases}
    if not arguments.peers:
        return chosen, ["other job queues: measured with --peers"]
    peers, remarks = comparisons(arguments.peer_python)
    return {**chosen, **{case.name: case for case in peers}}, list(remarks)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--cases", type=_case_names, default=list(CASES), help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=_positive(int), default=3, help="how often each side is measured; default: 3")
    parser.add_argument("--scale", type=_positive(float), default=1.0, help="the share of the full number of jobs")
    parser.add_argument("--peers", action="store_true", help="measure other job queues, too, where they are installed")
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PATH", help="the interpreter that has the peers"
    )
    parser.add_argument(
        "--database-url", help="a server to measure on, as an account that may create databases; default: an own one"
    )
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="the folder for what comes out")
    return parser.parse_args(arguments)


def _case_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        raise argparse.ArgumentTypeError(f"no such case: {', '.join(unknown)}; there are: {', '.join(CASES)}")
    return names


class _positive:
    """A number above zero, of this type."""

    def __init__(self, type: type[int | float]) -> None:
        self._type = type
        self.__name__ = f"positive {type.__name__}"

    def __call__(self, text: str) -> float:
        number = self._type(text)
        if not 0 < number < float("inf"):
            raise ValueError
        return number


if __name__ == "__main__":
    sys.exit(main())
