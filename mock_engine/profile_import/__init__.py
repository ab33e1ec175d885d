"""
Makes profiles out of published measurements; one module a source.

    python -m mock_engine.profile_import --all --data DIR --out profiles

    kernel_tables   NVIDIA's measured kernels, from the aiconfigurator-core wheel
    dynamo_sweep    Dynamo's profiler and its pre-swept results
    splitwise       Splitwise's perf_model.csv

`facts` has what is known without measuring, `overhead` what kernels alone do not
show (`fit_overhead` finds it), `writing` puts a profile on disk. Importing needs more than running:
see the `ProfileError` that each source raises when something is missing.
"""

from __future__ import annotations

from mock_engine.profile_import.dynamo_sweep import import_dynamo_sweep
from mock_engine.profile_import.kernel_tables import import_kernel_tables
from mock_engine.profile_import.splitwise import import_splitwise

__all__ = ["import_dynamo_sweep", "import_kernel_tables", "import_splitwise"]
