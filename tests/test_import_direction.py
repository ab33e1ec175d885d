"""Imports go one way: a module takes only from its own row and from the rows above it."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = (
    "errors request session",
    "step speculation kv_blocks latency_table monotone roofline gpu_datasheets engine_defaults profile"
    " model_config profile_writing roles kv_transfer lateness tokenizer_words output_tokens grammar_writer logprobs"
    " lora aiperf_schema columns"
    " slos state_log json_file bucket_counts metric_tables gpu_work gpu_power faults fault_injector"
    " event_file",
    "sequence decode_batch speculative_batch waiting_queue scheduler_config scheduler vllm_scheduler"
    " sglang_scheduler trtllm_scheduler drafting timing step_times structural_tag guided content"
    " prompt handoff kv_events",
    "core",
    "realtime_clock kv_channel kv_sender kv_fetcher recorder drive_realtime drive_virtual engine_settings"
    " trace_files workload aiperf_records simulation_results step_stats step_profile",
    "router_settings flags dynamo_release worker_settings worker_roles live_request recording kv_feed"
    " rank_choice adapter_announcement"
    " planes engine_stats exposition dcgm request_spans controls admission worker_config"
    " llm_engine routing deployment clients simulation",
)  # every other module is in one more row, the last
ROW_OF = {module: number for number, row in enumerate(ROWS, start=1) for module in row.split()}
LAST_ROW = len(ROWS) + 1
WITHOUT_A_CLOCK = range(1, 5)
CLOCKS = {"asyncio", "simpy", "time", "random", "threading"}
TOOLS = {"profile_import": {"import_command"}, "tokenizer_build": set()}  # and who alone may import them


def imports_of(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in it, `import_module("...")` included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            name = node.args[0]
            found.add(name.value if isinstance(name, ast.Constant) else ast.unparse(name))
    return found


def is_of(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def read_package(folder: Path) -> dict[str, set[str]]:
    """Imports by top-level module; a package inside the package counts as one module."""
    modules: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).parts[0].removesuffix(".py")
        modules.setdefault(name, set()).update(imports_of(path))
    return modules


def siblings(imports: set[str]) -> set[str]:
    return {name.split(".")[1] for name in imports if name.startswith("mock_engine.")}


MODULES = read_package(ROOT / "mock_engine")
CONFORMANCE = read_package(ROOT / "conformance")


def row_of(module: str) -> int:
    return ROW_OF.get(module, LAST_ROW)


def test_every_module_of_the_table_is_there():
    assert ROW_OF.keys() <= MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_row_and_from_above(module):
    below = {other for other in siblings(MODULES[module]) if row_of(other) > row_of(module)}
    assert not below, f"{module} (row {row_of(module)}) imports {below}, which are below it"


def test_no_module_imports_itself_over_a_detour():
    TopologicalSorter({module: siblings(imports) - {module} for module, imports in MODULES.items()}).prepare()


@pytest.mark.parametrize("module", [module for module in MODULES if row_of(module) in WITHOUT_A_CLOCK])
def test_the_engine_without_a_clock_knows_neither_time_nor_chance(module):
    used = {name for name in MODULES[module] if name.split(".")[0] in CLOCKS}
    assert not used, f"{module} imports {used}"


def test_only_dynamo_release_imports_dynamo():
    users = [module for module, imports in MODULES.items() if any(is_of(name, "dynamo") for name in imports)]
    assert users == ["dynamo_release"]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_is_imported_by_its_command_alone(tool):
    users = {module for module, imports in MODULES.items() if tool in siblings(imports)} - {tool}
    assert users == TOOLS[tool]


def test_the_conformance_suite_and_the_engine_do_not_know_each_other():
    assert not any(is_of(name, "mock_engine") for imports in CONFORMANCE.values() for name in imports)
    assert not any(is_of(name, "conformance") for imports in MODULES.values() for name in imports)


# What a check may know: the suite's rows. Nothing above the bench knows rules, nothing above the plugin knows pytest.
SUITE_ROWS = (
    "catalogue release virtual_loop runner_errors wire",
    "verdict deviations context transcript bridge streams settings resources"
    " verdict_text html_report suite_report terminal_summary worker_records",
    "worker_driver worker_child worker_conversation facts bench recording reproducer",
    "rules",
    "runner",
    "collection plugin selftest",
)
SUITE_ROW_OF = {module: number for number, row in enumerate(SUITE_ROWS) for module in row.split()}
IMPORT_DYNAMO = {"release", "selftest", "worker_child", "rules"}


def of_suite(module: str) -> set[str]:
    return {name.split(".")[1] for name in CONFORMANCE[module] if name.startswith("conformance.")} - {module}


@pytest.mark.parametrize("module", sorted(CONFORMANCE))
def test_a_module_of_the_suite_imports_only_from_its_row_and_from_above(module):
    if module == "__init__":
        return
    below = {other for other in of_suite(module) if SUITE_ROW_OF[other] > SUITE_ROW_OF[module]}
    assert not below, f"{module} imports {below}, which are below it"


def test_no_module_of_the_suite_imports_itself_over_a_detour():
    TopologicalSorter({module: of_suite(module) for module in CONFORMANCE}).prepare()


def test_the_suite_touches_pytest_in_the_plugin_alone():
    users = {module for module, imports in CONFORMANCE.items() if any(is_of(name, "pytest") for name in imports)}
    assert users <= {"plugin", "collection"}


def test_who_imports_dynamo_in_the_suite():
    users = {module for module, imports in CONFORMANCE.items() if any(is_of(name, "dynamo") for name in imports)}
    assert users <= IMPORT_DYNAMO
