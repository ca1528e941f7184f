"""What limits a run, from stage tables made by hand."""

from __future__ import annotations

import pytest

from tools.profiling import sweep, verdict
from tools.profiling.clock import Probe, measure
from tools.profiling.table import Lane, Spread, Stage


def spread(value: float, around: float = 0.0) -> Spread:
    return Spread(p20=value * (1 - around), p50=value, p80=value * (1 + around))


def stage(
    name: str, lane: Lane, wall_ms: float, cpu_ms: float = 0.0, device_ms: float | None = None
) -> Stage:
    return Stage(
        name=name,
        lane=lane,
        wall_s=spread(wall_ms / 1000),
        cpu_s=spread(cpu_ms / 1000),
        device_s=None if device_ms is None else spread(device_ms / 1000),
    )


FED = [
    stage("read", "read", 1),
    stage("decode", "graph", 4),
    stage("corrupt", "graph", 6),
    stage("forward", "model", 2),
    stage("backward", "model", 3),
]


def test_the_slowest_lane_sets_the_rate() -> None:
    assert verdict.predicted_img_s(FED, cores=2) == pytest.approx(1000 / 10)
    assert verdict.predicted_img_s(FED, cores=2, ranks=3) == pytest.approx(3000 / 10)


def test_limits_come_one_after_the_other() -> None:
    first, second, third = verdict.limits(FED, cores=2)
    # Without corrupting (6 of 10 ms) the model's 5 ms are the longest lane, and so on.
    assert (first.stage, first.rate_img_s, first.rate_if_free_img_s) == ("corrupt", 100, pytest.approx(200))
    assert first.binding == "the data graph"
    assert (second.stage, second.rate_img_s, second.rate_if_free_img_s) == (
        "backward",
        200,
        pytest.approx(250),
    )
    assert (third.stage, third.rate_if_free_img_s) == ("decode", pytest.approx(500))


def test_full_cores_limit_before_a_lane_does() -> None:
    stages = [stage("decode", "graph", 4, cpu_ms=8), stage("forward", "model", 5, cpu_ms=10)]
    assert verdict.predicted_img_s(stages, cores=2) == pytest.approx(1000 / 9)
    found = verdict.limit(stages, cores=2)
    assert found is not None
    assert (found.stage, found.binding) == ("forward", "the CPU cores")
    assert found.rate_if_free_img_s == pytest.approx(1000 / 4)
    assert verdict.predicted_img_s(stages, cores=8) == pytest.approx(1000 / 5)


def test_the_gpu_is_shared_by_graph_and_model() -> None:
    stages = [
        stage("decode", "graph", 3, device_ms=3),
        stage("forward", "model", 4, device_ms=4),
        stage("read", "read", 6),
    ]
    found = verdict.limit(stages, cores=64)
    assert found is not None
    assert (found.stage, found.binding, found.rate_img_s) == ("forward", "the GPU", pytest.approx(1000 / 7))
    assert found.rate_if_free_img_s == pytest.approx(1000 / 6)  # then reading


def test_what_is_only_shown_does_not_count() -> None:
    shown = stage("corrupt: fog", "shown", 1000, cpu_ms=1000)
    missing = Stage(name="all-reduce", lane="model", wall_s=None, note="one process")
    assert verdict.predicted_img_s([*FED, shown, missing], cores=2) == verdict.predicted_img_s(FED, cores=2)
    assert verdict.limits([shown], cores=2) == []


def test_two_lanes_alike_name_the_largest_stage_of_the_slowest() -> None:
    stages = [stage("read", "read", 5), stage("decode", "graph", 2), stage("corrupt", "graph", 3)]
    found = verdict.limit(stages, cores=2)
    assert found is not None
    assert found.stage == "read"
    assert found.rate_if_free_img_s == found.rate_img_s


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([(1, 100.0), (2, 190.0), (4, 200.0)], 2),
        ([(1, 100.0), (2, 150.0)], 2),
        ([(8, 95.0), (16, 100.0)], 8),
        ([], None),
    ],
)
def test_the_knee_is_the_least_that_is_nearly_best(
    rates: list[tuple[int, float]], expected: int | None
) -> None:
    assert sweep.knee(rates) == expected


def test_a_sweep_says_efficiency_and_hours() -> None:
    found = sweep.finish(
        "ranks", [(1, spread(100), ""), (2, spread(160), ""), (4, None, "no room")], samples=720_000
    )
    assert [p.efficiency for p in found.points] == [1.0, 0.8, None]
    assert [p.hours_per_epoch for p in found.points] == [2.0, 1.25, None]
    batches = sweep.finish("batch", [(8, spread(50), ""), (16, spread(100), "")], samples=10)
    assert [p.efficiency for p in batches.points] == [0.5, 1.0]


def test_spread_is_of_the_measurements() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Spread(p20=2.0, p50=3.0, p80=5.0)
    assert Spread.of([7.0]) == Spread(p20=7.0, p50=7.0, p80=7.0)


def test_probes_take_turns_and_the_same_number_of_steps() -> None:
    calls: list[str] = []

    def probe(name: str) -> Probe:
        def step() -> int:
            calls.append(name)
            return 4

        return Probe(name, step, prepare=lambda: calls.append("("), finish=lambda: calls.append(")"))

    probes = [probe("a"), probe("b")]
    measure(probes, rounds=3, seconds=1e-9, agree=lambda steps: 2)
    # Warm-up, then every other round backwards.
    assert "".join(calls) == "aa(a)" + "bb(b)" + "(aa)(bb)" + "(bb)(aa)" + "(aa)(bb)"
    assert all(len(p.readings) == 3 for p in probes)
    assert probes[0].of_rounds([2]).readings == probes[0].readings[2:]


def shared_cores_s(lanes: list[tuple[float, int]], cores: int, ahead: int = 4) -> float:
    """Return the seconds per batch of a chain of lanes, simulated: an oracle for `crowded_s`.

    Args:
        lanes: (CPU seconds of a batch, threads), each fed by the one before. Without threads: seconds of a device.
        ahead: batches that fit between two lanes.
    """
    tick_s, now_s, batches = 0.002, 0.0, 300
    done, left = [0] * len(lanes), [work for work, _ in lanes]
    while done[-1] < batches:
        busy = [
            (i == 0 or done[i - 1] > done[i]) and (i + 1 == len(lanes) or done[i] - done[i + 1] < ahead)
            for i in range(len(lanes))
        ]
        threads = sum(count for (_, count), on in zip(lanes, busy, strict=True) if on)
        share = min(1.0, cores / max(1, threads))  # of a core, for each thread alike
        for i, (work, count) in enumerate(lanes):
            if busy[i]:
                left[i] -= (share * count if count else 1.0) * tick_s
                if left[i] <= 0:
                    left[i] += work
                    done[i] += 1
        now_s += tick_s
    return now_s / batches


@pytest.mark.parametrize(
    ("graph_s", "graph_threads", "model_s", "model_threads"),
    [
        (0.3, 2, 1.0, 1),  # a model of one thread that the loader's threads crowd out: 1.15, not 1.0
        (0.3, 2, 1.0, 2),  # full cores: what both need
        (1.0, 2, 1.0, 1),
        (0.3, 1, 1.0, 1),  # room for both
        (2.0, 2, 0.3, 1),  # the loader is the slowest
        (0.9, 1, 0.2, 2),
    ],
)
def test_lanes_in_each_others_way(
    graph_s: float, graph_threads: int, model_s: float, model_threads: int
) -> None:
    stages = [
        stage("decode", "graph", 1000 * graph_s / graph_threads, cpu_ms=1000 * graph_s),
        stage("forward", "model", 1000 * model_s / model_threads, cpu_ms=1000 * model_s),
    ]
    simulated_s = shared_cores_s([(graph_s, graph_threads), (model_s, model_threads)], cores=2)
    assert 1 / verdict.predicted_img_s(stages, cores=2) == pytest.approx(simulated_s, rel=0.05)


@pytest.mark.parametrize(("graph_s", "model_s"), [(0.3, 1.0), (1.9, 1.0), (3.0, 1.0)])
def test_full_cores_do_not_stretch_the_time_of_a_device(graph_s: float, model_s: float) -> None:
    decode = stage("decode", "graph", 1000 * graph_s / 2, cpu_ms=1000 * graph_s)
    simulated_s = shared_cores_s([(graph_s, 2), (model_s, 0)], cores=2)
    forward = stage("forward", "model", 1000 * model_s, device_ms=1000 * model_s)
    assert 1 / verdict.predicted_img_s([decode, forward], cores=2) == pytest.approx(simulated_s, rel=0.05)


def test_the_host_thread_of_a_device_loads_the_cores() -> None:
    def predicted_s(graph_ms: float) -> float:
        decode = stage("decode", "graph", graph_ms / 2, cpu_ms=graph_ms)
        forward = stage("forward", "model", 1000, cpu_ms=900, device_ms=1000)
        written = stage("checkpoint", "model", 10)  # a lane of the device even with stages that are not
        return 1 / verdict.predicted_img_s([decode, forward, written], cores=2)

    assert predicted_s(300) == pytest.approx(1.01)  # not 1.07, as of a loop on the CPU
    assert predicted_s(1600) == pytest.approx((1.6 + 0.9) / 2)


def test_copies_overlap_with_the_model() -> None:
    model = stage("forward", "model", 5, device_ms=5)
    hidden = [stage("copy to GPU", "copy", 3, device_ms=3), model]
    assert verdict.predicted_img_s(hidden, cores=64) == pytest.approx(1000 / 5)
    assert verdict.loads(hidden, cores=64)[verdict.GPU] == pytest.approx(0.005)
    slow = verdict.limit([stage("copy to GPU", "copy", 8, device_ms=8), model], cores=64)
    assert slow is not None
    assert (slow.stage, slow.binding, slow.rate_img_s) == (
        "copy to GPU",
        "copies to the GPU",
        pytest.approx(1000 / 8),
    )
    assert slow.rate_if_free_img_s == pytest.approx(1000 / 5)


def test_a_part_is_taken_out_of_a_whole() -> None:
    left = Spread(p20=8, p50=10, p80=12).less(Spread(p20=2, p50=3, p80=4))
    assert left == Spread(p20=4, p50=7, p80=10)
    assert Spread(p20=1, p50=1, p80=1).less(left) == Spread(p20=0, p50=0, p80=0)
