"""Chat templates: the one of a model's folder, in Jinja's sandbox, or ChatML, which Qwen speaks."""

import datetime
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
# Noncharacters, which no text has, mark a rendered one: cut here; an assistant's turn; its end.
CUT, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2"
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
# A template that asks for the day is told this one: with today's, a run's rows would be others when
# it goes on tomorrow. Llama 3.2's template takes it where there is no clock.
_DAY = datetime.datetime(2024, 7, 26)
_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class _Blocks(jinja2.ext.Extension):
    """`{% generation %}`: transformers' tag around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return BEGIN + caller() + END


def read(folder: Path, settings: dict[str, Any]) -> tuple[jinja2.Template, bool]:
    """A folder's chat template, and whether it has `{% generation %}` blocks.

    Rendered, a block stands between `BEGIN` and `END`.

    Args:
        folder: of the model.
        settings: its `tokenizer_config.json`.

    Raises:
        ValueError: it has none, or one that is no Jinja.
        OSError: it cannot be read.
    """
    source = settings.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if (folder / TEMPLATE).exists():
        source = (folder / TEMPLATE).read_text(encoding="utf-8")
    if not isinstance(source, str):
        raise ValueError(
            f"{folder} has no chat template; put one for this model there, as {TEMPLATE}."
        )
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Blocks, jinja2.ext.loopcontrols]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = _DAY.strftime
    environment.filters["tojson"] = to_json
    try:
        return environment.from_string(source), bool(_BLOCK.search(source))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"The chat template of {folder} is damaged: line {error.lineno}: {error}."
        ) from None
