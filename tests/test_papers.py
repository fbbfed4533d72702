"""CONTRIBUTING.md, CHANGELOG.md, CITATION.cff and the metadata of the package say what is so."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(page: str) -> set[str]:
    """The headings of a page as its links name them."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_papers_lead_to_what_there_is() -> None:
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "README.md", "dpo/API.md", "dpo/RECIPES.md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", read(name)):
            if target.startswith("http"):
                continue
            file, _, anchor = target.partition("#")
            path = (ROOT / name).parent / file
            assert path.exists(), f"{name}: {target}"
            assert not anchor or anchor in anchors(path.read_text("utf-8")), f"{name}: {target}"


def test_papers_name_the_version_of_the_package() -> None:
    assert f"\n## [{PROJECT['version']}]" in read("CHANGELOG.md")
    assert yaml.safe_load(read("CITATION.cff"))["version"] == PROJECT["version"]


def test_citation_has_what_its_format_asks_for() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == PROJECT["license"]
    assert all({"type", "title", "authors"} <= set(paper) for paper in citation["references"])


def test_package_is_typed_and_names_the_pythons_it_is_for() -> None:
    assert (ROOT / "dpo/py.typed").exists()
    assert "Typing :: Typed" in PROJECT["classifiers"]
    least = PROJECT["requires-python"].removeprefix(">=")
    named = [name for name in PROJECT["classifiers"] if re.fullmatch(r".*:: 3\.\d+", name)]
    assert named[0].endswith(least)
