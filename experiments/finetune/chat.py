"""Converts conversations to tokens with a model's chat template, and marks the tokens to train on.

The `tokenizers` library tokenises, and Jinja renders the template, in a separate process with the
settings of transformers. The tokens are those of its `apply_chat_template`, except that templates
get a fixed date.
"""

import functools
import itertools
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

from experiments.finetune import template
from experiments.finetune.marks import MARK, Encoded, Text, join, unmark
from experiments.finetune.template import BEGIN, CUT, END, SETTINGS, TEMPLATE
from experiments.language import tokenizer
from experiments.runs import read_json, write_json, write_text

TOKENIZER = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
_OTHERS = "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"
_THOUGHTS = "reasoning_content", "thinking"
_KEYS = ("role", "content", "name", *_THOUGHTS, "tool_calls", "tool_call_id")
_PREDECESSORS: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "developer": (None,),
    "user": (None, "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_OTHER = "?"
_CALL = {"type": "function", "function": {"name": _OTHER, "arguments": {}}}
_LEFT_OUT = (
    "{} missing from the text that the chat template makes of the conversation; remove {}, or "
    "use a template that shows everything"
)


class Markers(NamedTuple):
    """What a template writes before and after an assistant's turn. The end is trained on, too."""

    begin: str
    end: str


CHATML = Markers("<|im_start|>assistant\n", "<|im_end|>")
_HEADER = "<|start_header_id|>"
LLAMA3 = Markers(f"{_HEADER}assistant<|end_header_id|>\n\n", "<|eot_id|>")


class Chat:
    """The tokenizer and chat template of a Hugging Face folder.

    Only the template can produce special tokens. If content spells one, or a marker, the text is
    cut after the first character of it, so that the model reads it as plain text and no turn begins
    or ends there. Tokens that are not special, such as Qwen3's `<think>`, are allowed in content.

    Args:
        folder: The folder, with `tokenizer.json`, `tokenizer_config.json`, and the template in the
            latter or in `chat_template.jinja`. The assistant's turns are its `{% generation %}`
            blocks; without these, Llama 3's markers if it writes their header, or else ChatML's.

    Attributes:
        vocabulary: The vocabulary size; all ids are less.

    Raises:
        ValueError: If a file is damaged or contradicts another one, or there is no template.
        OSError: If a file cannot be read.
    """

    def __init__(self, folder: Path):
        for name in (TOKENIZER, SETTINGS):
            if not (folder / name).exists():
                raise FileNotFoundError(
                    f"{folder / name} does not exist; download it, or write it with "
                    "transformers: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)."
                )
        self._folder = folder
        path = folder / TOKENIZER
        self._tokenizer = tokenizer.read(path.read_bytes(), str(path))
        # Tokens that begin every text, such as Llama's <|begin_of_text|>.
        example = self._tokenizer.encode("a")
        added = zip(example.tokens, example.special_tokens_mask, strict=True)
        opening = "".join(token for token, _ in itertools.takewhile(lambda pair: pair[1], added))
        self._opening = opening and opening + CUT
        self._tokenizer.post_processor = None  # since Llama's trims the tokens' offsets
        self.vocabulary = 1 + max(self._tokenizer.get_vocab().values())
        settings = read_json(folder / SETTINGS)
        self._names = {
            name: self._content(name, value)
            for name, value in settings.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        self._check_tokens(settings.get("added_tokens_decoder") or {})
        self._template, source = template.read(folder, settings)
        self._has_blocks = template.BLOCK.search(source) is not None
        self._markers = LLAMA3 if _HEADER in source else CHATML
        begin, end = map(re.escape, self._markers)
        self._turn = re.compile(f"({begin})(.*?{end})", re.DOTALL)
        added = self._tokenizer.get_added_tokens_decoder().values()
        reserved = {token.content for token in added if token.special}
        reserved |= set() if self._has_blocks else {*self._markers}
        if single := [text for text in reserved if len(text) < 2]:
            raise ValueError(
                "Special tokens and markers must have at least two characters, or they could "
                f"not be distinguished from content; got {single[0]!r}."
            )
        self._reserved = re.compile(
            f"(?={'|'.join(map(re.escape, sorted(reserved))) or '(?!)'})(.)", re.DOTALL
        )

    def _content(self, name: str, token: Any) -> str:
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str) or not content:
            raise ValueError(
                f"{self._folder / SETTINGS}: {name} is {short(token)}, but a token must be a "
                "non-empty text; download the file again, or remove that token."
            )
        return content

    def _check_tokens(self, added: Any) -> None:
        """Checks that the tokenizer has the tokens that the settings name."""
        path = self._folder / SETTINGS
        if not isinstance(added, dict):
            raise ValueError(
                f"{path}: added_tokens_decoder is {short(added)}, but must be an object."
            )
        for index, token in added.items():
            content = self._content(f"added token {index}", token)
            if str(self._tokenizer.token_to_id(content)) != index:
                raise ValueError(
                    f"{path} has the token {content!r} as {index}, but {TOKENIZER} does not; save "
                    "both again with transformers."
                )
        end = self._names.get("eos_token")
        if end is not None and self._tokenizer.token_to_id(end) is None:
            raise ValueError(
                f"{path}: the eos_token is {end!r}, which is not a token of {TOKENIZER} and "
                "would be trained on as plain text. Name one of its tokens."
            )

    def conversation(
        self, messages: Sequence[Any], tools: Sequence[Any] | None = None, given: int = 0
    ) -> Text:
        """Renders a conversation, to train on every turn of the assistant.

        Args:
            messages: Objects with a "role", a "content", and further keys of the template.
            tools: JSON schemas of tools, for templates that show them.
            given: The number of first messages that are a prompt, which is not trained on.

        Raises:
            ValueError: If a message is malformed, a role is out of order, the template rejects the
                messages or omits a message, a call or the tools, or the assistant's turns cannot be
                found in the rendered text.
        """
        roles = _check(messages)
        escaped, tools = self._escape(messages), self._escape(tools)
        rendered = self._render(escaped, tools)
        dropped = self._dropped(escaped, tools, rendered)
        where = "{% generation %} blocks"
        if not self._has_blocks:
            rendered = rendered.replace(BEGIN, "").replace(END, "")
            rendered = self._turn.sub(rf"\1{BEGIN}\2{END}", rendered)
            where = " … ".join(map(repr, self._markers))
        text, turns = unmark(rendered), roles.count("assistant")
        if len(text.learnt) != turns:
            raise ValueError(
                f"the assistant has {turns} turns, but the chat template shows {len(text.learnt)} "
                f"turns between {where}; put {{% generation %}} … {{% endgeneration %}} around "
                f"each of the assistant's turns in {self._folder / TEMPLATE}, which takes "
                f"precedence over the template in {SETTINGS}"
            )
        learnt = text.learnt[roles[:given].count("assistant") :]
        return text._replace(learnt=learnt, dropped=dropped)

    def completion(self, prompt: str, completion: str) -> Text:
        """Joins a prompt, a completion to train on and an end-of-turn token, without a template.

        Prompt and completion are tokenised separately, as when the model completes the prompt, and
        follow the tokens that begin every text.

        Raises:
            ValueError: If one of them is not a text, or the tokenizer has no `eos_token`.
        """
        end = self._names.get("eos_token")
        if end is None:
            raise ValueError(f"{SETTINGS} must have an eos_token to end completions; use messages")
        parts = {"prompt": prompt, "completion": completion}
        for name, part in parts.items():
            if not isinstance(part, str) or not part.strip():
                raise ValueError(f'its "{name}" must be a non-blank text; got {short(part)}')
        prompt, completion = map(self._escape, parts.values())
        text = unmark(f"{self._opening}{prompt}{CUT}{BEGIN}{completion}{CUT}{end}{END}")
        return text._replace(escaped=CUT in prompt + completion)

    def question(self, messages: Sequence[Any]) -> list[int]:
        """Returns the tokens of a conversation, up to where the assistant is to speak.

        Raises:
            ValueError: If the template rejects the messages, or they are no valid text.
        """
        rendered = self._render(self._escape(messages), None, answer=True)
        return self._tokens(rendered.replace(BEGIN, "").replace(END, ""))

    def prompt(self, text: str) -> list[int]:
        """Returns the tokens of a text to continue, as `completion` has those of a prompt."""
        return self._tokens(self._opening + self._escape(text))

    def _tokens(self, marked: str) -> list[int]:
        (encoded,) = self.encode([unmark(marked)])
        return encoded.tokens.tolist()

    def answer(self, tokens: Sequence[int], ends: Collection[int]) -> str:
        """Returns the text of tokens up to one of `ends` or the tokenizer's own end of a turn."""
        names = (self._names.get("eos_token"), self._markers.end.strip())
        known = {*ends, *(self._tokenizer.token_to_id(name) for name in names if name)}
        kept = itertools.takewhile(lambda token: token not in known, tokens)
        return self._tokenizer.decode(list(kept), skip_special_tokens=True)

    def encode(self, texts: Iterable[Text]) -> list[Encoded]:
        """Tokenises texts. A token is trained on if one of its characters is."""
        texts = list(texts)
        encodings = iter(
            self._tokenizer.encode_batch(
                [piece for text in texts for piece in text.pieces], add_special_tokens=False
            )
        )
        return [join(text, [next(encodings) for _ in text.pieces]) for text in texts]

    def _render(self, messages: Sequence[Any], tools: Any, answer: bool = False) -> str:
        values = {"messages": messages, "tools": tools, "documents": None}
        try:
            return self._template.render(**values, add_generation_prompt=answer, **self._names)
        except ValueError as error:
            raise ValueError(f"the chat template rejects it: {error}") from None

    def _dropped(self, messages: list[Any], tools: Any, rendered: str) -> int:
        """Counts omitted thoughts, and remarks beside tool calls; refuses other omissions."""
        if tools and self._same(messages, [{"name": _OTHER}], rendered):
            raise ValueError(_LEFT_OUT.format("its tools are", "them"))
        dropped = 0
        for number, message in enumerate(messages, 1):
            name = f"message {number}, of the {message['role']},"
            other = functools.partial(self._is_dropped, messages, number - 1, tools, rendered)
            calls = message.get("tool_calls")
            if calls and other("tool_calls", [_CALL]):
                raise ValueError(_LEFT_OUT.format(f"the tool_calls of {name} are", "them"))
            # Templates may trim or quote content. So, where the rendered text does not contain it,
            # the test is whether other content changes the rendered text.
            content = (message["content"] or "").strip()
            thought = _THOUGHT.match(content)
            if thought and thought[1].strip() not in rendered:
                changed = f"<think>\n{_OTHER}\n</think>\n\n{thought[2]}"
                dropped += other("content", changed)
                content = thought[2].strip()
            if content not in rendered and other("content", _OTHER):
                if not calls:
                    raise ValueError(_LEFT_OUT.format(f"{name} is", "it"))
                dropped += 1
            for key in _THOUGHTS:
                words = message.get(key)
                if isinstance(words, str) and words.strip() and words.strip() not in rendered:
                    dropped += other(key, _OTHER)
        return dropped

    def _is_dropped(
        self, messages: list[Any], index: int, tools: Any, rendered: str, key: str, value: Any
    ) -> bool:
        changed = messages[index] | {key: value}
        return self._same([*messages[:index], changed, *messages[index + 1 :]], tools, rendered)

    def _same(self, messages: list[Any], tools: Any, rendered: str) -> bool:
        try:
            return self._render(messages, tools) == rendered
        except ValueError:  # the template depends on the changed value
            return False

    def _escape(self, value: Any) -> Any:
        match value:
            case str():
                if MARK.search(value):
                    raise ValueError(
                        "texts must not contain the noncharacters U+FDD0, U+FDD1 and U+FDD2"
                    )
                try:
                    value.encode()  # JSON can contain half a surrogate pair
                except UnicodeEncodeError:
                    raise ValueError(f"it contains invalid Unicode: {short(value)}") from None
                return self._reserved.sub(rf"\1{CUT}", value)
            case dict():
                return {self._escape(key): self._escape(item) for key, item in value.items()}
            case list() | tuple():
                return [self._escape(item) for item in value]
        return value


def write_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int) -> None:
    """Trains a byte-level BPE with ChatML's tokens and template, in the format of transformers.

    Args:
        folder: The folder to write to. It is made if it is missing.
        texts: The texts to train on.
        vocabulary: Maximum number of tokens, including the special tokens: `END_OF_TEXT`, with id
            0, and ChatML's two markers, with the last ids.

    Raises:
        ValueError: If `vocabulary` is too small for all bytes and the special tokens.
    """
    source = tokenizer.train(texts, vocabulary - 2, END_OF_TEXT)
    bpe = tokenizer.read(source, TOKENIZER)
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / TOKENIZER, bpe.to_str())
    write_text(folder / TEMPLATE, template.CHATML)
    settings = {"eos_token": CHATML.end, "pad_token": END_OF_TEXT}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / SETTINGS, settings)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer's files to a model's folder."""
    for name in (TOKENIZER, SETTINGS, TEMPLATE, *_OTHERS):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _check(messages: Sequence[Any]) -> list[str]:
    """Checks that messages are well-formed and in order, and returns their roles."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"messages must be a non-empty list; got {short(messages)}")
    roles: list[str] = []
    for number, message in enumerate(messages, 1):
        name = f"message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(
                f'{name} must be an object with a "role" and a "content"; got {short(message)}'
            )
        if unknown := message.keys() - set(_KEYS):
            raise ValueError(f"{name} has {min(unknown)!r}, but may only have {', '.join(_KEYS)}")
        role, content, before = message["role"], message["content"], roles[-1] if roles else None
        if not isinstance(role, str) or role not in _PREDECESSORS:
            raise ValueError(
                f"the role of {name} must be one of {', '.join(_PREDECESSORS)}; got {short(role)}"
            )
        if before not in _PREDECESSORS[role]:
            raise ValueError(
                f"{name}, of the {role}, must not follow {before or 'nothing'}; after an optional "
                "system message, user and assistant take turns, with tools between two of the "
                "assistant's messages"
            )
        if not (content is None and role == "assistant" and message.get("tool_calls")):
            if not isinstance(content, str):
                raise ValueError(f"the content of {name} must be a text; got {short(content)}")
            if role in ("user", "assistant") and not (content.strip() or message.get("tool_calls")):
                raise ValueError(f"{name}, with the role {role}, must not be empty")
        roles.append(role)
    if roles[-1] != "assistant":
        raise ValueError(f"the last message must have the role assistant; got {roles[-1]}")
    return roles
