"""Chat templates render as in transformers, and end in a fault where they would take all time or memory."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mars_jax.data.chat_template import MAX_TEMPLATE, SECONDS, TemplateFaultError, render
from tests.helpers import tiny_data
from tests.helpers.tokenizer_kinds import TEMPLATES

MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": "be <b>short</b> & \u00e9"}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
]
# What published templates use: loop controls, namespaces, macros, filters, slices, JSON, dates, special tokens.
FEATURES = """{%- macro show(message) -%}{{ message['role'] | upper }}: {{ message.content | tojson }}{%- endmacro %}
{{ bos_token }}{% set ns = namespace(count=0, last=none) %}
{%- for message in messages %}
    {%- if loop.first and message['role'] == 'system' %}
        {%- set ns.last = message['content'][0]['text'] | trim %}{% continue %}
    {% endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- show(message) ~ '#' ~ ns.count }}
    {%- if loop.index0 % 2 == 0 %} even{% endif %}{% if ns.count > 5 %}{% break %}{% endif %}
{%- endfor %}
{{ messages[1:] | length }} {{ ns.last.split(' ')[0] }} {{ '%05d' | format(3) }} {{ 'a,b'.replace(',', ';') * 2 }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ strftime_now('%Y') | length }}
{{ dict(a=1) | items | list }} {% if tools is none and documents is none %}no tools{% endif %} {{ 2 ** 5 }}
{% generation %}{{ '\\n' + eos_token }}{% endgeneration %}{% if add_generation_prompt %}ask{% endif %}"""


@pytest.mark.parametrize("ask", [True, False])
@pytest.mark.parametrize("template", [*TEMPLATES.values(), FEATURES])
def test_templates_render_as_in_transformers(template: str, ask: bool) -> None:
    tokenizer = tiny_data.tokenizer(template)
    tokenizer.bos_token = "<|im_start|>"
    messages = MESSAGES if "part in" in template or template == FEATURES else [{**m, "content": "x"} for m in MESSAGES]
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    assert render(template, messages, special, ask=ask) == expected


ENDLESS = {
    "nested loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "loops in a filter": "{% for a in range(90000) %}{% set x = range(90000) | map('string') | list %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{% set x = f(n - 1) + f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
    "search": "{% set l = range(90000) | list %}{% for a in l %}{% if -1 in l %}{% endif %}{% endfor %}",
}
HUGE = {
    "product": "{{ 'x' * 10**9 }}",
    "constant product": "{{ 'x' * 1000000000 }}",
    "list": "{{ [0] * 1000000000 }}",
    "sums": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "tildes": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "blocks": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "replacements": "{% set x = 'ab' %}" + "{% set x = x.replace('a', 'aa') %}" * 60,
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "center": "{{ 'x' | center(1000000000) }}",
    "percent": "{{ '%1000000000d' % 3 }}",
    "format": "{{ '{:1000000000d}'.format(3) }}",
    "format filter": "{{ '%1000000000d' | format(3) }}",
    "power": "{{ 2**100000000 }}",
    "squares": "{% set n = namespace(x=7) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "join": "{% set x = 'y' * 8000000 %}{{ (['a'] * 100000) | join(x) }}",
    "indent": "{{ ('x\n' * 1000000) | indent(1000000) }}",
    "tabs": "{{ '\t'.expandtabs(10**9) }}",
    "lists": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "output": "{% for i in range(90000) %}{{ 'x' * 90000 }}{% endfor %}",
}


@pytest.mark.parametrize("template", [*ENDLESS.values(), *HUGE.values()], ids=[*ENDLESS, *HUGE])
def test_a_template_without_end_or_measure_is_stopped(template: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateFaultError, match=r"takes more than 2 seconds|without measure|a text with a width"):
        render(template, MESSAGES, {})
    assert time.monotonic() - start < 20 * SECONDS  # not minutes


def test_a_template_was_refused_because_the_machine_stood_still() -> None:
    def stand_still(*_: object) -> None:
        time.sleep(1.1 * SECONDS)

    before = signal.signal(signal.SIGALRM, stand_still)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        start = time.monotonic()
        template = "{% for i in range(50) %}{% for j in range(1000) %}{% endfor %}{% endfor %}done"
        assert render(template, MESSAGES, {}) == "done"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start > SECONDS


def test_renderings_in_other_threads_put_off_the_end_of_one_without_end() -> None:
    template = f"{{% if messages[0].role == 'system' %}}{ENDLESS['nested loops']}{{% endif %}}short"
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(render, template, MESSAGES, {})
        while not endless.done() and time.monotonic() - start < 4 * SECONDS:
            assert render(template, MESSAGES[1:], {}) == "short"
            time.sleep(SECONDS / 20)
        was_stopped = endless.done()
        with pytest.raises(TemplateFaultError, match="takes more than 2 seconds of processor time for one"):
            endless.result()
    assert was_stopped


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for %}", "TemplateSyntaxError: Expected an expression"),
        ("{{ raise_exception('only two turns') }}", "^only two turns$"),
        ("{{ messages[7]['role'] }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError|UndefinedError"),
        ("{% include 'file' %}", "no loader|TypeError"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "calls itself without end"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "calls itself without end"),
        ("x" * (MAX_TEMPLATE + 1), "1,048,577 characters; at most 1,048,576 are read"),
    ],
)
def test_whatever_a_template_raises_is_a_fault_with_its_cause(template: str, text: str) -> None:
    with pytest.raises(TemplateFaultError, match=text):
        render(template, MESSAGES, {})
