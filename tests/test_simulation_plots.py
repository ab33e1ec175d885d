"""Pictures of simulations: what is drawn is what came out, nothing is empty, and no number covers another."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from mock_engine.aiperf_schema import PERCENTILES
from mock_engine.cli import main
from mock_engine.deployment import DeploymentSettings, WorkerGroup
from mock_engine.engine_settings import EngineSettings
from mock_engine.simulation import SimulationSettings, simulate
from mock_engine.simulation_plots import _coarser, plot_latency, plot_pareto, plot_timeline
from mock_engine.sweep import SweepPoint, front, pareto_front
from mock_engine.workload import Workload


def simulated(**load):
    return simulate(SimulationSettings(DeploymentSettings((WorkerGroup(EngineSettings()),)), Workload(**load)))


@pytest.fixture(scope="module")
def results():
    return simulated(isl=500, osl=40, osl_stddev=9, request_rate=30, request_count=200)


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Calls a function of the module and gives the figure that it has written."""
    figures = []
    save = Figure.savefig

    def keep(figure, path, **options):
        figures.append(figure)
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", keep)

    def call(plot, what):
        plot(tmp_path / "picture.png", what)
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        figure = figures.pop()
        assert not figures, "one picture at a time"
        assert all(panel.has_data() for panel in figure.axes), "no panel is empty"
        assert not shown_overlaps(figure)
        return figure

    return call


def shown_overlaps(figure):
    """Pairs of numbers, at points or along an axis, that cover each other."""
    found = []
    for panel in figure.axes:
        low, high = panel.get_xlim()
        ticks = [
            label for at, label in zip(panel.get_xticks(), panel.get_xticklabels(), strict=False) if low <= at <= high
        ]
        for texts in (ticks, [text for text in panel.texts if text.get_visible()]):
            boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
            found += [(one[0], other[0]) for one, other in combinations(boxes, 2) if one[1].overlaps(other[1])]
    return found


def words_in(figure):
    return " ".join(text.get_text() for text in figure.texts)


def test_the_timeline_is_the_one_of_the_results(draw, results):
    figure = draw(plot_timeline, results)
    requests, blocks, tokens = figure.axes
    running, waiting = (patch.get_data() for patch in requests.patches)
    timeline = results.timeline
    assert running.values.tolist() == timeline.num_running.tolist()
    assert waiting.values.tolist() == timeline.num_waiting.tolist()
    assert running.edges[:-1].tolist() == timeline.start_s.tolist()
    assert timeline.start_s[-1] < running.edges[-1] <= timeline.start_s[-1] + timeline.bin_s
    for patch in blocks.patches:
        assert patch.get_data().values == pytest.approx(100 * timeline.kv_usage)
    made = tokens.patches[0].get_data()
    num_tokens = results.metrics["total_osl"]["avg"]
    assert (made.values * np.diff(made.edges)).sum() == pytest.approx(num_tokens, rel=0.02)


@given(num_bins=st.integers(1, 1000), bin_s=st.sampled_from([2.0**-10, 0.25, 64.0]), last_share=st.floats(0.01, 1))
@settings(max_examples=60)
def test_fewer_bins_hold_the_same_tokens(num_bins, bin_s, last_share):
    rates = np.random.default_rng(num_bins).uniform(0, 1e4, num_bins)
    edges_s = np.append(np.arange(num_bins), num_bins - 1 + last_share) * bin_s
    coarse, coarse_s = _coarser(rates, edges_s)
    assert len(coarse) == len(coarse_s) - 1 <= 150
    assert set(coarse_s) <= set(edges_s)
    assert (coarse_s[0], coarse_s[-1]) == (edges_s[0], edges_s[-1])
    made = np.append(0, np.cumsum(rates * np.diff(edges_s)))
    assert np.append(0, np.cumsum(coarse * np.diff(coarse_s))) == pytest.approx(
        made[np.searchsorted(edges_s, coarse_s)], abs=1e-6
    )


def test_latencies_are_drawn_at_all_percentiles_that_are_known(draw, results):
    figure = draw(plot_latency, results)
    for panel, name in zip(figure.axes, ("time_to_first_token", "inter_token_latency"), strict=True):
        metric = results.metrics[name]
        times_ms, shares = panel.lines[0].get_data()
        assert list(shares) == [0, *(percent / 100 for percent in PERCENTILES), 1]
        assert list(times_ms) == [metric["min"], *(metric[f"p{percent}"] for percent in PERCENTILES), metric["max"]]
        assert f"p99 {metric['p99']:,.1f} ms" in panel.get_title(loc="left")


def test_latencies_that_are_far_apart_are_all_to_be_seen(draw, results):
    metric = results.metrics["time_to_first_token"]
    spread = {
        key: 10.0**number for number, key in enumerate(["min", "p1", "p25", "p50", "p90", "p99", "max"], start=-1)
    }
    figure = draw(plot_latency, replace(results, metrics={"time_to_first_token": metric | spread}))
    assert figure.axes[0].get_xscale() == "log"


def test_without_second_tokens_there_is_no_itl_to_draw(draw):
    results = simulated(isl=100, osl=1, concurrency=4, request_count=20)
    assert len(draw(plot_latency, results).axes) == 1
    draw(plot_timeline, results)
    figure = draw(plot_pareto, [SweepPoint({"concurrency": 4}, results)])
    assert [panel.get_xlabel() for panel in figure.axes] == ["time to first token p95, ms"]


def test_a_run_in_which_nothing_happened_says_so(draw, results):
    nothing = replace(results, metrics={}, timeline=replace(results.timeline, start_s=np.array([])))
    for plot, what in (
        (plot_latency, nothing),
        (plot_pareto, [SweepPoint({"workers": 1}, nothing)]),
        (plot_pareto, []),
    ):
        assert words_in(draw(plot, what)) == "No request was answered."
    assert words_in(draw(plot_timeline, nothing)) == "No worker did anything."


places = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(places=places)
def test_the_front_is_what_nothing_else_beats(places):
    def is_beaten(place):
        return any(x >= place[0] and y >= place[1] and (x, y) != place for x, y in places)

    on_front = front(places)
    assert sorted(on_front) == [index for index, place in enumerate(places) if not is_beaten(place)]
    assert [places[index] for index in on_front] == sorted(places[index] for index in on_front)


def at(results, per_gpu, per_user, ttft_ms):
    """Results with these figures."""
    changed = {
        "output_token_throughput": {"avg": per_gpu},
        "output_token_throughput_per_user": {"avg": per_user},
        "time_to_first_token": {"p95": ttft_ms},
    }
    return replace(results, num_gpus=1, metrics=changed)


def sweep_of(results, places, names=("a/b/c", "d/e/f")):
    return [
        SweepPoint(
            {"request-rate": 500.0 * (number + 1), "profile": name},
            at(results, gpu + 7.0 * row, user + row, 50.0 * user),
        )
        for row, name in enumerate(names)
        for number, (user, gpu) in enumerate(places)
    ]


@given(places=places)
@settings(max_examples=25)
def test_table_and_picture_have_the_same_front(results, places):
    points = sweep_of(results, places)
    drawn = front([(point.tokens_per_user_s, point.tokens_per_gpu_s) for point in points])
    assert {id(points[index]) for index in drawn} == {id(point) for point in pareto_front(points)}


@pytest.mark.parametrize(
    "places",
    [
        pytest.param([(1, 9)], id="one point"),
        pytest.param([(2, 5)] * 4, id="all the same"),
        pytest.param([(100 - x, math.sqrt(x)) for x in range(1, 40)], id="a close front"),
        pytest.param([(x, 100 - x) for x in range(1, 100, 9)], id="wide apart"),
        pytest.param([(x * 37 % 50 + 1, x * 17 % 23) for x in range(50)], id="everywhere"),
    ],
)
def test_each_point_of_a_sweep_is_drawn_and_those_off_the_front_are_hollow(draw, results, places):
    points = sweep_of(results, places)
    figure = draw(plot_pareto, points)
    assert "Numbers: request-rate." in words_in(figure)
    for panel, x_of, sign in zip(
        figure.axes,
        (lambda point: point.tokens_per_user_s, lambda point: point.results.metrics["time_to_first_token"]["p95"]),
        (1, -1),
        strict=True,
    ):
        wanted = [(x_of(point), point.tokens_per_gpu_s) for point in points]
        on_line, *groups = panel.lines
        assert sorted(place for group in groups for place in group.get_xydata().tolist()) == sorted(map(list, wanted))
        on_front = [wanted[index] for index in front([(sign * x, y) for x, y in wanted])]
        assert [tuple(place) for place in on_line.get_xydata().tolist()] == on_front
        hollow = [tuple(place) for holes in panel.collections for place in holes.get_offsets().tolist()]
        assert sorted(hollow + on_front) == sorted(wanted)
        assert all(holes.get_facecolor().tolist() == [list(to_rgba("white"))] for holes in panel.collections)
        assert len(panel.texts) == len(points)
        for text in panel.texts:
            assert any(f"{point.swept['request-rate']:,.0f}" == text.get_text() for point in points)
        assert any(text.get_visible() for text in panel.texts)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["profile a/b/c", "profile d/e/f"]


@pytest.mark.parametrize("num_names", [1, 3, 25])
def test_a_sweep_over_profiles_alone_names_them_in_a_legend_that_fits(draw, results, num_names):
    points = [
        SweepPoint({"profile": f"a100-sxm/llama-3.1-70b/vllm-tp4-bf16-{number:02}"}, at(results, 90 + number, 9, 50))
        for number in range(num_names)
    ]
    figure = draw(plot_pareto, points)
    assert len(figure.legends) == (num_names > 1)
    for legend in figure.legends:
        assert len(legend.get_texts()) == num_names
        box = legend.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 < min(panel.get_window_extent().y0 for panel in figure.axes)


def test_without_matplotlib_plots_are_refused_before_anything_is_simulated(capsys, monkeypatch, tmp_path):
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert main(["simulate", "--plots", str(tmp_path / "pictures")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "--plots needs matplotlib, which is not installed. Run: pip install 'mock-engine[bench]'" in captured.err
    assert not captured.out
