"""What comes out: JSON lines for programs, a page of Markdown for people, and its picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import picture
from benchmarks.case import METRICS, Measurement, as_record, figures, shown
from benchmarks.targets import Judgement, judge

LINES = "performance.jsonl"
PAGE = "performance.md"
PICTURE = "performance.svg"

_INTRODUCTION = f"""# Performance

This page is made by `make bench ARGS="--output docs"`; nothing on it is written by hand. Each case is measured beside
what it could reach at best: the same work in plain SQL, or in a loop that claims, executes and acknowledges in gevent
and does nothing else.

- Everything that is measured runs in processes of its own, against a database of its own. A rate counts from the start
  of the first job to the moment when the last acknowledgement is in the database.
- The sides of a case take turns in each round. A figure is the median of the rounds, a ratio the median of their
  ratios: greenjobs by the other side.
- Before each measurement the table is vacuumed and analysed, and the server makes a checkpoint.
- After each one the rows are counted: a figure stands for jobs that were really run, each of them once.

The same as JSON lines: [{LINES}]({LINES}).
"""

_NOT_DURABLE = "The server can lose committed jobs in a crash (see its settings): nothing is compared with the targets."


@dataclass(frozen=True, slots=True)
class Results:
    """All that a run gave. `titles` by case; `remarks` say what was left out, and why."""

    facts: Mapping[str, str]
    titles: Mapping[str, str]
    measurements: Sequence[Measurement]
    remarks: Sequence[str]
    is_durable: bool
    scale: float

    def judgements(self) -> list[Judgement]:
        """Which targets were reached; none where the comparison would not be fair."""
        return judge(figures(self.measurements)) if self.is_durable else []


def write(results: Results, folder: Path) -> None:
    """Write the three files into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [{"facts": dict(results.facts)}, *(as_record(each) for each in results.measurements)]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    folder.joinpath(LINES).write_text(lines, encoding="utf-8")
    folder.joinpath(PAGE).write_text(page(results), encoding="utf-8")
    folder.joinpath(PICTURE).write_text(picture.draw(figures(results.measurements), results.titles), encoding="utf-8")


def page(results: Results) -> str:
    """The page of Markdown."""
    sections = [
        _INTRODUCTION,
        _table(("measured", "on and with"), [(name, _cell(value)) for name, value in results.facts.items()]),
        "## Figures\n",
        _figures_table(results),
        f"![The rates, case by case]({PICTURE})\n",
        "## Targets\n",
        _targets_table(results),
    ]
    if results.remarks:
        sections += ["## Left out\n", "".join(f"- {remark}\n" for remark in results.remarks)]
    return "\n".join(sections)


def targets_text(results: Results) -> str:
    """The targets, a line each, for a terminal."""
    return "\n".join(
        f"{'reached    ' if each.is_reached else 'NOT reached'}  {results.titles[each.target.case]}: {each.measured} "
        f"(to reach: {each.target.wanted()})"
        for each in results.judgements()
    )


def _figures_table(results: Results) -> str:
    rows: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for figure in figures(results.measurements):
        subject, others = rows.setdefault((figure.case, figure.metric), ([], []))
        value = shown(figure.metric, figure.value)
        if figure.side == _subject(results, figure.case):
            subject.append(value)
        else:
            ratio = f" ({figure.ratio:.2f})" if figure.ratio is not None else ""
            others.append(f"{figure.side} {value}{ratio}")
    return _table(
        ("case", "in", "greenjobs", "beside (greenjobs by it)"),
        [
            (results.titles[case], METRICS[metric].unit, "".join(subject), "; ".join(others))
            for (case, metric), (subject, others) in rows.items()
        ],
    )


def _targets_table(results: Results) -> str:
    if not results.is_durable:
        return _NOT_DURABLE + "\n"
    note = f"Measured at {results.scale:g} of the full size, which the targets are not meant for.\n\n"
    table = _table(
        ("case", "to reach", "measured", ""),
        [
            (results.titles[each.target.case], each.target.wanted(), each.measured, _verdict(each))
            for each in results.judgements()
        ],
    )
    return table if results.scale == 1.0 else note + table


def _verdict(judgement: Judgement) -> str:
    if judgement.is_reached:
        return "reached"
    obstacle = judgement.target.obstacle
    return f"**not reached**: {obstacle}" if obstacle else "**not reached**"


def _subject(results: Results, case: str) -> str:
    return next(each.side for each in results.measurements if each.case == case)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
