"""Runs the rows of a table that are missing, one at a time, and writes docs/results/NAME.json and NAME.md.

    python scripts/table.py configs/tables/speed_cpu.yaml [--again REGEX] [--list] [--only-format]

TABLE.yaml:
  name: speed_cpu
  title: one line
  notes: text below the table
  rows: [{id: base-10s, command: jaxslim bench config:wav2vec2-base --seconds 10 --baseline torch}]
  columns: {audio s: "{audio_seconds:g}", peak MB: "{peak_bytes:.1f/1e6}"}   # header: format of a row's values
  relative:                                                                  # values added to the results
  - {name: vs_30s, of: seconds_per_second, to: {audio_seconds: 30}, by: [model, engine]}   # over another row's
  - {name: peak_per_second, of: peak_bytes, per: audio_seconds}                            # over another of its row
  plots:                                                    # NAME-PLOT.svg: x and y are formats like the columns'
  - {name: time, title: a line, x: "{audio_seconds}", y: "{steady_seconds}", xlabel: audio s, series: "(.*)-.*",
     xlog: false, ylog: true}                               # rows whose ids have the same first group are one series

A command prints one JSON object or a list of them (`--json` is appended for `jaxslim`); each becomes a result with the
row's `id`, `command` and the date. A row is missing when no result has its id and command, or when a result's
`fingerprint` is not that of its model any more. Stop it at any time and run it again: finished rows stay.
"""
from __future__ import annotations

import argparse
import datetime
import functools
import json
import operator
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAIN = "import sys; from jaxslim.cli import main; sys.exit(main())"
KEYS = {"name", "title", "notes", "rows", "columns", "relative", "plots"}
STYLES = [(color, marker) for marker in ("circle", "diamond") for color in (
    "#2f62b0", "#c8501e", "#0c7f78", "#9a6b00", "#7a4ba0", "#a83a6b", "#6d727c", "#4f8a2a")]


def read(path: str) -> dict[str, Any]:
    """The table file, checked. Raises SystemExit with a sentence."""
    try:
        spec = yaml.safe_load(pathlib.Path(path).read_text())
        missing, unknown = {"name", "rows", "columns"} - set(spec), set(spec) - KEYS
        ids = [row["id"] for row in spec["rows"] if row["command"]]
        spec["columns"] = {str(k): str(v) for k, v in spec["columns"].items()}
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        sys.exit(f"{path} is not a table: {error}.")
    if missing or unknown or len(set(ids)) < len(ids):
        sys.exit(f"{path}: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}, or an id is given twice.")
    return spec


def is_stale(result: dict[str, Any]) -> bool:
    """True when the model behind a result is another one than when it was measured."""
    name = result.get("model", "")
    return "fingerprint" in result and name.startswith("bundled:") and result["fingerprint"] != _fingerprint(name)


@functools.cache
def _fingerprint(name: str) -> str:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # this process leaves the accelerator to the commands
    from jaxslim import speed

    return speed.resolve(name)[0].fingerprint


def run(command: str) -> list[dict[str, Any]]:
    """The results that a command prints, which may begin with NAME=VALUE words. Raises RuntimeError when it fails."""
    words, env = shlex.split(command), dict(os.environ)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    if words[0] == "jaxslim":
        words = [sys.executable, "-c", MAIN, *words[1:], *([] if "--json" in words else ["--json"])]
    elif words[0] == "python":
        words[0] = sys.executable
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}")
    try:
        values = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        raise RuntimeError(f"it printed no JSON ({error})") from None
    return values if isinstance(values, list) else [values]


def write(path: pathlib.Path, text: str) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(path.suffix + ".partial")
    aside.write_text(text)
    aside.replace(path)


def relate(results: list[dict], rule: dict[str, Any]) -> list[dict]:
    """Results with the value `rule` adds, where what it needs is there (module docstring)."""
    if "per" in rule:
        fits = [rule["of"] in r and r.get(rule["per"]) for r in results]
        return [{**r, rule["name"]: r[rule["of"]] / r[rule["per"]]} if ok else r for r, ok in zip(results, fits)]

    def key(r):
        return [r.get(k) for k in rule["by"]]

    base = [r for r in results if rule["of"] in r and all(r.get(k) == v for k, v in rule["to"].items())]
    out = []
    for r in results:
        to = next((b[rule["of"]] for b in base if key(b) == key(r)), None)
        out.append({**r, rule["name"]: r[rule["of"]] / to} if to and rule["of"] in r else r)
    return out


def cell(form: str, result: dict[str, Any]) -> str:
    """`form` filled with a result; `{x:.1f/1e6}` divides first, `{x.y}` looks inside. Without the value: '-'."""
    def value(match):
        spec, _, divisor = (match[2] or "").partition("/")
        found = functools.reduce(operator.getitem, match[1].split("."), result)
        return format(found / float(divisor) if divisor else found, spec)

    try:
        return re.sub(r"\{([\w.]+)(?::([^}]*))?\}", value, form).replace("|", "\\|")
    except KeyError:
        return "-"


def plot(rule: dict[str, Any], results: list[dict]) -> str:
    """The SVG file of one of `plots`; '' when no result has both values."""
    from jaxslim import svg

    points: dict[str, list] = {}
    for r in results:
        found, at = re.fullmatch(rule.get("series", "(.*)"), r["id"]), [cell(rule[axis], r) for axis in "xy"]
        if found and "-" not in at:
            points.setdefault(found[1], []).append(tuple(map(float, at)))
    series = [svg.Series(name, sorted(p), *style) for (name, p), style in zip(points.items(), STYLES)]
    picture = svg.chart(series, label=rule["title"], xlabel=rule["xlabel"], xlog=rule.get("xlog", False),
                        ylog=rule.get("ylog", False))
    return svg.document(picture, rule["title"], series) if picture else ""


def markdown(spec: dict[str, Any], results: list[dict], source: str) -> str:
    """The table as GitHub markdown, with device, versions and commands below it."""
    for rule in spec.get("relative", []):
        results = relate(results, rule)
    columns = spec["columns"]
    lines = [f"# {spec.get('title', spec['name'])}", "", f"Made by `python scripts/table.py {source}` from "
             f"[{spec['name']}.json]({spec['name']}.json).", "", "| " + " | ".join(columns) + " |",
             "|" + "|".join(" --- " for _ in columns) + "|"]
    lines += ["| " + " | ".join(cell(f, r) for f in columns.values()) + " |" for r in results]
    lines += [line for p in spec.get("plots", []) for line in ("", f"![{p['title']}]({spec['name']}-{p['name']}.svg)")]
    failed = [f"- `{r['id']}`, {r.get('engine', '')} {r.get('audio_seconds', '')} s: {r['error']}"
              for r in results if "error" in r]
    used = sorted({f"- {r['device']}, {r.get('threads', '?')} threads; "
                   + ", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in results if "versions" in r})
    commands = dict.fromkeys(f"- `{r['command']}` ({r['date']})" for r in results)
    for head, items in (("Not measured", failed), ("Machine and versions", used), ("Commands", commands)):
        lines += ["", f"{head}:", "", *items] if items else []
    return "\n".join([*lines, "", spec.get("notes", "").strip()]).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="TABLE.yaml")
    parser.add_argument("--again", metavar="REGEX", help="run the rows again whose whole id fits")
    parser.add_argument("--list", action="store_true", help="say what is missing and stop")
    parser.add_argument("--only-format", action="store_true", help="write the markdown from the results at hand")
    parser.add_argument("--results", default=ROOT / "docs" / "results", type=pathlib.Path, help="folder of the results")
    args = parser.parse_args()
    spec = read(args.table)
    path = args.results / f"{spec['name']}.json"
    source = os.path.relpath(pathlib.Path(args.table).resolve(), ROOT)
    known = json.loads(path.read_text()) if path.is_file() else []
    done: dict[str, list[dict]] = {}
    for row in spec["rows"]:
        found = [r for r in known if r["id"] == row["id"] and r["command"] == row["command"]]
        again = args.again and re.fullmatch(args.again, row["id"])
        if found and not again and (args.only_format or not any(map(is_stale, found))):
            done[row["id"]] = found
    missing = [] if args.only_format else [row for row in spec["rows"] if row["id"] not in done]
    print(f"{spec['name']}: {len(done)} of {len(spec['rows'])} rows are there.", file=sys.stderr)
    if args.list:
        print("\n".join(row["id"] for row in missing))
        return 0
    failed = 0
    for i, row in enumerate([None, *missing]):
        if row:
            print(f"[{i}/{len(missing)}] {row['id']}: {row['command']}", file=sys.stderr, flush=True)
            try:
                results = run(row["command"])
            except RuntimeError as error:
                print(f"{row['id']} failed: {error}.", file=sys.stderr)
                failed += 1
                continue
            date = datetime.datetime.now(datetime.UTC).date().isoformat()
            done[row["id"]] = [{"id": row["id"], "command": row["command"], "date": date, **r} for r in results]
        in_order = [r for row in spec["rows"] for r in done.get(row["id"], [])]
        if in_order:
            write(path, json.dumps(in_order, indent=1) + "\n")
            write(path.with_suffix(".md"), markdown(spec, in_order, source))
            for rule in spec.get("plots", []):
                write(path.with_name(f"{spec['name']}-{rule['name']}.svg"), plot(rule, in_order))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
