"""
What a worker of a deployment does of a request, under the names of Dynamo's `--disaggregation-mode`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mock_engine.errors import ConfigError

ROLES = ("agg", "prefill", "decode")  # all of it, its prompt, what comes after the prompt


def check_num_workers(groups: Sequence[tuple[str, int]]) -> None:
    """Raise `ConfigError` for a deployment of such roles and numbers of workers that cannot answer."""
    for role, number in groups:
        if number < 1:
            raise ConfigError(f"{_flag_of(role)} is {number}; it must be at least 1")
    if {role for role, _ in groups} not in ({"agg"}, {"prefill", "decode"}):
        raise ConfigError("disaggregated serving needs both --prefill-workers and --decode-workers")


def check_migration_limit(limit: int) -> None:
    """Raise `ConfigError` for what `--migration-limit` cannot be."""
    if limit < 0:
        raise ConfigError(f"--migration-limit is {limit}; it must be 0 or more")


def num_workers_by_role(workers: int | None, prefill: int | None, decode: int | None) -> list[tuple[str, int]]:
    """What `--workers`, `--prefill-workers` and `--decode-workers` say. Raises `ConfigError` for a mixture."""
    if prefill is None and decode is None:
        return [("agg", 1 if workers is None else workers)]
    if workers is not None:
        raise ConfigError(
            "--workers do all of a request, --prefill-workers and --decode-workers each a part; give the one or the "
            "other"
        )
    return [(role, number) for role, number in (("prefill", prefill), ("decode", decode)) if number is not None]


def _flag_of(role: str) -> str:
    return "--workers" if role == "agg" else f"--{role}-workers"
