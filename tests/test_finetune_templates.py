"""What a chat template refuses, drops, and may take of time and memory."""

import pytest
from test_finetune_chat import CALLS, THINKING, folder_of, said

from experiments.finetune import template
from experiments.finetune.chat import Chat


def test_what_a_template_refuses_is_an_error(tmp_path):
    for source, messages, error in (
        (template.CHATML, CALLS, r"the chat template rejects it: .* neither tools nor"),
        ("{{ messages.x.y }}", said("a", "b"), "the chat template rejects it"),
        # The sandbox: a template comes from elsewhere.
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", said("a", "b"), "unsafe"),
    ):
        with pytest.raises(ValueError, match=error):
            Chat(folder_of(tmp_path / "hf", source)).conversation(messages)


def test_a_message_that_a_template_drops_is_an_error(tmp_path):
    """Qwen3's shows no developer; what another one trims, quotes or thinks is shown."""
    hidden = "{%- elif message.role != 'developer' %}\n{{- '<|im"
    drops = THINKING.replace("{%- else %}\n{{- '<|im", hidden)
    model = Chat(folder_of(tmp_path / "drops", drops))
    developer = [{"role": "developer", "content": "Be brief."}]
    with pytest.raises(ValueError, match=r"message 1, of the developer, is missing .*remove it"):
        model.conversation(developer + said("a", "b"))
    assert model.conversation(developer[:0] + said("a", "<think>x</think>", "b", "c")).learnt
    assert model.conversation([developer[0] | {"content": " "}, *said("a", "b")]).learnt
    quotes = drops.replace("+ content +", "+ (content | trim | tojson) +")
    quoted = Chat(folder_of(tmp_path / "quotes", quotes)).conversation(said(' "a"\n', "b"))
    assert r'"\"a\""' in "".join(quoted.pieces)


def test_a_template_that_asks_for_the_day_is_told_the_same_one(tmp_path):
    folder = folder_of(tmp_path / "hf", "{{ strftime_now('%d %b %Y') }}" + THINKING)
    (piece,) = Chat(folder).conversation(said("a", "b")).pieces
    assert piece.startswith("26 Jul 2024<|im_start|>")


TOOLS = [{"type": "function", "function": {"name": "time", "parameters": {}}}]
IGNORES = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + "
    "(message.content or '') + '<|im_end|>\\n' }}{%- endfor %}"
)


def test_calls_and_tools_that_a_template_ignores_are_refused(tmp_path):
    model = Chat(folder_of(tmp_path / "ignores", IGNORES))
    with pytest.raises(ValueError, match="the tool_calls of message 3, of the assistant, are mi"):
        model.conversation(CALLS)
    with pytest.raises(ValueError, match="its tools are missing"):
        model.conversation(said("a", "b"), tools=TOOLS)
    assert Chat(folder_of(tmp_path / "shows")).conversation(CALLS, tools=TOOLS).dropped == 0


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "content"])
def test_thoughts_that_a_template_drops_are_counted(tmp_path, key):
    thought = {"content": "<think>\nFirst so.\n</think>\n\nb"} if key == "content" else {key: "Hm."}
    messages = said("a", "b", "c", "d")
    messages[1] |= thought
    knows = Chat(folder_of(tmp_path / "knows"))
    text = knows.conversation(messages)
    assert text.dropped == 1 and "First so" not in "".join(text.pieces)
    messages = said("a", "b")
    messages[1] |= thought
    # The template shows those of the last turn, but for `thinking`, which it does not know.
    assert knows.conversation(messages).dropped == (key == "thinking")
    ignores = Chat(folder_of(tmp_path / "ignores", IGNORES)).conversation(messages)
    assert ignores.dropped == (key != "content")


def test_words_beside_a_call_that_a_template_drops_are_counted(tmp_path):
    source = THINKING.replace("{{- content }}", "{{- '' if message.tool_calls else content }}")
    messages = [dict(message) for message in CALLS]
    messages[2]["content"] = "Let me look."
    assert Chat(folder_of(tmp_path / "a", source)).conversation(messages).dropped == 1
    assert Chat(folder_of(tmp_path / "b")).conversation(messages).dropped == 0


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ messages[0].content * 10 ** 10 }}",
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x * 2 %}"
        "{% endfor %}",
        "{{ 'x' * (10 ** 8) }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_takes_no_more_time_or_memory_than_it_may(tmp_path, source, monkeypatch):
    monkeypatch.setattr(template.renderer, "SECONDS", 1)
    folder = folder_of(tmp_path / "hf", source + THINKING)
    with pytest.raises(ValueError, match=r"it requires more than|it produces more than|recursion"):
        Chat(folder).conversation(said("a", "b"))


def test_a_template_s_process_ends_with_it(tmp_path):
    model = Chat(folder_of(tmp_path / "hf"))
    process = model._template._process
    assert process.poll() is None
    del model
    assert process.wait(10) is not None
