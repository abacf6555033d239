"""The Python page does what it says: its blocks run in their order. Links in the documentation lead somewhere."""
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_python_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/api.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    names: dict = {}
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, "docs/api.md", "exec"), names)
    assert set(names["student"].spec.blocks) == {"encoder.2.attention", "encoder.3.attention"}
    assert names["result"]["n"] == 4 and names["record"]["checked"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_are_named_exist(page):
    """Configs, scripts, tests and recorded results."""
    for name in re.findall(r"(?<![\w/])((?:configs|scripts|tests|docs|jaxslim)/[\w/.-]+\.(?:ya?ml|py|sh|json|md|txt))",
                           page.read_text()):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
