"""``dpo/RECIPES.md`` has its recipes, and ``dpo/REPORT.md`` explains every chart."""

import re

from dpo.report.charts import CHARTS
from tests.pages import ROOT, blocks


def test_there_are_five_recipes() -> None:
    assert len(blocks("sh", "dpo/RECIPES.md")) == 5


def test_every_chart_of_the_report_is_explained() -> None:
    page = (ROOT / "dpo/REPORT.md").read_text(encoding="utf-8").lower()
    told = re.findall(r"^\| ([\w ,-]+) \|", page, re.MULTILINE)
    titles = [chart.title.split(" (")[0].lower() for chart in CHARTS]
    assert [title for title in titles if not any(title in each for each in told)] == []
