"""
The rules on what is said of an engine before and beside its answers: args, sig, start, hook, ctx, log.

Each broken engine is noticed by the rule that names it, the correct one by none.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conformance import release
from conformance.catalogue import load_catalogue, select
from conformance.rules.args import config_valid_of
from conformance.rules.ctx import StrictContext, surface_of
from conformance.rules.hook import logits_spec_of
from conformance.rules.log import levels_of
from conformance.rules.sig import generate_of, hooks_of, kind_of
from conformance.rules.start import (
    config_consistent_of,
    config_shape_of,
    config_types_of,
    model_of,
    runtime_data_json_of,
    typed_failure_of,
)
from conformance.selftest.kill import verdict_on, verdicts_of
from conformance.selftest.mutants import Mutant, mutants
from conformance.selftest.toy import ToyEngine
from conformance.settings import SuiteSettings
from conformance.streams import DriverName
from conformance.transcript import Transcript, Violation
from conformance.verdict import Outcome

AREAS = ("args", "sig", "start", "hook", "ctx", "log")
MUTANTS = [mutant for mutant in mutants() if mutant.rule_id.partition(".")[0] in AREAS]
RULES = select(load_catalogue(), [f"{area}.*" for area in AREAS])
TOY = "conformance.selftest.toy:ToyEngine"
ALL_FLAGS = "--kv-events --metrics --logprobs --controls --logits"
HAS_LLM = release.is_at_least("1.3")

# The dry run cannot know yet that what `generate` gives is no stream, and leaves it.
pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore:coroutine '.*generate' was never awaited:RuntimeWarning"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.rule_id}-{mutant.name}")
def test_each_broken_engine_is_noticed_by_the_rule_that_names_it(mutant: Mutant) -> None:
    verdict = verdict_on(mutant, seed=1)
    assert verdict.outcome is Outcome.FAILED, verdict.reason
    assert verdict.finding is not None
    assert verdict.finding.script.count("\n") <= 25


def test_every_rule_of_these_areas_has_a_broken_engine() -> None:
    named = {mutant.rule_id for mutant in MUTANTS}
    installed = {rule.id for rule in RULES if rule.is_in_release(release.dynamo_version())}
    assert installed <= named


CORRECT = [
    pytest.param(TOY, ALL_FLAGS, "bridge", id="agg"),
    pytest.param(TOY, ALL_FLAGS, "plain", id="agg, plain driver"),
    pytest.param(TOY, "", "bridge", id="agg, no flags"),
    pytest.param(TOY, f"{ALL_FLAGS} --disaggregation-mode prefill", "bridge", id="prefill"),
    pytest.param(TOY, f"{ALL_FLAGS} --disaggregation-mode decode", "bridge", id="decode"),
    pytest.param(TOY, f"{ALL_FLAGS} --disaggregation-mode encode", "bridge", id="encode"),
    pytest.param(
        TOY,
        "--route-to-encoder",
        "bridge",
        id="behind an encoder",
        marks=pytest.mark.skipif(not HAS_LLM, reason="from 1.3"),
    ),
    pytest.param("conformance.selftest.toy:ToyWithoutProbe", ALL_FLAGS, "bridge", id="no probe"),
    pytest.param("conformance.selftest.mutants.hook:ForcingToy", "--logits", "bridge", id="forced tokens"),
    pytest.param(
        "conformance.selftest.mutants.hook:ForcingToy",
        "--logits --disaggregation-mode prefill",
        "bridge",
        id="forced tokens, prefill",
    ),
    pytest.param("tests.test_conformance_rules_static:OtherwiseToy", ALL_FLAGS, "bridge", id="unusual but correct"),
]


@pytest.mark.parametrize(("engine", "engine_args", "driver"), CORRECT)
def test_a_correct_engine_breaks_none_of_these_rules(engine: str, engine_args: str, driver: DriverName) -> None:
    settings = SuiteSettings(engine, engine_args, driver, seed=1)
    broken = {
        verdict.rule.id: verdict.finding.message
        for verdict in verdicts_of(settings, RULES)
        if verdict.finding is not None
    }
    assert broken == {}


def _logged(method: Any) -> Any:
    """A decorator whose wrapper is no coroutine function, but gives a coroutine."""

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return wrapper


class OtherwiseToy(ToyEngine):
    """What the contract allows, and few engines do."""

    known_tokens: frozenset[int] = frozenset()
    cache: dict[int, list[int]] = {}  # noqa: RUF012  (shared by all engines, and harmless)

    @_logged
    async def abort(self, context: Any) -> None:
        logging.getLogger("otherwise").debug("aborting %s", context.id())
        await super().abort(context)

    def generate(self, *args: Any, **kwargs: Any) -> Any:  # not an async generator function, but gives one
        return super().generate(*args, **kwargs)

    def admit(self, request: Any, context: Any) -> Any:
        work = super().admit(request, context)
        logging.getLogger("otherwise").info("request %s has %d tokens", context.id(), len(work.prompt))
        self.cache[len(work.prompt)] = list(work.prompt)
        getattr(context, "metadata", None)
        return work

    def engine_config(self) -> Any:
        config = super().engine_config()
        holder = config.llm if HAS_LLM else config
        holder.context_length = np.int64(holder.context_length)
        holder.total_kv_blocks = np.uint32(holder.total_kv_blocks)
        return config


# The pure checks, without an engine.


def _numbers(**numbers: Any) -> Any:
    """An EngineConfig of the installed release."""
    module = release.backend()
    if HAS_LLM:
        return module.EngineConfig(model="m", llm=module.LlmRegistration(**numbers))
    return module.EngineConfig(model="m", **numbers)


@pytest.mark.parametrize("model", [None, "", b"m", Path("m"), 7])
def test_a_model_that_is_no_name_is_noticed(model: Any) -> None:
    with pytest.raises(Violation, match="model"):
        model_of(SimpleNamespace(model=model))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context_length", 4096.0),
        ("context_length", "4096"),
        ("context_length", 2**32),
        ("kv_cache_block_size", True),
        ("total_kv_blocks", -1),
        ("total_kv_blocks", 2**64),
        ("max_num_seqs", np.float32(4)),
        ("bootstrap_port", 70000),
    ],
)
def test_a_number_that_the_bridge_does_not_take_is_noticed(name: str, value: Any) -> None:
    with pytest.raises(Violation, match=name):
        config_types_of(_numbers(**{name: value}))


@pytest.mark.parametrize("value", [None, 0, 1, 2**32 - 1, np.int32(5), np.uint64(7)])
def test_a_number_that_the_bridge_takes_is_not(value: Any) -> None:
    config_types_of(_numbers(context_length=value, total_kv_blocks=value, max_num_seqs=value))


@pytest.mark.skipif(not HAS_LLM, reason="the shape is from 1.3")
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SimpleNamespace(context_length=96), id="flat"),
        pytest.param(SimpleNamespace(context_length=96, llm=None), id="flat, llm None"),
        pytest.param(SimpleNamespace(llm={"context_length": 96}), id="dict"),
        pytest.param(SimpleNamespace(llm=SimpleNamespace(length=96)), id="other names"),
    ],
)
def test_numbers_where_nobody_reads_them_are_noticed(config: Any) -> None:
    with pytest.raises(Violation, match="LlmRegistration"):
        config_shape_of(config)


@pytest.mark.skipif(not HAS_LLM, reason="the shape is from 1.3")
def test_numbers_in_both_places_are_read_from_the_right_one() -> None:
    config_shape_of(SimpleNamespace(context_length=96, llm=SimpleNamespace(context_length=96)))
    config_shape_of(SimpleNamespace(model="m", llm=None))


@pytest.mark.parametrize(
    ("numbers", "kv_ranks", "metrics_ranks"),
    [
        ({"context_length": 0}, [], []),
        ({"kv_cache_block_size": 0}, [], []),
        ({"total_kv_blocks": 0}, [], []),
        ({"bootstrap_host": "h"}, [], []),
        ({"bootstrap_port": 9000}, [], []),
        ({"bootstrap_host": 1, "bootstrap_port": 9000}, [], []),
        ({}, [0], []),
        ({"kv_cache_block_size": 16}, [0, 1], []),
        ({}, [], [1]),
    ],
)
def test_numbers_that_do_not_fit_together_are_noticed(
    numbers: dict[str, Any], kv_ranks: list[int], metrics_ranks: list[int]
) -> None:
    with pytest.raises(Violation):
        config_consistent_of(_numbers(**numbers), kv_ranks, metrics_ranks)


def test_numbers_that_fit_together_are_not() -> None:
    config_consistent_of(_numbers())
    config_consistent_of(_numbers(bootstrap_host="h", bootstrap_port=9000, kv_cache_block_size=16), [0], [0])
    if HAS_LLM:
        ranks = {"data_parallel_start_rank": 2, "data_parallel_size": 2, "kv_cache_block_size": 16}
        config_consistent_of(_numbers(**ranks), [2, 3], [3])
        with pytest.raises(Violation, match="rank 0"):
            config_consistent_of(_numbers(**ranks), [0, 2], [])


@pytest.mark.parametrize("data", [[], "x", {1: 2}, {"a": {1: 2}}, {"a": {1, 2}}, {"a": b"x"}, {"a": np.float32(1)}])
def test_runtime_data_that_is_no_json_is_noticed(data: Any) -> None:
    with pytest.raises(Violation, match="runtime_data"):
        runtime_data_json_of(SimpleNamespace(runtime_data=data))


@pytest.mark.parametrize("data", [None, {}, {"a": [1, 2.5, None, {"b": True}], "c": (1, 2)}])
def test_runtime_data_that_is_json_is_not(data: Any) -> None:
    runtime_data_json_of(SimpleNamespace(runtime_data=data))


@pytest.mark.parametrize("error", [SystemExit(1), GeneratorExit(), RuntimeError("x"), ValueError("x"), OSError("x")])
def test_a_start_that_fails_with_another_type_is_noticed(error: BaseException) -> None:
    with pytest.raises(Violation, match=type(error).__name__):
        typed_failure_of(error, "", "")


def test_a_start_that_fails_with_dynamos_own_type_is_not() -> None:
    typed_failure_of(None, "", "")
    for kind in release.exceptions("EngineShutdown", "InvalidArgument", "CannotConnect"):
        typed_failure_of(kind("x"), "", "")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("namespace", ""),
        ("namespace", None),
        ("endpoint_types", ""),
        ("endpoint_types", "chat,embed"),
        ("endpoint_types", None),
        ("disaggregation_mode", "agg"),
        ("model_input", release.core("ModelInput").Text),
        ("component", None),
        ("endpoint", 5),
        ("metrics_labels", [("one", 1)]),
        ("request_plane", 7),
    ],
)
def test_a_worker_config_that_dynamo_does_not_take_is_noticed(field: str, value: Any) -> None:
    config = release.backend().WorkerConfig(namespace="x")
    config_valid_of(config)
    setattr(config, field, value)
    with pytest.raises(Violation, match=field):
        config_valid_of(config)


def test_endpoint_types_are_not_read_for_a_prefill_worker() -> None:
    config = release.backend().WorkerConfig(namespace="x", endpoint_types="")
    config.disaggregation_mode = release.disaggregation_modes()["prefill"]
    config_valid_of(config)


@pytest.mark.skipif(not release.is_at_least("1.6"), reason="response_plane is from 1.6")
def test_an_unknown_response_plane_is_noticed() -> None:
    with pytest.raises(Violation, match="response_plane"):
        config_valid_of(release.backend().WorkerConfig(namespace="x", response_plane="udp"))


async def _awaited(*_: Any) -> None: ...


async def _yields(*_: Any) -> Any:
    yield 1


def _called(*_: Any) -> None: ...


class _AwaitedCall:
    async def __call__(self) -> None: ...


@pytest.mark.parametrize(
    ("thing", "kind"),
    [
        (_awaited, "coroutine function"),
        (functools.partial(_awaited, 1), "coroutine function"),
        (_AwaitedCall(), "coroutine function"),
        (ToyEngine.cleanup, "coroutine function"),
        (_yields, "async generator function"),
        (_called, "function"),
        (functools.partial(_called, 1), "function"),
        (print, "function"),
        ({1}, "set"),
        (None, "NoneType"),
    ],
)
def test_the_kind_of_a_hook_is_known(thing: Any, kind: str) -> None:
    assert kind_of(thing) == kind


def test_hooks_of_the_wrong_kind_are_noticed() -> None:
    assert hooks_of(ToyEngine) == []
    assert hooks_of(type("Plain", (ToyEngine,), {"abort": _called})) == ["abort"]
    with pytest.raises(Violation, match="async generator"):
        hooks_of(type("Yields", (ToyEngine,), {"abort": _yields}))
    with pytest.raises(Violation, match="NoneType"):
        hooks_of(type("Nothing", (ToyEngine,), {"cleanup": None}))


def _named(_: Any, ctx: Any) -> None:
    del ctx


def _context_last(_: Any, *, context: Any, extra: int = 1) -> None:
    del context, extra


@pytest.mark.parametrize("generate", [_named, lambda _: None, None])
def test_a_generate_that_takes_no_context_is_noticed(generate: Any) -> None:
    with pytest.raises(Violation, match="context"):
        generate_of(generate)


@pytest.mark.parametrize("generate", [_context_last, lambda *_, **__: None, ToyEngine.generate.__get__(object())])
def test_a_generate_that_takes_one_is_not(generate: Any) -> None:
    generate_of(generate)


def test_what_an_engine_touches_of_its_context_is_remembered() -> None:
    context = StrictContext("r1")
    assert (context.id(), context.is_stopped(), context.trace_id) == ("r1", False, None)
    surface_of(context)
    assert not hasattr(context, "_controller")
    assert getattr(context, "deadline", None) is None
    with pytest.raises(AttributeError):
        context.mark = 1
    for name in ("_controller", "deadline", "mark = ..."):
        with pytest.raises(Violation, match=re.escape(name)):
            surface_of(context)


def _record(level: int, message: str) -> logging.LogRecord:
    return logging.LogRecord("engine", level, "engine.py", 1, message, (), None)


@pytest.mark.parametrize(
    ("kind", "level", "message"),
    [
        ("served", logging.WARNING, "slow request"),
        ("stopped", logging.ERROR, "request failed"),
        ("stopped", logging.INFO, "request r1 cancelled"),
        ("aborted", logging.WARNING, "Aborting r1"),
        ("dropped", logging.INFO, "client disconnected"),
        ("wrong", logging.ERROR, "empty prompt"),
        ("wrong", logging.CRITICAL, "empty prompt"),
    ],
)
def test_what_is_logged_too_loudly_is_noticed(kind: str, level: int, message: str) -> None:
    with pytest.raises(Violation, match=message):
        levels_of([_record(level, message)], Transcript("r1", {}), kind)


@pytest.mark.parametrize(
    ("kind", "level", "message"),
    [
        ("served", logging.INFO, "request r1 done"),
        ("stopped", logging.INFO, "request r1 came"),
        ("aborted", logging.WARNING, "cache is nearly full"),
        ("dropped", logging.DEBUG, "request r1 aborted"),
        ("wrong", logging.WARNING, "empty prompt"),
    ],
)
def test_what_is_logged_at_the_right_level_is_not(kind: str, level: int, message: str) -> None:
    levels_of([_record(level, message)], Transcript("r1", {}), kind)


engine_module: Any = release.submodule("engine")


@pytest.mark.skipif(not hasattr(engine_module, "LogitsProcessorSpec"), reason="not in this release")
def test_a_logits_spec_that_cannot_be_used_is_noticed() -> None:
    spec, forced, python = (
        engine_module.LogitsProcessorSpec,
        engine_module.ForcedTokenSequenceSpec,
        engine_module.PythonProcessorSpec,
    )
    logits_spec_of(None)
    logits_spec_of(spec(entries=()))
    logits_spec_of(spec(entries=(forced((1, 2), 3), forced([4], 3), python(object))))
    shared = object()
    wrong: Any
    for wrong in (
        [],
        forced((1,), 2),
        spec(entries=({},)),
        spec(entries=(forced((np.int64(1),), 2),)),
        spec(entries=(python(lambda: shared),)),
    ):
        with pytest.raises(Violation):
            logits_spec_of(wrong)


# The scripts.

SCRIPTED = (
    "EmptyListIsNone",
    "ThreadTooEarly",
    "NoComponent",
    "SyncGenerator",
    "AsyncOnReady",
    "Port70000",
    "LosesTheType",
    "IgnoresSigint",
    "WaitsForSecond",
    "SharedPlace",
    "InfoForCancel",
    "MarksTheContext",
)


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name in SCRIPTED], ids=lambda mutant: mutant.name)
def test_the_script_fails_for_the_broken_engine_and_for_no_other(mutant: Mutant) -> None:
    finding = verdict_on(mutant, seed=1).finding
    assert finding is not None
    module = mutant.engine.partition(":")[0]
    correct = finding.script.replace(
        f"from {module} import {mutant.name}", f"from {ToyEngine.__module__} import ToyEngine as {mutant.name}"
    )
    assert correct != finding.script
    processes = [_run(script) for script in (finding.script, correct)]
    (broken_output, broken_status), (correct_output, correct_status) = [
        (process.communicate(timeout=60)[0], process.returncode) for process in processes
    ]
    assert broken_status != 0, broken_output
    assert "SyntaxError" not in broken_output
    assert correct_status == 0, correct_output


def _run(script: str) -> subprocess.Popen[str]:
    root = Path(__file__).parent.parent
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
