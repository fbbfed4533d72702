"""The diffs of the how-to pages apply to the sources as they are, and do what they say."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, blocks

CHECK = """
from pathlib import Path
from dpo.data.export import export_pairs
from dpo.losses import make_loss
from dpo.preferences import read_pairs

Path("pairs.csv").write_text("prompt,chosen,rejected\\n2 + 2 =, 4, 5\\n", encoding="utf-8")
assert read_pairs("pairs.csv")[0].chosen == " 4"
export_pairs("pairs.csv", Path("out"), format_name="markdown")
assert any("Better:  4" in page.read_text("utf-8") for page in Path("out").glob("*.md"))
print(make_loss("squared", beta=0.5))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources."""
    for folder in ("dpo", "data", "eval", "bench", "tests"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return tmp_path


def test_diffs_of_the_pages_apply_and_work(tree: Path) -> None:
    for block in blocks("diff"):
        apply = ["git", "apply", "--whitespace=error", "-"]
        done = subprocess.run(apply, input=block.text, cwd=tree, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), block
    said = subprocess.run([sys.executable, "-c", CHECK], cwd=tree, capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "Squared(beta=0.5)\n"), said.stderr
