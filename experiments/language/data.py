"""The training text as tokens: documents, tokenised once and cached, or tokenised shards."""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from etils import epath

from experiments import cache
from experiments.json_files import digest
from experiments.language import documents, shards, tokenizer
from experiments.settings import Count, Positive

_FORMAT = 2  # of the cache; another one makes all texts be tokenised again
_SAMPLE = 1 << 27  # characters that a tokenizer is trained on at most
_PIECE = 1 << 20  # characters of a document that are tokenised at once at most
_BATCH = 1 << 22  # characters of a batch of pieces, which threads share out
_TOKENIZER = "tokenizer.json"
_SIDES = "train.bin", "validation.bin"
_HELD_OUT = {"val", "valid", "validation", "test"}  # words of the names of shards

# Takes a description, the amount done, and the total amount. It may raise to stop the work.
OnProgress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Data:
    """Settings of the text and its tokenisation."""

    files: tuple[str, ...] = ()
    """Globs of text or token files, local or in gs:// or s3://. Text files: .txt (one document
    each), .jsonl, .jsonl.gz or .parquet (one document in each "text" field). Token files: .npy
    (uint16 or uint32) or .bin (uint16). A token file whose name contains the word val, valid,
    validation or test is held out; without such a file, the end of the last one is. By default,
    the source of Python's standard library."""
    mixture: tuple[tuple[str, Positive, str], ...] = ()
    """Sources in place of --data.files, each a NAME, a WEIGHT and a quoted GLOB, such as code 3
    "a/*.py" prose 1 "b/*.txt". Of all sequences a source has its weight's share, in an order and
    in epochs of its own. Each has its held-out text and loss; the loss of all is their mean by
    weight. One tokenizer serves all."""
    tokenizer: str | None = None
    """Path of a tokenizer.json, or of a Hugging Face folder with one, whose eos_token and size are
    then the defaults of the next two. By default a byte-level BPE is trained on the text."""
    vocabulary: Count = 2048
    """Vocabulary size of the tokenizer to train, or of the token files in --data.files."""
    end_of_text: str = "<|endoftext|>"
    """The special token that ends a document."""
    cache: Path | None = None
    """Folder that caches tokens. By default muon_jax/pretrain in $XDG_CACHE_HOME or ~/.cache."""

    def __post_init__(self) -> None:
        if self.mixture and self.files:
            raise ValueError("--data.mixture excludes --data.files; remove one of them.")
        names = [name for name, _, _ in self.mixture]
        if again := {name for name in names if names.count(name) > 1}:
            raise ValueError(
                f"--data.mixture requires another NAME for each source; got {min(again)} twice."
            )

    def folder(self) -> Path:
        """Returns the folder of the token cache."""
        return self.cache or cache.home("pretrain")


class Tokens(NamedTuple):
    """A tokenised text.

    Attributes:
        name: The name of the source.
        train: Memory-mapped shards to train on, each `(tokens,)` uint16 or uint32.
        validation: Held-out shards.
        vocabulary: The vocabulary size; all tokens are less.
        bytes_per_token: `(vocabulary,)` int32, 0 for special tokens. None if the bytes of the text
            do not follow exactly from its tokens.
        tokenizer: The tokenizer; None for shards without one.
        end_of_text: The token that ends a document; None without a tokenizer.
        sha256: The digest of all tokens and of `bytes_per_token`.
        parts: of a mixture: each source's name, weight and tokens; the shards above are of all.
    """

    name: str
    train: tuple[np.ndarray, ...]
    validation: tuple[np.ndarray, ...]
    vocabulary: int
    bytes_per_token: np.ndarray | None
    tokenizer: tokenizers.Tokenizer | None
    end_of_text: int | None
    sha256: str
    parts: tuple[tuple[str, float, "Tokens"], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Returns the record that a run stores."""
        sources = {name: {"weight": w} | tokens.as_json() for name, w, tokens in self.parts}
        return ({"sources": sources} if sources else {}) | {
            "name": self.name,
            "train_tokens": sum(map(len, self.train)),
            "validation_tokens": sum(map(len, self.validation)),
            "vocabulary": self.vocabulary,
            "sha256": self.sha256,
        }


def fitted(default: Data, path: str, sized: bool) -> Data:
    """Returns default settings with the end of text of a Hugging Face folder's tokenizer.

    They also have the size of its vocabulary if `sized`. A `tokenizer.json` changes nothing.

    Raises:
        ValueError, OSError: As for `tokenizer.facts_of`.
    """
    folder = epath.Path(path).expanduser()
    if not folder.is_dir():
        return default
    end, size = tokenizer.facts_of(folder)
    return dataclasses.replace(
        default,
        end_of_text=end or default.end_of_text,
        vocabulary=size if sized else default.vocabulary,
    )


def prepare(config: Data, on_progress: OnProgress = lambda what, done, total: None) -> Tokens:
    """Returns the configured text as tokens, from the cache if they are in it.

    One process of each host does the work, and the others wait. A kill leaves no incomplete cache.

    Raises:
        ValueError: If files are missing, damaged or of unknown types, or nothing is left to train
            on or to hold out.
        OSError: If files cannot be read, or the cache cannot be written.
    """
    given = tokenizer.file_of(config.tokenizer).read_bytes() if config.tokenizer else None
    make = _mixed if config.mixture else _prepared
    return make(config, given, on_progress)


def _prepared(config: Data, given: bytes | None, on_progress: OnProgress) -> Tokens:
    files, tokenised = _files(config.files)
    make = _from_shards if tokenised else _from_texts
    return make(config, files, given, on_progress)


def _files(globs: tuple[str, ...]) -> tuple[tuple[epath.Path, ...], bool]:
    """Returns the files that match globs, and whether they contain tokens."""
    files = documents.matching(globs, documents.SUFFIXES + shards.SUFFIXES)
    tokenised = sum(file.name.endswith(shards.SUFFIXES) for file in files)
    if 0 < tokenised < len(files):
        raise ValueError("--data.files has both text and token files; give files of one kind.")
    return files, bool(tokenised)


def _mixed(config: Data, given: bytes | None, on_progress: OnProgress) -> Tokens:
    sources = [_files((glob,)) for _, _, glob in config.mixture]
    if given is None and any(tokenised for _, tokenised in sources):
        if not all(tokenised for _, tokenised in sources):
            raise ValueError(
                "--data.mixture has both text and token files; give the --data.tokenizer of the "
                "tokens, or files of one kind."
            )
    elif given is None:
        given = _tokenizer_of([files for files, _ in sources], config, on_progress)
    parts = []
    for name, weight, glob in config.mixture:
        own = dataclasses.replace(config, mixture=(), files=(glob,))
        parts.append((name, weight, _prepared(own, given, on_progress)))
    every = [tokens for _, _, tokens in parts]
    exact = all(tokens.bytes_per_token is not None for tokens in every)
    return every[0]._replace(
        name=", ".join(f"{weight:g} {name}" for name, weight, _ in parts),
        train=sum((tokens.train for tokens in every), ()),
        validation=sum((tokens.validation for tokens in every), ()),
        bytes_per_token=every[0].bytes_per_token if exact else None,
        sha256=digest([[name, weight, tokens.sha256] for name, weight, tokens in parts]),
        parts=tuple(parts),
    )


def _tokenizer_of(
    sources: list[tuple[epath.Path, ...]], config: Data, on_progress: OnProgress
) -> bytes:
    """Returns the cached tokenizer of several sources, trained on as much text of each."""
    settings = [[documents.fingerprint(file) for file in files] for files in sources]
    settings = [_FORMAT, "tokenizer", settings, config.vocabulary, config.end_of_text]
    folder = config.folder() / digest(settings)[:16]

    def write(partial: Path) -> dict[str, Any]:
        on_progress("training a tokenizer", 0, 1)
        samples = (documents.from_files(files).sample(_SAMPLE // len(sources)) for files in sources)
        texts = itertools.chain.from_iterable(samples)
        source = tokenizer.train(texts, config.vocabulary, config.end_of_text)
        (partial / _TOKENIZER).write_bytes(source)
        return {}

    with cache.alone(folder, lambda: on_progress("waiting for another process", 0, 1)):
        if cache.read(folder) is None:
            cache.make(folder, write)
        return (folder / _TOKENIZER).read_bytes()


def _from_texts(
    config: Data, files: tuple[epath.Path, ...], given: bytes | None, on_progress: OnProgress
) -> Tokens:
    library = None if files else documents.standard_library()
    sources = [documents.fingerprint(file) for file in (library.files if library else files)]
    least = config.vocabulary if given is None else 0
    settings = [least, given and given.decode(errors="replace"), config.end_of_text]
    folder = config.folder() / digest([_FORMAT, sources, settings])[:16]

    def load(source: bytes) -> tokenizer.Vocabulary:
        return tokenizer.load(source, config.tokenizer or _TOKENIZER, config.end_of_text, least)

    def write(partial: Path) -> dict[str, Any]:
        texts = library or documents.from_files(files)
        source = given
        if source is None:
            on_progress("training a tokenizer", 0, 1)
            source = tokenizer.train(texts.sample(_SAMPLE), least, config.end_of_text)
        vocabulary = load(source)
        (partial / _TOKENIZER).write_bytes(source)
        return _tokenise(texts, vocabulary, partial, on_progress)

    with cache.alone(folder, lambda: on_progress("waiting for another process", 0, 1)):
        meta = cache.read(folder)
        if meta is None:
            if folder.exists():
                on_progress("tokenizing damaged files again", 0, 1)
            meta = cache.make(folder, write)
        vocabulary = load((folder / _TOKENIZER).read_bytes())
        sides = [(np.memmap(folder / side, meta["dtype"], "r"),) for side in _SIDES]
    if not meta["exact"]:
        vocabulary = vocabulary._replace(bytes_per_token=None)
    return _tokens(config, sides, vocabulary, [[meta["files"][side]] for side in _SIDES])


class _Piece(NamedTuple):
    """A part of a document that is tokenised separately."""

    text: str
    held_out: bool
    is_last: bool


def _tokenise(
    texts: documents.Documents,
    vocabulary: tokenizer.Vocabulary,
    folder: Path,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Writes the training and held-out tokens; returns their dtype and if their bytes are known."""
    dtype = np.dtype("<u2" if vocabulary.size <= 1 << 16 else "<u4")
    end = np.array(vocabulary.end_of_text, dtype).tobytes()
    exact = vocabulary.bytes_per_token is not None
    with contextlib.ExitStack() as files:
        train, validation = (files.enter_context(open(folder / side, "wb")) for side in _SIDES)
        for batch in _batches(_pieces(texts, on_progress)):
            encodings = vocabulary.tokenizer.encode_batch_fast(
                [piece.text for piece in batch], add_special_tokens=False
            )
            for piece, encoding in zip(batch, encodings, strict=True):
                tokens = np.array(encoding.ids, dtype)
                if exact:
                    counted = vocabulary.bytes_per_token[tokens].sum()
                    exact = bool(counted == len(piece.text.encode()))
                side = validation if piece.held_out else train
                side.write(tokens.tobytes())
                if piece.is_last:
                    side.write(end)
        for side in (train, validation):
            if not side.tell():
                raise ValueError(
                    "--data.files has too little text: nothing is left to "
                    f"{'train on' if side is train else 'hold out'}. Give more text."
                )
    return {"dtype": dtype.str, "exact": exact}


def _pieces(texts: documents.Documents, on_progress: OnProgress) -> Iterator[_Piece]:
    for done, file in enumerate(texts.files):
        for text, held_out in texts.of(file):
            on_progress("tokenising", done, len(texts.files))
            start = 0
            while start < len(text):
                stop = min(start + _PIECE, len(text))
                if stop < len(text):
                    stop = text.rfind("\n", start, stop) + 1 or stop
                yield _Piece(text[start:stop], held_out, stop == len(text))
                start = stop


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _from_shards(
    config: Data, files: tuple[epath.Path, ...], given: bytes | None, on_progress: OnProgress
) -> Tokens:
    vocabulary = tokenizer.Vocabulary(None, config.vocabulary, None, None)
    if given is not None:
        vocabulary = tokenizer.load(given, config.tokenizer, config.end_of_text)
    names = [[file for file in files if _is_held_out(file) is side] for side in (False, True)]
    if not names[0]:
        raise ValueError(
            f"--data.files has only held-out files, such as {files[0].name}; give others to train "
            f"on. Files are held out if {', '.join(sorted(_HELD_OUT))} is a word of their name."
        )
    tokens = {}
    for done, file in enumerate(files):
        on_progress("fetching shards", done, len(files))
        where = shards.fetch(
            file,
            config.folder() / "shards",
            lambda: on_progress("waiting for another process", 0, 1),
        )
        tokens[file] = shards.load(where)
    digests = {}
    with ThreadPoolExecutor() as threads:
        checked = threads.map(lambda file: shards.check(tokens[file], vocabulary.size, file), files)
        for file, sha256 in zip(files, checked, strict=True):
            on_progress("checking shards", len(digests), len(files))
            digests[file] = sha256
    train, validation = ([tokens[file] for file in side] for side in names)
    if not validation:
        last = train.pop()
        cut = len(last) - max(len(last) // documents.HELD_OUT_SHARE, 1)
        train, validation = [*train, last[:cut]], [last[cut:]]
    digests = [[digests[file] for file in side] for side in names]
    return _tokens(config, (train, validation), vocabulary, digests)


def _is_held_out(shard: epath.Path) -> bool:
    """Returns if a word of a name marks it held out: "fineweb_val_0.bin", not "interval_0.bin"."""
    return not _HELD_OUT.isdisjoint(re.findall("[a-z]+", shard.name.lower()))


def _tokens(
    config: Data,
    sides: Iterable[Iterable[np.ndarray]],
    vocabulary: tokenizer.Vocabulary,
    digests: list[list[str]],
) -> Tokens:
    bpe, size, end_of_text, table = vocabulary
    name, *more = config.files or (documents.library_name(),)
    return Tokens(
        f"{name} and {len(more)} more" if more else name,
        *map(tuple, sides),
        vocabulary=size,
        bytes_per_token=table,
        tokenizer=bpe,
        end_of_text=end_of_text,
        sha256=digest([digests, size, None if table is None else table.tolist()]),
    )
