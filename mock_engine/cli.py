"""
The command line.

    mock-engine serve      Dynamo's frontend and N mock workers
    mock-engine bench      serve, AIPerf against it, and a report
    mock-engine simulate   the same engine in virtual time
    mock-engine worker     one worker for a cluster that is already there
    mock-engine profiles   list, show, check, import, measure, record, fit

A mistake of the user's is one line on stderr and exit status 2; a part that
dies is exit status 1; Ctrl-C before the work is done is 130.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from mock_engine.errors import MockEngineError, ProcessError
from mock_engine.flags import (
    OneLineParser,
    add_engine_flags,
    add_fleet_flags,
    add_load_flags,
    add_plane_flags,
    add_worker_flags,
)
from mock_engine.fleet import FleetSettings
from mock_engine.import_command import add_import_flags
from mock_engine.planes import Planes
from mock_engine.profile_fit.flags import add_fit_flags, add_record_flags
from mock_engine.profile_measure.settings import add_measure_flags
from mock_engine.router_settings import RouterSettings
from mock_engine.simulate_flags import add_simulate_flags
from mock_engine.worker_settings import WorkerSettings

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def run() -> NoReturn:
    """The process: run the command in its arguments and end with that exit status."""
    if sys.argv[1:2] == ["worker"]:
        _worker(sys.argv[2:])
        sys.exit(0)
    for number in _INTERRUPTS:
        signal.signal(number, _interrupt)
    sys.exit(main(sys.argv[1:]))


def main(argv: list[str]) -> int:
    """Run the command in `argv` and return its exit status."""
    try:
        flags = parse(argv)
        status: int = flags.run(flags)
        return status
    except MockEngineError as error:
        print(f"mock-engine: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ProcessError) else 2
    except KeyboardInterrupt:
        print("mock-engine: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a file that the user named
        print(f"mock-engine: error: {error.filename}: {error.strerror}. Name another file.", file=sys.stderr)
        return 2


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags of `argv`; what follows a `--` is `flags.aiperf_flags`. Exits with status 2 for a wrong one."""
    end = argv.index("--") if "--" in argv else len(argv)
    flags = _parser().parse_args(argv[:end])
    flags.aiperf_flags = tuple(argv[end + 1 :])
    return flags


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """The first interrupt begins to stop everything, which ends by itself; further ones must not cut that short."""
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="mock-engine", description="An LLM inference engine without a GPU.")
    parser.add_argument("--version", action="version", version=f"mock-engine {version('mock-engine')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", help="Dynamo's frontend and N mock workers, in one command")
    add_fleet_flags(serve, default_port=8000)
    add_engine_flags(serve)
    add_worker_flags(serve)
    add_plane_flags(serve)
    _add_json_flag(serve, "write URL, model, capacity and process ids there once the model answers")
    serve.set_defaults(run=_serve)

    bench = commands.add_parser(
        "bench",
        help="serve, run AIPerf against it, and report what it measured beside what the profile says",
        epilog="Flags after -- go to 'aiperf profile' as they are.",
    )
    add_load_flags(bench)
    add_fleet_flags(bench, default_port=0)
    add_engine_flags(bench)
    add_worker_flags(bench)
    add_plane_flags(bench)
    _add_json_flag(bench, "write the results there too (they are in DIR/bench.json anyway)")
    bench.set_defaults(run=_bench)

    simulate = commands.add_parser(
        "simulate",
        help="the same engine in virtual time: days of traffic in seconds",
        usage="mock-engine simulate [flags]",
        epilog="For example: mock-engine simulate --isl 1024 --osl 256 --request-rate 20 --workers 2",
    )
    add_simulate_flags(simulate)
    _add_json_flag(simulate, "write the results there, in AIPerf's schema")
    simulate.set_defaults(run=_simulate)

    commands.add_parser("worker", help="one Dynamo worker for a cluster that is already there", add_help=False)

    profiles = commands.add_parser(
        "profiles", help="the measured GPUs: list, show, check, import, measure, record, fit"
    )
    actions = profiles.add_subparsers(metavar="ACTION", required=True)
    list_ = actions.add_parser("list", help="the profiles that come with the package")
    show = actions.add_parser("show", help="all there is to know about one profile")
    show.add_argument("profile", help="a name from the list, or a folder")
    check = actions.add_parser("check", help="find everything that is wrong with profiles")
    check.add_argument("profiles", nargs="*", metavar="profile", help="names or folders (default: all that ship)")
    measure = actions.add_parser(
        "measure",
        help="time a model's passes on your GPU, and make a profile of them",
        epilog="For example: mock-engine profiles measure --model llama-3.1-8b --out my-profile. See docs/measure.md.",
    )
    add_measure_flags(measure)
    for name, action in (("list", list_), ("show", show), ("check", check), ("measure", measure)):
        _add_json_flag(
            action, "write every repeat there" if action is measure else "write the same there, for machines"
        )
        action.set_defaults(run=_profiles, action=name)
    import_ = actions.add_parser("import", help="make profiles out of measurements: NVIDIA's, Dynamo's, your own")
    add_import_flags(import_)
    import_.set_defaults(run=_profiles, action="import")
    record = actions.add_parser(
        "record",
        help="benchmark your server with AIPerf, for 'fit'",
        epilog="Flags after -- go to 'aiperf profile' as they are. See docs/calibrate.md.",
    )
    add_record_flags(record)
    record.set_defaults(run=_profiles, action="record")
    fit = actions.add_parser(
        "fit",
        help="make a profile of a server out of its benchmark",
        epilog="For example: mock-engine profiles fit runs/* --out my-profile. See docs/calibrate.md.",
    )
    add_fit_flags(fit)
    _add_json_flag(fit, "write all figures there")
    fit.set_defaults(run=_profiles, action="fit")
    return parser


def _add_json_flag(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help=text)


def _worker(argv: list[str]) -> None:
    from mock_engine.dynamo_release import run_backend
    from mock_engine.llm_engine import MockLLMEngine

    run_backend(MockLLMEngine, argv)


def _fleet_settings(flags: argparse.Namespace) -> FleetSettings:
    return FleetSettings(
        worker=replace(WorkerSettings.from_flags(flags), model_path=flags.model_path.resolve()),
        num_workers=flags.workers,
        router=RouterSettings.from_flags(flags),
        host=flags.host,
        port=flags.port,
        planes=Planes.from_flags(flags),
    )


def _serve(flags: argparse.Namespace) -> int:
    from mock_engine.serve import serve

    serve(_fleet_settings(flags), flags.json, Console())
    return 0


def _bench(flags: argparse.Namespace) -> int:
    from mock_engine.bench import bench
    from mock_engine.load import Load

    return bench(_fleet_settings(flags), Load.from_flags(flags), flags.output_dir, flags.json, Console())


def _simulate(flags: argparse.Namespace) -> int:
    from mock_engine.simulate_command import simulate_command

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # rich takes 80 for a pipe, and cuts the table of a sweep
    return simulate_command(flags, console)


def _profiles(flags: argparse.Namespace) -> int:
    from mock_engine.profiles_command import check_command, list_command, show_command

    console = Console()
    if flags.action == "import":
        from mock_engine.import_command import import_command

        return import_command(flags, console)
    if flags.action == "measure":
        from mock_engine.profile_measure.command import measure_command

        return measure_command(flags, console)
    if flags.action == "record":
        from mock_engine.profile_fit.flags import RecordSettings
        from mock_engine.profile_fit.record import record

        return record(RecordSettings.from_flags(flags), console)
    if flags.action == "fit":
        from mock_engine.profile_fit.command import fit_command

        return fit_command(flags, console)
    if flags.action == "list":
        return list_command(flags.json, console)
    if flags.action == "show":
        return show_command(flags.profile, flags.json, console)
    return check_command(flags.profiles, flags.json, console)
