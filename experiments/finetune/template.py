"""Chat templates: that of a model's folder, rendered with bounded resources, and Qwen's ChatML."""

import contextlib
import json
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

from experiments.finetune import renderer
from experiments.finetune.renderer import BEGIN, END

__all__ = ["BEGIN", "BLOCK", "CHATML", "CUT", "END", "SETTINGS", "TEMPLATE", "Template", "read"]

SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
CUT = "\ufdd0"  # a Unicode noncharacter, at which texts are cut before tokenisation
CHATML = """\
{%- if tools %}{{ raise_exception('this model knows no tools') }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' or message.tool_calls or message.reasoning_content %}
{{- raise_exception('this model knows neither tools nor reasoning') }}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Template:
    """A chat template in a separate process, which ends with this object.

    Raises:
        ValueError: If the template is not valid Jinja.
    """

    def __init__(self, source: str):
        self._process = subprocess.Popen(
            [sys.executable, "-P", renderer.__file__, str(renderer.SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        weakref.finalize(self, _end, self._process)
        self._ask(source)

    def render(self, **values: Any) -> str:
        """Renders the template with JSON values.

        Raises:
            ValueError: If the template rejects them, or takes too much time or memory.
        """
        return self._ask(values)

    def _ask(self, value: Any) -> str:
        sent: Any = self._process.stdin
        given: Any = self._process.stdout
        try:
            sent.write(json.dumps(value).encode() + b"\n")
            sent.flush()
            # JSON escapes take at most twelve characters each.
            line = given.readline(12 * renderer.LARGEST + 100)
        except BrokenPipeError:
            line = b""
        except TypeError as error:
            raise ValueError(f"it contains values that JSON cannot express: {error}") from None
        if not line.endswith(b"\n"):
            raise ValueError(
                f"it requires more than {renderer.SECONDS} seconds or {renderer.MEMORY >> 20} MB"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()  # type: ignore[union-attr]


def read(folder: Path, settings: dict[str, Any]) -> tuple[Template, str]:
    """Returns a folder's chat template, and its source.

    The template renders each `{% generation %}` block between `BEGIN` and `END`.

    Args:
        folder: The model's folder.
        settings: The content of its `tokenizer_config.json`.

    Raises:
        ValueError: If the folder has no template, or one that is not valid Jinja.
        OSError: If the template cannot be read.
    """
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = [entry for entry in source if isinstance(entry, dict)]
        source = {entry.get("name"): entry.get("template") for entry in named}.get("default")
    if (folder / TEMPLATE).exists():
        source = (folder / TEMPLATE).read_bytes().decode(errors="replace")
    if not isinstance(source, str):
        raise ValueError(f"{folder} has no chat template; add the one of this model as {TEMPLATE}.")
    try:
        return Template(source), source
    except ValueError as error:
        raise ValueError(f"The chat template of {folder} is damaged: {error}.") from None
