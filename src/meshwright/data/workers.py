"""Processes that tokenise, started as fresh ones: a process that has imported torch has threads, and is not forked.

Each reads requests from its standard input and answers on its standard output. They end when the input does, and so
with the process that started them, however it ends.
"""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

import msgspec
import numpy as np

from meshwright.data.encode import Encoded, dtype_of, encode_chunk
from meshwright.data.source import Chunk
from meshwright.data.tokenizer import open_tokenizer
from meshwright.spec import DataSettings, SettingError

# Chunks handed out for each worker: one at work, and one that waits for its turn to be written.
AHEAD = 2
WORKER_ENVIRONMENT = {
    # Each of them is one thread's worth of work; the library's own threads would fight over the cores.
    "TOKENIZERS_PARALLELISM": "false",
    # The library makes and frees a hundred times a text's size in small pieces: glibc is to give large stretches back
    # at once, where it would keep up to 480 MB in a worker (benchmarks/tokenizing.py --memory).
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
}
BEGIN = "from meshwright.data.workers import work; work()"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says before the bytes of its arrays, which follow in this order."""

    tokens_bytes: int = 0
    lengths_bytes: int = 0
    masked_bytes: int = 0
    goes_on: bool = False
    refused: tuple[str, str, str] | None = None


class Workers:
    """Some processes that tokenise chunks. Use as a context: leaving it ends them."""

    def __init__(self, settings: DataSettings, vocabulary: int, count: int) -> None:
        self._dtype = dtype_of(vocabulary)
        self._count = count
        environment = {**os.environ, **WORKER_ENVIRONMENT}
        command = [sys.executable, "-c", BEGIN]
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                # The terminal's Ctrl-C is for the process that knows what to say about it.
                start_new_session=True,
            )
            for _ in range(count)
        ]
        self._free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for process in self._processes:
            send(process, msgspec.json.encode(settings))
            self._free.put(process)
        self._threads = ThreadPoolExecutor(count, "workers")

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                try:
                    assert pipe is not None
                    pipe.close()
                except BrokenPipeError:  # a request that it did not live to read
                    pass

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Encoded]]:
        """Each chunk's tokens in order, while others are made; only a few are held."""
        coming: deque[tuple[Chunk, Future[Encoded]]] = deque()
        for chunk in chunks:
            coming.append((chunk, self._threads.submit(self._ask, chunk)))
            if len(coming) >= AHEAD * self._count:
                first, future = coming.popleft()
                yield first, future.result()
        for chunk, future in coming:
            yield chunk, future.result()

    def _ask(self, chunk: Chunk) -> Encoded:
        process = self._free.get()
        try:
            send(process, msgspec.json.encode(chunk))
            return self._receive(process)
        except (OSError, EOFError, msgspec.DecodeError):
            code = process.wait()
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise SettingError("tokenising", f"a process that tokenises ended ({how})", "fewer workers") from None
        finally:
            self._free.put(process)

    def _receive(self, process: subprocess.Popen[bytes]) -> Encoded:
        assert process.stdout is not None
        answer = msgspec.json.decode(process.stdout.readline(), type=Answer)
        if answer.refused:
            raise SettingError(*answer.refused)
        sizes = (answer.tokens_bytes, answer.lengths_bytes, answer.masked_bytes)
        tokens, lengths, masked = (process.stdout.read(size) for size in sizes)
        if len(masked) < answer.masked_bytes:
            raise EOFError
        return Encoded(
            tokens=np.frombuffer(tokens, self._dtype),
            lengths=np.frombuffer(lengths, np.int64),
            masked=np.frombuffer(masked, np.bool_) if masked else None,
            goes_on=answer.goes_on,
        )


def send(process: subprocess.Popen[bytes], line: bytes) -> None:
    """One line to a worker."""
    assert process.stdin is not None
    process.stdin.write(line + b"\n")
    process.stdin.flush()


def work() -> None:
    """A worker's life: the job's settings, then one answer to each chunk."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    settings = msgspec.json.decode(requests.readline(), type=DataSettings)
    try:
        tokenizer = open_tokenizer(settings)
        for line in requests:
            try:
                encoded = encode_chunk(msgspec.json.decode(line, type=Chunk), tokenizer)
            except SettingError as error:
                refused = (error.setting, error.reason, error.nearest)
                answers.write(msgspec.json.encode(Answer(refused=refused)) + b"\n")
            else:
                tokens, lengths = encoded.tokens.tobytes(), encoded.lengths.tobytes()
                masked = b"" if encoded.masked is None else encoded.masked.tobytes()
                answer = Answer(
                    tokens_bytes=len(tokens),
                    lengths_bytes=len(lengths),
                    masked_bytes=len(masked),
                    goes_on=encoded.goes_on,
                )
                answers.write(msgspec.json.encode(answer) + b"\n")
                answers.writelines((tokens, lengths, masked))
            answers.flush()
    except BrokenPipeError:  # whoever asked is gone
        os._exit(1)
