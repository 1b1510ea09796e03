"""Renders one chat template, in a process of its own whose time and memory are bounded.

A template comes from elsewhere, and Jinja's sandbox bounds neither: loops in loops, or one long
product, would hang or exhaust what trains. `experiments.finetune.template` runs this file, which
imports nothing of ours, and talks to it in lines of JSON.
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

SECONDS = 10  # of a processor, for a template or a conversation
MEMORY = 1 << 30  # bytes
LARGEST = 1 << 26  # characters of what is made of a conversation
# Noncharacters, which no text has, mark an assistant's turn and its end.
BEGIN, END = "\ufdd1", "\ufdd2"
# A template that asks for the day is told this one: with today's, a run's rows would be others when
# it goes on tomorrow. Llama 3.2's template takes it where there is no clock.
_DAY = datetime.datetime(2024, 7, 26)


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


def _environment() -> jinja2.Environment:
    """With the settings of transformers."""
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
    """Sends the text that `work` makes, or what went wrong."""
    # The signal ends the process, even in the middle of a long product.
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
    """Reads the template, and then what to render it with, until the input ends."""
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for what trains
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    made = []

    def compile_it() -> str:
        made.append(_environment().from_string(json.loads(sys.stdin.readline())))
        return ""

    _answer(compile_it, seconds)
    for line in sys.stdin:
        _answer(lambda given=line: made[0].render(**json.loads(given)), seconds)


if __name__ == "__main__":
    main()
