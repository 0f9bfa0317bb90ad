"""Any cluster table is planned or refused in one line, whatever is in it."""

import tomllib
from collections.abc import Callable
from math import isfinite
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import cpu_cluster

from meshwright.plan import Goal, build_plan, predict
from meshwright.spec import Job, SettingError
from meshwright.spec.decode import decode_job, encode_job
from meshwright.spec.devices import NODES
from meshwright.spec.hardware import cluster_of
from meshwright.spec.links import FABRICS, NETWORKS

# Clusters up to this size are searched; of larger ones the job's own layout is predicted.
SEARCHED = 16

numbers = st.one_of(
    st.integers(-(2**70), 2**70),
    st.integers(0, 20),
    st.floats(),
    st.sampled_from([0.0, -1.0, 1.0, 1e-300, 1e21, 1e300, float("nan"), float("inf")]),
)
odd = st.one_of(numbers, st.booleans(), st.text(max_size=8), st.lists(st.integers(), max_size=2), st.just({}))
words = st.builds(
    lambda nodes, devices, name: f"{nodes}x{devices}x{name}",
    st.integers(0, 5),
    st.integers(0, 9),
    st.sampled_from([*NODES, "b100", ""]),
)
gpus = st.one_of(words, st.lists(words, min_size=2, max_size=3).map(" + ".join), st.text(max_size=12))


def mostly(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any] = odd) -> st.SearchStrategy[Any]:
    """Nine in ten as they should be, so that a table of many keys is right now and then."""
    return st.integers(0, 9).flatmap(lambda die: good if die else bad)


rates = mostly(st.floats(1, 1e15))
links = st.fixed_dictionaries(
    {
        "name": mostly(st.just("link")),
        "bytes_per_s": rates,
        "latency_s": mostly(st.floats(0, 1)),
        "source": st.just("s"),
    }
)
ports = st.fixed_dictionaries({"gbit_per_s": mostly(st.floats(1, 1e4)), "ports": mostly(st.integers(1, 64))})
fabrics = mostly(st.one_of(st.sampled_from([*FABRICS]), links), st.one_of(odd, ports))
networks = mostly(
    st.one_of(
        st.sampled_from([*NETWORKS]),
        st.builds(lambda count, name: f"{count}x{name}", st.integers(0, 9), st.sampled_from([*NETWORKS, *FABRICS])),
        ports,
        links,
    )
)
devices = st.fixed_dictionaries(
    {
        "name": st.just("mine"),
        "kind": mostly(st.sampled_from(["cuda", "rocm", "tpu", "cpu"])),
        "memory_bytes": mostly(st.floats(1e9, 1e12)),
        "memory_bytes_per_s": rates,
        "peak_bf16_flops_per_s": mostly(st.floats(0, 1e16)),
        "peak_fp32_flops_per_s": mostly(st.floats(0, 1e16)),
        "source": st.just("s"),
    },
    optional={"peak_fp8_flops_per_s": rates, "peak_fp16_flops_per_s": rates},
)
counts = mostly(st.integers(1, 9))
nodes = st.one_of(
    st.fixed_dictionaries({"gpus": gpus}, optional={"intra": fabrics}),
    st.fixed_dictionaries({"device": mostly(devices), "devices_per_node": counts, "intra": fabrics}),
)
price = {"price_per_device_hour": mostly(st.floats(0, 1e3))}
tables = st.one_of(
    st.fixed_dictionaries({"gpus": gpus}, optional={"intra": fabrics, "inter": networks, **price}),
    st.fixed_dictionaries(
        {"device": mostly(devices), "devices_per_node": counts, "intra": fabrics, "inter": networks},
        optional={"nodes": counts, **price},
    ),
    st.fixed_dictionaries(
        {"groups": mostly(st.lists(nodes, max_size=3)), "inter": networks}, optional={"nodes": counts, **price}
    ),
    st.fixed_dictionaries({}, optional={"processes": odd, "groups": odd, "inter": odd, "device": odd, **price}),
)


def decode(section: dict[str, Any], precision: str) -> Job | SettingError:
    table = {
        "run": {"name": "any", "steps": 2},
        "model": {"layers": 2, "d_model": 64, "heads": 4, "feed_forward": 128, "vocabulary": 257},
        "data": {"sequence": 128, "global_batch": 16},
        "layout": {"precision": precision},
        "cluster": section,
    }
    try:
        return decode_job(table, local=cpu_cluster)
    except SettingError as error:
        return error


# The same tables each time: a new one that fails would come up in a change that it has nothing to do with.
each = settings(
    derandomize=True, database=None, deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow]
)


@each
@given(section=tables, precision=st.sampled_from(["auto", "bf16", "fp32", "fp8"]))
def test_any_cluster_is_planned_or_refused_in_one_line(section: dict[str, Any], precision: str) -> None:
    job = decode(section, precision)
    if isinstance(job, SettingError):
        assert job.reason and "\n" not in str(job)
        return
    found = [predict(job)]
    if job.cluster.devices <= SEARCHED:
        plan = build_plan(job, Goal(tokens=10**6))
        found += [*plan.ranked, *(one.best for one in plan.alone if one.best is not None)]
    for prediction in found:
        assert isfinite(prediction.step_s) and prediction.step_s >= 0
        assert isfinite(prediction.memory.total()) and prediction.memory.total() > 0
    # And it is written down as it was understood.
    again = decode(tomllib.loads(encode_job(job))["cluster"], job.layout.precision)
    assert isinstance(again, Job) and again.cluster == job.cluster


@each
@given(
    kinds=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 8), st.sampled_from([*NODES])), min_size=2, max_size=4)
)
def test_no_layout_counts_on_more_than_every_node_has(kinds: list[tuple[int, int, str]]) -> None:
    rows = [NODES[name].device for _, _, name in kinds]
    try:
        cluster = cluster_of(" + ".join(f"{count}x{size}x{name}" for count, size, name in kinds))
    except SettingError:
        assert len({row.kind for row in rows}) > 1
        return
    assert cluster.devices == sum(count * size for count, size, _ in kinds)
    assert all(size % cluster.devices_per_node == 0 for _, size, _ in kinds)
    figures: list[Callable[[Any], float]] = [
        lambda row: row.memory_bytes,
        lambda row: row.memory_bytes_per_s,
        lambda row: row.peak_flops_per_s("bf16"),
        lambda row: row.peak_flops_per_s("fp32"),
        lambda row: row.peak_flops_per_s("fp8"),
    ]
    for figure in figures:
        assert figure(cluster.device) == min(figure(row) for row in rows)
    assert cluster.intra.bytes_per_s == min(NODES[name].intra.bytes_per_s for _, _, name in kinds)
