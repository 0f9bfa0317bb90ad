"""Text, a tokenizer trained on it, and jobs' data settings for both. Nothing is downloaded."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from meshwright.spec import DataSettings

END_TEXT = "<|endoftext|>"
SPECIAL = [END_TEXT, "<|im_start|>", "<|im_end|>"]
WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "word,",
    "then",
    "(another",
    "one)",
    "and",
    "so",
    "on:",
    "naïve",
    "café",
    "東京",
    "x_1",
    "=",
    "3.14159",
    "don't",
    "STOP",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def words(seed: int, count: int) -> str:
    """Some text with lines, blank lines, indents, letters of several bytes."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice((" ", " ", " ", "\n", "\n\n", "  ", "\t")) for _ in range(count))


@cache
def trained() -> tokenizers.Tokenizer:
    """A small byte-level BPE, like GPT-2's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words(seed, 500) for seed in range(10)], trainer)
    # What published files carry, and what must not reach a document: a limit, padding, a token in front.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END_TEXT} $A", special_tokens=[(END_TEXT, 0)])
    return tokenizer


def write_tokenizer(folder: Path, **config: Any) -> Path:
    """A folder as Hugging Face keeps one: tokenizer.json, and tokenizer_config.json if there is any."""
    folder.mkdir(parents=True, exist_ok=True)
    trained().save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def plain_ids(text: str) -> list[int]:
    """What `tokenizers` makes of a text, by itself."""
    tokenizer = tokenizers.Tokenizer.from_str(trained().to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.encode(text, add_special_tokens=False).ids


def settings_for(folder: Path, **changes: Any) -> DataSettings:
    """The data of `folder / "text"`, tokenised by `folder / "tokenizer"`."""
    settings = DataSettings(
        path=str(folder / "text"),
        tokenizer=str(folder / "tokenizer"),
        sequence=16,
        global_batch=6,
        held_out=0.2,
        cache=str(folder / "cache"),
    )
    return msgspec.structs.replace(settings, **changes)
