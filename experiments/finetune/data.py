"""Training data of fine-tuning: a file's examples as tokens, to train on or held out."""

import hashlib
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from experiments import corpus
from experiments.finetune import instructions
from experiments.finetune.architecture import Architecture
from experiments.finetune.chat import Chat, Encoded, Text
from experiments.finetune.packing import Rows
from experiments.json_files import loads
from experiments.language import documents

SUFFIXES = ".jsonl", ".jsonl.gz", ".parquet"
_COLUMNS = {"messages", "tools", "prompt", "completion", "group"}
TEXTS = ".txt", ".jsonl", ".jsonl.gz", ".parquet"
HELD_OUT = "held_out.npy"  # windows of the text of a small model's pretraining
_CHARACTERS = 8  # of a token, at most on average
_BATCH = 1024  # number of rows to tokenise at once

OnProgress = Callable[[int], None]  # takes the number of finished rows; it may raise to stop


class Report(NamedTuple):
    """Statistics of how a file's rows were used."""

    name: str  # of the source
    rows: int
    too_long: int  # rows omitted because nothing to train on is within the context
    truncated: int  # rows truncated to the context
    escaped: int  # rows whose content spells a special token or a marker as plain text
    dropped: int  # reasoning texts, and remarks beside tool calls, that the chat template omits
    groups: int  # of rows; none is both trained on and held out
    tokens: int  # of kept rows, within the context
    learnt: int  # how many of these count in the loss
    held_out_rows: int
    held_out_learnt: int  # how many of their tokens count in the loss
    lost: int  # tokens beyond the context, over all rows
    sha256: str  # of all tokens, and of which ones are trained on
    packages: dict[str, str] | None  # packages that functions are from; None for a file
    modules: dict[str, int] | None  # number of functions of each module; None for a file
    absent: int  # default rows that the installed packages lack
    text_sha256: str | None  # of the functions' rows as text; None for a file

    def text(self, context: int) -> str:
        """Returns a sentence for the user."""
        dropped = (
            f", {self.dropped:,} reasoning texts or remarks beside a tool call dropped by the chat "
            "template"
        )
        return (
            f"{self.name}: {self.rows:,} examples, {self.tokens:,} tokens, {self.learnt:,} of them "
            f"trained on; {self.held_out_rows:,} examples held out, {self.truncated:,} truncated "
            f"to {context:,} tokens, {self.too_long:,} left out{dropped if self.dropped else ''}."
        )


class Prepared(NamedTuple):
    """Rows to train on, held-out rows, and statistics of all rows."""

    train: Rows
    held_out: Rows
    report: Report


class _Row(NamedTuple):
    text: Text
    group: str
    place: str  # file and line, for error messages


def read(
    command: Any,
    folder: Path,
    architecture: Architecture,
    on_progress: Callable[[str, int, int | None], None],
) -> Prepared:
    """Reads the rows of a command's `data`, as tokens of the model in a folder.

    Raises:
        ValueError: As for `prepare`, or if the tokenizer has tokens that the model lacks, or the
            digest of the rows is not the command's `data_sha256`.
    """
    chat = Chat(folder)
    if chat.vocabulary > architecture.vocabulary:
        raise ValueError(
            f"{folder}: the tokenizer has {chat.vocabulary} tokens, but the model "
            f"{architecture.vocabulary}. The files are of different models; download them again."
        )

    def show(rows: int) -> None:
        on_progress(f"reading rows, {rows:,}", rows, None)

    found = prepare(command.data, chat, command.context, on_progress=show)
    _check_digest(found.report, command.data_sha256)
    return found


def _check_digest(report: Report, pinned: str | None) -> None:
    known = [digest for digest in (report.text_sha256, report.sha256) if digest]
    if any(digest.startswith(pinned or "") for digest in known):
        return
    remedy = "Give the same file, --model and --context"
    if report.packages:
        versions = ", ".join(f"{name} {version}" for name, version in report.packages.items())
        remedy = (
            f"{report.absent:,} listed functions are not in the packages that are installed, and "
            "--data installed takes all of their functions; install the versions that the study's "
            f"summary.json names. Here are {versions}"
        )
    digests = " as text, and as tokens ".join(known)
    raise ValueError(
        f"--data-sha256 is {pinned}, but the digest of the examples of {report.name} is "
        f"{digests}. {remedy}; or omit --data-sha256 for a study of its own."
    )


def prepare(
    file: str | None,
    chat: Chat,
    context: int,
    *,
    on_progress: OnProgress = lambda done: None,
) -> Prepared:
    """Reads a file's rows as tokens.

    A row is an object with `messages`, or with `prompt` and `completion`, both texts or both lists
    of messages, as in trl. The assistant's turns (in the second case, those of the completion) are
    trained on. A row may name its `group`; by default this is its first user message. About one
    group in ten is held out, depending on its name, but never more than half of the rows.

    Args:
        file: A .jsonl, .jsonl.gz or .parquet file, local or in gs:// or s3://. None means the
            listed functions of the installed packages, and "installed" all of them.
        chat: The tokenizer and chat template.
        context: The maximum number of tokens of a row, at least 2; longer rows are truncated.
        on_progress: Called repeatedly with the number of finished rows.

    Raises:
        ValueError: If a row is malformed or has nothing to train on (the message has its number),
            or no rows remain to train on or to hold out.
        OSError: If the file does not exist or cannot be read.
    """
    made = None
    if file in (None, instructions.INSTALLED):
        chosen = {} if file is None else {"listed": None}
        made = instructions.prepare(lambda: on_progress(0), **chosen)
    path = located(made.path if made else file)
    name = f"functions of {len(made.rows)} installed Python modules" if made else path.name
    if made and made.absent:
        name += f" ({made.absent:,} of the {made.absent + sum(made.rows.values()):,} listed absent)"
    kept: list[tuple[str, Encoded]] = []
    groups: set[str] = set()
    done, counts = 0, Counter(too_long=0, truncated=0, escaped=0, dropped=0, lost=0)
    rows = _rows(path, chat)
    while batch := list(itertools.islice(rows, _BATCH)):
        for row, (tokens, learnt) in zip(batch, chat.encode(r.text for r in batch), strict=True):
            learnt[:1] = False  # the first token has no context to predict it from
            if not learnt.any():
                raise ValueError(f"{row.place}: it has no tokens to train on.")
            groups.add(row.group)
            beyond, fits = max(len(tokens) - context, 0), learnt[:context].any()
            counts.update(too_long=not fits, truncated=beyond > 0, lost=beyond)
            counts.update(escaped=row.text.escaped, dropped=row.text.dropped)
            if fits:
                kept.append((row.group, Encoded(tokens[:context], learnt[:context])))
        done += len(batch)
        on_progress(done)
    if not done:
        raise ValueError(f"{path} has no examples.")
    held = _held_out(group for group, _ in kept)
    divided = [[row for group, row in kept if (group in held) is side] for side in (False, True)]
    if not all(divided):
        raise ValueError(
            f"{name} has {done} examples in {len(groups)} groups. Within a context of {context} "
            f"tokens, {len(divided[0])} of these can be trained on and {len(divided[1])} held "
            "out; both must be at least 1. Give more data with different prompts or groups, or a "
            "longer --context."
        )
    train, held_out = sides = [Rows.of(side) for side in divided]
    digest = hashlib.sha256()
    for array in (array for side in sides for array in side):
        digest.update(array.data)
    report = Report(
        name=name,
        rows=done,
        **counts,
        groups=len(groups),
        tokens=sum(len(side.tokens) for side in sides),
        learnt=sum(int(side.learnt.sum()) for side in sides),
        held_out_rows=len(held_out.lengths),
        held_out_learnt=int(held_out.learnt.sum()),
        sha256=digest.hexdigest(),
        packages=made and made.packages,
        modules=made and made.rows,
        absent=made.absent if made else 0,
        text_sha256=made and made.sha256,
    )
    return Prepared(train, held_out, report)


def pretraining_text(command: Any, folder: Path) -> Rows | None:
    """Returns rows of a command's `pretraining_text`, or of the small model's held-out text.

    Raises:
        ValueError: If the file has no text, or is damaged.
        OSError: If it cannot be read.
    """
    context = command.context
    if command.pretraining_text is not None:
        file = epath.Path(command.pretraining_text).expanduser()
        if not file.name.endswith(TEXTS) or not file.exists():
            raise ValueError(
                f"--pretraining-text must be a file that ends in one of {', '.join(TEXTS)}; got "
                f"{file}."
            )
        chat, most = Chat(folder), command.evaluation_tokens * _CHARACTERS
        texts = (chat.prompt(text) for text in documents.from_files((file,)).sample(most))
        windows = (np.array(text[:context], np.int32) for text in texts if len(text) > 1)
    elif (path := folder / HELD_OUT).exists():
        windows = iter(np.load(path)[:, :context])
    else:
        return None
    return Rows.of([(window, np.arange(len(window)) > 0) for window in windows])


def located(file: Any) -> epath.Path:
    """Returns a file's path, after checking that its first row can be read.

    Raises:
        ValueError: If the suffix is not supported, or the first row is not an object.
        OSError: If the file does not exist or cannot be read.
    """
    path = epath.Path(file).expanduser()
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}.")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the path of a file with examples.")
    for place, row in itertools.islice(_values(path), 1):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: an example must be an object; got {type(row).__name__}.")
    return path


def _rows(path: epath.Path, chat: Chat) -> Iterator[_Row]:
    for place, value in _values(path):
        try:
            text, group = _text(value, chat)
        except ValueError as error:
            raise ValueError(f"{place}: {error}.") from None
        yield _Row(text, group, place)


def _values(path: epath.Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".parquet":
        for number, row in enumerate(documents.table(path, _COLUMNS), 1):
            yield f"{path}, row {number}", _as_written(row)
        return
    for number, line in documents.lines(path):
        try:
            yield f"{path}:{number}", loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: invalid JSON: {error}.") from None


def _as_written(row: dict[str, Any]) -> dict[str, Any]:
    """Removes the nulls that a table adds to objects, except as the content of messages."""
    row = {name: _without_nulls(value) for name, value in row.items()}
    for value in row.values():
        for message in value if isinstance(value, list) else ():
            if isinstance(message, dict) and "role" in message:
                message.setdefault("content", None)
    return row


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


def _text(row: Any, chat: Chat) -> tuple[Text, str]:
    if not isinstance(row, dict):
        raise ValueError(f"an example must be an object; got {type(row).__name__}")
    given = row
    row = {key: value for key, value in given.items() if key in _COLUMNS and value is not None}
    group, tools = row.pop("group", None), row.pop("tools", None)
    if not isinstance(group, str | None):
        raise ValueError(f'its "group" must be a text; got {group!r}')
    if not (tools is None or (isinstance(tools, list) and "prompt" not in row)):
        raise ValueError('its "tools" must be a list, beside "messages"')
    if row.keys() == {"messages"}:
        messages = row["messages"]
        text = chat.conversation(messages, tools)
    elif row.keys() != {"prompt", "completion"}:
        keys = ", ".join(f"{key!r}{' (null)' * (given[key] is None)}" for key in sorted(given))
        raise ValueError(
            'an example must have "messages", or "prompt" and "completion", none of them null; '
            f"this has {keys or 'no keys'}; convert it to one of these"
        )
    else:
        prompt, completion = row["prompt"], row["completion"]
        if not isinstance(prompt, list) or not isinstance(completion, list):
            return chat.completion(prompt, completion), group or prompt
        if not prompt or not completion:
            raise ValueError('its "prompt" or its "completion" is empty')
        messages = prompt + completion
        text = chat.conversation(messages, given=len(prompt))
    asked = (message["content"] for message in messages if message["role"] == "user")
    return text, group or next(asked)


def _held_out(groups: Iterable[str]) -> set[str]:
    """Returns the groups to hold out: about one in ten, at least one, at most half of the rows."""
    rows, held = Counter(groups), set()
    room = rows.total() // 2

    def order(group: str) -> tuple[bool, int, str]:
        number = zlib.crc32(group.encode(errors="replace"))
        return number % corpus.VALIDATION_SHARE > 0, number, group

    for group in sorted(rows, key=order):
        if held and order(group)[0]:
            break
        if rows[group] <= room:
            held.add(group)
            room -= rows[group]
    return held
