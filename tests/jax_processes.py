"""One of two processes of a JAX program, the first of which gets its batches late: NUMBER PORT RUN."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from meshwright.jax import record
from meshwright.spec import SettingError

DELAY_S = 0.1


@jax.jit
def train_step(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    loss, gradient = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
    return w - 0.1 * gradient, loss


def main(number: int, port: int, run: Path) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, number)
    mesh = jax.make_mesh((4,), ("replica",), axis_types=(AxisType.Auto,))

    def batches() -> Iterator[jax.Array]:
        for _ in range(15):
            time.sleep(DELAY_S if number == 0 else 0)
            share = np.ones((16, 64), np.float32)
            yield jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("replica")), share)

    w = jax.device_put(jnp.full((64, 64), 0.01), NamedSharding(mesh, PartitionSpec()))
    with record(run) as recorder:
        step = recorder.watch(train_step)
        for x in recorder.steps(batches()):
            w, loss = step(w, x)
            recorder.log(loss=loss)
            float(loss)
    # What the first process cannot make, no process uses.
    (run.parent / "file").write_text("")
    try:
        record(run.parent / "file")
    except SettingError as error:
        with (run.parent / "refused.txt").open("a") as file:
            file.write(f"{error}\n")


main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
