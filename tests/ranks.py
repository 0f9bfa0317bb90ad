"""Several ranks for a test: a fresh set of forked processes for each layout.

Forked from a parent that has imported torch, so that twenty layouts do not pay for twenty imports; fresh, because a
second mesh of another shape in the same processes can hang.
"""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError
from typing import Any

import torch

TIMEOUT_S = 120
PATIENCE_S = 5

# Forking after an operation that ran on several OpenMP threads hangs the child: the parent keeps to one from the start.
torch.set_num_threads(1)


def run_ranks(world_size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call work(*arguments) on `world_size` ranks and return what each returned; fails with the first traceback."""
    fork = multiprocessing.get_context("fork")
    port = free_port()
    pipes = [fork.Pipe(duplex=False) for _ in range(world_size)]
    done = fork.Barrier(world_size)
    ranks = [
        fork.Process(target=_rank, args=(rank, world_size, port, pipes[rank][1], done, work, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for _, sender in pipes:
        sender.close()
    results = [receive(receiver) for receiver, _ in pipes]
    for process in ranks:
        process.join(TIMEOUT_S)
        if process.is_alive():
            process.kill()
    failures = [text for ok, text in results if not ok]
    # A rank that failed first breaks its peers' connections: theirs are the longer list, not the cause.
    cause = next((text for text in failures if "Connection" not in text), failures[0] if failures else "")
    assert not failures, cause
    return [value for _, value in results]


def receive(receiver: Connection) -> tuple[bool, Any]:
    """What a rank sent, or that it ended without a word."""
    try:
        return pickle.loads(receiver.recv_bytes()) if receiver.poll(TIMEOUT_S) else (False, "a rank took too long")
    except EOFError:
        return False, "a rank ended without a word"


def _rank(
    rank: int, world_size: int, port: int, sender: Connection, done: Barrier, work: Callable[..., Any], arguments: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "KINETO_LOG_LEVEL": "99",
    }
    try:
        # Pickled by value: a pipe would pass tensors by a handle into this process, which is gone by then.
        sender.send_bytes(pickle.dumps((True, work(*arguments))))
        # Rank 0 has the store by which the others may still be meeting; where one failed, not for long.
        with suppress(BrokenBarrierError):
            done.wait(PATIENCE_S)
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
    sender.close()
    # Not an ordinary exit: the parent's pytest must not tear itself down in a child.
    os._exit(0)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
