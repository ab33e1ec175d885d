"""
A served fleet under AIPerf's load, watched by Prometheus: what each dashboard query answers, and what AIPerf says.

    python reports/observability.py --out reports/observability.md

Needs the programs `prometheus` and `promtool`. Everything listens on 127.0.0.1, and ends with the script.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mock_engine.aiperf_process import run_aiperf
from mock_engine.bench_results import AIPERF_EXPORT, find_commit
from mock_engine.engine_settings import EngineSettings
from mock_engine.fleet import Fleet, FleetSettings
from mock_engine.load import Load, aiperf_environment
from mock_engine.processes import free_ports
from mock_engine.worker_settings import WorkerSettings

_SELECTOR = '{model_name="MODEL"}'


def _of(metric: str, function: str = "rate") -> str:
    """A function of a metric over the last minute."""
    return f"{function}({metric}{_SELECTOR if metric.startswith('vllm:') else ''}[1m])"


def _quantile(quantile: float, metric: str) -> str:
    return f"histogram_quantile({quantile}, sum by(le) ({_of(metric + '_bucket')}))"


def _mean(metric: str) -> str:
    return f"sum({_of(metric + '_sum')}) / sum({_of(metric + '_count')})"


def _buckets(metric: str) -> str:
    return f"sum by(le) ({_of(metric + '_bucket', 'increase')})"


def _highest(metric: str) -> str:
    return f"max({_of(metric, 'max_over_time')})"


# The queries of vLLM's example Grafana dashboard (examples/online_serving/prometheus_grafana/grafana.json), its
# variables filled in, one a panel; then those for metrics that it does not have.
QUERIES = {
    "E2E request latency, p99": _quantile(0.99, "vllm:e2e_request_latency_seconds"),
    "E2E request latency, mean": _mean("vllm:e2e_request_latency_seconds"),
    "Prompt tokens/s": f"sum({_of('vllm:prompt_tokens_total')})",
    "Generation tokens/s": f"sum({_of('vllm:generation_tokens_total')})",
    "Time per output token, p99": _quantile(0.99, "vllm:time_per_output_token_seconds"),
    "Requests running, highest": f"max_over_time(sum(vllm:num_requests_running{_SELECTOR})[1m:1s])",
    "Requests waiting, highest": f"max_over_time(sum(vllm:num_requests_waiting{_SELECTOR})[1m:1s])",
    "Time to first token, p99": _quantile(0.99, "vllm:time_to_first_token_seconds"),
    "KV cache usage, highest": _highest("vllm:gpu_cache_usage_perc"),
    "Prompt length, requests by bucket": _buckets("vllm:request_prompt_tokens"),
    "Generation length, requests by bucket": _buckets("vllm:request_generation_tokens"),
    "Finish reason": f"sum by(finished_reason) ({_of('vllm:request_success_total', 'increase')})",
    "Queue time/s": f"sum({_of('vllm:request_queue_time_seconds_sum')})",
    "Prefill time/s": f"sum({_of('vllm:request_prefill_time_seconds_sum')})",
    "Decode time/s": f"sum({_of('vllm:request_decode_time_seconds_sum')})",
    "Max generation tokens, by bucket": _buckets("vllm:request_max_num_generation_tokens"),
    "Inter-token latency, mean": _mean("vllm:inter_token_latency_seconds"),
    "KV cache usage by its newer name": _highest("vllm:kv_cache_usage_perc"),
    "Inference time, p50": _quantile(0.5, "vllm:request_inference_time_seconds"),
    "max_tokens parameter, p50": _quantile(0.5, "vllm:request_params_max_tokens"),
    "n parameter, mean": _mean("vllm:request_params_n"),
    "Mean ITL of a request, p50": _quantile(0.5, "vllm:request_time_per_output_token_seconds"),
    "Tokens a step, p50": _quantile(0.5, "vllm:iteration_tokens_total"),
    "Prefix cache hit rate": (
        f"sum({_of('vllm:prefix_cache_hits_total')}) / sum({_of('vllm:prefix_cache_queries_total')})"
    ),
    "Preemptions": f"sum({_of('vllm:num_preemptions_total', 'increase')})",
    "KV blocks, and workers with so many": "count by(num_gpu_blocks) (vllm:cache_config_info)",
    "Token lateness, p99": _quantile(0.99, "mock_engine_token_lateness_seconds"),
    "Step time, p50": _quantile(0.5, "mock_engine_step_seconds"),
    "Share of the time in steps": f"avg({_of('mock_engine_busy_seconds_total')})",
    "GPU utilization, highest (%)": _highest("DCGM_FI_DEV_GPU_UTIL"),
    "GPU power, highest (W)": _highest("DCGM_FI_DEV_POWER_USAGE"),
    "GPU energy in a minute (J)": f"sum({_of('DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION', 'increase')}) / 1000",
    "GPU memory used, of each (MiB)": "max by(modelName) (DCGM_FI_DEV_FB_USED)",
    "Tensor cores active, highest": _highest("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"),
    "Memory active, highest": _highest("DCGM_FI_PROF_DRAM_ACTIVE"),
}

_AIPERF_TABLES = ("GPU Power Efficiency", "GPU Telemetry Summary", "LLM Metrics: Usage")
_AIPERF_METRICS = (
    *("goodput", "good_request_count", "usage_prompt_cache_read_tokens", "overall_usage_prompt_cache_read_pct"),
    *("time_to_first_token", "inter_token_latency", "request_throughput", "output_token_throughput"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--request-count", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("reports/observability.md"))
    flags = parser.parse_args()
    for program in ("prometheus", "promtool"):
        if shutil.which(program) is None:
            parser.error(f"{program} is not installed; both prometheus and promtool are needed")
    load = Load(
        isl=256,
        osl=96,
        concurrency=flags.concurrency,
        request_count=flags.request_count,
        goodput="time_to_first_token:500ms inter_token_latency:20ms",
        aiperf_flags=("--num-prefix-prompts", "4", "--prefix-prompt-length", "512"),
    )
    settings = FleetSettings(WorkerSettings(EngineSettings()), (("agg", flags.workers),), port=0)
    with tempfile.TemporaryDirectory(prefix="observability-") as name:
        folder = Path(name)
        with Fleet(settings, folder / "fleet") as fleet, _prometheus(folder, fleet) as url:
            metrics_urls, dcgm_urls = list(fleet.metrics_urls.values()), list(fleet.dcgm_urls.values())
            aiperf = folder / "aiperf"
            command = load.aiperf_command(
                fleet.model, fleet.url, aiperf, metrics_urls=metrics_urls, dcgm_urls=dcgm_urls
            )
            environment = aiperf_environment(settings.worker.model_path, folder / "cache", dcgm_urls)
            environment["COLUMNS"] = "120"
            status = run_aiperf(command, environment, fleet.check, folder / "aiperf.log")
            time.sleep(2)  # a last scrape
            answers = {title: _query(url, query.replace("MODEL", fleet.model)) for title, query in QUERIES.items()}
            lints = {part: _lint(_read(where)) for part, where in fleet.metrics_urls.items()}
            lints |= {f"{part}, GPUs": _lint(_read(where)) for part, where in fleet.dcgm_urls.items()}
        log = (folder / "aiperf.log").read_text(encoding="utf-8")
        export = json.loads((aiperf / AIPERF_EXPORT).read_text(encoding="utf-8"))
        server = json.loads((aiperf / "server_metrics_export.json").read_text(encoding="utf-8"))
    page = _page(flags, status, answers, lints, log, export, server)
    flags.out.write_text("\n".join(page) + "\n", encoding="utf-8")
    print(f"written: {flags.out}")


def _page(
    flags: argparse.Namespace,
    status: int,
    answers: dict[str, list[tuple[str, float]]],
    lints: dict[str, tuple[int, list[str]]],
    log: str,
    export: dict[str, Any],
    server: dict[str, Any],
) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("mock-engine", "ai-dynamo", "aiperf"))
    warnings = [line for line in log.splitlines() if re.search(r"\b(WARNING|ERROR|CRITICAL)\b", line)]
    ours = [line for line in warnings if "Event loop for" not in line]
    lines = [
        "# A served fleet, watched",
        "",
        "```",
        shlex.join(["python", "reports/observability.py", *sys.argv[1:]]),
        "```",
        "",
        f"{versions}, Prometheus {_prometheus_version()}; commit {find_commit() or 'unknown'}; "
        f"Python {platform.python_version()}, {flags.workers} workers, AIPerf's exit status {status}",
        "",
        "## What the dashboards ask",
        "",
        f"PromQL, asked right after a load of {flags.request_count} requests at concurrency {flags.concurrency}. "
        "An answer with a label is one row of several.",
        "",
        "| panel | answer |",
        "|---|---|",
    ]
    for title, rows in answers.items():
        shown = "; ".join(f"{label + ': ' if label else ''}{value:,.4g}" for label, value in rows) or "**none**"
        lines.append(f"| {title} | {shown} |")
    lines += ["", "The queries are in `QUERIES` of the script.", "", "## promtool check metrics", ""]
    lines += ["| exposition | read | what its linter says |", "|---|---|---|"]
    for part, (code, complaints) in lints.items():
        kinds = sorted({complaint.partition(" ")[2] for complaint in complaints})
        lines.append(f"| {part} | {'yes' if code in (0, 3) else '**no**'} | {'; '.join(kinds) or 'nothing'} |")
    lines += [
        "",
        "The names that it minds are vLLM's, NVIDIA's and, in the frontend, Dynamo's.",
        "",
        "## AIPerf",
        "",
        "| metric | avg |",
        "|---|--:|",
        *(
            f"| {name} | {export[name]['avg']:,.2f} {export[name]['unit']} |"
            for name in _AIPERF_METRICS
            if name in export
        ),
        "",
        f"Server metrics: {len(server.get('metrics', {}))} in its export, "
        f"{sum(name.startswith('vllm:') for name in server.get('metrics', {}))} of them vLLM's.",
        "",
        f"Warnings and errors in its output: {len(ours)}"
        + (
            f", and {len(warnings) - len(ours)} times that its own event loops were late (the machine has few cores)."
            if len(warnings) > len(ours)
            else "."
        ),
        *(f"- `{line}`" for line in ours),
        "",
        "Its tables on GPUs and the prompt cache:",
        "",
        "```",
        *_tables(log),
        "```",
    ]
    return lines


def _tables(log: str) -> list[str]:
    """The tables of AIPerf's console that are about what this report is about."""
    lines = log.splitlines()
    shown: list[str] = []
    for number, line in enumerate(lines):
        if any(title in line for title in _AIPERF_TABLES):
            end = next((i for i in range(number, len(lines)) if lines[i].strip().startswith("└")), number)
            shown += [each.rstrip() for each in lines[number : end + 1]] + [""]
    return shown


@contextlib.contextmanager
def _prometheus(folder: Path, fleet: Fleet) -> Iterator[str]:
    """Prometheus, scraping all of the fleet once a second."""
    jobs = [
        {"job_name": job, "static_configs": [{"targets": [urllib.parse.urlsplit(url).netloc for url in urls.values()]}]}
        for job, urls in (("engine", fleet.metrics_urls), ("dcgm", fleet.dcgm_urls))
    ]
    config = folder / "prometheus.yml"  # JSON is YAML
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}), encoding="utf-8")
    (port,) = free_ports(1)
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _query(url: str, promql: str) -> list[tuple[str, float]]:
    """(labels, value) of each row; buckets that hold nothing new are left out."""
    answer = json.loads(_read(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': promql})}"))
    if answer["status"] != "success":
        raise SystemExit(f"Prometheus refuses {promql}: {answer}")
    rows = [
        (",".join(f"{name} {value}" for name, value in row["metric"].items()), float(row["value"][1]))
        for row in answer["data"]["result"]
    ]
    if rows and rows[0][0].startswith("le "):
        rows.sort(key=lambda row: float(row[0].removeprefix("le ")))
        highest = rows[-1][1]
        first = next((number for number, row in enumerate(rows) if row[1] > 0.5), 0)
        full = next((number for number, row in enumerate(rows) if row[1] >= highest - 0.5), len(rows) - 1)
        rows = rows[first : full + 1]
    return rows


def _lint(exposition: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=exposition, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr.splitlines()


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


def _prometheus_version() -> str:
    done = subprocess.run(["prometheus", "--version"], capture_output=True, text=True, check=True)
    return (done.stdout or done.stderr).split()[2]


if __name__ == "__main__":
    main()
