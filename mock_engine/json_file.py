"""
Files for machines: JSON that a person can read, too.
"""

from __future__ import annotations

import json
from pathlib import Path


def write_json(path: Path | None, content: object) -> None:
    """Write `content` (what `json.dumps` takes) to `path`, if there is one. Raises `OSError` if that fails."""
    if path is not None:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
