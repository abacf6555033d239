"""The model card (README.md) of a slimmed model: what was done to it, what that cost and bought, how to open it."""
from __future__ import annotations

import re
from typing import Any

from jaxslim import hub
from jaxslim._version import __version__
from jaxslim.spec import Spec

TASKS = {"ctc": "automatic-speech-recognition", "seq2seq": "automatic-speech-recognition",
         "causal": "text-generation"}


def card(summary: dict[str, Any], recipe: str, spec: Spec, train: str, test: str | None) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
      summary: as in summary.json; recipe: the resolved YAML; train, test: DATA.
    """
    import jinja2

    from jaxslim.report import METRICS

    models = [(role, summary[role]) for role in ("teacher", "control", "student") if role in summary]
    rows = [(label, [form(m[key]) if m.get(key) is not None else "" for _, m in models])
            for key, label, form, _ in METRICS if any(m.get(key) is not None for _, m in models)]
    front, base = _front(summary["teacher"]["path"])
    templates = jinja2.Environment(loader=jinja2.PackageLoader("jaxslim", "assets"), undefined=jinja2.StrictUndefined,
                                   trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return templates.get_template("card.md.j2").render(
        front=front, base=base, summary=summary, recipe=recipe.strip(), version=__version__, rows=rows, train=train,
        roles=[role for role, _ in models], test=test, stock=not spec.blocks, task=TASKS.get(spec.head),
        paired=summary.get("student_minus_control"))


def _front(teacher: str) -> tuple[dict[str, str], str]:
    """Licence and language of the teacher's own card, and what the student's card calls its base model."""
    try:
        text = (hub.folder(teacher) / "README.md").read_text()
    except (OSError, ValueError):
        text = ""
    head = text.split("---", 2)[1] if text.startswith("---") and text.count("---") > 1 else ""
    found = dict(re.findall(r"^(license|language):[ \t]*([^\s\[\]{}#]+)[ \t]*$", head, re.M))
    return found, teacher.removeprefix("bundled:")
