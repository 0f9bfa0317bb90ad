"""JAX programs that tests record, in a process of their own: JAX starts threads, and other tests fork."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from meshwright.jax import record
from meshwright.spec import SettingError

DELAY_S, LATE_S, HIDDEN_S = 0.12, 0.08, 0.01


@partial(jax.jit, donate_argnums=0)
def train_step(state: dict[str, jax.Array], x: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    def loss_of(w: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ w) @ w.T - x) ** 2)

    loss, gradient = jax.value_and_grad(loss_of)(state["w"])
    return {"w": state["w"] - 0.1 * gradient, "count": state["count"] + 1}, loss


def new_state() -> dict[str, jax.Array]:
    state = {"w": jnp.full((64, 128), 0.01), "count": jnp.zeros((), jnp.int32)}
    return jax.device_put(state, sharding())


def sharding(*axes: str) -> NamedSharding:
    mesh = jax.make_mesh((jax.device_count(),), ("replica",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*axes))


def batch(rows: int = 32) -> jax.Array:
    return jax.device_put(np.ones((rows, 64), np.float32), sharding("replica"))


def delayed(folder: Path) -> None:
    """Input and host are late by sleeping; step 15 has another shape; held-out loss is evaluated once."""
    slept: dict[str, list[float]] = {"input": [], "host": []}

    def sleep(where: str, seconds: float) -> None:
        begun = time.perf_counter()
        time.sleep(seconds)
        slept[where].append(time.perf_counter() - begun)

    def batches() -> Iterator[jax.Array]:
        for number in range(41):
            sleep("input", DELAY_S)
            yield batch(64 if number == 15 else 32)

    state = new_state()
    with record(folder / "delayed", name="late", tokens_per_step=32 * 8) as recorder:
        step = recorder.watch(train_step)
        for number, x in enumerate(recorder.steps(batches())):
            sleep("host", LATE_S)
            state, loss = step(state, x)
            recorder.log(loss=loss)
            float(loss)
            if number == 35:
                with recorder.span("evaluation"):
                    time.sleep(0.2)
                    step(new_state(), batch())
    (folder / "slept.json").write_text(json.dumps(slept))


def ahead(folder: Path) -> None:
    """Batches come while the device is busy for longer than they take."""

    @jax.jit
    def long_step(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 150, lambda _, y: jnp.tanh(y @ y), x)

    x = jnp.full((384, 384), 0.01)
    with record(folder / "ahead") as recorder:
        for _ in range(14):
            with recorder.input():
                time.sleep(HIDDEN_S)
            x = recorder.watch(long_step)(x)
            recorder.next_step()


def handed_over(folder: Path) -> None:
    """Nothing is watched, and what the step computed is handed over; the same again in a second attempt."""
    for _ in range(2):
        state = new_state()
        recorder = record(folder / "handed", flops_per_step=4e6, first_step=100)
        for _ in range(14):
            time.sleep(LATE_S / 4)
            state, loss = train_step(state, batch())
            recorder.next_step(loss, loss=loss)
        recorder.close(how="stopped")


def unseen_program(folder: Path) -> None:
    """Nothing is watched and nothing handed over; microbatches; a loop that is left in the middle; no close."""
    recorder = record(folder / "blind")
    state = new_state()
    for number, x in enumerate(recorder.steps([batch() for _ in range(20)], microbatches=2)):
        state, _ = train_step(state, x)
        if number == 12:
            break


def crashed(folder: Path) -> None:
    try:
        with record(folder / "crashed") as recorder:
            step = recorder.watch(train_step)
            state = new_state()
            for number, x in enumerate(recorder.steps([batch() for _ in range(12)])):
                if number == 11:
                    raise RuntimeError("out of luck")
                state, _ = step(state, x)
    except RuntimeError:
        pass


def refused(folder: Path) -> None:
    """What cannot be asked for, each as its one line."""
    (folder / "ours").mkdir()
    (folder / "ours" / "job.toml").write_text("")
    (folder / "file").write_text("")
    recorder = record(folder / "refusing")
    loose: Any = recorder
    tries: list[Callable[[], Any]] = [
        lambda: record(folder / "ours"),
        lambda: record(folder / "file"),
        lambda: record(folder / "x", budget=2),
        lambda: record(folder / "x", tokens_per_step=0),
        lambda: record(folder / "x", flops_per_step=float("inf")),
        lambda: record(folder / "x", first_step=-1),
        lambda: recorder.steps([], microbatches=0),
        lambda: loose.span("evaluating"),
        lambda: loose.watch(3),
    ]
    lines: list[str] = []
    for one in tries:
        try:
            one()
        except SettingError as error:
            lines.append(str(error))
        else:
            lines.append("")
    recorder.close()
    (folder / "refused.json").write_text(json.dumps(lines))


def profiled(folder: Path) -> None:
    """Traces of four steps that wait for their batches: with annotations, and with none."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    state, slept = new_state(), []
    state, _ = jax.block_until_ready(train_step(state, batch()))
    for name in ("marked", "bare"):
        with jax.profiler.trace(folder / name, profiler_options=options):
            for number in range(4):
                with jax.profiler.StepTraceAnnotation("train", step_num=number) if name == "marked" else nullcontext():
                    with jax.profiler.TraceAnnotation("input"):
                        begun = time.perf_counter()
                        time.sleep(DELAY_S)
                        slept.append(time.perf_counter() - begun)
                    state, loss = train_step(state, batch())
                    # Not the loss alone, which one device has before the others are done and drawn.
                    jax.block_until_ready((state, loss))
    (folder / "profiled.json").write_text(json.dumps(slept))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    for program in (delayed, ahead, handed_over, crashed, refused, profiled, unseen_program):
        program(Path(sys.argv[1]))
