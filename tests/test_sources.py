"""Conversations, masks, mixtures, and the commands that look at them."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tokenizers
import torch
from commands import run
from corpora import refusal
from jobs import tiny_job
from test_tokenizing import documents_of, prepared, write_job
from tokenized import CHATML, END_TEXT, plain_ids, settings_for, trained, words, write_tokenizer
from verifying import References, assert_agrees, verdict_of

from meshwright.data import Batches, Stream, TokenFolder, prepare
from meshwright.models import NOT_COUNTED
from meshwright.spec import DataSettings, Source

CONVERSATION = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "the word"},
    {"role": "assistant", "content": "reads a model"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "so on: café"},
]
SAID = ["reads a model<|im_end|>\n", "so on: café<|im_end|>\n"]


def write_lines(folder: Path, *lines: dict[str, Any]) -> Path:
    (folder / "text").mkdir(parents=True, exist_ok=True)
    file = folder / "text" / "a.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def counted_text(folder: TokenFolder) -> list[str]:
    """The text of each run of tokens that are targets."""
    assert folder.masked is not None
    edges = np.flatnonzero(np.diff(~folder.masked, prepend=False, append=False)).reshape(-1, 2)
    return [trained().decode(folder.tokens[a:b].tolist(), skip_special_tokens=False) for a, b in edges]


# Conversations


def test_only_the_assistants_turns_are_learned(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", chat_template=CHATML, eos_token=END_TEXT)
    write_lines(tmp_path, {"messages": CONVERSATION})
    folder = prepared(settings_for(tmp_path))
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CONVERSATION)
    assert documents_of(folder) == [[*plain_ids(whole), trained().token_to_id(END_TEXT)]]
    assert counted_text(folder) == SAID
    assert folder.manifest.masked == folder.manifest.tokens - sum(len(plain_ids(text)) for text in SAID)
    assert folder.manifest.bigram_entropy is None


@pytest.mark.parametrize("kind", ["file", "named", "content"])
def test_where_a_template_may_stand(tmp_path: Path, kind: str) -> None:
    config: dict[str, Any] = {"eos_token": {"content": END_TEXT}, "chat_template": CHATML}
    if kind == "named":
        config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    elif kind == "file":
        config["chat_template"] = "not this one"
    write_tokenizer(tmp_path / "tokenizer", **config)
    if kind == "file":
        (tmp_path / "tokenizer" / "chat_template.jinja").write_text(CHATML)
    write_lines(tmp_path, {"messages": CONVERSATION})
    folder = prepared(settings_for(tmp_path))
    assert counted_text(folder) == SAID


# Qwen3's own, less its tools: reasoning stands in the last turn only, so that earlier turns change when one is added.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}"
    "{{ ('<think>\n\n</think>\n\n' if loop.last else '') + message.content + '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_turns_that_change_are_learned_where_the_template_marks_them(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", chat_template=THINKING)
    file = write_lines(tmp_path, {"messages": CONVERSATION})
    folder = prepared(settings_for(tmp_path))
    assert counted_text(folder) == [SAID[0], "<think>\n\n</think>\n\n" + SAID[1]]
    plain = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CONVERSATION)
    whole = plain.replace("so on", "<think>\n\n</think>\n\nso on")
    assert documents_of(folder) == [[*plain_ids(whole), trained().token_to_id(END_TEXT)]]

    unmarked = THINKING.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    write_tokenizer(tmp_path / "tokenizer", chat_template=unmarked)
    assert refusal(lambda: prepare(settings_for(tmp_path))) == (
        f"{file} line 1: the chat template writes turns before turn 3 otherwise than without it; "
        "nearest that works: a chat template with {% generation %} around the assistant's words, or lines with a prompt"
    )


def test_a_turn_that_ends_with_the_end_token_needs_no_second_one(tmp_path: Path) -> None:
    template = CHATML.replace("'<|im_end|>\n'", "eos_token")
    write_tokenizer(tmp_path / "tokenizer", chat_template=template, eos_token="<|im_end|>")
    write_lines(tmp_path, {"messages": CONVERSATION})
    folder = prepared(settings_for(tmp_path))
    assert counted_text(folder) == [text.removesuffix("\n") for text in SAID]
    end = trained().token_to_id("<|im_end|>")
    assert folder.tokens[-1] == end and folder.tokens[-2] != end


@pytest.mark.parametrize("tokenizer", ["bytes", "trained"])
def test_of_a_prompt_and_its_completion_the_completion_is_learned(tmp_path: Path, tokenizer: str) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    write_lines(tmp_path, {"prompt": "the word: ", "completion": "café"}, {"text": "all of this"})
    settings = settings_for(tmp_path, **({"tokenizer": "bytes"} if tokenizer == "bytes" else {}))
    folder = prepared(settings)
    assert folder.masked is not None
    prompt = len(b"the word: ") if tokenizer == "bytes" else len(plain_ids("the word: "))
    assert folder.masked.tolist() == [True] * prompt + [False] * (folder.manifest.tokens - prompt)
    if tokenizer == "trained":
        expected = [*plain_ids("the word: "), *plain_ids("café"), trained().token_to_id(END_TEXT)]
        assert documents_of(folder)[0] == expected


def test_tokens_of_one_character_are_learned_together(tmp_path: Path) -> None:
    """A character of several tokens at a turn's first place is the assistant's with all of them."""
    write_tokenizer(tmp_path / "tokenizer", chat_template=CHATML)
    write_lines(tmp_path, {"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "ß東"}]})
    assert counted_text(prepared(settings_for(tmp_path))) == ["ß東<|im_end|>\n"]


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        ("{{ messages[-1]['content'] }}", CONVERSATION, "writes turns before turn 3 otherwise than without it"),
        (
            "{{ messages[0]['content'] + raise_exception('roles must alternate') }}",
            CONVERSATION,
            "roles must alternate",
        ),
        ("{{ messages.pop() }}", CONVERSATION, "cannot render it"),
        ("{{ ''.__class__.__mro__ }}", CONVERSATION, "cannot render it"),
        (
            "{% generation %}{% generation %}a{% endgeneration %}{% endgeneration %}",
            CONVERSATION,
            "{% generation %} is inside another one",
        ),
        (CHATML, [{"role": "user", "content": "a \ufdd0 b"}], "it holds U+FDD0"),
        (CHATML, [{"role": "user"}], 'a message has no "role" or "content" that is a string'),
        (None, CONVERSATION, "is a conversation, and the tokenizer has no chat template"),
    ],
)
def test_conversations_that_cannot_be_told_apart(
    tmp_path: Path, template: str | None, messages: list[dict[str, str]], reason: str
) -> None:
    write_tokenizer(tmp_path / "tokenizer", **({} if template is None else {"chat_template": template}))
    file = write_lines(tmp_path, {"text": "fine"}, {"messages": messages})
    for workers in (1, 2):
        line = refusal(lambda workers=workers: prepare(settings_for(tmp_path), workers))
        assert line.startswith(f"{file} line 2: ") and reason in line


# Masks in batches and in training


def chat_settings(folder: Path, **changes: Any) -> DataSettings:
    write_tokenizer(folder / "tokenizer")
    write_lines(folder, *({"prompt": words(n, 3 + n % 9), "completion": words(90 + n, 2 + n % 7)} for n in range(60)))
    return settings_for(folder, **changes)


def test_masked_targets_are_not_counted(tmp_path: Path) -> None:
    settings = chat_settings(tmp_path)
    stream = Stream(prepare(settings), settings, 0)
    whole = stream.batch(2, 0, 6)
    plain = stream.sources[0].training
    for row in range(6):
        offset = stream.place(2, row).offset
        masked, read = plain.masked(offset + 1, 16), plain.read(offset + 1, 16).astype(np.int64)
        assert whole.targets[row].tolist() == np.where(masked, NOT_COUNTED, read).tolist()
    assert 0 < stream.counted(2) == (whole.targets != NOT_COUNTED).sum() < 6 * 16
    for rank in range(3):
        batches = Batches(stream, data_rank=rank, data_size=3, microbatch=1, accumulation=2, device=torch.device("cpu"))
        assert batches.next(2).counted == stream.counted(2)
        batches.close()


@pytest.mark.parametrize("layout", [{"microbatch": 2}, {"shard": 2, "microbatch": 1}], ids=["one", "shard2"])
def test_a_masked_corpus_trains_as_one_process_does(tmp_path: Path, layout: dict[str, int]) -> None:
    settings = msgspec.to_builtins(chat_settings(tmp_path, sequence=24, global_batch=8))
    job = tiny_job(tmp_path, processes=layout.get("shard", 1), layout=layout, data=settings, model={"vocabulary": 300})
    assert_agrees(verdict_of(job, References(tmp_path)))


# Mixtures


def two_sources(folder: Path, weights: tuple[float, float] = (3, 1), **changes: Any) -> DataSettings:
    sources: list[Source] = []
    for name, weight in zip("ab", weights, strict=True):
        (folder / name).mkdir(exist_ok=True)
        for number in range(30):
            (folder / name / f"{number}.txt").write_text(name * (40 + number))
        sources.append(Source(path=str(folder / name), weight=weight))
    settings = DataSettings(path="", sources=tuple(sources), sequence=16, global_batch=8, cache=str(folder / "cache"))
    return msgspec.structs.replace(settings, held_out=0.2, **changes)


def test_a_mixture_is_a_pure_function_with_its_shares(tmp_path: Path) -> None:
    settings = two_sources(tmp_path)
    stream = Stream(prepare(settings), settings, 5)
    batches = [stream.batch(step, 0, 8) for step in range(6)]
    for step in (4, 1):
        fresh = Stream(prepare(settings), settings, 5)
        assert fresh.batch(step, 3, 2).tokens.tolist() == batches[step].tokens[3:5].tolist()
    letters = ["".join(map(chr, row[row < 256]))[0] for batch in batches for row in batch.tokens]
    assert letters.count("b") == 12 and all(letters[start : start + 8].count("b") == 2 for start in range(0, 48, 8))
    assert stream.bigram_entropy is None
    seen = [stream.place(0, index) for index in range(4 * stream.sources[1].training_samples)]
    own = [place.offset for place in seen if place.source == 1]
    assert sorted(own) == [16 * n for n in range(stream.sources[1].training_samples)]


def test_a_lone_source_is_its_path(tmp_path: Path) -> None:
    settings = two_sources(tmp_path)
    path = settings.sources[0].path
    alone = msgspec.structs.replace(settings, sources=(Source(path=path, weight=7),))
    one = msgspec.structs.replace(settings, sources=(), path=path)
    streams = [Stream(prepare(s), s, 3) for s in (alone, one)]
    assert streams[0].checksum == streams[1].checksum
    assert streams[0].batch(9, 0, 8).tokens.tolist() == streams[1].batch(9, 0, 8).tokens.tolist()
    assert streams[0].held_out_samples == streams[1].held_out_samples


def test_held_out_samples_are_mixed_alike_and_never_trained_on(tmp_path: Path) -> None:
    settings = two_sources(tmp_path)
    stream = Stream(prepare(settings), settings, 0)
    batch = stream.held_out_batch(0, stream.held_out_samples)
    letters = ["".join(map(chr, row[row < 256]))[0] for row in batch.tokens]
    assert abs(letters.count("b") - len(letters) / 4) <= 1
    assert stream.sources[0].held_out.tokens + stream.sources[0].training.tokens == (
        prepare(settings)[0].manifest.tokens
    )


def test_other_weights_are_other_data(tmp_path: Path) -> None:
    checksums = set()
    for weights in ((3, 1), (6, 2), (1, 1)):
        settings = two_sources(tmp_path, weights)
        checksums.add(Stream(prepare(settings), settings, 0).checksum)
    assert len(checksums) == 2


# What cannot be honoured


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    write_lines(tmp_path, {"text": "a"})
    assert "no such file or folder" in refusal(lambda: prepare(settings_for(tmp_path)))
    (tmp_path / "tokenizer").mkdir()
    assert "the folder holds no tokenizer.json" in refusal(lambda: prepare(settings_for(tmp_path)))
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be used" in refusal(lambda: prepare(settings_for(tmp_path)))
    write_tokenizer(tmp_path / "tokenizer", chat_template="{% if %}")
    assert "the chat template is damaged" in refusal(lambda: prepare(settings_for(tmp_path)))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("[")
    assert "its tokenizer_config.json is damaged" in refusal(lambda: prepare(settings_for(tmp_path)))
    assert not list((tmp_path / "cache").glob("*"))


def test_end_tokens_that_are_not_there(tmp_path: Path) -> None:
    write_lines(tmp_path, {"text": "a"})
    write_tokenizer(tmp_path / "tokenizer")
    assert refusal(lambda: prepare(settings_for(tmp_path, end_token="<|endoftexd|>"))) == (
        'data.end_token = "<|endoftexd|>": the tokenizer has no such token; '
        'nearest that works: data.end_token = "<|endoftext|>"'
    )
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, "?")).save(str(tmp_path / "none.json"))
    line = refusal(lambda: prepare(settings_for(tmp_path, tokenizer=str(tmp_path / "none.json"))))
    assert line.startswith('data.end_token = "": ') and "names no token that ends a document" in line


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("fine")
    (tmp_path / "text" / "b.txt").write_bytes(b"caf\xe9")
    line = refusal(lambda: prepare(settings_for(tmp_path)))
    assert line.startswith(f"{tmp_path}/text/b.txt: is not UTF-8; nearest that works: ")


def test_a_parquet_file_without_text(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    file = tmp_path / "text" / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None], "n": [1, 2]}), file)
    assert refusal(lambda: prepare(settings_for(tmp_path))).startswith(f"{file} row 2: has no ")
    parquet.write_table(pyarrow.table({"messages": ["a"]}), file)
    assert refusal(lambda: prepare(settings_for(tmp_path))).startswith(f"{file} row 1: has no ")
    file.write_bytes(b"PAR1")
    assert "is not a Parquet file" in refusal(lambda: prepare(settings_for(tmp_path)))


def test_a_parquet_file_that_is_damaged(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    file = tmp_path / "text" / "a.parquet"
    # A column of strings whose bytes are no text: pyarrow looks when it is asked for them.
    held = pyarrow.array([b"fine", b"caf\xe9"], type=pyarrow.binary())
    strings = pyarrow.Array.from_buffers(pyarrow.string(), 2, held.buffers())
    parquet.write_table(pyarrow.table({"text": strings}), file)
    line = refusal(lambda: prepare(settings_for(tmp_path)))
    assert line.startswith(f"{file} from row 1 on: holds a string that is not UTF-8; ")
    parquet.write_table(
        pyarrow.table({"text": ["hello " * 999] * 99}), file, compression="snappy", use_dictionary=False
    )
    whole = bytearray(file.read_bytes())
    whole[100 : len(whole) // 2] = bytes(len(whole) // 2 - 100)
    file.write_bytes(whole)
    line = refusal(lambda: prepare(settings_for(tmp_path)))
    assert line.startswith(f"{file}: ") and "None" not in line and "napp" in line


# Commands


def test_the_commands_show_what_is_there(tmp_path: Path) -> None:
    settings = chat_settings(tmp_path, sequence=32)
    done = run("data", "prepare", write_job(tmp_path, sequence=32))
    folder = prepared(settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{settings.path}: 60 documents, {folder.manifest.tokens:,} tokens in {folder.path}\n"

    shown = run("data", "show", tmp_path / "job.toml", "--step", 2, "--index", 1).stdout
    assert "step 2, sample 1 of 6: 32 tokens" in shown
    stream = Stream([folder], settings, 0)
    text = shown.partition("--- document 0")[2].partition("\n")[2]
    plain = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("--- document"))
    expected = trained().decode(stream.batch(2, 1, 1).tokens[0].tolist(), skip_special_tokens=False)
    strip = str.maketrans("", "", "⟦⟧\n")
    assert plain.translate(strip) == expected.translate(strip)
    assert "⟦" in plain

    stats = run("data", "stats", tmp_path / "job.toml").stdout
    used = len(np.unique(folder.tokens))
    assert f"vocabulary used           {used} of 300\n" in stats
    assert f"masked tokens             {folder.manifest.masked / folder.manifest.tokens:.1%}\n" in stats
    assert f"{24 / stream.training_samples:.2f} (24 samples)" in stats
    small = run("data", "stats", tmp_path / "job.toml", "--set", "model.vocabulary=299")
    assert small.returncode == 2 and small.stdout == stats
    assert "model.vocabulary = 299: the data's vocabulary is 300 tokens" in small.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--index", "6"), "error: --index 6: data.global_batch is 6; nearest that works: --index 5"),
        (("--step", "-1"), "error: --step -1: must be at least 0; nearest that works: --step 0"),
        (
            ("--set", "data.tokenizer=none"),
            'error: data.tokenizer = "none": no such file or folder; nearest that works',
        ),
    ],
)
def test_samples_that_are_not_there(tmp_path: Path, arguments: tuple[str, ...], line: str) -> None:
    chat_settings(tmp_path)
    done = run("data", "show", write_job(tmp_path), *arguments)
    assert done.returncode == 2 and done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_training_and_sampling_speak_the_jobs_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    write_lines(tmp_path, *({"text": words(n, 60)} for n in range(20)))
    trained_run = run("train", write_job(tmp_path, global_batch=4))
    assert trained_run.returncode == 0, trained_run.stderr
    sampled = run("sample", tmp_path / "runs" / "tokens", "--prompt", "naïve café", "--tokens", 5)
    assert sampled.returncode == 0 and sampled.stdout.startswith("naïve café"), sampled.stderr
