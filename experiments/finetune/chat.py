"""Conversations as tokens: a model's tokenizer and chat template, and which tokens are learnt.

The tokenizer is that of the `tokenizers` library, and the template is rendered by Jinja, in a
process of its own, with the settings of transformers: the tokens are those of its
`apply_chat_template`, but that a template is told a fixed day.
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
    """What a template writes before and after an assistant's words; the latter is learnt, too."""

    begin: str
    end: str


CHATML = Markers("<|im_start|>assistant\n", "<|im_end|>")
_HEADER = "<|start_header_id|>"
LLAMA3 = Markers(f"{_HEADER}assistant<|end_header_id|>\n\n", "<|eot_id|>")


class Chat:
    """The tokenizer and the chat template of a Hugging Face folder.

    Special tokens are the template's alone. Where content spells one, or a marker, the text is cut
    after its first character, so that the model reads it as plain text and no turn begins or ends
    there. Tokens that are not special, as Qwen3's `<think>`, are tokens in content, too.

    Args:
        folder: has `tokenizer.json`, `tokenizer_config.json`, and the template in the latter or in
            `chat_template.jinja`.
        markers: of an assistant's turn; by default the template's `{% generation %}` blocks. Where
            it has none they are Llama 3's, if it writes headers of turns, or else ChatML's.

    Attributes:
        vocabulary: all ids are less than it.

    Raises:
        ValueError: a file is damaged or contradicts another one, or there is no template.
        OSError: a file cannot be read.
    """

    def __init__(self, folder: Path, markers: Markers | None = None):
        for name in (TOKENIZER, SETTINGS):
            if not (folder / name).exists():
                raise FileNotFoundError(
                    f"{folder / name} does not exist; download it, or write it with "
                    "transformers: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)."
                )
        self._folder = folder
        path = folder / TOKENIZER
        self._tokenizer = tokenizer.read(path.read_bytes(), str(path))
        # What the model has seen before each text, as Llama's <|begin_of_text|>.
        example = self._tokenizer.encode("a")
        added = zip(example.tokens, example.special_tokens_mask, strict=True)
        self._opening = "".join(token for token, _ in itertools.takewhile(_is_added, added))
        self._tokenizer.post_processor = None  # Llama's trims the offsets of tokens
        self.vocabulary = 1 + max(self._tokenizer.get_vocab().values())
        settings = read_json(folder / SETTINGS)
        self._names = {
            name: _content(folder, name, value)
            for name, value in settings.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        self._check_tokens(settings.get("added_tokens_decoder") or {})
        self._template, source = template.read(folder, settings)
        if not markers and not template.BLOCK.search(source):
            markers = LLAMA3 if _HEADER in source else CHATML
        self._markers = markers
        begin, end = map(re.escape, self._markers or CHATML)
        self._turn = re.compile(f"({begin})(.*?{end})", re.DOTALL)
        added = self._tokenizer.get_added_tokens_decoder().values()
        reserved = {token.content for token in added if token.special} | {*(self._markers or ())}
        if single := [text for text in reserved if len(text) < 2]:
            raise ValueError(
                "Special tokens and markers must have at least two characters, or they could "
                f"not be distinguished from content; got {single[0]!r}."
            )
        self._reserved = re.compile(
            f"(?={'|'.join(map(re.escape, sorted(reserved))) or '(?!)'})(.)", re.DOTALL
        )

    def _check_tokens(self, added: Any) -> None:
        """Raises a ValueError where the settings name a token that the tokenizer has not."""
        path = self._folder / SETTINGS
        if not isinstance(added, dict):
            raise ValueError(
                f"{path}: added_tokens_decoder is {short(added)}, but must be an object."
            )
        for index, token in added.items():
            content = _content(self._folder, f"added token {index}", token)
            if str(self._tokenizer.token_to_id(content)) != index:
                raise ValueError(
                    f"{path} has the token {content!r} as {index}, but {TOKENIZER} has not; save "
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
        """A conversation of which every turn of the assistant is learnt.

        Args:
            messages: objects with a "role" and a "content", and what else the template knows.
            tools: JSON schemas, for templates that show them.
            given: so many of the first messages are a prompt, and nothing of them is learnt.

        Raises:
            ValueError: a message is none, a role is out of order, the template refuses them or
                drops a message, a call or the tools, or the assistant's turns cannot be told apart
                in what it makes of them.
        """
        roles = _check(messages)
        escaped, tools = self._escape(messages), self._escape(tools)
        rendered = self._render(escaped, tools)
        dropped = self._dropped(escaped, tools, rendered)
        where = "{% generation %} blocks"
        if self._markers:
            rendered = rendered.replace(BEGIN, "").replace(END, "")
            rendered = self._turn.sub(rf"\1{BEGIN}\2{END}", rendered)
            where = " … ".join(map(repr, self._markers))
        text = unmark(rendered)
        turns = roles.count("assistant")
        if len(text.learnt) != turns:
            raise ValueError(
                f"the chat template shows {len(text.learnt)} turns between {where}, and the "
                f"assistant has {turns}; put {{% generation %}} … {{% endgeneration %}} around the "
                f"assistant's words, each turn's in one, in {self._folder / TEMPLATE}, which is "
                f"read before the template in {SETTINGS}"
            )
        return text._replace(
            learnt=text.learnt[roles[:given].count("assistant") :], dropped=dropped
        )

    def completion(self, prompt: str, completion: str) -> Text:
        """A prompt and the completion to learn, with the end of a turn, and without a template.

        They are tokenised one by one, as when the model completes the prompt, and follow what the
        tokenizer begins every text with.

        Raises:
            ValueError: one of them is no text, or the tokenizer names no `eos_token`.
        """
        end = self._names.get("eos_token")
        if end is None:
            raise ValueError(f"no eos_token in {SETTINGS} can end a completion; use messages")
        parts = {"prompt": prompt, "completion": completion}
        for name, part in parts.items():
            if not isinstance(part, str) or not part.strip():
                raise ValueError(f'its "{name}" must be a non-blank text; got {short(part)}')
        prompt, completion = map(self._escape, parts.values())
        opening = f"{self._opening}{CUT}" if self._opening else ""
        text = unmark(f"{opening}{prompt}{CUT}{BEGIN}{completion}{CUT}{end}{END}")
        return text._replace(escaped=CUT in prompt + completion)

    def question(self, messages: Sequence[Any]) -> list[int]:
        """Tokens of a conversation, up to where the assistant is to speak.

        Raises:
            ValueError: the template refuses the messages, or they have what no text has.
        """
        rendered = self._render(self._escape(messages), None, answer=True)
        return self._tokens(rendered.replace(BEGIN, "").replace(END, ""))

    def prompt(self, text: str) -> list[int]:
        """Tokens of a text to go on from, as `completion` has those of a prompt."""
        opening = f"{self._opening}{CUT}" if self._opening else ""
        return self._tokens(opening + self._escape(text))

    def _tokens(self, marked: str) -> list[int]:
        (encoded,) = self.encode([unmark(marked)])
        return encoded.tokens.tolist()

    def answer(self, tokens: Sequence[int], ends: Collection[int]) -> str:
        """The text of tokens up to one of `ends`, or of the tokenizer's own end of a turn."""
        names = (self._names.get("eos_token"), (self._markers or CHATML).end.strip())
        known = {*ends, *(self._tokenizer.token_to_id(name) for name in names if name)}
        kept = itertools.takewhile(lambda token: token not in known, tokens)
        return self._tokenizer.decode(list(kept), skip_special_tokens=True)

    def encode(self, texts: Iterable[Text]) -> list[Encoded]:
        """Their tokens; one is learnt if a character of it is."""
        texts = list(texts)
        encodings = iter(
            self._tokenizer.encode_batch(
                [piece for text in texts for piece in text.pieces], add_special_tokens=False
            )
        )
        return [join(text, [next(encodings) for _ in text.pieces]) for text in texts]

    def _render(self, messages: Sequence[Any], tools: Any, answer: bool = False) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=answer,
                **self._names,
            )
        except ValueError as error:
            raise ValueError(f"the chat template rejects it: {error}") from None

    def _dropped(self, messages: list[Any], tools: Any, rendered: str) -> int:
        """How many thoughts, and words beside a call, are not in what the template makes.

        Raises:
            ValueError: a message, a call or the tools are not.
        """
        if tools and self._same(messages, [{"name": _OTHER}], rendered):
            raise ValueError(_LEFT_OUT.format("its tools are", "them"))
        dropped = 0
        for number, message in enumerate(messages, 1):
            name = f"message {number}, of the {message['role']},"
            other = functools.partial(self._is_dropped, messages, number - 1, tools, rendered)
            calls = message.get("tool_calls")
            if calls and other("tool_calls", [_CALL]):
                raise ValueError(_LEFT_OUT.format(f"the tool_calls of {name} are", "them"))
            # Templates may trim or quote content: only where it is not found they are asked.
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
        """Whether the text is the same with another value in a message, which is not in it then."""
        changed = messages[index] | {key: value}
        return self._same([*messages[:index], changed, *messages[index + 1 :]], tools, rendered)

    def _same(self, messages: list[Any], tools: Any, rendered: str) -> bool:
        try:
            return self._render(messages, tools) == rendered
        except ValueError:  # it looked at what is another
            return False

    def _escape(self, value: Any) -> Any:
        match value:
            case str():
                if MARK.search(value):
                    raise ValueError(
                        "it contains U+FDD0, U+FDD1 or U+FDD2, which are not characters"
                    )
                try:
                    value.encode()  # JSON may spell half a character
                except UnicodeEncodeError:
                    raise ValueError(f"it contains invalid Unicode: {short(value)}") from None
                return self._reserved.sub(rf"\1{CUT}", value)
            case dict():
                return {self._escape(key): self._escape(item) for key, item in value.items()}
            case list() | tuple():
                return [self._escape(item) for item in value]
        return value


def _is_added(token: tuple[str, int]) -> bool:
    return bool(token[1])


def _content(folder: Path, name: str, token: Any) -> str:
    """How a token of `tokenizer_config.json` is spelt."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise ValueError(
            f"{folder / SETTINGS}: {name} is {short(token)}, but a token must be a non-empty "
            "text; download the file again, or remove that token."
        )
    return content


def write_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int) -> None:
    """Trains a byte-level BPE with ChatML's tokens and template; transformers loads it.

    Args:
        folder: is made if it is missing.
        texts: to count the pairs of.
        vocabulary: tokens at most, with the three special ones: `END_OF_TEXT` is 0, and the two
            markers of ChatML are the last ones.

    Raises:
        ValueError: the vocabulary is less than all bytes and the special tokens.
    """
    source = tokenizer.train(texts, vocabulary - 2, END_OF_TEXT)
    bpe = tokenizer.read(source, TOKENIZER)
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / TOKENIZER, bpe.to_str())
    write_text(folder / TEMPLATE, template.CHATML)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": CHATML.end,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / SETTINGS, settings)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer's files beside a model's."""
    for name in (TOKENIZER, SETTINGS, TEMPLATE, *_OTHERS):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _check(messages: Sequence[Any]) -> list[str]:
    """The roles of messages; a ValueError where one is no message or at a wrong place."""
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
            raise ValueError(f"{name} has the role {short(role)}, not {', '.join(_PREDECESSORS)}")
        if before not in _PREDECESSORS[role]:
            raise ValueError(
                f"{name} is of the {role} after {before or 'nothing'}; after a system message, if "
                "any, come user and assistant in turn, and tools between two of the assistant"
            )
        if not (content is None and role == "assistant" and message.get("tool_calls")):
            if not isinstance(content, str):
                raise ValueError(f"the content of {name} must be a text; got {short(content)}")
            if role in ("user", "assistant") and not (content.strip() or message.get("tool_calls")):
                raise ValueError(f"{name}, of the {role}, is empty")
        roles.append(role)
    if roles[-1] != "assistant":
        raise ValueError(f"the last message must be the assistant's; got the {roles[-1]}'s")
    return roles
