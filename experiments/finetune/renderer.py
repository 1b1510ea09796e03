"""Renders one chat template, in a separate process with bounded time and memory.

Jinja's sandbox bounds neither, so nested loops or one long product in an untrusted template could
hang the training or exhaust its memory. `experiments.finetune.template` runs this file as a script
and talks to it in lines of JSON. The script imports nothing else of this repository.
"""

import datetime
import json
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

SECONDS = 10  # processor time for compiling a template or rendering a conversation
MEMORY = 1 << 30  # bytes
LARGEST = 1 << 26  # maximum number of characters of a rendered conversation
# Unicode noncharacters, which texts do not contain, mark the ends of an assistant's turn.
BEGIN, END = "\ufdd1", "\ufdd2"
# The date that templates get. With the current date, a run's tokens would change if it is resumed
# on another day. Llama 3.2's template has this date as its default.
_DAY = datetime.datetime(2024, 7, 26)


class _Blocks(jinja2.ext.Extension):
    """The tag `{% generation %}`, which templates of transformers put around assistants' turns."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return BEGIN + caller() + END


def _environment() -> jinja2.Environment:
    """Returns a Jinja environment with the settings of transformers."""
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
    return environment


def _answer(work: Any, seconds: float) -> None:
    """Prints the text that `work` returns, or an error, as JSON."""
    # The signal ends the process, even in the middle of a long operation.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        text = work()
        if len(text) > LARGEST:
            answer = {"error": f"it produces more than {LARGEST:,} characters"}
        else:
            answer = {"text": text}
    except MemoryError:
        answer = {"error": f"it requires more than {MEMORY >> 20} MB"}
    except Exception as error:
        line = getattr(error, "lineno", None)
        answer = {"error": f"line {line}: {error}" if line else str(error) or repr(error)}
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(answer), flush=True)


def main() -> None:
    """Compiles the template on the first line of the input, and renders it with the others."""
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    compiled = []

    def compile_it() -> str:
        compiled.append(_environment().from_string(json.loads(sys.stdin.readline())))
        return ""

    _answer(compile_it, seconds)
    for line in sys.stdin:
        _answer(lambda given=line: compiled[0].render(**json.loads(given)), seconds)


if __name__ == "__main__":
    main()
