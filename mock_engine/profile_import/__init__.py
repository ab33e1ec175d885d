"""
Makes profiles out of published and of your own measurements: `mock-engine profiles import`.

    kernel_tables   NVIDIA's measured kernels, from the aiconfigurator-core wheel
    dynamo_sweep    Dynamo's profiler and its pre-swept results
    splitwise       CSV files like Splitwise's perf_model.csv
    step_rows       a plain CSV file of an engine's steps
    catalogue       all that ships

`known_models` has the models known by name, `overhead` what
kernels alone do not show (`fit_overhead` finds it), `accuracy` how well the tables predict,
`writing` puts a profile on disk. Importing needs more than running: see the `ProfileError` that
each source raises when something is missing.
"""

from __future__ import annotations

from mock_engine.profile_import.dynamo_sweep import import_dynamo_sweep
from mock_engine.profile_import.kernel_tables import import_kernel_tables
from mock_engine.profile_import.splitwise import import_splitwise
from mock_engine.profile_import.step_rows import import_step_rows

__all__ = ["import_dynamo_sweep", "import_kernel_tables", "import_splitwise", "import_step_rows"]
