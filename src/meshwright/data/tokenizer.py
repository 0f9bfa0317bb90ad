"""Text to tokens and back: bytes, or any Hugging Face tokenizer.json."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import msgspec
import numpy as np
import tokenizers
from numpy.typing import NDArray

from meshwright.data.chat import ChatError, ChatTemplate
from meshwright.data.folder import END, VOCABULARY, is_prepared, open_folder
from meshwright.spec import DataSettings, SettingError, nearest_choice
from meshwright.spec.job import TOKEN_FILES

BYTES = "bytes"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# What well-known tokenizers call the token that ends a document, for those that come without tokenizer_config.json.
USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")
# Before the space between two words is where most tokenizers' texts can be parted. Which cannot is found out by this.
PROBE = ("A few words of text", " and a few more of them.\n")

Ids = NDArray[Any]
Divides = Literal["anywhere", "words", "never"]


class Placed(NamedTuple):
    """The tokens of a text, and at which of its characters each begins."""

    ids: Ids
    starts: NDArray[np.int64]


class Tokenizer(Protocol):
    """What preparing, showing and sampling need of a tokenizer.

    end: the token that ends a document. divides: where a long text may be divided without a change of its tokens;
    between words only where its two sides prove to give the same tokens together and apart.
    """

    vocabulary: int
    end: int
    divides: Divides
    template: ChatTemplate | None

    def encode(self, texts: Sequence[str | bytes]) -> list[Ids]:
        """Tokens of each text. Raises UnicodeDecodeError for bytes that are no text."""
        ...

    def encode_placed(self, texts: Sequence[str]) -> list[Placed]:
        """Tokens of each text and where they begin in it."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, special ones included."""
        ...


class ByteTokenizer:
    """0 to 255 are the bytes of UTF-8; 256 ends a document."""

    vocabulary = VOCABULARY
    end = END
    divides: Divides = "anywhere"
    template: ChatTemplate | None = None

    def encode(self, texts: Sequence[str | bytes]) -> list[Ids]:
        """The bytes of each text."""
        contents = (text.encode() if isinstance(text, str) else text for text in texts)
        return [np.frombuffer(content, dtype=np.uint8) for content in contents]

    def encode_placed(self, texts: Sequence[str]) -> list[Placed]:
        """The bytes of each text, each where its character begins."""
        placed: list[Placed] = []
        for text in texts:
            ids = np.frombuffer(text.encode(), dtype=np.uint8)
            # A byte that goes on with a character is 10xxxxxx.
            placed.append(Placed(ids, np.cumsum((ids & 0xC0) != 0x80) - 1))
        return placed

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these bytes; end tokens are passed over."""
        return bytes(token for token in tokens if token < END).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer.json, as the `tokenizers` library runs it, without the special tokens that it would add."""

    def __init__(self, inner: tokenizers.Tokenizer, end: int, template: ChatTemplate | None) -> None:
        # Both are properties of a batch for a model, and many files carry them: here they would cut documents.
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.vocabulary = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.end = end
        self.template = template
        self.divides: Divides = "words" if same_apart(self, *PROBE) else "never"

    def encode(self, texts: Sequence[str | bytes]) -> list[Ids]:
        """Tokens of each text, at the library's best speed."""
        whole = [text if isinstance(text, str) else text.decode() for text in texts]
        encodings = self._inner.encode_batch_fast(whole, add_special_tokens=False)
        return [as_array(encoding.ids) for encoding in encodings]

    def encode_placed(self, texts: Sequence[str]) -> list[Placed]:
        """Tokens of each text and where they begin in it."""
        encodings = self._inner.encode_batch(list(texts), add_special_tokens=False)
        return [
            Placed(as_array(encoding.ids), np.array([start for start, _ in encoding.offsets], dtype=np.int64))
            for encoding in encodings
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens."""
        return self._inner.decode(list(tokens), skip_special_tokens=False)


def as_array(ids: list[int]) -> Ids:
    """A list of token ids as an array; of all ways from a list of Python's numbers the fastest."""
    return np.fromiter(ids, dtype=np.uint32, count=len(ids))


def same_apart(tokenizer: Tokenizer, left: str, right: str) -> bool:
    """Whether two texts give the same tokens together as each for itself."""
    together, first, second = tokenizer.encode([left + right, left, right])
    return np.array_equal(together, np.concatenate([first, second]))


def open_tokenizer(settings: DataSettings) -> Tokenizer:
    """The job's tokenizer. Raises SettingError where it cannot be used."""
    if settings.tokenizer == BYTES:
        return ByteTokenizer()
    files = read_files(settings.tokenizer)
    setting = f'data.tokenizer = "{settings.tokenizer}"'
    try:
        inner = tokenizers.Tokenizer.from_str(files[TOKENIZER_FILE].decode())
    except Exception as error:  # the library raises nothing narrower
        raise SettingError(setting, f"{TOKENIZER_FILE} cannot be used ({error})", 'data.tokenizer = "bytes"') from None
    config = read_config(setting, files)
    end = find_end(settings, inner, config)
    template = files[TEMPLATE_FILE].decode() if TEMPLATE_FILE in files else named_template(config.get("chat_template"))
    names = {name: text_of(token) for name, token in config.items() if name.endswith("_token") and text_of(token)}
    try:
        return HuggingFaceTokenizer(inner, end, ChatTemplate(template, names) if template else None)
    except ChatError as error:
        raise SettingError(setting, str(error), f"the folder without {TEMPLATE_FILE}") from None


def open_reader(settings: DataSettings) -> Tokenizer:
    """The tokenizer that turns the job's tokens into text again.

    Raises SettingError for tokens that somebody else made, where the job does not say with which one.
    """
    for setting, source in settings.named_sources() if settings.tokenizer == BYTES else ():
        path = Path(source.path).expanduser()
        foreign = is_prepared(path) and open_folder(path).manifest.vocabulary != VOCABULARY
        if foreign or path.suffix in TOKEN_FILES:
            nearest = "data.tokenizer = the one that made them"
            raise SettingError(f'{setting} = "{source.path}"', "its tokens are not bytes", nearest)
    return open_tokenizer(settings)


def identity_of(settings: DataSettings) -> str:
    """Changes when the same text would give other tokens, whatever the tokenizer's path."""
    if settings.tokenizer == BYTES:
        return "bytes-1"
    identity = hashlib.sha256(f"tokenizer-2\n{settings.end_token}\n".encode())
    for name, content in sorted(read_files(settings.tokenizer).items()):
        identity.update(f"{name}\0{len(content)}\0".encode() + content)
    return identity.hexdigest()


def read_files(tokenizer: str) -> dict[str, bytes]:
    """tokenizer.json and what lies beside it, by their usual names."""
    given = Path(tokenizer).expanduser()
    file = given / TOKENIZER_FILE if given.is_dir() else given
    setting = f'data.tokenizer = "{tokenizer}"'
    nearest = f'data.tokenizer = "{BYTES}", or a tokenizer.json or a folder that holds one'
    if not file.exists():
        reason = f"the folder holds no {TOKENIZER_FILE}" if given.is_dir() else "no such file or folder"
        raise SettingError(setting, reason, nearest)
    try:
        beside = [file.with_name(name) for name in (CONFIG_FILE, TEMPLATE_FILE)]
        return {TOKENIZER_FILE: file.read_bytes()} | {p.name: p.read_bytes() for p in beside if p.exists()}
    except OSError as error:
        raise SettingError(setting, f"cannot be read ({error.strerror})", nearest) from None


def read_config(setting: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none."""
    try:
        return msgspec.json.decode(files.get(CONFIG_FILE, b"{}"), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise SettingError(setting, f"its {CONFIG_FILE} is damaged ({error})", "the file as it was published") from None


def find_end(settings: DataSettings, inner: tokenizers.Tokenizer, config: Mapping[str, Any]) -> int:
    """The token that ends a document: as the job says, as tokenizer_config.json says, or by a usual name."""
    if settings.end_token:
        end = inner.token_to_id(settings.end_token)
        if end is None:
            added = [token.content for token in inner.get_added_tokens_decoder().values()]
            nearest = nearest_choice("data.end_token", settings.end_token, added) if added else "a token that it has"
            raise SettingError(f'data.end_token = "{settings.end_token}"', "the tokenizer has no such token", nearest)
        return end
    for name in (text_of(config.get("eos_token")), *USUAL_ENDS):
        end = inner.token_to_id(name) if name else None
        if end is not None:
            return end
    reason = f'data.tokenizer = "{settings.tokenizer}" names no token that ends a document'
    raise SettingError('data.end_token = ""', reason, 'data.end_token = "</s>", or another token that it has')


def text_of(token: object) -> str:
    """A special token's text in tokenizer_config.json: a string, or a table that holds it."""
    if isinstance(token, dict):
        token = cast(dict[str, object], token).get("content")
    return token if isinstance(token, str) else ""


def named_template(template: object) -> str:
    """The chat template of tokenizer_config.json: a string, or the one called default of several."""
    if isinstance(template, list):
        rows = [cast(dict[str, object], row) for row in cast(list[object], template) if isinstance(row, dict)]
        template = next((row.get("template") for row in rows if row.get("name") == "default"), "")
    return template if isinstance(template, str) else ""
