"""Chat templates yield the same token ids as with transformers, and callers can understand the errors of a render."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.text.chat.template import ChatTemplate
from cluster.gateway.text.tokenizer import TextModel
from cluster.worker.weights.tokenizer_bundle import build_bundle
from tests.gateway.text.kinds import Kind, with_template
from tests.support.cpu import cpu_within

pytestmark = pytest.mark.slow

PUBLIC = Path(__file__).parents[3] / "data" / "chat_templates"
NAMES = sorted(path.stem for path in PUBLIC.glob("*.jinja"))
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a <city> & its surroundings, e.g. Zürich 東京",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "enum": [1, 3]}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [{"role": "user", "content": "What is the capital of France?"}],
    "with a system prompt": [
        {"role": "system", "content": "You answer in one word. "},
        {"role": "user", "content": " Où est 東京? 🎉 <b>&amp;</b> \n"},
    ],
    "several turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello! How can I help? "},
        {"role": "user", "content": "Count to <s> </s> <|eot_id|> [INST] <|im_end|> three"},
    ],
    "a tool was called": [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sky": "blue"}', "tool_call_id": "abcdef123", "name": "get_weather"},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "And tomorrow?"},
    ],
    "roles out of turn": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "an unknown role": [{"role": "wizard", "content": "Abracadabra"}],
    "content in parts": [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
    ],
}


def outcome_of(encode: Callable[..., Any], messages: list[dict[str, Any]], **kwargs: Any) -> Any:
    """Call `encode` and return the token ids of the messages. If that fails, return a text: the template's own error
    text, or `failed` if the template could not render."""
    from jinja2.exceptions import TemplateError, UndefinedError

    try:
        return encode(messages, **kwargs)
    except CallError as e:
        if e.outcome is not Outcome.INVALID_FIELD:
            raise
        text = e.message.removeprefix("messages: ")
        return "failed" if text.startswith("the model's chat template cannot render") else text
    except UndefinedError:
        return "failed"
    except TemplateError as e:
        return str(e)
    except (TypeError, AttributeError, KeyError):
        return "failed"


def joined(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with its text parts as one text."""
    content = message["content"]
    return message if isinstance(content, str) else message | {"content": "\n".join(part["text"] for part in content)}


def loops_over_parts(source: str) -> bool:
    """Return whether a template expects contents as lists of parts, by the rules of vLLM."""
    from vllm.renderers.hf import _detect_content_format

    return bool(_detect_content_format(source, default="string") == "openai")


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("name", NAMES)
def test_public_templates_give_transformers_ids(kinds: dict[str, Kind], name: str, family: str) -> None:
    """A public template yields the same ids or the same error as with transformers, for every conversation, with and
    without tools, and with and without a generation prompt. If a template expects contents as text, a content that
    consists of parts is first joined to one text, as vLLM does."""
    kind = kinds[family]
    source = (PUBLIC / f"{name}.jinja").read_text()
    model = with_template(kind, {"default": source})
    rendered = 0
    for title, messages in CONVERSATIONS.items():
        for tools in (None, [WEATHER]):
            for prompt in (True, False):
                given: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt}
                plain = messages if loops_over_parts(source) else [joined(message) for message in messages]
                theirs = outcome_of(
                    kind.theirs.apply_chat_template, plain, chat_template=source, return_dict=False, **given
                )
                ours = outcome_of(model.codec.encode_chat, messages, **given)
                assert ours == theirs, title
                rendered += isinstance(ours, list)
    assert rendered >= 8


def test_own_templates_have_one_bos(kind: Kind) -> None:
    """The template of each family yields the same ids as with transformers, with exactly one BOS."""
    messages = CONVERSATIONS["one question"]
    ids = kind.ours.codec.encode_chat(messages)
    assert ids == kind.theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    if kind.theirs.bos_token_id is not None:
        assert ids.count(kind.theirs.bos_token_id) == 1


def test_every_public_template_names_its_origin() -> None:
    """Each public template in the repository has an index entry with the model, the copyright holder and a permissive
    licence. There are at least twelve public templates."""
    index = json.loads((PUBLIC / "index.json").read_text())
    assert sorted(Path(entry["file"]).stem for entry in index) == NAMES
    assert len(NAMES) >= 12
    assert {entry["held_license"] for entry in index} <= {"MIT", "Apache-2.0"}
    assert all(entry["model"] and entry["held_by"] for entry in index)


def test_named_templates(kinds: dict[str, Kind], tmp_path: Path) -> None:
    """A model with the templates `default` and `tool_use` uses `tool_use` if the request has tools, as transformers
    does.
    """
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(kinds["llama"].folder, folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = {
        "default": (PUBLIC / "chatml.jinja").read_text(),
        "tool_use": (PUBLIC / "hermes-2-pro-tool-use.jinja").read_text(),
    }
    theirs.save_pretrained(folder)
    bundle = build_bundle(folder)
    assert {"chat_template.jinja", "chat_template.tool_use.jinja"} <= bundle.files.keys()
    model = TextModel.from_bundle(bundle)
    messages = CONVERSATIONS["several turns"]
    for tools in (None, [WEATHER]):
        expected = theirs.apply_chat_template(messages, tools, add_generation_prompt=True, return_dict=False)
        assert model.codec.encode_chat(messages, tools=tools) == expected
    assert model.codec.encode_chat(messages, tools=[]) == model.codec.encode_chat(messages)


def test_named_special_tokens_reach_the_template(kinds: dict[str, Kind], tmp_path: Path) -> None:
    """A template gets the special tokens by the names that transformers gives them, also names that only this model
    has. Other settings in the bundle do not reach the template."""
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(kinds["llama"].folder, tmp_path / "model"))
    path = folder / "tokenizer_config.json"
    tokens = {"image_token": "<|start_header_id|>", "begin_of_image": "<|end_header_id|>"}
    named = {"extra_special_tokens": tokens, "eot_token": "<|eot_id|>", "truncation_side": "left"}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    names = [*tokens, "eot_token", "bos_token", "eos_token", "pad_token", "truncation_side", "escape_separator"]
    source = "{% for m in messages %}{{ m.content }}{% endfor %}" + "".join(
        f"{{{{ '{name}: ' ~ {name} if {name} is defined else 'no {name}' }}}}\n" for name in names
    )
    (folder / "chat_template.jinja").write_text(source)
    messages = CONVERSATIONS["one question"]
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    assert all(f"{name}: {token}" in expected for name, token in (tokens | {"eot_token": "<|eot_id|>"}).items())
    model = TextModel.from_bundle(build_bundle(folder, escapes_control_tokens=True))
    assert model.codec.render_chat(messages) == expected


@pytest.mark.parametrize("final", ["The capital is", "The capital is ", " Paris,\n\n and", "{"])
@pytest.mark.parametrize("name", ["chatml", "qwen2.5", "mistral-nemo", "phi3-training", "granite-3.3", "trims"])
def test_continues_the_final_message(kinds: dict[str, Kind], name: str, final: str) -> None:
    """With continue_final_message the prompt equals that of transformers, whether or not the template trims the last
    message."""
    kind = kinds["mistral"]
    source = kinds["llama"].theirs.chat_template if name == "trims" else (PUBLIC / f"{name}.jinja").read_text()
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": final}]
    theirs = kind.theirs.apply_chat_template(
        messages, chat_template=source, continue_final_message=True, return_dict=False
    )
    assert with_template(kind, {"default": source}).codec.encode_chat(messages, continue_final_message=True) == theirs


def test_template_kwargs_reach_the_template(kinds: dict[str, Kind]) -> None:
    """The template arguments in a request reach the template. An argument such as `messages`, whose value comes from
    elsewhere in the request, is refused with an error that names the argument."""
    kind = kinds["llama"]
    source = (PUBLIC / "qwen3.5.jinja").read_text()
    model = with_template(kind, {"default": source})
    messages = CONVERSATIONS["one question"]
    plain, without = (model.codec.render_chat(messages, template_kwargs=k) for k in (None, {"enable_thinking": False}))
    assert plain != without
    assert without == kind.theirs.apply_chat_template(
        messages, chat_template=source, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    with pytest.raises(CallError, match="messages is set by the request") as error:
        model.codec.render_chat(messages, template_kwargs={"messages": []})
    assert error.value.violations[0].field == "chat_template_kwargs_json"


def render(source: str, **kwargs: Any) -> str:
    """Render one short message with the template `source`."""
    return ChatTemplate({"default": source}).render([{"role": "user", "content": "hi"}], **kwargs)


def test_the_date_is_given_from_outside() -> None:
    """The template function strftime_now uses the clock that is passed in, so that a prompt can be reproduced."""
    template = ChatTemplate({"default": "{{ strftime_now('%d %B %Y') }}"}, now=lambda: datetime(2026, 3, 1))
    assert template.render([{"role": "user", "content": "hi"}]) == "01 March 2026"


def test_a_templates_refusal_is_the_callers() -> None:
    """The text that a template passes to raise_exception reaches the caller as an error on `messages`. A long text is
    cut."""
    with pytest.raises(CallError, match="messages: no wizards here") as error:
        render("{{ raise_exception('no wizards here') }}")
    assert error.value.outcome is Outcome.INVALID_FIELD
    with pytest.raises(CallError) as error:
        render("{{ raise_exception('x' * 100000) }}")
    assert len(error.value.message) < 1000


RENDER_S = 0.5
"""CPU limit of a runaway template in seconds, a quarter of the usual limit."""
KEEP, KEPT = "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + [", "] %}{% endfor %}"
DOUBLE = "{% set ns = namespace(x='xx') %}{% for i in range(60) %}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 100000000000 }}",
        "{{ [0] * 100000000000 }}",
        "{{ 10 ** 1000000000 }}",
        DOUBLE + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ range(1000000000) | length }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set l = range(9999) | list %}{% for a in l %}{% for b in l %}{% for c in l %}" + "{% endfor %}" * 3,
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for a in [[[]]] recursive %}{{ loop([[], []]) }}{% endfor %}",
        DOUBLE + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        DOUBLE + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        DOUBLE + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
        DOUBLE + "{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}",
        DOUBLE + "{% set ns.x = ns.x.replace('x', 'xxx') %}{% endfor %}",
        DOUBLE + "{% set ns.x = ns.x | replace('x', 'xxx') %}{% endfor %}",
        KEEP + "'x' * 9999999" + KEPT,
        "{{ ([{'a': 'x' * 9999999}] * 9999999) | join(attribute='a') }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 999999999) }}",
        "{{ 'x'.center(999999999) }}",
        "{{ 'x' | center(999999999) }}",
        "{{ 'x\\ny' | indent(999999999) }}",
        "{{ {'a': 1} | tojson(indent=999999999) }}",
        "{{ ([1] * 999999) | tojson(indent=999999) }}",
        "{{ ('\\n' * 999999) | indent(999999) }}",
        "{{ ('\\t' * 999999).expandtabs(999999) }}",
        "{{ ('x' * 999999).translate({120: 'x' * 999999}) }}",
        "{{ ('x ' * 999999) | wordwrap(1, true, 'x' * 999999) }}",
        "{{ ('x' * 999999).encode().replace(''.encode(), ('x' * 999999).encode()) }}",
        "{{ lipsum(n=10 ** 6) }}",
        DOUBLE + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        DOUBLE + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        DOUBLE + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x ~ '' }}",
        DOUBLE + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x | string }}",
        DOUBLE + "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ '%s' % ns.x }}",
        DOUBLE + "{% set ns.x = [ns.x, ns.x] | batch(1) | list %}{% endfor %}{{ '{}'.format(ns.x) }}",
        DOUBLE + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
        DOUBLE + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {}.get(ns.x) }}",
        DOUBLE + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {}[ns.x] }}",
        DOUBLE + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ [ns.x] | join }}",
        DOUBLE + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ [[ns.x], [ns.x]] | sort }}",
        DOUBLE + "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y or 0, ns.y or 0] %}{% endfor %}{{ ns.x == ns.y }}",
        DOUBLE
        + "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y or 0, ns.y or 0] %}{% endfor %}{{ ns.x is eq ns.y }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = ns.x * 2 %}{% endfor %}",
        "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ ([('x' * 999999)] * 99999) | string }}",
        "{{ ('%(a)s' * 99999) % {'a': 'x' * 999999} }}",
        "{{ ('%(a)s' * 99999) | format(a='x' * 999999) }}",
        "{{ ('{0}' * 99999).format('x' * 999999) }}",
        "{{ ('x ' * 4500000) | wordwrap(1) }}",
        "{{ ('<' * 999999) | striptags }}",
        "{{ ('a' * 999999) | title | wordcount }}",
        "{{ (range(999999) | list) | groupby('x') }}",
        "{{ range(999999) | map('string')" + " | map('upper')" * 50 + " | list | length }}",
        "{% set r = range(999999) %}" + KEEP + "r | list" + KEPT,
        "{% set r = range(999999) %}" + KEEP + "{}.fromkeys(r)" + KEPT,
        "{% set r = 'x' * 9999999 %}" + KEEP + "r[1:]" + KEPT,
        "{% set r = 'x' * 9999999 %}" + KEEP + "r.upper()" + KEPT,
        "{% set r = 'x' * 9999999 %}" + KEEP + "r | lower" + KEPT,
        "{% set r = 'x ' * 99999 %}" + KEEP + "r.split()" + KEPT,
        KEEP + "'x'.ljust(999999)" + KEPT,
        KEEP + "'1'.zfill(999999)" + KEPT,
        KEEP + "[1] | batch(999999, 1) | list" + KEPT,
        "{{ ('f' * 9999999) | int(base=16) // 3 }}",
        "{{ (1).from_bytes(('x' * 9999999).encode(), 'big') // 3 }}",
        "{{ ('%Y' * 999999) | map('string') | list }}",
        "{{ " + "('x' | center(99999) | wordwrap(1)) ~ " * 2000 + "'' }}",
    ],
)
@pytest.mark.slow
def test_a_runaway_template_is_stopped(source: str) -> None:
    """A template that makes endless text, loops forever or tries to leave the sandbox fails soon. It takes little time
    and memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    template = ChatTemplate({"default": source}, render_s=RENDER_S)
    with cpu_within(RENDER_S + 3), pytest.raises(CallError) as error:
        template.render([{"role": "user", "content": "hi"}])
    assert error.value.outcome is Outcome.INVALID_FIELD
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000_000, "KiB at most so far"


def test_bounds_are_each_renders_own() -> None:
    """The limits of a chat template apply to each call of `render` by itself, whatever earlier calls have used. A
    conversation of 100,000 messages is within the limits."""
    template = ChatTemplate({"default": "{% for m in messages %}{{ m.content ~ m.content }}{% endfor %}"})
    for _ in range(40):
        assert len(template.render([{"role": "user", "content": "x" * 1_000_000}] * 8)) == 16_000_000
    assert len(template.render([{"role": "user", "content": "hi"}] * 100_000)) == 400_000


def test_a_model_without_template_says_so() -> None:
    """A chat request is refused if the model has no template, no default template, or a template that does not compile.
    The error names the method Complete as the remedy."""
    for sources in ({}, {"rag": "x"}, {"default": "{% if %}"}):
        with pytest.raises(CallError, match="use Complete") as error:
            ChatTemplate(sources).render([{"role": "user", "content": "hi"}])
        assert error.value.outcome is Outcome.UNSUPPORTED_FEATURE


def test_no_messages_is_refused() -> None:
    """An empty conversation is refused before any template renders it."""
    with pytest.raises(CallError, match="at least one message"):
        ChatTemplate({"default": "x"}).render([])


def test_a_message_without_text_cannot_be_continued() -> None:
    """The last message can be continued only if it has text and the template outputs that text."""
    loop = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    for source, content in ((loop, None), ("nothing", "hi")):
        with pytest.raises(CallError, match="continue_final_message"):
            ChatTemplate({"default": source}).render(
                [{"role": "user", "content": content}], continue_final_message=True
            )


@pytest.mark.parametrize(
    "source", ["[" * 5000 + "]" * 5000, "{% for x in y %}" * 30 + "{% endfor %}" * 30, "x" * (2 << 20)]
)
def test_a_template_that_cannot_be_compiled_leaves_the_model_its_completions(source: str) -> None:
    """A template that is nested too deeply, or too long, is refused when a chat is rendered, not when the model is
    opened."""
    template = ChatTemplate({"default": source if source[0] in "{x" else "{{ " + source + " }}"})
    with pytest.raises(CallError, match="does not compile") as error:
        template.render([{"role": "user", "content": "hi"}])
    assert error.value.outcome is Outcome.UNSUPPORTED_FEATURE
