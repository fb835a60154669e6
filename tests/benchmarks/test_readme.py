"""The README's tables say what the committed results say."""

import json
from pathlib import Path

import pytest

from benchmarks.readme import RESULTS, with_tables

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name",
    ["README.md", "benchmarks/README.md", *(f"docs/{page}.md" for page in ("reproduction", "reliability", "scaling"))],
)
def test_every_table_is_up_to_date(name):
    text = (PROJECT / name).read_text()
    assert "<!-- end -->" in text
    assert with_tables(text) == text, f"run: python -m benchmarks.readme {name}"


def test_a_table_is_replaced_and_nothing_else():
    text = "before\n<!-- results: loaders-2-cores.json -->\nold\n<!-- end -->\nafter\n"
    made = with_tables(text)
    assert made.startswith("before\n<!-- results: loaders-2-cores.json -->\n")
    assert made.endswith("<!-- end -->\nafter\n")
    assert "old" not in made
    assert with_tables(made) == made


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_every_result_tells_where_it_comes_from(path):
    report = json.loads(path.read_bytes())
    environment = report["environment"]
    assert report["schema"] == 1
    assert all(environment[key] for key in ("device", "threads", "versions", "commit", "command", "started"))
    assert not environment["commit"].endswith("+")  # measured on what is in the repository
    for row in report["rows"]:
        assert row["images_per_s_low"] <= row["images_per_s"] <= row["images_per_s_high"]
