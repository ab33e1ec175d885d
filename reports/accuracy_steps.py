"""
How far step times are off: measured points left out, largest batches left out, steps of a real vLLM.

    shipped_points()                 each point of each shipped table, from the others, as a share of its pass
    whole_passes(data)               sources of whole passes, each point from the others, by several forms
    largest_batches(data)            the same sources, their largest batch from the smaller ones
    vllm_cycles(data, models)        real steps, with the overhead that other runs gave

Errors are predicted / measured - 1; for shipped points, the difference as a share of the pass.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from accuracy_models import KERNEL_SUM, NAMES, OURS, Models
from accuracy_rows import Deployment
from numpy.typing import NDArray

from mock_engine.gpu_datasheets import DATASHEETS
from mock_engine.latency_table import make_table
from mock_engine.profile import WEIGHT_BYTES, list_profiles, load_profile
from mock_engine.profile_import.accuracy import PASS_OF, left_out
from mock_engine.profile_import.fit_overhead import fit, read_experiments
from mock_engine.profile_import.known_models import MODELS
from mock_engine.roofline import Roofline, smooth_max
from mock_engine.timing import TimingModel

FloatArray = NDArray[np.float64]
Errors = dict[tuple[str, str], FloatArray]  # by what is predicted, and by which form

PREFILL, DECODE = "prefill", "decode"
FORMS = ("ours", "linear form", "interpolation", "data sheet")
MAX_DECODE_TOKENS = 1024  # matrices of up to so many rows are in decode passes too


def shipped_points() -> dict[tuple[str, str], FloatArray]:
    """
    By kind of pass, and whether tables hold parts or whole passes. A point of the matrices or of communication counts
    in the prefill pass of so many tokens, and up to 1,024 in the decode pass of so many sequences.
    """
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name in list_profiles():
        profile = load_profile(name)
        timing = TimingModel(profile)
        for table_name, table in profile.latency.items():
            misses = left_out(table, getattr(profile.roofline, f"{table_name}_s")) - table.seconds
            kinds = {"decode": [DECODE], "decode_attention": [DECODE], "head": [DECODE]}.get(table_name, [PREFILL])
            if table_name in ("linear", "communication"):
                kinds = [PREFILL, DECODE]
            for point, miss in zip(table.points.astype(int).tolist(), misses.tolist(), strict=True):
                for kind in kinds:
                    if np.isnan(miss) or (kind == DECODE and len(kinds) == 2 and point[0] > MAX_DECODE_TOKENS):
                        continue
                    load = PASS_OF["head" if len(kinds) == 2 and kind == DECODE else table_name](*point)
                    found[kind, profile.tables].append(miss / timing.step_s(load))
    return {key: np.array(values) for key, values in found.items()}


@dataclass(frozen=True)
class Passes:
    """Whole passes from one source, of one deployment: shape (n, 2), prompts or sequences and tokens of each."""

    source: str
    kind: str
    points: FloatArray
    seconds: FloatArray
    roofline: Roofline

    def bound_s(self, points: FloatArray) -> FloatArray:
        """The data sheet's time."""
        number, each = points.T
        if self.kind == DECODE:
            return self.roofline.decode_s(number, each)
        roofline, tokens = self.roofline, number * each
        attention_s = number * roofline.prefill_attention_s(each, np.zeros_like(each))
        return np.asarray(
            roofline.linear_s(tokens) + roofline.head_s(number) + roofline.communication_s(tokens) + attention_s
        )

    def but(self, keep: NDArray[np.bool_]) -> Passes:
        return Passes(self.source, self.kind, self.points[keep], self.seconds[keep], self.roofline)

    def predict(self, form: str, points: FloatArray) -> FloatArray:
        """Seconds at other points, by a form of `FORMS` made of these."""
        if form == "data sheet":
            return self.bound_s(points)
        if form == "linear form":
            return _terms(points) @ self._linear_form()
        bound = self.bound_s if form == "ours" else lambda at: np.ones(len(at))
        floor_s = float(np.min(self.seconds)) if form == "ours" else 0.0
        residual = np.log(self.seconds / smooth_max(bound(self.points), floor_s))
        return np.asarray(smooth_max(bound(points), floor_s) * np.exp(self._between(form, residual, points)))

    def _between(self, form: str, values: FloatArray, points: FloatArray) -> FloatArray:
        """`values` at other points. To ours, a prefill is its tokens, and the data sheet knows how they are cut."""
        if self.kind == PREFILL and form == "ours":
            tokens = self.points.prod(axis=1)
            known = np.unique(tokens)
            means = np.array([values[tokens == count].mean() for count in known])
            return np.asarray(np.interp(np.log1p(points.prod(axis=1)), np.log1p(known), means))
        if len(np.unique(self.points[:, 0])) == 1:
            order = np.argsort(self.points[:, 1])
            x = np.log1p(self.points[order, 1])
            return np.asarray(np.interp(np.log1p(points[:, 1]), x, values[order]))
        if form == "ours":
            table = make_table("passes", ("number", "tokens"), self.points, np.exp(values))
            return table.interpolate(np.log(table.seconds), *points.T)
        return _nearest_plane(np.log1p(self.points), values, np.log1p(points))

    def _linear_form(self) -> FloatArray:
        """a + b number + c number tokens, by least squares of relative errors."""
        terms = _terms(self.points) / self.seconds[:, np.newaxis]
        return np.asarray(np.linalg.lstsq(terms, np.ones(len(terms)), rcond=None)[0])


def _terms(points: FloatArray) -> FloatArray:
    return np.column_stack([np.ones(len(points)), points[:, 0], points.prod(axis=1)])


def _nearest_plane(x: FloatArray, values: FloatArray, at: FloatArray) -> FloatArray:
    """Log-log interpolation of scattered points: the plane through the nearest ones, weighted by distance."""
    found = []
    for place in at:
        distance = np.abs(x - place).sum(axis=1) + 1e-9
        near = np.argsort(distance)[:6]
        weights = 1 / distance[near]
        terms = np.column_stack([np.ones(len(near)), x[near] - place])
        found.append(np.linalg.lstsq(terms * weights[:, np.newaxis], values[near] * weights, rcond=None)[0][0])
    return np.array(found)


def whole_passes(data: Path) -> Errors:
    """Each pass inside the others' range, left out and predicted."""
    found: dict[tuple[str, str], list[FloatArray]] = defaultdict(list)
    for passes in read_passes(data):
        for index in _inner(passes):
            others = passes.but(np.arange(len(passes.points)) != index)
            for form in FORMS:
                predicted = others.predict(form, passes.points[[index]])
                found[passes.kind, form].append(predicted / passes.seconds[[index]] - 1)
    return {key: np.concatenate(values) for key, values in found.items()}


def largest_batches(data: Path) -> Errors:
    """Decode passes of the largest batch size, predicted from the smaller ones."""
    found: dict[tuple[str, str], list[FloatArray]] = defaultdict(list)
    for passes in read_passes(data):
        is_largest = passes.points[:, 0] == passes.points[:, 0].max()
        if passes.kind != DECODE or np.sum(~is_largest) < 4:
            continue
        for form in FORMS:
            predicted = passes.but(~is_largest).predict(form, passes.points[is_largest])
            found[DECODE, form].append(predicted / passes.seconds[is_largest] - 1)
    return {key: np.concatenate(values) for key, values in found.items()}


def _inner(passes: Passes) -> Iterator[int]:
    """Points that lie among the others on both axes and, in a prefill, in the tokens of the pass."""
    points = passes.points
    for index in range(len(points)):
        others = np.delete(points, index, axis=0)
        looked_at = [(points[index, axis], others[:, axis]) for axis in (0, 1)]
        if passes.kind == PREFILL:
            looked_at.append((points[index].prod(), others.prod(axis=1)))
        if all(np.min(values) <= own <= np.max(values) for own, values in looked_at):
            yield index


def read_passes(data: Path) -> Iterator[Passes]:
    """All sources of whole passes, known-bad rows left out (profiles/README.md says which)."""
    yield from _aiconfigurator(data)
    yield from _dynamo(data)
    yield from _splitwise(data)


def _aiconfigurator(data: Path) -> Iterator[Passes]:
    by_hub_name = {model.hub_name: model for model in MODELS.values()}
    found: dict[tuple[str, ...], list[tuple[float, float, float]]] = defaultdict(list)
    with (data / "aic_static_h100_a100.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            key = tuple(row[name] for name in ("system", "backend", "model", "tp", "gemm", "kind"))
            found[key].append((float(row["batch"]), float(row["isl"]), float(row["ms"]) / 1e3))
    for (system, _, model, tp, dtype, kind), rows in found.items():
        gpu = system.replace("_", "-")
        roofline = Roofline(
            by_hub_name[model].shape, DATASHEETS[gpu, dtype], int(tp), WEIGHT_BYTES[dtype], kv_cache_dtype="bf16"
        )
        yield _passes("kernel sums (aiconfigurator)", kind, rows, roofline)


def _dynamo(data: Path) -> Iterator[Passes]:
    found: dict[tuple[str, str], dict[tuple[float, float], float]] = defaultdict(dict)
    with (data / "dynamo_preswept_h100.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["hw"] != "h100_sxm" or (row["tp"], row["isl"]) == ("8", "6205.0"):
                continue
            is_prefill = row["kind"] == PREFILL
            number = 1.0 if is_prefill else round(float(row["batch"]))
            each = round(float(row["isl"] if is_prefill else row["ctx"]))
            if 1 <= number <= 256:
                found[row["tp"], row["kind"]].setdefault((number, each), float(row["ms"]) / 1e3)
    for (tp, kind), points in found.items():
        sheet = DATASHEETS["h100-sxm", "fp8"]
        roofline = Roofline(MODELS["llama-3.3-70b"].shape, sheet, int(tp), 1, kv_cache_dtype="bf16")
        yield _passes("vLLM 0.10 (Dynamo)", kind, [(*point, seconds) for point, seconds in points.items()], roofline)


def _splitwise(data: Path) -> Iterator[Passes]:
    found: dict[tuple[str, str, str], dict[tuple[float, float], list[float]]] = defaultdict(lambda: defaultdict(list))
    with (data / "splitwise_perf_model.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            gpu, tp, batch = row["hardware"], row["tensor_parallel"], float(row["batch_size"])
            if row["model"] != "llama2-70b" or gpu not in ("a100-80gb", "h100-80gb") or (tp, batch) == ("2", 64.0):
                continue
            prompt, tokens = float(row["prompt_size"]), float(row["token_size"])
            if batch == 1:
                found[gpu, tp, PREFILL][1.0, prompt].append(float(row["prompt_time"]) / 1e3)
            if tokens == 128:
                found[gpu, tp, DECODE][batch, prompt + tokens // 2].append(float(row["token_time"]) / 1e3)
    for (gpu, tp, kind), points in found.items():
        sheet = DATASHEETS[f"{gpu[:4]}-sxm", "fp16"]
        roofline = Roofline(MODELS["llama-2-70b"].shape, sheet, int(tp), 2, kv_cache_dtype="bf16")
        rows = [(*point, float(np.median(seconds))) for point, seconds in points.items()]
        yield _passes("engine of 2023 (Splitwise)", kind, rows, roofline)


def _passes(source: str, kind: str, rows: list[tuple[float, float, float]], roofline: Roofline) -> Passes:
    figures = np.array(sorted(rows))
    return Passes(source, kind, figures[:, :2], figures[:, 2], roofline)


@dataclass(frozen=True)
class Cycles:
    """Errors of real steps by experiment, and by model over all of them."""

    held_out: dict[str, FloatArray]
    by_model: dict[str, FloatArray]
    per_layer_us: float
    per_finished_us: tuple[float, float]  # and its standard error
    mean_before: float
    mean_after: float


def vllm_cycles(data: Path, models: Models) -> Cycles:
    """
    Ours: the overhead of each experiment is fitted on the other two. Others have none, and predict the same steps with
    their own times.
    """
    path = data / "vllm_h100_step_cycles.csv.gz"
    experiments = read_experiments(path)
    fitted = fit(experiments)
    by_model = {OURS: np.concatenate([fitted.held_out[run.name] for run in experiments])}
    for name in NAMES[1:]:
        runs = read_experiments(path, partial(_timing, models, name))
        if runs:
            by_model[name] = np.concatenate([run.errors(0.0, 0.0) for run in runs])
    assert KERNEL_SUM in by_model
    return Cycles(
        fitted.held_out,
        by_model,
        fitted.per_layer_s * 1e6,
        (fitted.per_finished_s * 1e6, fitted.per_finished_sd_s * 1e6),
        fitted.mean_before,
        fitted.mean_after,
    )


def _timing(models: Models, name: str, shipped: str) -> TimingModel | None:
    gpu, model, deployed = shipped.split("/")
    engine, tp, dtype = deployed.split("-")
    paths = models.paths(Deployment("vLLM", gpu, model, engine, "steps", int(tp[2:]), dtype, "bf16"))
    return TimingModel(load_profile(paths[name])) if name in paths else None
