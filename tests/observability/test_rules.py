"""Rules, dashboards and docs: promtool takes them, and every name in them is in the code."""

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest

from tests.fixtures.prometheus_server import (
    CLUSTERS,
    DASHBOARDS,
    PROMETHEUS,
    ROOT,
    RULES,
    expressions,
    needs_prometheus,
    read_yaml,
    rules,
)
from tests.fixtures.rank_exporter import PROCESS, Exporter
from vlal_dist.observability.metric_definitions import (
    JOB,
    LOADER,
    PACK,
    SCORE,
    STORAGE,
    TRAIN,
    Metric,
)

DOCS = ROOT / "docs" / "operations.md"
TABLES = {
    "Training": TRAIN,
    "Loader": LOADER,
    "Storage": STORAGE,
    "Scoring": SCORE,
    "Packing": PACK,
    "Programs that end": JOB,
    "Process": PROCESS,
}
NAMES: Mapping[str, Metric] = {
    name: one for table in TABLES.values() for name, one in table.items()
}
NAME = re.compile(r"\b(?:ray_vlal|vlal|process)_[a-z0-9_]+\b(?!:)")
RULE_TESTS = PROMETHEUS / "rules" / "tests" / "vlal.yml"


def promtool(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run(
        ["promtool", *arguments], input=text, capture_output=True, text=True, check=False
    )
    return f"rc {done.returncode}\n{done.stdout}{done.stderr}"


def unknown(text: str) -> set[str]:
    """Names of metrics in an expression that nothing exports."""
    suffixes = re.compile(r"_(bucket|sum|count)$")
    return {
        name
        for name in NAME.findall(text)
        if name not in NAMES
        and NAMES.get(suffixes.sub("", name), Metric("gauge", "")).kind
        not in ("histogram", "summary")
    }


@needs_prometheus
def test_promtool_takes_the_configuration_and_the_rules() -> None:
    assert promtool("check", "config", str(PROMETHEUS / "prometheus.yml")).startswith("rc 0")
    checked = promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES))
    assert checked.startswith("rc 0"), checked


@needs_prometheus
def test_promtool_takes_what_a_rank_exports() -> None:
    exporter = Exporter()
    exporter.begin()
    exporter.step()
    exporter.rarely()
    text = generate_latest(exporter.metrics.registry).decode()
    assert promtool("check", "metrics", text=text) == "rc 0\n"
    assert not promtool("check", "metrics", text="a_ms 1\n").startswith("rc 0")


@needs_prometheus
def test_each_alert_fires_for_its_fault_and_for_nothing_else() -> None:
    checked = promtool("test", "rules", str(RULE_TESTS))
    assert checked.startswith("rc 0"), checked


@needs_prometheus
@pytest.mark.parametrize("alert", [rule["alert"] for rule in rules() if "alert" in rule])
def test_the_tests_of_an_alert_can_fail(tmp_path: Path, alert: str) -> None:
    shipped = read_yaml(RULES)
    for group in shipped["groups"]:
        for rule in group["rules"]:
            if rule.get("alert") == alert:
                rule["expr"] = "vector(0) > 1"
    (tmp_path / "tests").mkdir()
    (tmp_path / RULES.name).write_text(yaml.safe_dump(shipped))
    (tmp_path / "tests" / "one.yml").write_text(RULE_TESTS.read_text())
    checked = promtool("test", "rules", str(tmp_path / "tests" / "one.yml"))
    assert not checked.startswith("rc 0") and alert in checked


def test_every_metric_of_a_rule_is_exported() -> None:
    for rule in rules():
        assert unknown(rule["expr"]) == set(), rule


def test_the_name_test_can_fail() -> None:
    assert unknown("rate(vlal_train_step_total[5m]) / vlal_train_steps_total") == {
        "vlal_train_step_total"
    }
    assert unknown("vlal_train_steps_total_sum") == {"vlal_train_steps_total_sum"}
    assert unknown("vlal_train_step_duration_seconds_bucket") == set()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_has_the_form_that_grafana_reads(path: Path) -> None:
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    assert dashboard["uid"] == f"vlal-{path.stem}"
    panels = dashboard["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert all(panel["datasource"] == source for panel in panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    assert all(panel["description"] for panel in panels)
    for title, expression in expressions(path):
        assert unknown(expression) == set(), title
    known = {rule["alert"] for rule in rules() if "alert" in rule}
    named = set(re.findall(r"\bVlal[A-Z]\w+", path.read_text(encoding="utf-8")))
    assert named <= known
    assert "://" not in path.read_text(encoding="utf-8")


def test_every_metric_is_on_a_panel_or_in_a_rule() -> None:
    texts = [expression for path in DASHBOARDS for _, expression in expressions(path)]
    shown = set(NAME.findall(" ".join([*texts, *(rule["expr"] for rule in rules())])))
    shown |= {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    hidden = {"vlal_build_info"} | {name for name in PROCESS if name not in shown}
    assert set(NAMES) - shown == hidden


def test_grafana_finds_the_dashboards() -> None:
    (provider,) = read_yaml(CLUSTERS / "grafana/provisioning/dashboards/vlal.yml")["providers"]
    assert provider["type"] == "file" and provider["options"] == {"path": "$VLAL_DASHBOARDS"}
    (source,) = read_yaml(CLUSTERS / "grafana/provisioning/datasources/prometheus.yml")[
        "datasources"
    ]
    pace = read_yaml(PROMETHEUS / "prometheus.yml")["global"]["scrape_interval"]
    assert source["type"] == "prometheus" and source["jsonData"]["timeInterval"] == pace


def rows(table: Mapping[str, Metric]) -> list[str]:
    """A table of the documentation."""
    return [
        f"| `{name}` | {one.kind} | {labels(one)} | {one.text} |" for name, one in table.items()
    ]


def labels(metric: Metric) -> str:
    return "; ".join(
        f"`{name}`" + (f": {', '.join(values)}" if values else "")
        for name, values in metric.labels.items()
    )


@pytest.mark.parametrize("title", TABLES)
def test_the_documented_table_is_the_codes(title: str) -> None:
    text = DOCS.read_text(encoding="utf-8")
    section = text.partition(f"\n### {title}\n")[2].partition("\n#")[0]
    found = [line for line in section.splitlines() if line.startswith("| `")]
    assert found == rows(TABLES[title]), "\n".join(["it should be", *rows(TABLES[title])])


def test_every_alert_is_explained_and_no_other() -> None:
    text = DOCS.read_text(encoding="utf-8")
    explained = re.findall(r"^### (Vlal\w+)$", text, re.MULTILINE)
    assert sorted(explained) == sorted(rule["alert"] for rule in rules() if "alert" in rule)
    assert unknown(text.replace("vlal_dist", "")) == set()
