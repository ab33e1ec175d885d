"""
Which broken engines the conformance suite notices, and whether it blames a correct one.

    python reports/conformance_mutants.py --runs 3 --clean-runs 20

Each mutant is a small change to the toy engine (`conformance.selftest`), held against the rule that names it, once
with each seed. The correct engines are held against all rules, with more seeds; nothing may be found. Each engine has
a process of its own, which is ended when it takes too long. Ends with status 1 if a mutant survives or a correct
engine is blamed.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mock_engine.bench_results import find_commit

_ROOT = Path(__file__).resolve().parent.parent
_TOY = "conformance.selftest.toy"
_MUTANT_LIMIT_S = 120.0  # for one seed
_CLEAN_LIMIT_S = 600.0  # for all rules with one seed
_CLEAN = "## Correct engines"
# Bugs of real engines that must have a mutant, as `seen_in` names them.
_ISSUES = {
    "vllm": [19225, 29987, 14326],
    "sglang": [9817, 21652],
    "ATOM": [1589],
    "tt-inference-server": [4818],
    "tenstorrent/vllm": [145],
    "llm-d": [187],
    "TensorRT-LLM": [12314],
    "dynamo": [
        14368,
        15161,
        8624,
        4177,
        7489,
        9344,
        8003,
        9531,
        2894,
        8549,
        5566,
        1856,
        10513,
        4154,
        3443,
        3876,
        8743,
        7503,
        2035,
        3780,
        6605,
        7752,
        12562,
        10149,
        8611,
        8521,
    ],
}
# Bugs without an issue: a word of `seen_in`, how many mutants there must be, and what they are.
_UNNUMBERED = [
    ("1.3.1", 1, "an await inside `finally`, in the TensorRT-LLM engine of ai-dynamo 1.3.1"),
    (
        "sample",
        4,
        "of NVIDIA's sample engine: an unread publish queue that grows, no terminal with a default budget of 0, 2500 "
        "of 1000 blocks used, KV removals lost at cleanup",
    ),
]


@dataclass(frozen=True, slots=True)
class Clean:
    """A correct engine."""

    title: str
    engine: str
    engine_args: str
    role: str


@dataclass(slots=True)
class Work:
    """What one process does: yields one result after another, each a picklable tuple."""

    title: str
    function: Callable[..., Iterator[Any]]
    arguments: tuple[Any, ...]
    limit_s: float  # for one result
    results: list[Any] = field(default_factory=list)
    problem: str = ""  # why there are no more results
    seconds: float = 0.0


# In the processes.


def judge_mutant(name: str, rule_id: str, seeds: Sequence[int]) -> Iterator[tuple[str, int, str]]:
    """Outcome, examples and words of the rule that names it, with each seed."""
    from conformance.selftest.kill import verdict_on
    from conformance.selftest.mutants import mutants

    mutant = next(each for each in mutants() if (each.name, each.rule_id) == (name, rule_id))
    for seed in seeds:
        verdict = verdict_on(mutant, seed=seed, shrinks=False)
        yield str(verdict.outcome), verdict.num_examples, verdict.finding.message if verdict.finding else verdict.reason


def judge_clean(clean: Clean, seed: int) -> Iterator[list[tuple[str, str, str]]]:
    """Rule, outcome and words of all rules."""
    from conformance.catalogue import load_catalogue
    from conformance.selftest.kill import verdicts_of
    from conformance.settings import ROLES, SuiteSettings

    role = next(role for role in ROLES if role == clean.role)
    settings = SuiteSettings(clean.engine, clean.engine_args, "bridge", None if role == "agg" else role, seed=seed)
    yield [
        (verdict.rule.id, str(verdict.outcome), verdict.finding.message if verdict.finding else verdict.reason)
        for verdict in verdicts_of(settings, load_catalogue().values(), shrinks=False)
    ]


def _child(connection: Connection, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    os.setsid()  # what a broken engine leaves behind is ended with it
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        for result in function(*arguments):
            connection.send(result)
        connection.send(None)
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
    signal.pause()  # the parent ends this group: a thread that never ends must not hold it up


def run_all(works: Iterable[Work], num_jobs: int) -> None:
    """Do all, so many at a time, each in a process of its own; the results are in them afterwards."""
    spawn = multiprocessing.get_context("spawn")
    waiting = list(works)[::-1]
    running: dict[Connection, tuple[Work, Any, float]] = {}
    num_all, began_s = len(waiting), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `finally` runs
    try:
        while waiting or running:
            while waiting and len(running) < num_jobs:
                work = waiting.pop()
                ours, theirs = spawn.Pipe(duplex=False)
                process = spawn.Process(target=_child, args=(theirs, work.function, work.arguments))
                process.start()
                theirs.close()
                running[ours] = (work, process, time.monotonic())
            wait(list(running), timeout=1.0)
            for connection, (work, process, since_s) in list(running.items()):
                is_over = False
                try:
                    while connection.poll() and not is_over:
                        result = connection.recv()
                        is_over = result is None or isinstance(result, str)
                        work.problem = result or "" if is_over else ""
                        if not is_over:
                            work.results.append(result)
                            work.seconds += time.monotonic() - since_s
                            since_s = time.monotonic()
                            running[connection] = (work, process, since_s)
                except EOFError:
                    is_over, work.problem = True, "its process ended"
                if not is_over and time.monotonic() - since_s > work.limit_s:
                    is_over, work.problem = True, f"not over after {work.limit_s:g} s"
                if is_over:
                    del running[connection]
                    connection.close()
                    _end(process)
                    num_over = num_all - len(waiting) - len(running)
                    words = f"{num_over} of {num_all}, {time.monotonic() - began_s:.0f} s: {work.title}"
                    print(f"{words} {work.problem}".rstrip(), file=sys.stderr, flush=True)
    finally:
        for _, process, _ in running.values():
            _end(process)


def _end(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


# What is judged.


def correct_engines() -> list[Clean]:
    """Every toy engine, in each role; with all that it can do, with nothing, and with each alone."""
    from conformance.selftest.toy import ToyEngine
    from conformance.settings import ROLES

    switches = [
        action.option_strings[0]
        for action in ToyEngine.parser()._actions
        if action.const is True and "--route-to-encoder" not in action.option_strings
    ]
    every = shlex.join(switches)
    toys = [
        name
        for name, thing in vars(import_module(_TOY)).items()
        if isinstance(thing, type) and issubclass(thing, ToyEngine) and thing is not ToyEngine
    ]
    toy = f"{_TOY}:ToyEngine"
    return [
        *(Clean(f"ToyEngine, {role}, all on", toy, every, role) for role in ROLES),
        *(Clean(f"ToyEngine, {role}, all off", toy, "", role) for role in ROLES),
        *(Clean(f"ToyEngine, agg, {switch} alone", toy, switch, "agg") for switch in switches),
        Clean("ToyEngine, agg, one place", toy, f"{every} --max-num-seqs 1", "agg"),
        *(Clean(f"ToyEngine, {role}, an encoder before it", toy, "--route-to-encoder", role) for role in ROLES[:2]),
        *(Clean(f"{name}, agg, all on", f"{_TOY}:{name}", every, "agg") for name in toys),
    ]


def holes() -> list[str]:
    """Rules without a mutant, bugs without one, rules without a check."""
    from conformance.catalogue import load_catalogue
    from conformance.rules import UNCHECKABLE, checks
    from conformance.selftest.mutants import mutants

    with_mutant = {mutant.rule_id for mutant in mutants()}
    seen = " ".join(mutant.seen_in for mutant in mutants())
    issues = re.findall(r"[\w.-]+(?:/[\w.-]+)?#\d+", seen)
    rules, installed = load_catalogue(), version("ai-dynamo")
    lines = [f"- no check: `{rule_id}`" for rule_id in rules if rule_id not in {*checks(), *UNCHECKABLE}]
    lines += [
        f"- no mutant for the rule `{rule_id}`"
        for rule_id in checks()
        if rule_id not in with_mutant and rules[rule_id].is_in_release(installed)
    ]
    lines += [
        f"- no mutant for {wanted}"
        for wanted in (f"{project}#{number}" for project, numbers in _ISSUES.items() for number in numbers)
        if not any(issue == wanted or issue.endswith(f"/{wanted}") for issue in issues)
    ]
    for word, number, what in _UNNUMBERED:
        found = sum(word in mutant.seen_in for mutant in mutants())
        if found < number:
            lines.append(f"- {found} of {number} mutants for bugs {what}")
    return lines


# The page.


def mutant_line(mutant: Any, work: Work, num_runs: int) -> tuple[str, bool]:
    """A line of the table, and whether the mutant survived."""
    from conformance.catalogue import load_catalogue

    rule = load_catalogue()[mutant.rule_id]
    noticed = [num for outcome, num, _ in work.results if outcome == "failed"]
    if not rule.is_in_release(version("ai-dynamo")):
        said, survived = f"not in this release ({rule.since or 'first'} to {rule.until or 'now'})", False
    elif len(noticed) == num_runs:
        said, survived = f"{num_runs} of {num_runs}", False
    else:
        others = sorted({f"{outcome} {words}".strip() for outcome, _, words in work.results if outcome != "failed"})
        why = "; ".join(filter(None, [*others, work.problem]))
        said, survived = f"**{len(noticed)} of {num_runs}**: {why}", True
    examples = ", ".join(map(str, noticed))
    cells = [f"`{mutant.rule_id}`", f"`{mutant.name}`", mutant.what, mutant.seen_in, mutant.role, said, examples]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |", survived


def clean_line(clean: Clean, works: Sequence[Work]) -> tuple[str, list[str]]:
    """A line of the table, and what the engine was blamed for."""
    outcomes: dict[str, set[str]] = {}
    blamed: set[str] = set()
    for work in works:
        if work.problem:
            blamed.add(f"the run itself: {work.problem}")
        for rule_id, outcome, words in (verdict for result in work.results for verdict in result):
            outcomes.setdefault(rule_id, set()).add(outcome)
            if outcome == "failed":
                blamed.add(f"`{rule_id}` (seed {work.arguments[1]}): {words}")
    num_passed = sum("passed" in each for each in outcomes.values())
    num_left_out = sum(not each & {"passed", "failed"} for each in outcomes.values())
    arguments = f"`{clean.engine_args}`" if clean.engine_args else ""
    cells = [clean.title, arguments, str(len(works)), str(num_passed), str(num_left_out), str(len(blamed) or "none")]
    return f"| {' | '.join(cells)} |", [f"- {clean.title}: {each}" for each in sorted(blamed)]


def main() -> None:
    """Judge them all and write the page."""
    parser = argparse.ArgumentParser(description="Hold broken and correct engines against the conformance suite.")
    parser.add_argument("--runs", type=int, default=3, help="seeds for each mutant; 0: leave them out (%(default)s)")
    parser.add_argument(
        "--clean-runs", type=int, default=20, help="seeds for each correct engine; 0: leave them out (%(default)s)"
    )
    parser.add_argument("--area", action="append", metavar="AREA", help="only mutants of these areas, as in gen,err")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (%(default)s)")
    default = Path("reports/conformance-mutants.md")
    parser.add_argument("--out", type=Path, default=default, metavar="FILE", help="the page to write (%(default)s)")
    flags = parser.parse_args()
    sys.path.insert(0, str(_ROOT))
    from conformance.rules import AREAS
    from conformance.selftest.mutants import mutants

    areas = [area for given in flags.area or [",".join(AREAS)] for area in given.split(",")]
    if unknown := set(areas) - set(AREAS):
        parser.error(f"--area {', '.join(sorted(unknown))}: areas are {', '.join(AREAS)}")
    seeds = list(range(1, flags.runs + 1))
    of_mutants = [
        (mutant, Work(mutant.name, judge_mutant, (mutant.name, mutant.rule_id, seeds), _MUTANT_LIMIT_S))
        for mutant in mutants()
        if flags.runs and mutant.rule_id.partition(".")[0] in areas
    ]
    of_clean = {
        clean: [
            Work(f"{clean.title}, seed {seed}", judge_clean, (clean, seed), _CLEAN_LIMIT_S)
            for seed in range(1, flags.clean_runs + 1)
        ]
        for clean in (correct_engines() if flags.clean_runs else [])
    }
    began_s = time.monotonic()
    run_all([work for _, work in of_mutants] + [work for works in of_clean.values() for work in works], flags.jobs)
    seconds = time.monotonic() - began_s

    mutant_lines = [mutant_line(mutant, work, flags.runs) for mutant, work in of_mutants]
    clean_lines = [clean_line(clean, works) for clean, works in of_clean.items()]
    survived = [line for line, has_survived in mutant_lines if has_survived]
    blamed = [line for _, blames in clean_lines for line in blames]
    flags.out.write_text("\n".join(page(flags, mutant_lines, clean_lines, blamed, seconds)), encoding="utf-8")
    if survived or blamed:
        sys.exit("\n".join(["not as it should be:", *survived, *blamed]))


def page(
    flags: argparse.Namespace,
    mutant_lines: Sequence[tuple[str, bool]],
    clean_lines: Sequence[tuple[str, list[str]]],
    blamed: Sequence[str],
    seconds: float,
) -> list[str]:
    """The lines of the whole page. A part that was not judged now stays as it is on the page that is there."""
    there = flags.out.read_text(encoding="utf-8") if flags.out.exists() else ""
    about_mutants = mutants_section(flags, mutant_lines, seconds) if flags.runs else _section("## Mutants", there)
    about_clean = clean_section(flags, clean_lines, blamed, seconds) if flags.clean_runs else _section(_CLEAN, there)
    return [
        "# Broken engines and the rules that notice",
        "",
        *about_mutants,
        *about_clean,
        "## Holes",
        "",
        *(holes() or ["None: every rule that is checked has a mutant, and so has every bug in the list."]),
        "",
    ]


def _section(title: str, text: str) -> list[str]:
    """The lines of one section of a page, its title among them."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line == title), len(lines))
    end = next((i for i in range(begin + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
    return lines[begin:end]


def _made_by(flags: argparse.Namespace, option: str, number: int, seconds: float) -> list[str]:
    command = ["python", "reports/conformance_mutants.py", option, str(number)]
    command += ["--area", ",".join(flags.area)] if flags.area else []
    return [
        f"`{shlex.join(command)}` at commit {find_commit()}; ai-dynamo {version('ai-dynamo')}, hypothesis "
        f"{version('hypothesis')}, Python {platform.python_version()}, {os.cpu_count()} cores, shared; "
        f"{seconds / 60:.0f} min for the whole command.",
        "",
    ]


def mutants_section(flags: argparse.Namespace, mutant_lines: Sequence[tuple[str, bool]], seconds: float) -> list[str]:
    """The broken engines."""
    num_survived = sum(has_survived for _, has_survived in mutant_lines)
    num_elsewhere = sum("not in this release" in line for line, _ in mutant_lines)
    num_judged = len(mutant_lines) - num_elsewhere
    return [
        "## Mutants",
        "",
        *_made_by(flags, "--runs", flags.runs, seconds),
        f"{num_judged - num_survived} of {num_judged} mutants are noticed by the rule that names them with every one "
        f"of {flags.runs} seeds; {num_elsewhere} are for rules that ai-dynamo {version('ai-dynamo')} does not have.",
        "",
        "`examples`: how many it took with each seed, the one or two that confirm the finding included.",
        "",
        "| rule | mutant | what is broken | seen in | role | noticed | examples |",
        "|---|---|---|---|---|---|---|",
        *(line for line, _ in mutant_lines),
        "",
    ]


def clean_section(
    flags: argparse.Namespace,
    clean_lines: Sequence[tuple[str, list[str]]],
    blamed: Sequence[str],
    seconds: float,
) -> list[str]:
    """The correct engines."""
    return [
        _CLEAN,
        "",
        *_made_by(flags, "--clean-runs", flags.clean_runs, seconds),
        f"{len(clean_lines)} correct engines, each with {flags.clean_runs} seeds and all rules: "
        f"{len(blamed) or 'no'} findings. Rules that are left out are for another role, release or capability, or "
        "cannot be checked.",
        "",
        "| engine | arguments | seeds | rules passed | left out | found |",
        "|---|---|--:|--:|--:|---|",
        *(line for line, _ in clean_lines),
        "",
        *blamed,
        *([""] if blamed else []),
    ]


if __name__ == "__main__":
    main()
