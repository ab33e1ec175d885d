"""Broken engines, each held against the rule that names it; and the scripts that their findings come with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conformance import release
from conformance.catalogue import load_catalogue
from conformance.selftest.kill import verdict_on
from conformance.selftest.mutants import Mutant
from conformance.verdict import Verdict

ROOT = Path(__file__).resolve().parents[2]


def name_of(mutant: Mutant) -> str:
    return f"{mutant.rule_id}-{mutant.name}"


def is_installed(mutant: Mutant) -> bool:
    """Whether the rule that names it holds in the installed release of Dynamo."""
    return load_catalogue()[mutant.rule_id].is_in_release(release.dynamo_version())


def verdict_of_its_rule(mutant: Mutant) -> Verdict:
    """What that rule says; the test is skipped where the installed release does not have the rule."""
    verdict = verdict_on(mutant, seed=1, shrinks=False)
    if not is_installed(mutant):
        pytest.skip(verdict.reason)
    return verdict


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", script]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
