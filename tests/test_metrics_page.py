"""docs/metrics.md, the dashboard and the rules for alerts: what they name is there in a scrape of a runner."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import databases
import pages
import processes
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from waiting import eventually

from greenjobs.contrib import prometheus
from greenjobs.events import Outcome

PAGE = (pages.DOCS / "metrics.md").read_text(encoding="utf-8")
DASHBOARD = json.loads((processes.ROOT / "examples" / "grafana" / "greenjobs.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((processes.ROOT / "examples" / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))

APPLICATION = """
    import os
    import greenjobs.contrib.prometheus
    from greenjobs import job

    @job(queue="emails")
    def send():
        pass

    @job(queue="emails", max_retries=0)
    def break_down():
        raise ValueError

    @job(priority=-1)
    def scrape():
        with open("scrape.part", "wb") as file:
            file.write(greenjobs.contrib.prometheus.render()[1])
        os.rename("scrape.part", "scrape.txt")
"""


@pytest.fixture(scope="module")
def printed(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What somebody sees who follows the page."""
    with databases.fresh(server_url) as url:
        return pages.follow("metrics.md", tmp_path_factory.mktemp("page"), url)


@pytest.fixture(scope="module")
def shown(server_url: str, migrated_template: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The labels of every sample that a runner shows that has run jobs, by the name of the sample."""
    folder = tmp_path_factory.mktemp("application")
    processes.write_application(folder, APPLICATION)
    with databases.fresh(server_url, template=migrated_template) as url:
        code = "import app; app.send.delay(); app.break_down.delay(); app.scrape.delay()"
        processes.run("python", "-c", code, folder=folder, database_url=url)
        with processes.runner(folder, url):
            file: Path = folder / "scrape.txt"
            eventually(file.exists, "nobody was scraped", seconds=processes.PATIENCE_SECONDS)
            text = file.read_text()
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("greenjobs_") and not sample.name.endswith("_created"):
                labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def metric(sample: str) -> str:
    """The name of the metric that a sample belongs to: that of a histogram has three."""
    return re.sub(r"(_seconds)_(bucket|sum|count)$", r"\1", sample)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_snippets_print_what_the_page_says(printed: dict[str, str]) -> None:
    expected = [block.text for block in pages.blocks("metrics.md") if block.language == "text"][1]
    assert printed["In a web application"].endswith(expected)
    assert printed["In a program of your own"].splitlines()[-1] == "True"


def test_page_has_every_metric_with_its_labels_and_no_other(shown: dict[str, set[str]]) -> None:
    rows = re.findall(r"^\| `(greenjobs_\w+)` \| (.*?) \| ", PAGE, re.MULTILINE)
    on_page = {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    assert on_page == {metric(name): labels - {"le"} for name, labels in shown.items()}


def test_page_has_every_outcome() -> None:
    sentence = PAGE[PAGE.index("`outcome` is") : PAGE.index("`pool` is")]
    assert {*re.findall(r"`(\w+)`", sentence)} - {"outcome"} == {*Outcome.__args__}  # type: ignore[attr-defined]


def test_figures_of_the_page_are_those_of_the_code() -> None:
    assert prometheus._FRESH_SECONDS == 5
    assert prometheus._REFRESH_SECONDS == 1
    assert (prometheus.BUCKETS[0], prometheus.BUCKETS[-1]) == (0.005, 3600)


# --- dashboard and alerts ---------------------------------------------------------------------------------------------


def dashboard_expressions() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def rules() -> Iterator[dict[str, Any]]:
    for group in RULES["groups"]:
        yield from group["rules"]


EXPRESSIONS = [*dashboard_expressions(), *((rule["alert"], rule["expr"]) for rule in rules())]


def parsed(expression: str) -> Any:
    """As Prometheus reads it; what Grafana puts in place of its variables is put there."""
    filled = expression.replace("$__rate_interval", "5m").replace("$__range", "1h").replace("$queue", ".*")
    return promql_parser.parse(filled)


def selectors(node: Any) -> Iterator[Any]:
    """All places in an expression where a metric is read."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        child = getattr(node, name, None)
        if isinstance(child, promql_parser.Expr):
            yield from selectors(child)
    for child in getattr(node, "args", ()) or ():
        yield from selectors(child)


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_expression_reads_metrics_and_labels_that_exist(
    title: str, expression: str, shown: dict[str, set[str]]
) -> None:
    read = list(selectors(parsed(expression)))
    assert len(read) == len(re.findall(r"greenjobs_\w+", expression))
    for selector in read:
        assert selector.name in shown
        named = {matcher.name for matcher in selector.matchers.matchers} - {"__name__"}
        assert named <= shown[selector.name]


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_expression_is_grouped_by_labels_that_exist(title: str, expression: str, shown: dict[str, set[str]]) -> None:
    labels = set().union(*(shown[name] for name in re.findall(r"greenjobs_\w+", expression)), {"instance"})
    grouped = {
        label.strip() for found in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for label in found.split(",")
    }
    assert grouped <= labels


def test_every_metric_is_on_the_dashboard(shown: dict[str, set[str]]) -> None:
    drawn = {
        metric(name) for _, expression in dashboard_expressions() for name in re.findall(r"greenjobs_\w+", expression)
    }
    # How often somebody waited is told by how long.
    assert drawn == {metric(name) for name in shown} - {"greenjobs_connection_waits_total"}


def test_every_panel_has_the_data_source_that_was_chosen() -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    drawing = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert [panel["title"] for panel in drawing if panel["datasource"] != chosen] == []
    assert [target for panel in drawing for target in panel["targets"] if target["datasource"] != chosen] == []
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "queue"]


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_legends_show_labels_that_their_expression_keeps() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            kept = {
                label.strip() for found in re.findall(r"\bby \(([^)]*)\)", target["expr"]) for label in found.split(",")
            }
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, target["expr"]


def test_alerts_say_what_is_wrong_and_how_bad() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} <= rule["annotations"].keys()
        kept = {word.strip() for found in re.findall(r"\bby \(([^)]*)\)", rule["expr"]) for word in found.split(",")}
        text = rule["annotations"]["summary"] + rule["annotations"]["description"]
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= kept


def test_alert_that_reads_no_metric_of_ours_would_be_found() -> None:
    """The reader of expressions sees into functions, both sides of an operator, and ranges."""
    found = selectors(
        parsed("absent(a) or sum(rate(b[5m])) / histogram_quantile(0.9, sum by (le) (rate(c[1m]))) > (d)")
    )
    assert [selector.name for selector in found] == ["a", "b", "c", "d"]
