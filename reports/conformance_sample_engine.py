"""
What the conformance suite says of engines that we did not write, and what we say to that.

    python reports/conformance_sample_engine.py --out reports/conformance-sample-engine.md \\
        --python RELEASE-1.4.2/bin/python --python RELEASE-1.6.1/bin/python

Each interpreter has another release of ai-dynamo (and mock-engine with the conformance extra). Every broken
rule must be argued in conformance_arguments.toml, which people write after reading the engine; a finding without
an argument, or an argument without a finding, ends the command with status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mock_engine.bench_results import find_commit

_ROOT = Path(__file__).resolve().parent.parent
_SAMPLE = "dynamo.common.backend.sample_engine:SampleLLMEngine"
_TOKENSPEED = "tests.engines.tokenspeed_stub:TokenSpeedEngine"
_TORCH = "tests.engines.tiny_torch:TinyTorchEngine"
_ARGUMENTS_FILE = Path(__file__).with_name("conformance_arguments.toml")
_LIMIT_S = 60
_OTHER_SEEDS = (2, 3, 4)


@dataclass(frozen=True, slots=True)
class Subject:
    """An engine and how it is run. `since`: the first release in which it is looked at here."""

    title: str
    engine: str
    role: str
    since: tuple[int, ...] = (1, 2)


_SUBJECTS = (
    *(Subject(f"SampleLLMEngine, {role}", _SAMPLE, role) for role in ("agg", "prefill", "decode", "encode")),
    Subject("TokenSpeed's engine over a stand-in for its native part, agg", _TOKENSPEED, "agg", (1, 6)),
    Subject("A small transformer with random weights on torch and the CPU, agg", _TORCH, "agg"),
)


@dataclass(slots=True)
class Case:
    """One broken rule of one subject, in every release where it was found."""

    rule: dict[str, Any]
    message: str
    script: str
    releases: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)  # what running the script gave, by release


def run_suite(python: str, subject: Subject, seed: int = 1, rule_id: str = "*") -> tuple[str, dict[str, Any] | None]:
    """The installed release, and the report; None where the engine has no such role there."""
    with tempfile.TemporaryDirectory() as folder:
        words = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}"]
        words += [f"--engine={subject.engine}", f"--engine-role={subject.role}", "--engine-report=out"]
        words += [f"--rule={rule_id}"]
        done = subprocess.run(words, cwd=folder, env=_environment(), capture_output=True, text=True, check=False)
        path = Path(folder) / "out/conformance.json"
        if not path.exists():
            release = _release_of(python)
            print(f"{subject.title} on {release}: not run: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
            return release, None
        report: dict[str, Any] = json.loads(path.read_text())
        return report["subject"]["dynamo_version"], report


def run_script(python: str, script: str) -> str:
    """What the reproducing script does: its last line if it fails, "" if it runs through."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reproduce.py"
        path.write_text(script)
        try:
            done = subprocess.run(
                [python, str(path)], env=_environment(), capture_output=True, text=True, check=False, timeout=_LIMIT_S
            )
        except subprocess.TimeoutExpired:
            return f"not over after {_LIMIT_S} s"
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return last if len(last) <= 200 else f"{last[:200]} ..."


def look_again(python: str, subject: Subject, rule_id: str, finding: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The same rule with other seeds, until a script shows what is found: some examples take luck."""
    for seed in _OTHER_SEEDS:
        _, report = run_suite(python, subject, seed, rule_id)
        others = [verdict["finding"] for verdict in report["verdicts"] if verdict["finding"]] if report else []
        for other in others:
            shown = run_script(python, other["script"]) if other["script"] else ""
            if shown:
                return other, shown
    return finding, ""


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONWARNINGS": "ignore"}


def _release_of(python: str) -> str:
    words = [python, "-c", "from importlib.metadata import version; print(version('ai-dynamo'))"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def collect(pythons: list[str], subject: Subject) -> tuple[dict[str, Case], dict[str, int]]:
    """Broken rules by id, and how many rules hold by release."""
    cases: dict[str, Case] = {}
    held: dict[str, int] = {}
    for python in pythons:
        if tuple(int(part) for part in _release_of(python).split(".")[:2]) < subject.since:
            continue
        release, report = run_suite(python, subject)
        if report is None:
            continue
        held[release] = sum(verdict["outcome"] == "passed" for verdict in report["verdicts"])
        for verdict in report["verdicts"]:
            finding = verdict["finding"]
            if finding is None:
                continue
            rule_id = verdict["rule"]["id"]
            shown = run_script(python, finding["script"]) if finding["script"] else "there is no script"
            if not shown:
                finding, shown = look_again(python, subject, rule_id, finding)
            case = cases.setdefault(rule_id, Case(verdict["rule"], finding["message"], finding["script"]))
            case.releases.append(release)
            case.shown.append(f"{release}: {shown or 'it ran through'}")
            print(f"{subject.title} on {release}: {rule_id}: {shown or 'NOT SHOWN'}", flush=True)
    return cases, held


def main() -> int:
    """Run all, write the page, and say what is not argued."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--python", action="append", default=[], help="an interpreter with another release of ai-dynamo"
    )
    flags = parser.parse_args()
    arguments: dict[str, dict[str, str]] = tomllib.loads(_ARGUMENTS_FILE.read_text(encoding="utf-8"))
    faults: list[str] = []
    sections = []
    unused = {(name, rule_id) for name, table in arguments.items() for rule_id in table}
    for subject in _SUBJECTS:
        cases, held = collect(flags.python or [sys.executable], subject)
        name = subject.engine.partition(":")[2]
        argued = arguments.get(name, {})
        faults += [f"{subject.title}: {rule_id} is not argued" for rule_id in cases.keys() - argued.keys()]
        unused -= {(name, rule_id) for rule_id in cases}
        sections.append(_section(subject, cases, held, argued))
    faults += [f"{name}: {rule_id} is argued and not found" for name, rule_id in sorted(unused)]
    head = f"""# The suite on engines that we did not write

    python reports/conformance_sample_engine.py --out reports/conformance-sample-engine.md --python ... --python ...

Commit {find_commit()}, Python {platform.python_version()}; driver bridge, Hypothesis seed 1. Each finding was read by
hand and is argued from the contract; "shown by" is the last line of the reproducing script, run on its own.
SampleLLMEngine is NVIDIA's reference (`dynamo/common/backend/sample_engine.py`). TokenSpeed's engine is Dynamo's
(`dynamo/tokenspeed`); its native part cannot be installed here and is a stand-in of ours
(`tests/engines/tokenspeed_stub.py`), so findings that depend on what the native part does say so. The last engine is
ours, but a real one: its times are those of torch, in real time on a thread (`tests/engines/tiny_torch.py`).
"""
    flags.out.write_text("\n".join([head, *sections]), encoding="utf-8")
    for fault in faults:
        print(fault, file=sys.stderr)
    return bool(faults)


def _section(subject: Subject, cases: dict[str, Case], held: dict[str, int], argued: dict[str, str]) -> str:
    lines = [
        f"## {subject.title}",
        "",
        "Rules that hold: " + ", ".join(f"{count} on {release}" for release, count in held.items()) + ".",
        "",
    ]
    for rule_id, case in cases.items():
        rule = case.rule
        lines += [
            f"### {rule_id} ({rule['level']}), on {', '.join(case.releases)}",
            "",
            rule["sentence"],
            "",
            f"- Found: {case.message}",
            *(f"- Shown by the script on {shown}" for shown in case.shown),
            f"- Source: {rule['source']}",
            f"- {argued.get(rule_id, 'NOT ARGUED').strip()}",
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
