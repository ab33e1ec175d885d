"""
Deliberately broken versions of the jump over decode steps, and whether the tests notice.

    python reports/jumping_mutants.py --out reports/jumping-mutants.md

Each is one change in a copy of the tree. `jump` is tests/test_drive_virtual.py (runs of steps against single steps),
`plain` tests/test_scheduler.py (single steps against the policies written out plainly), `policy`
tests/test_scheduling_policies.py (examples of what SGLang and TensorRT-LLM do). A test that never ends counts as
one that noticed. The first row breaks nothing, and must not be noticed.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mock_engine.bench_results import find_commit

_ROOT = Path(__file__).resolve().parent.parent
_TESTS = {
    "jump": "tests/test_drive_virtual.py",
    "plain": "tests/test_scheduler.py",
    "policy": "tests/test_scheduling_policies.py",
}
_TIMEOUT_S = 120.0
# Making a failing example small takes longer than finding it, and nobody looks at it here.
_NO_SHRINKING = """
import hypothesis
hypothesis.settings.register_profile("no shrinking", phases=[hypothesis.Phase.generate])
hypothesis.settings.load_profile("no shrinking")
"""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of a module: `old`, which is in it, becomes `new`. `is_slower_only`: results stay right."""

    what: str
    module: str
    old: str
    new: str
    is_slower_only: bool = False


MUTANTS = [
    Mutant("nothing is broken", "core", "import numpy as np", "import numpy as np"),
    Mutant(
        "a run that is cut as one of its steps ends takes that step as over",
        "drive_virtual",
        "run.edges_s.searchsorted(self._clock.now)",
        'run.edges_s.searchsorted(self._clock.now, side="right")',
    ),
    Mutant("an arrival does not cut a run", "drive_virtual", "self.core.scheduler.has_room:", "False:"),
    Mutant(
        "an arrival cuts a run only if somebody waits already",
        "drive_virtual",
        "self.core.scheduler.has_room:",
        "self.core.scheduler.is_admitting:",
    ),
    Mutant(
        "a cancel does not cut a run",
        "drive_virtual",
        "            self._cut_run()\n        self._count_waiting(self._clock.now)\n        if flight in",
        "            pass\n        self._count_waiting(self._clock.now)\n        if flight in",
    ),
    Mutant("a run cut in its second step loses the first", "drive_virtual", "if num_over > 0:", "if num_over > 1:"),
    Mutant(
        "the step under way at a cut starts where the run did",
        "drive_virtual",
        "float(run.edges_s[max(num_over, 0)])",
        "float(run.edges_s[0])",
    ),
    Mutant(
        "the end of a run that was cut ends the next one",
        "drive_virtual",
        "if event is not self._next:\n            return\n        assert self._run",
        "if self._run is None:\n            return\n        assert self._run",
    ),
    Mutant(
        "what happens at one moment happens in any order",
        "drive_virtual",
        "STEP_BEGINS = 1, 2, 3",
        "STEP_BEGINS = 1, 1, 1",
    ),
    Mutant(
        "the next step begins though others act at this moment",
        "drive_virtual",
        "if self._clock.peek() > self._clock.now:",
        "if True:",
    ),
    Mutant(
        "a second token's time is taken though its sequence was preempted",
        "drive_virtual",
        "flight.sequence.num_output_tokens > 1 and ",
        "",
    ),
    Mutant(
        "a run begins though some wait for a token since a step that only prefilled",
        "drive_virtual",
        " and not self._stalled:",
        ":",
    ),
    Mutant(
        "a sequence that waited through several steps has waited for the last of them",
        "drive_virtual",
        "self._start_s) | self._stalled",
        "self._start_s)",
    ),
    Mutant(
        "a sequence preempted after steps that only prefilled had its last token before the preemption",
        "drive_virtual",
        "self._stalled.pop(sequence, self._start_s)",
        "self._start_s",
    ),
    Mutant(
        "a sequence preempted twice before its next token had its last at the second",
        "drive_virtual",
        "if sequence.num_output_tokens and flight.last_token_s is None:",
        "if sequence.num_output_tokens:",
    ),
    Mutant(
        "who is cancelled while it waits for a token is still waited for",
        "drive_virtual",
        "        self._stalled.pop(flight.sequence, None)\n",
        "",
    ),
    Mutant("those that decode go on in a step that only prefills", "sglang_scheduler", "decodes=False", "decodes=True"),
    Mutant("nothing is held back for those that decode", "sglang_scheduler", "+ prefilling", "* 0 + prefilling"),
    Mutant("what is held back never sinks", "sglang_scheduler", " - RATIO_DECAY * num_steps", ""),
    Mutant(
        "what is held back stays as it is when some are retracted", "sglang_scheduler", "self._ratio = min", "_ = min"
    ),
    Mutant(
        "of equal sequences the oldest is retracted", "sglang_scheduler", "reversed(self.decoding)", "self.decoding"
    ),
    Mutant("who is retracted comes first again", "sglang_scheduler", "waiting.append(", "waiting.appendleft("),
    Mutant("a chunk of a prompt is promised no more", "trtllm_scheduler", "to_finish() + prefilling", "to_finish()"),
    Mutant(
        "those that decode are promised no more",
        "trtllm_scheduler",
        "num_blocks_to_finish()",
        "num_blocks_for_step * 0",
    ),
    Mutant(
        "a promise begins a step late",
        "decode_batch",
        "(-(phase + self.num_steps + 1) %",
        "(-(phase + self.num_steps) %",
    ),
    Mutant("jitter that was looked at is not used up", "core", "self._times.skip(num_steps)", "pass"),
    Mutant(
        "a cut run uses up all the jitter it looked at",
        "core",
        "self._times.skip(num_steps)",
        "self._times.skip(run.num_steps)",
    ),
    Mutant(
        "times of a run are summed apart from the clock: the last bits differ",
        "core",
        "np.add.accumulate(edges_s, out=edges_s)",
        "edges_s[1:] = now_s + np.cumsum(edges_s[1:])",
    ),
    Mutant("a run goes on though somebody can be admitted", "scheduler", "or self.is_admitting:", "or False:"),
    Mutant("a run goes on beside a chunked prefill", "scheduler", "if self.prefilling or not", "if False or not"),
    Mutant(
        "a run is not cut where blocks run short",
        "scheduler",
        "return self._decodes.num_steps_with_blocks(num_steps, self.blocks.num_available)",
        "return num_steps",
    ),
    Mutant(
        "a run goes one step past the first end",
        "decode_batch",
        "return self._finish_steps[0] - self.num_steps",
        "return self._finish_steps[0] - self.num_steps + 1",
    ),
    Mutant(
        "a run is cut where eviction would have given blocks",
        "scheduler",
        "(num_steps, self.blocks.num_available)",
        "(num_steps, self.blocks.num_free)",
        is_slower_only=True,
    ),
    Mutant(
        "a run is one step shorter than its blocks allow",
        "decode_batch",
        "while left >= (needed",
        "while left > (needed",
        is_slower_only=True,
    ),
    Mutant(
        "blocks of a run are counted from the wrong phase",
        "decode_batch",
        "first = -self.num_steps % self._block_size",
        "first = self.num_steps % self._block_size",
    ),
    Mutant(
        "blocks of a run that wraps around are forgotten",
        "decode_batch",
        "(sum(by_phase[below:]) if below < 0 else 0)",
        "0",
    ),
    Mutant(
        "sequences that have left still take blocks",
        "decode_batch",
        "self._num_by_phase[sequence._num_computed_tokens % self._block_size] -= 1",
        "pass",
    ),
    Mutant(
        "the context of sequences that have left still counts",
        "decode_batch",
        "self._context_tokens -= request.isl_tokens + sequence._num_output_tokens",
        "pass",
    ),
    Mutant(
        "a cancel within a step loses the block taken for it",
        "scheduler",
        "num_tokens = sequence.num_computed_tokens + self._is_in_decode_step\n        sequence.table",
        "num_tokens = sequence.num_computed_tokens\n        sequence.table",
    ),
    Mutant(
        "a blocked head is not looked at when blocks come back",
        "scheduler",
        "            self.blocks.release(sequence.table)\n        self._is_head_blocked = False",
        "            self.blocks.release(sequence.table)",
    ),
    Mutant(
        "decoded blocks are not offered at an admission",
        "scheduler",
        "for publisher in list(self._publishers):",
        "for publisher in []:",
    ),
    Mutant(
        "blocks are offered twice",
        "scheduler",
        "hashes)\n            sequence.num_published_blocks = num_full",
        "hashes)",
    ),
    Mutant(
        "the oldest sequence is preempted",
        "vllm_scheduler",
        "next(reversed(self.prefilling or self.decoding))",
        "next(iter(self.prefilling or self.decoding))",
    ),
    Mutant(
        "a prefix claimed from the cache can still be evicted",
        "kv_blocks",
        "if release in self._claimed_from:",
        "if False:",
    ),
]


def notices(folder: Path, test: str) -> bool:
    """Whether that test fails, or does not end."""
    shutil.rmtree(folder / ".hypothesis", ignore_errors=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return True
    if run.returncode not in (0, 1) or "error" in run.stdout.splitlines()[-1]:
        sys.exit(f"{test} did not run:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode == 1


def main() -> None:
    """Break, test, and write the page. Ends with status 1 if a broken version got away."""
    parser = argparse.ArgumentParser(description="Break the jump over decode steps, and see the tests notice.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page to write")
    flags = parser.parse_args()
    lines, escaped = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("mock_engine", "profiles", "tests"):
            shutil.copytree(_ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(_ROOT / "pyproject.toml", folder)
        with (folder / "tests" / "conftest.py").open("a", encoding="utf-8") as conftest:
            conftest.write(_NO_SHRINKING)
        for mutant in MUTANTS:
            path = folder / "mock_engine" / f"{mutant.module}.py"
            source = path.read_text(encoding="utf-8")
            if mutant.old not in source:
                sys.exit(f"{mutant.module}.py has changed; {mutant.what!r} no longer applies")
            path.write_text(source.replace(mutant.old, mutant.new, 1), encoding="utf-8")
            noticed = {title: notices(folder, test) for title, test in _TESTS.items()}
            path.write_text(source, encoding="utf-8")
            cells = ["noticed" if each else "" for each in noticed.values()]
            remark = " (slower only)" if mutant.is_slower_only else ""
            lines.append(f"| {mutant.what}{remark} | `{mutant.module}` | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
            may_pass = mutant.is_slower_only or mutant.old == mutant.new
            if any(noticed.values()) == (mutant.old == mutant.new) and not (may_pass and not any(noticed.values())):
                escaped.append(mutant.what)
    page = [
        "# Broken versions of the jump over decode steps",
        "",
        "```",
        f"python reports/jumping_mutants.py --out reports/{flags.out.name}",
        "```",
        "",
        f"mock-engine {version('mock-engine')}, commit {find_commit()}; hypothesis {version('hypothesis')}; "
        f"Python {platform.python_version()}.",
        "",
        f"`jump`: {_TESTS['jump']}, 2,500 random workloads. `plain`: {_TESTS['plain']}, 600 of each policy. `policy`: "
        f"{_TESTS['policy']}, examples. Changes that make a run "
        "shorter than it could be change no result, so nothing is to be noticed.",
        "",
        f"| what is broken | module | {' | '.join(_TESTS)} |",
        "|---|---|---|---|",
        *lines,
        "",
    ]
    flags.out.write_text("\n".join(page), encoding="utf-8")
    if escaped:
        sys.exit(f"not as it should be: {', '.join(escaped)}")


if __name__ == "__main__":
    main()
