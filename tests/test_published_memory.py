"""The validation program on rows made up here: what is read, what is compared, and when it fails."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "validate_planner.py"
# No run of anybody's: a GPT of 1.3 billion parameters on one A100.
ROW = {
    "id": "made-up-0",
    "dataset": "made_up",
    "model": "GPT",
    "arch": "GPT",
    "n_layers": "24",
    "hidden": "2048",
    "ffn": "8192",
    "act": "gelu",
    "n_heads": "16",
    "n_kv_heads": "16",
    "vocab": "50257",
    "tied_emb": "1",
    "seq_len": "1024",
    "gpu": "A100-80GB",
    "gpu_mem_gb": "80",
    "n_gpus": "1",
    "gpus_per_node": "1",
    "framework": "Megatron-LM",
    "precision": "bf16",
    "dp": "1",
    "zero": "0",
    "tp": "1",
    "sp": "0",
    "cp": "1",
    "pp": "1",
    "vpp": "1",
    "ep": "1",
    "mbs": "8",
    "gbs": "64",
    "recompute": "none",
    "attn": "fused softmax",
    "mem_kind": "allocated peak",
    "status": "ok",
}
EMPTY = (
    "n_experts topk params interconnect n_microbatches step_time_s step_time_kind tokens_per_s_per_gpu tflops_per_gpu "
    "flops_convention mfu_pct hfu_pct mem_gib quality transcription source_repo source_path source_rev notes"
)
COLUMNS = [*ROW, *EMPTY.split()]
# 16 bytes of each of 1.31 billion parameters; 34 sbh + 5 as^2b of 24 blocks; 6 of each of 8 x 1024 x 50304 logits.
STATES_GIB = 16 * 1.3138e9 / 2**30
PEAK_GIB = STATES_GIB + 8 * 1024 * (24 * (34 * 2048 + 5 * 16 * 1024) + 6 * 50304) / 2**30


def validate(folder: Path, *rows: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """Exit code, and what it prints for programs."""
    path = folder / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({**ROW, "id": f"made-up-{number}", **row} for number, row in enumerate(rows))
    done = subprocess.run([sys.executable, PROGRAM, path, "--json"], capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, json.loads(done.stdout)


def figures(found: dict[str, Any]) -> dict[str, float]:
    return {bar["figure"]: bar["value"] for bar in found["bars"]}


def test_a_peak_reckoned_by_hand_is_near(tmp_path: Path) -> None:
    code, found = validate(tmp_path, {"mem_gib": f"{PEAK_GIB:.3f}"})
    assert code == 0
    assert figures(found)["peak: median error"] < 0.01


@pytest.mark.parametrize("scale", [0.8, 1.2])
def test_a_peak_that_is_off_misses_its_bar(tmp_path: Path, scale: float) -> None:
    code, found = validate(tmp_path, {"mem_gib": f"{scale * PEAK_GIB:.3f}"})
    assert code == 1
    assert figures(found)["peak: median error"] == pytest.approx(abs(1 / scale - 1), rel=0.05)


def test_states_are_compared_with_what_is_held_between_steps(tmp_path: Path) -> None:
    held = int(STATES_GIB * 2**30)
    notes = "steady mem-allocated-bytes {}; ETP="
    row = {"mem_gib": f"{PEAK_GIB:.3f}", "notes": notes.format(held)}
    assert figures(validate(tmp_path, row)[1])["states within 1% or 150 MiB"] == 1
    row["notes"] = notes.format(held * 3 // 4)
    code, found = validate(tmp_path, row)
    assert (code, figures(found)["states within 1% or 150 MiB"]) == (1, 0)


def test_what_fits_is_told_from_what_does_not(tmp_path: Path) -> None:
    full = {"mbs": "64", "status": "oom"}
    code, found = validate(tmp_path, {}, full)
    assert code == 0
    assert figures(found) == {"fits: balanced accuracy": 1, "ran out of memory, called a fit": 0}
    # The same rows, said to have gone the other way.
    code, found = validate(tmp_path, {"status": "oom"}, {**full, "status": "ok"})
    assert code == 1
    assert figures(found) == {"fits: balanced accuracy": 0, "ran out of memory, called a fit": 1}


def test_rows_that_say_too_little_are_counted(tmp_path: Path) -> None:
    code, found = validate(tmp_path, {"mbs": "not stated"}, {"framework": "homemade"}, {"gpu": "Abacus"})
    assert (code, len(found["unread"]), found["bars"]) == (1, 3, [])


def test_rows_that_share_no_states_are_read_whatever_divides_their_sequences(tmp_path: Path) -> None:
    both = {"framework": "Megatron-Core", "tp": "2", "cp": "2", "n_gpus": "8", "gpus_per_node": "8", "mem_gib": "9"}
    divided = {"framework": "Megatron-Core", "zero": "Megatron-FSDP optim_grads_params", "dp": "8", "n_gpus": "8"}
    _, found = validate(tmp_path, {**both, "dp": "2"}, {**divided, "gpus_per_node": "8", "mem_gib": "9"})
    assert found["unread"] == {}


@pytest.mark.parametrize(
    ("text", "words"), [("id,dataset\n1,mine\n", "has no column hidden and "), (None, "cannot be read: ")]
)
def test_a_file_that_has_no_such_rows_is_one_line(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "other.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, PROGRAM, path], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and f"error: {path}: {words}" in done.stderr
