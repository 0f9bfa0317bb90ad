"""A small decoder in plain JAX, data parallel over all devices, recorded: python examples/jax_loop.py RUN."""

import functools
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from meshwright.jax import record

LAYERS, WIDTH, HEADS, VOCABULARY, SEQUENCE, BATCH, STEPS = 2, 64, 4, 128, 64, 16, 40
LEARNING_RATE = 3e-3


def init(key: jax.Array) -> dict:
    sizes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    keys = iter(jax.random.split(key, len(sizes) + 1))
    layers = {name: jax.random.normal(next(keys), (LAYERS, *size)) * size[0] ** -0.5 for name, size in sizes.items()}
    return {"words": jax.random.normal(next(keys), (VOCABULARY, WIDTH)) * 0.1, "layers": layers}


def norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def block(x: jax.Array, layer: dict) -> tuple[jax.Array, None]:
    batch, sequence, _ = x.shape
    qkv = (norm(x) @ layer["qkv"]).reshape(batch, sequence, 3, HEADS, WIDTH // HEADS)
    heads = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)
    x = x + heads.reshape(x.shape) @ layer["out"]
    return x + jax.nn.gelu(norm(x) @ layer["up"]) @ layer["down"], None


def loss_of(parameters: dict, tokens: jax.Array) -> jax.Array:
    x, _ = jax.lax.scan(block, parameters["words"][tokens[:, :-1]], parameters["layers"])
    logits = norm(x) @ parameters["words"].T
    chances = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1))


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: dict, tokens: jax.Array) -> tuple[dict, jax.Array]:
    """One step of Adam."""
    loss, gradients = jax.value_and_grad(loss_of)(state["parameters"], tokens)
    count = state["count"] + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["first"], gradients)
    second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, state["second"], gradients)

    def moved(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        return p - LEARNING_RATE * m / (1 - 0.9**count) / (jnp.sqrt(v / (1 - 0.99**count)) + 1e-8)

    parameters = jax.tree.map(moved, state["parameters"], first, second)
    return {"parameters": parameters, "first": first, "second": second, "count": count}, loss


def batches(sharding: NamedSharding) -> Iterator[jax.Array]:
    """Sequences in which each token is the one before it, plus a number that the sequence keeps to."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        begin, stride = rng.integers(VOCABULARY, size=(BATCH, 1)), rng.integers(1, 4, size=(BATCH, 1))
        tokens = (begin + stride * np.arange(SEQUENCE + 1)) % VOCABULARY
        yield jax.device_put(tokens.astype(np.int32), sharding)


def main(run: str) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("replica",), axis_types=(AxisType.Auto,))
    parameters = init(jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    # Each moment has memory of its own: a buffer can be donated once.
    state = {"parameters": parameters, "first": zeros, "second": jax.tree.map(jnp.copy, zeros), "count": jnp.array(0)}
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))

    with record(run, tokens_per_step=BATCH * SEQUENCE) as recorder:
        step = recorder.watch(train_step)
        for number, tokens in enumerate(recorder.steps(batches(NamedSharding(mesh, PartitionSpec("replica"))))):
            state, loss = step(state, tokens)
            recorder.log(loss=loss)
            if number % 10 == 9:
                print(f"step {number + 1}  loss {loss:.3f}")


if __name__ == "__main__":
    # Where there is only a CPU it counts as four.
    jax.config.update("jax_num_cpu_devices", 4)
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/jax-loop")
