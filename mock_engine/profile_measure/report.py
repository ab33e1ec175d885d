"""
What was found, for people (report.md, a summary on the terminal) and for machines (`--json`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from mock_engine.profile_measure.measuring import Measurement
from mock_engine.profile_measure.overhead import Comparison, OverheadFit
from mock_engine.profile_writing import Document
from mock_engine.step import StepLoad


def report_markdown(
    document: Document, measured: list[Measurement], comparisons: list[Comparison], fit: OverheadFit, minutes: float
) -> str:
    """report.md: the command first, then what was measured, then whole passes beside the sums of their parts."""
    source = document["source"]
    counts = Counter(found.point.table for found in measured)
    lines = [
        f"# {document['model']} on {document['gpu']}, {document['dtype']}",
        "",
        f"    {source['build_command']}",
        "",
        f"{source['source_version']}. {source['how_measured']}",
        "",
        f"{', '.join(f'{count} points of {name}' for name, count in counts.items())}; {minutes:.1f} minutes.",
        "",
        "## Whole passes, and the sum of their parts",
        "",
        "| pass | whole, ms | sum, ms | diff. | with overhead |",
        "|---|--:|--:|--:|--:|",
    ]
    rows = zip(comparisons, fit.errors_before, fit.errors_after, strict=True)
    for found, before, after in rows:
        lines.append(
            f"| {load_text(found.load)} | {found.whole_s * 1e3:.3f} | {found.sum_s * 1e3:.3f} "
            f"| {before:+.1%} | {after:+.1%} |"
        )
    timing = document["timing"]
    lines += [
        "",
        *(f"{line}  " for line in summary_lines(fit)),
        "",
        f"jitter_cv {timing['jitter_cv']:g}. {timing['jitter_source']}",
        "",
    ]
    return "\n".join(lines)


def summary_lines(fit: OverheadFit) -> list[str]:
    """How parts and whole passes agree, in two lines."""
    signed = sum(fit.errors_before) / len(fit.errors_before)
    worst = max(fit.errors_before, key=abs)
    return [
        f"The sum of parts differs from {len(fit.errors_before)} whole passes by {fit.mean_before:.1%} "
        f"(mean {signed:+.1%}, worst {worst:+.1%}).",
        f"Overhead fitted: {fit.step_s * 1e6:.0f} us a step and {fit.per_seq_s * 1e6:.1f} us a sequence; "
        f"with it {fit.mean_after:.1%}.",
    ]


def results_json(
    document: Document, measured: list[Measurement], comparisons: list[Comparison], fit: OverheadFit, minutes: float
) -> dict[str, Any]:
    """All of it, every repeat included."""
    return {
        "profile": document,
        "minutes": minutes,
        "points": [
            {
                "table": found.point.table,
                "at": list(found.point.at) if found.point.load is None else load_text(found.point.load),
                "seconds": found.seconds,
                "cv": found.cv,
                "num_layers": found.num_layers,
                "repeats_s": list(found.repeats_s),
            }
            for found in measured
        ],
        "whole_passes": [
            {"pass": load_text(found.load), "whole_s": found.whole_s, "sum_s": found.sum_s} for found in comparisons
        ],
        "overhead": asdict(fit),
    }


def load_text(load: StepLoad) -> str:
    """A pass in words."""
    parts = [
        f"prefill {chunk.new_tokens:,}" + (f" after {chunk.past_tokens:,}" if chunk.past_tokens else "")
        for chunk in load.prefill_chunks
    ]
    if load.decode_batch_size:
        parts.append(f"decode {load.decode_batch_size:,} x {load.context_tokens // load.decode_batch_size:,}")
    return ", ".join(parts)
