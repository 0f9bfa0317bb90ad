"""Speed of tokenising to a token folder against the `tokenizers` library alone, and its memory.

    python benchmarks/tokenizing.py [--megabytes 30] [--rounds 9]
    python benchmarks/tokenizing.py --memory [--megabytes 1000]

Both sides tokenise the same text (the source of the standard library, repeated) with the same BPE of 32,000 tokens,
trained on it, on the same cores, in turn: what disturbs the machine disturbs both. The library is given the texts in
memory, in batches, and its tokens are thrown away; ours reads a .jsonl file and writes a token folder, start of its
processes included. Prints the median of the rounds' ratios and a bootstrap interval.

With --memory: the most memory that `meshwright data prepare` and its processes held together, a page that they share
counted once (PSS, Linux).
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from itertools import cycle
from pathlib import Path

import msgspec
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from meshwright.data import prepare
from meshwright.data.prepare import available_cores
from meshwright.spec import DataSettings

END = "<|endoftext|>"
# Texts given to the library at once; larger batches are not faster.
BATCH = 1000
POLL_S = 0.05
JOB = """\
[run]
name = "tokenizing"
steps = 1
[model]
layers = 1
d_model = 8
heads = 2
feed_forward = 8
vocabulary = 32000
[data]
"""


def read_library() -> list[str]:
    """The texts of the standard library."""
    texts: list[str] = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        try:
            texts.append(file.read_text("utf-8"))
        except UnicodeDecodeError:
            continue
    return [text for text in texts if text]


def repeat_to(texts: list[str], megabytes: float) -> list[str]:
    """Texts, from the first again where they end, up to a size."""
    chosen: list[str] = []
    size = 0
    for text in cycle(texts):
        chosen.append(text)
        size += len(text.encode())
        if size >= megabytes * 1e6:
            return chosen
    return chosen


def train_tokenizer(texts: list[str], file: Path) -> None:
    """A byte-level BPE of 32,000 tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(file))


def theirs(file: Path, texts: list[str]) -> float:
    """Seconds of the library alone, with its own threads."""
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    began = time.perf_counter()
    for start in range(0, len(texts), BATCH):
        tokenizer.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)
    return time.perf_counter() - began


def ours(settings: DataSettings) -> float:
    """Seconds from a file of text to a token folder."""
    shutil.rmtree(settings.cache, ignore_errors=True)
    began = time.perf_counter()
    prepare(settings, available_cores())
    return time.perf_counter() - began


def bootstrap(values: list[float], rounds: int = 2000) -> tuple[float, float]:
    """95% interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(rounds))
    return medians[int(0.025 * rounds)], medians[int(0.975 * rounds)]


def compare(settings: DataSettings, texts: list[str], rounds: int) -> None:
    """Both sides in turn; prints their speeds and the ratio."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    mine: list[float] = []
    library: list[float] = []
    for _ in range(rounds):
        library.append(megabytes / theirs(Path(settings.tokenizer), texts))
        mine.append(megabytes / ours(settings))
        print(f"  tokenizers alone {library[-1]:.2f} MB/s, data prepare {mine[-1]:.2f} MB/s", flush=True)
    # Of neighbours in time: a machine that other work slows down slows both.
    ratios = [one / other for one, other in zip(mine, library, strict=True)]
    low, high = bootstrap(ratios)
    print(f"{megabytes:.0f} MB of text, {len(texts)} documents, {available_cores()} cores, {rounds} rounds")
    print(f"tokenizers alone  median {statistics.median(library):6.2f} MB/s")
    print(f"data prepare      median {statistics.median(mine):6.2f} MB/s")
    print(f"ratio {statistics.median(ratios):.3f}  (95% interval {low:.3f} to {high:.3f})")


def descendants(process: int) -> list[int]:
    """A process and all that it started."""
    found = [process]
    for number in found:
        try:
            tasks = list(Path(f"/proc/{number}/task").iterdir())
            found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def held_bytes(process: int) -> int:
    """Memory of one process, of a shared page its share; 0 once it is gone."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    kilobytes = next((line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:")), "0")
    return int(kilobytes) * 1024


def measure_memory(settings: DataSettings, megabytes: float, folder: Path) -> None:
    """Run the command and watch it; prints the most that it held."""
    job = folder / "job.toml"
    lines = {name: value for name, value in msgspec.to_builtins(settings).items() if name != "sources"}
    job.write_text(JOB + "".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items()))
    command = [sys.executable, "-m", "meshwright", "data", "prepare", str(job)]
    most, parts = 0, [0]
    began = time.perf_counter()
    with subprocess.Popen(command, env={**os.environ}) as process:
        while process.poll() is None:
            held = [held_bytes(number) for number in descendants(process.pid)]
            if sum(held) > most:
                most, parts = sum(held), held
            time.sleep(POLL_S)
    seconds = time.perf_counter() - began
    each = " + ".join(f"{part / 1e6:.0f}" for part in parts)
    print(
        f"{megabytes:.0f} MB of text in {seconds:.0f} s, at most {most / 1e6:.0f} MB in {len(parts)} processes ({each})"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Tokenising against the tokenizers library alone.")
    parser.add_argument("--megabytes", type=float, default=None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="memory instead of speed")
    parser.add_argument("--one-text", action="store_true", help="with --memory: one .txt file instead of a .jsonl file")
    options = parser.parse_args()
    megabytes = options.megabytes or (1000 if options.memory else 30)
    library = read_library()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer, text = folder / "tokenizer.json", folder / ("text.txt" if options.one_text else "text.jsonl")
        train_tokenizer(library, tokenizer)
        texts = repeat_to(library, megabytes)
        with text.open("w") as file:
            for part in texts:
                file.write(part if options.one_text else json.dumps({"text": part}) + "\n")
        settings = DataSettings(
            path=str(text), tokenizer=str(tokenizer), sequence=8, global_batch=1, cache=str(folder / "cache")
        )
        if options.memory:
            measure_memory(settings, megabytes, folder)
        else:
            compare(settings, texts, options.rounds)


if __name__ == "__main__":
    main()
