"""
A fitted profile as a folder like any other.

    profile = write_fit(fit, folder, command)      reads it back
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from mock_engine.profile import Profile, to_document
from mock_engine.profile_fit.fit import Fit
from mock_engine.profile_writing import write_folder


def write_fit(fit: Fit, start_name: str, folder: Path, command: str) -> Profile:
    """Write profile.toml and the corrected tables. Raises `ProfileError`."""
    document = to_document(fit.profile)
    document.pop("expected_error", None)  # of the start's tables: points that the fit has moved since
    num_requests = sum(len(run.run.requests) for run in fit.runs)
    concurrencies = ", ".join(str(run.run.concurrency) for run in fit.runs)
    what = f"{num_requests:,} requests in {len(fit.runs)} runs at a concurrency of {concurrencies}"
    document["is_measured"] = True
    document["source"] = {
        "how_measured": (
            f"Fitted end to end: TTFT and ITL of {what}, as a client saw them. Starts from {start_name}, whose shape "
            "it has wherever the requests did not go. No pass was timed alone."
        ),
        "source": "fitted here with 'mock-engine profiles fit'",
        "source_version": f"mock-engine {version('mock-engine')}",
        "licence": f"own measurement; the start profile: {fit.start.licence}",
        "build_command": command,
    }
    timing = document["timing"]
    timing["overhead_source"] = f"Fitted with the tables to {what}."
    timing["jitter_source"] = f"As in {start_name}: {timing['jitter_source']}"
    for key, value in timing.items():
        if isinstance(value, float):
            timing[key] = float(f"{value:.6g}")
    return write_folder(folder, document, fit.profile.latency)
