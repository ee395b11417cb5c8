"""Turn text into token ids and back, over the `tokenizers` library."""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers

from sailfish.base.errors import CheckpointError, ContextTooLong, RequestError
from sailfish.checkpoint.files import DOWNLOAD_AGAIN, read_bytes, read_json, shown
from sailfish.checkpoint.hf_config import MAX_VOCAB

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
MAX_TOKENIZER_BYTES = 256 << 20
_SCAN_CHARS = 1 << 16
_SCAN_SLACK_TOKENS = 64
_LIKELY_BYTES_PER_TOKEN = 8
_MAX_PENDING_TOKENS = 32
_TRIAL = "a \u00e9\u65e5\U0001f389"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TextStream(Protocol):
    """Decodes one answer token by token."""

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is now certain (often empty inside a character)."""

    def flush(self) -> str:
        """Return what is left at the end; an incomplete character becomes U+FFFD."""


class Tokenizer:
    """A checkpoint's tokenizer. Safe to share between threads."""

    def __init__(self, backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> None:
        """Wrap `backend`; `special` maps bos_token, eos_token ... to their texts."""
        self._backend = backend
        # The switch that makes special tokens plain text is state of a backend, hence a second one.
        self._plain = tokenizers.Tokenizer.from_str(backend.to_str())
        self._plain.encode_special_tokens = True
        vocab = backend.get_vocab(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._longest_bytes = max((len(text.encode()) for text in vocab), default=1)
        self._decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
        self._bytes: dict[int, bytes] = {}
        self.vocab_size = max(vocab.values(), default=-1) + 1
        """One more than the largest id; a model's vocabulary may be padded beyond it."""
        self.bos_token = special.get("bos_token")
        self.eos_token = special.get("eos_token")
        self.special_tokens = frozenset(added[token_id].content for token_id in self._special_ids)
        """Texts of the control tokens."""
        first = backend.encode("a", add_special_tokens=True).ids[:1]
        self.adds_bos = self.bos_token is not None and first == [vocab.get(self.bos_token)]
        """Whether `encode(..., add_special=True)` begins with the begin-of-text token."""

    @classmethod
    def load(cls, directory: Path | str) -> Tokenizer:
        """Read a directory's tokenizer.json, and the names of its control tokens.

        Like transformers, take what surrounds a text (begin, end) from tokenizer.json alone, whatever
        add_bos_token says beside it.
        """
        directory = Path(directory)
        path = directory / TOKENIZER_FILE
        if not path.exists() and not path.is_symlink():
            other = " but tokenizer.model" if (directory / "tokenizer.model").exists() else ""
            raise CheckpointError(
                f"{directory} has no {TOKENIZER_FILE}{other}",
                hint="copy it there, or make it: AutoTokenizer.from_pretrained(dir).save_pretrained(dir)",
            )
        data = read_bytes(path, MAX_TOKENIZER_BYTES)
        special = special_token_texts(directory)
        try:
            backend = tokenizers.Tokenizer.from_buffer(data)
            _check_ids(backend.get_vocab(with_added_tokens=True), path)
            backend.no_truncation()
            backend.no_padding()
            marked = {token.content for token in backend.get_added_tokens_decoder().values()}
            named = set(special.values()) - marked
            backend.add_special_tokens([text for text in named if backend.token_to_id(text) is not None])
            backend.decode(backend.encode(_TRIAL, add_special_tokens=True).ids)
            return cls(backend, special)
        except (KeyboardInterrupt, SystemExit, CheckpointError):
            raise
        except BaseException as error:  # noqa: BLE001 - on a bad file the library raises bare Exception, or panics
            raise CheckpointError(
                f"{path} is not a tokenizer: {shown(str(error))}", hint=DOWNLOAD_AGAIN
            ) from None

    def encode(
        self, text: str, *, special: bool = False, add_special: bool = True, max_tokens: int | None = None
    ) -> list[int]:
        """Return the ids of a text.

        `special`: special-token texts in it become those tokens; else they are encoded as plain text.
        `add_special`: add the begin (or end) token that this tokenizer puts around a text.
        `max_tokens`: a text that cannot fit raises ContextTooLong before it is encoded as a whole; one
        that turns out a little longer is returned, so that the caller can say by how much.
        """
        backend = self._backend if special else self._plain
        if max_tokens is not None and len(text) > max_tokens * self._longest_bytes:
            raise _too_long(len(text), max_tokens)
        try:
            n_bytes = len(text.encode())
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text is not valid Unicode: a lone surrogate at character {error.start}", param="prompt"
            ) from None
        if max_tokens is not None and n_bytes > max_tokens * _LIKELY_BYTES_PER_TOKEN:
            self._scan(backend, text, max_tokens)
        with _refusing_panics("prompt"):
            return list(backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of a sequence of ids. Ids that no token has add nothing."""
        for token_id in ids:
            if not 0 <= token_id < 2**31:
                raise RequestError(f"{token_id} is not a token id", param="tokens")
        with _refusing_panics("tokens"):
            return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """Return a decoder for one answer, token by token; the pieces add up to what `decode` returns."""
        skipped = self._special_ids if skip_special else frozenset[int]()
        return (_ByteStream if self._is_byte_level else _WindowStream)(self, skipped)

    def token_text(self, token_id: int) -> str:
        """Return one token's text; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token stands for, which may be part of a character."""
        found = self._bytes.get(token_id)
        if found is None:
            piece = self._backend.id_to_token(token_id) if 0 <= token_id < 2**31 else None
            found = self._bytes[token_id] = b"" if piece is None else self._piece_bytes(piece)
        return found

    @property
    def _is_byte_level(self) -> bool:
        return bool(self._decoder.get("type") == "ByteLevel")

    def _piece_bytes(self, piece: str) -> bytes:
        if self._is_byte_level:
            if all(char in _BYTE_OF for char in piece):
                return bytes(_BYTE_OF[char] for char in piece)
        elif match := _BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(match[1])
        elif piece not in self.special_tokens:
            piece = piece.replace("\u2581", " ")  # SentencePiece's space
        return piece.encode()

    def _scan(self, backend: tokenizers.Tokenizer, text: str, max_tokens: int) -> None:
        """Count tokens piece by piece and stop as soon as the text surely has too many."""
        n_tokens = 0
        for start in range(0, len(text), _SCAN_CHARS):
            piece = text[start : start + _SCAN_CHARS]
            # A cut can add tokens that the whole text would not have; never as many as the slack.
            with _refusing_panics("prompt"):
                n_piece = len(backend.encode(piece, add_special_tokens=False).ids)
            n_tokens += n_piece - _SCAN_SLACK_TOKENS
            if n_tokens > max_tokens:
                raise _too_long(len(text), max_tokens)


class _ByteStream:
    """For byte-level vocabularies: exact, and linear in the number of tokens whatever the model draws."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowStream:
    """For all other vocabularies: decode a short window of tokens and emit what the last one added."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._ids: list[int] = []
        self._n_emitted = 0
        """Leading ids of the window whose text is out already; they give the next ones their context."""
        self._n_chars = 0

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids, skip_special=False)
        # U+FFFD at the end may be the first bytes of a character. Past the bound it is garbage for sure.
        if text.endswith("\ufffd") and len(self._ids) - self._n_emitted < _MAX_PENDING_TOKENS:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        return self._emit(self._tokenizer.decode(self._ids, skip_special=False))

    def _emit(self, text: str) -> str:
        new = text[self._n_chars :]
        self._ids = self._ids[self._n_emitted :]
        self._n_emitted = len(self._ids)
        self._n_chars = len(self._tokenizer.decode(self._ids, skip_special=False))
        return new


def special_token_texts(directory: Path) -> dict[str, str]:
    """Return the texts of bos_token, eos_token and the like, as the directory's files name them."""
    texts: dict[str, str] = {}
    for name in (SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE):
        path = directory / name
        for key, value in (read_json(path) if path.exists() else {}).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                texts[key] = text
    return texts


def _check_ids(vocab: Mapping[str, int], path: Path) -> None:
    """Refuse what no model has; a backend is cloned in time that grows with the largest id."""
    if not vocab:
        raise CheckpointError(f"{path} holds no tokens", hint=DOWNLOAD_AGAIN)
    text, largest = max(vocab.items(), key=lambda item: item[1])
    if largest >= MAX_VOCAB:
        raise CheckpointError(
            f"{path}: token {shown(text)} has id {largest}", hint=f"give it an id below {MAX_VOCAB}"
        )


@contextlib.contextmanager
def _refusing_panics(param: str) -> Iterator[None]:
    """Make a RequestError of a Rust panic: it is no Exception, and its class cannot be imported."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - as the docstring says
        raise RequestError(
            f"the model's tokenizer fails on this: {shown(str(error))}",
            hint=f"change the {param}, or repair tokenizer.json",
            param=param,
        ) from None


def _too_long(n_chars: int, max_tokens: int) -> ContextTooLong:
    return ContextTooLong(
        f"the prompt has {n_chars} characters, which cannot fit the context of {max_tokens} tokens",
        hint="shorten it",
        param="prompt",
    )


def _byte_chars() -> Iterable[tuple[str, int]]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else the next from U+0100 on."""
    stand_in = 0x100
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            yield chr(byte), byte
        else:
            yield chr(stand_in), byte
            stand_in += 1


_BYTE_OF = dict(_byte_chars())
