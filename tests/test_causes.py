"""Why a device was idle, what its kernels were for and who sent what, of programs that say nothing of themselves.

Traces made by hand, with every moment known. Times are milliseconds; no GPU needed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from test_kineto import HOST, Trace, ms

from meshwright.account import Purpose
from meshwright.record import Step
from meshwright.record.kineto import PREFIX, STEP, measure_trace, read_trace

AUTOGRAD = 2
NODE = "autograd::engine::evaluate_function: "
LOADER = "enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__"


class Foreign(Trace):
    """A trace of a program that only PyTorch annotates; its steps lie as in the one of our own."""

    def __init__(self) -> None:
        super().__init__()
        for number, event in enumerate(e for e in self.events if e["name"] == STEP):
            event["name"] = f"ProfilerStep#{number + 7}"

    def call(self, name: str, start: float, end: float) -> None:
        """A call of the runtime that launches nothing."""
        self._add("cuda_runtime", name, start, end, tid=HOST)

    def node(self, name: str, start: float, end: float) -> None:
        """A node of the backward pass, on a thread of its own."""
        for label in (NODE + name, name):
            self._add("cpu_op", label, start, end, tid=AUTOGRAD, **{"Sequence number": 3})

    def moved(self, kind: str, start: float, end: float, *, launch: float, **told: Any) -> None:
        """A collective's kernel; told: what NCCL says of it."""
        self.kernel(f"ncclDevKernel_{kind}_RING_LL()", start, end, launch=launch, **told)

    def step(self, folder: Path, purposes: dict[str, Purpose] | None = None) -> Step:
        """The last step."""
        path = folder / "rank-0.json"
        path.write_text(json.dumps({"traceEvents": self.events}))
        steps, _ = measure_trace(read_trace(path), purposes=purposes)
        assert [step.measured.step for step in steps] == [8]
        return steps[-1]


def causes(step: Step) -> dict[str, float]:
    """The host bucket's, milliseconds; they add up to it."""
    assert step.detail is not None
    host = step.detail.host
    assert sum(host.values()) == pytest.approx(step.measured.account.host, abs=1e-9)
    return {cause: round(seconds * 1e3, 6) for cause, seconds in host.items()}


def purpose_of(step: Step) -> str:
    """Of the only transfer."""
    (transfer,) = step.measured.transfers
    return transfer.purpose


def test_a_host_that_is_late_at_launching(tmp_path: Path) -> None:
    trace = Foreign()
    trace.kernel("one", 12, 16, launch=10.5)
    trace.operator("aten::linear", 15, 18)
    trace.kernel("two", 18.005, 20, launch=18)
    assert causes(trace.step(tmp_path)) == {"launch": 2.005}


def test_what_follows_a_synchronisation_is_due_to_it_up_to_its_length(tmp_path: Path) -> None:
    trace = Foreign()
    trace.kernel("one", 12, 16, launch=10.5)
    trace.call("cudaStreamSynchronize", 14.5, 16.01)
    trace.operator("aten::linear", 16.01, 19)
    trace.kernel("two", 17.005, 18, launch=17)
    trace.kernel("three", 19.005, 20, launch=19)
    # It held the host up for 1.51 ms.
    assert causes(trace.step(tmp_path)) == {"synchronize": 1.51, "launch": 0.5}


def test_a_synchronisation_at_the_end_of_the_step_before(tmp_path: Path) -> None:
    trace = Foreign()
    trace.kernel("before", 3, 9, launch=2)
    trace.events = [event for event in trace.events if event["name"] != "warm"]
    trace.call("cudaStreamSynchronize", 4, 9.5)
    trace.operator("aten::linear", 9.6, 12)
    trace.kernel("one", 12.005, 16, launch=12)
    assert causes(trace.step(tmp_path)) == {"synchronize": 2.005}


def test_python_that_does_something_else(tmp_path: Path) -> None:
    trace = Foreign()
    trace.kernel("one", 12, 13, launch=10.5)
    trace.operator("aten::linear", 10, 14)
    trace.operator("aten::linear", 19, 19.5)
    trace.kernel("two", 19.205, 20, launch=19.2)
    step = trace.step(tmp_path)
    assert causes(step) == {"launch": 1.205, "python": 5.0}
    assert step.detail is not None
    (gap,) = step.detail.gaps
    assert gap.bucket == "host" and "Python" in gap.doing and gap.before == "two"
    # Inside of an annotation it would be that.
    trace.annotate("evaluate", 14, 19)
    renamed = trace.step(tmp_path)
    assert renamed.detail is not None and renamed.detail.gaps[0].doing == "evaluate"
    assert gap.seconds == pytest.approx(6.205e-3) and gap.start_s == pytest.approx(1e-3)


def test_collecting_garbage(tmp_path: Path) -> None:
    trace = Foreign()
    trace.kernel("one", 12, 13, launch=10.5)
    trace.operator("aten::linear", 10, 14)
    trace.annotate(f"{PREFIX}collect", 14, 17)
    trace.operator("aten::linear", 17, 18)
    trace.kernel("two", 18.005, 20, launch=18)
    step = trace.step(tmp_path)
    assert causes(step) == {"collect": 3.0, "launch": 2.005}
    assert step.detail is not None and step.detail.gaps[0].doing == f"{PREFIX}collect"


def test_waiting_for_a_batch_has_a_bucket_of_its_own(tmp_path: Path) -> None:
    trace = Foreign()
    trace.kernel("one", 12, 13, launch=10.5)
    trace.annotate(LOADER, 11, 17)
    trace.operator("aten::linear", 17, 18)
    trace.kernel("two", 18.005, 20, launch=18)
    step = trace.step(tmp_path)
    assert ms(step.measured.account) == {"inefficiency": 2.995, "input": 4, "host": 1.005}
    assert causes(step) == {"launch": 1.005}
    assert step.detail is not None and step.detail.gaps[0].bucket == "input"


def test_what_follows_the_backward_pass_updates(tmp_path: Path) -> None:
    trace = Foreign()
    trace.node("MmBackward0", 10.2, 10.8)
    trace.kernel("backward", 12, 14, launch=10.6)
    trace.kernel("norm", 14, 15, launch=11)
    trace.annotate("Optimizer.step#AdamW.step", 11.2, 11.8)
    trace.kernel("adamw", 15, 18, launch=11.5)
    trace.kernel("metric", 18, 19, launch=11.9)
    step = trace.step(tmp_path)
    assert ms(step.measured.account) == {"inefficiency": 3, "optimizer": 4}
    assert step.detail is not None and step.detail.launches == 4


def test_kernels_are_grouped_by_what_they_are_for(tmp_path: Path) -> None:
    trace = Foreign()
    names = {
        "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTN": "matrix products",
        "Cijk_Ailk_Bljk_BBS_BH_MT256x256x64": "matrix products",
        "cutlass_80_tensorop_bf16_s16816gemm": "matrix products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma": "attention",
        "void pytorch_flash::flash_fwd_kernel<>": "attention",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
        "void at::native::vectorized_elementwise_kernel<8, at::native::silu>": "normalisation and element-wise",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0": "normalisation and element-wise",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "void at::native::nll_loss_forward_reduce_cuda_kernel_2d<>": "loss and embedding",
        "somebodys_own": "other",
    }
    for number, name in enumerate(names):
        trace.kernel(name, 12 + number, 13 + number, launch=10.5)
    step = trace.step(tmp_path)
    assert step.detail is not None
    wanted: dict[str, int] = {}
    for purpose in names.values():
        wanted[purpose] = wanted.get(purpose, 0) + 1
    assert {group.purpose: group.count for group in step.detail.kernels} == wanted
    assert {group.purpose: round(group.seconds * 1e3) for group in step.detail.kernels} == wanted


@pytest.mark.parametrize(
    ("description", "kind", "purpose"),
    [
        ("mesh_tp", "AllReduce", "tensor"),
        ("TENSOR_MODEL_PARALLEL_GROUP", "AllGather", "tensor"),
        ("mesh_dp_shard_cp", "ReduceScatter", "shard"),
        ("mesh_dp_replicate", "AllReduce", "replica"),
        ("DATA_PARALLEL_GROUP_WITH_CP", "AllReduce", "replica"),
        ("DATA_PARALLEL_GROUP_WITH_CP", "ReduceScatter", "shard"),
        ("EXPERT_DATA_PARALLEL_GROUP", "AllReduce", "replica"),
        ("CONTEXT_PARALLEL_GROUP", "AllGather", "context"),
        ("mesh_cp", "SendRecv", "context"),
        ("mesh_ep", "AllToAll", "expert"),
        ("PIPELINE_MODEL_PARALLEL_GROUP", "SendRecv", "pipeline"),
        ("MODEL_PARALLEL_GROUP", "AllReduce", "control"),
        ("", "SendRecv", "pipeline"),
    ],
)
def test_groups_are_known_by_their_descriptions(tmp_path: Path, description: str, kind: str, purpose: str) -> None:
    trace = Foreign()
    trace.kernel("one", 12, 16, launch=10.5)
    told = {"In msg nelems": 1 << 20, "dtype": "BFloat16", "Process Group Ranks": "[0, 1]"}
    trace.moved(kind, 16, 18, launch=10.6, **told, **{"Process Group Description": description})
    trace.kernel("two", 18, 20, launch=10.7)
    step = trace.step(tmp_path)
    assert purpose_of(step) == purpose
    assert step.detail is not None
    (group,) = step.detail.groups
    assert (group.group, group.purpose, group.count, group.sent_bytes) == (description, purpose, 1, 2.0 * (1 << 20))
    assert (group.exposed_s, group.overlapped_s) == (pytest.approx(2e-3), pytest.approx(0.0))


@pytest.mark.parametrize("by", ["description", "name"])
def test_a_name_that_somebody_gives_comes_first(tmp_path: Path, by: str) -> None:
    trace = Foreign()
    told = {"In msg nelems": 1 << 20, "dtype": "Float"}
    trace.moved(
        "AllReduce",
        12,
        18,
        launch=10.6,
        **told,
        **{"Process Group Name": "9", "Process Group Description": "mesh_dp_replicate"},
    )
    trace.kernel("two", 18, 20, launch=10.7)
    named: dict[str, Purpose] = {"mesh_dp_replicate" if by == "description" else "9": "expert"}
    assert purpose_of(trace.step(tmp_path, named)) == "expert"


@pytest.mark.parametrize(
    ("elements", "backward", "purpose"),
    [(1 << 24, False, "tensor"), (1 << 24, True, "replica"), (8, False, "control"), (8, True, "control")],
)
def test_sums_of_a_group_that_tells_nothing(tmp_path: Path, elements: int, backward: bool, purpose: str) -> None:
    """Large ones of forward passes are partial results, those of the backward pass alone are gradients."""
    trace = Foreign()
    trace.node("MmBackward0", 11, 11.5)
    trace.kernel("one", 12, 16, launch=10.2)
    told = {"In msg nelems": elements, "dtype": "Float", "Process Group Description": "default_pg"}
    trace.moved("AllReduce", 16, 18, launch=11.2 if backward else 10.6, **told)
    trace.kernel("two", 18, 20, launch=11.7)
    assert purpose_of(trace.step(tmp_path)) == purpose


def test_old_kernels_are_named_by_the_operator_above_them(tmp_path: Path) -> None:
    """Before torch 2.2 NCCL's kernels did not say what they were, but the operator record_param_comms did."""
    trace = Foreign()
    trace.kernel("one", 12, 16, launch=10.5)
    told = {"Collective name": "allreduce", "In msg nelems": 1 << 20, "dtype": "Half"}
    args = {"Process Group Name": "5", "Process Group Description": "mesh_tp"}
    trace._add("cpu_op", "record_param_comms", 10.6, 10.7, tid=HOST, **told, **args)
    trace.moved("AllReduce", 16, 18, launch=10.65)
    trace.kernel("two", 18, 20, launch=10.7)
    step = trace.step(tmp_path)
    assert purpose_of(step) == "tensor"
    assert step.detail is not None and step.detail.groups[0].sent_bytes == 2.0 * (1 << 20)


@pytest.mark.parametrize("bracket", ["FSDP::post_backward_reduce (layers.3)", "FullyShardedDataParallel._pre_forward"])
def test_fsdp_says_what_it_moves(tmp_path: Path, bracket: str) -> None:
    """Shards, or, where it sums them, the gradients of replicas of them."""
    for kind, purpose in (("ReduceScatter", "shard"), ("AllReduce", "replica")):
        trace = Foreign()
        trace.annotate(bracket, 10.55, 10.65)
        trace.kernel("one", 12, 16, launch=10.5)
        told = {"In msg nelems": 1 << 20, "dtype": "Float", "Process Group Description": "default_pg"}
        trace.moved(kind, 16, 18, launch=10.6, **told)
        trace.kernel("two", 18, 20, launch=10.7)
        assert purpose_of(trace.step(tmp_path)) == purpose


def test_the_reducer_of_replicas_works_where_gradients_are_kept(tmp_path: Path) -> None:
    trace = Foreign()
    trace.node("torch::autograd::AccumulateGrad", 10.55, 10.65)
    trace.kernel("one", 12, 16, launch=10.5)
    told = {"In msg nelems": 1 << 20, "dtype": "Float", "Process Group Description": "default_pg"}
    trace.moved("AllReduce", 16, 18, launch=10.6, **told)
    trace.kernel("two", 18, 20, launch=10.7)
    assert purpose_of(trace.step(tmp_path)) == "replica"
