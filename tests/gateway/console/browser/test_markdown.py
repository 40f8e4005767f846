"""The console's Markdown in a browser. Each form of Markdown becomes the right HTML elements, and no text can add a
harmful element."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.async_api import Browser

from tests.support.browser import Watched, bare_page

pytestmark = [pytest.mark.slow, pytest.mark.needs("chromium")]

ALLOWED: dict[str, set[str]] = {
    "a": {"href", "rel", "target", "class"},
    "button": {"type", "class"},
    "div": {"class", "role", "aria-label", "tabindex"},
    "ol": {"start"},
    "pre": {"tabindex"},
    "span": {"class"},
    "td": {"class"},
    "th": {"class", "scope"},
    **{f"h{level}": {"class"} for level in range(3, 7)},
    **{name: set() for name in ("blockquote", "code", "del", "em", "hr", "li", "p", "strong", "table", "tr", "ul")},
}

RENDER = """
async (texts) => {
  const { renderMarkdown } = await import("/console/static/markdown.js");
  return texts.map((text) => {
    const element = renderMarkdown(text);
    const html = element.outerHTML;
    const nodes = [...element.querySelectorAll("*")].map((node) => [
      node.localName, node.getAttributeNames(), node.namespaceURI, node.getAttribute("href")]);
    for (const extra of element.querySelectorAll(".md-target, button")) extra.remove();
    return { html, nodes, text: element.textContent };
  });
}
"""

IN_PIECES = """
async (cases) => {
  const { MarkdownView, renderMarkdown } = await import("/console/static/markdown.js");
  const wrong = [];
  for (const pieces of cases) {
    const element = document.createElement("div");
    const view = new MarkdownView(element);
    for (const piece of pieces) view.append(piece);
    view.finish();
    element.normalize();
    const whole = renderMarkdown(pieces.join(""));
    if (!element.isEqualNode(whole)) wrong.push([pieces, element.innerHTML, whole.innerHTML]);
  }
  return wrong;
}
"""

MARKS = st.sampled_from(
    ["*", "**", "***", "_", "__", "~~", "`", "``", "```", "```js\n", "\n", "\n\n", "# ", "## ", "- ", "  - ", "1. ",
     "10) ", "> ", "> > ", "|", "a|b\n-|-\n", "| a | b |\n|---|:-:|\n", "---", "***\n", "[", "]", "](", ")", "![", "<",
     ">", "<b>", "</script>", "<img src=x onerror=alert(1)>", "[a](https://e.example/x)", "https://e.example/a_b",
     "<https://e.example>", "javascript:alert(1)", "\\", "\t", "    ", "&amp;", "&lt;", "word", "snake_case", "\r\n",
     "\r", "\u202e", "\u2028", "é", "😀", "\x00", "~~~\n"]
)  # fmt: skip
TEXTS = st.lists(MARKS | st.text(max_size=6), max_size=40)


@pytest.fixture(scope="module")
async def bare(browser: Browser) -> AsyncIterator[Watched]:
    """Provide a page with the console's files and content security policy, without a gateway."""
    async with bare_page(browser) as watched:
        yield watched


async def rendered(bare: Watched, *texts: str) -> list[dict[str, Any]]:
    """Return the rendered form of each text: HTML, elements, and the text without link targets and buttons."""
    found: list[dict[str, Any]] = await bare.page.evaluate(RENDER, list(texts))
    return found


def letters(text: str) -> str:
    """Return the letters of a text, which Markdown never removes."""
    return "".join(re.findall(r"[^\W\d_]", text))


EXAMPLES = {
    "plain": "<p>plain</p>",
    "# One": '<h3 class="md-h1">One</h3>',
    "#### Deep": '<h3 class="md-h4">Deep</h3>',
    "#tag": "<p>#tag</p>",
    "*a* **b** ***c*** ~~d~~": "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <del>d</del></p>",
    "snake_case_name 2*3*4": "<p>snake_case_name 2<em>3</em>4</p>",
    "`a*b*` ``x`y``": "<p><code>a*b*</code> <code>x`y</code></p>",
    "- a\n- b\n  - c": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li></ul>",
    "3. a\n4. b": '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>',
    "> a\n> b": "<blockquote><p>a\nb</p></blockquote>",
    "---": "<hr>",
    "a | b\n--|--:\n1 | 2": '<div class="md-table" tabindex="0" role="group" aria-label="Table"><table><tr>'
    '<th scope="col">a</th><th scope="col" class="md-right">b</th></tr><tr><td>1</td><td class="md-right">2</td></tr>'
    "</table></div>",
    "[a](https://e.example/x)": '<p><a href="https://e.example/x" rel="noopener noreferrer nofollow" target="_blank">'
    'a</a><span class="md-target"> (https://e.example/x)</span></p>',
    "see https://e.example/x.": '<p>see <a href="https://e.example/x" rel="noopener noreferrer nofollow" '
    'target="_blank">https://e.example/x</a>.</p>',
    "[a](javascript:alert(1))": "<p>[a](javascript:alert(1))</p>",
    "[a](java\tscript:x)": "<p>[a](java\tscript:x)</p>",
    "[a](https://bank.example@evil.example/)": "<p>[a](https://bank.example@evil.example/)</p>",
    "![a](https://e.example/i.png)": '<p><a href="https://e.example/i.png" rel="noopener noreferrer nofollow" '
    'target="_blank" class="md-image">a</a><span class="md-target"> (image: https://e.example/i.png)</span></p>',
    "<b>x</b>": "<p>&lt;b&gt;x&lt;/b&gt;</p>",
    "```py\na\n\tb\n```\nc": '<div class="md-code"><div class="md-code-head"><span>py</span>'
    '<button type="button" class="button small copy">Copy</button></div>'
    '<pre tabindex="0"><code>a\n\tb</code></pre></div><p>c</p>',
    "**[0, 1)**": "<p><strong>[0, 1)</strong></p>",
}


async def test_markdown_becomes_the_elements_that_it_means(bare: Watched) -> None:
    """Each form of Markdown that the console supports gives its elements. All other text stays text."""
    found = await rendered(bare, *EXAMPLES)
    for (source, wanted), shown in zip(EXAMPLES.items(), found, strict=True):
        html = shown["html"].removeprefix('<div class="md">').removesuffix("</div>")
        assert html == wanted, source


@settings(max_examples=25)
@given(cases=st.lists(TEXTS, min_size=10, max_size=30))
async def test_no_text_makes_other_elements_or_attributes(bare: Watched, cases: list[list[str]]) -> None:
    """Any Markdown text is rendered with only allowed elements and attributes. Links lead to web or mail addresses, and
    no letter of the text is lost or added."""
    texts = ["".join(case) for case in cases]
    for source, shown in zip(texts, await rendered(bare, *texts), strict=True):
        for name, attributes, namespace, href in shown["nodes"]:
            assert namespace == "http://www.w3.org/1999/xhtml"
            assert set(attributes) <= ALLOWED[name], (source, name, attributes)
            assert href is None or href.startswith(("http://", "https://", "mailto:"))
        if "](" not in source:
            assert letters(shown["text"]) == letters(source), source
    assert await bare.faults() == []


@settings(max_examples=25)
@given(cases=st.lists(TEXTS, min_size=10, max_size=30))
async def test_pieces_give_what_the_whole_text_gives(bare: Watched, cases: list[list[str]]) -> None:
    """A text that arrives in pieces is shown at the end like the whole text, however it is split."""
    assert await bare.page.evaluate(IN_PIECES, [case or [""] for case in cases]) == []


LONG = {
    "openers": "*a **b ~~c " * 6_000,
    "brackets": "[" * 20_000 + "](" * 12_000,
    "links": "[a](b " * 10_000,
    "backticks": "".join("`" * (1 + i % 300) + "a" for i in range(400)),
    "quotes": "> > > > > > > > > > > a\n" * 3_000,
    "lists": "- - - - - - - - - - a\n  - b\n" * 400,
    "table": "|" * 500 + "\n" + "|-" * 500 + "|\n" + "|\n" * 4_000,
    "urls": "http://" * 5_000,
    "autolinks": "<http://a" * 1_500,
    "fence": "```\n" + "x = 1\n" * 10_000,
    "paragraph": "word " * 15_000,
    "runs": "_" * 30_000 + " *" * 15_000,
    "escapes": "\\*" * 30_000,
}


@pytest.mark.parametrize("name", LONG)
async def test_time_is_linear_in_the_length(bare: Watched, name: str) -> None:
    """Rendering time grows linearly with the length of a text, whether the text arrives at once or in 200 pieces. Some
    of the texts take quadratic time in careless renderers."""
    text = LONG[name]
    script = """
    async ([text, pieces]) => {
      const { MarkdownView } = await import("/console/static/markdown.js");
      const time = (length) => {
        const view = new MarkdownView(document.createElement("div"));
        const size = Math.ceil(length / pieces);
        const began = performance.now();
        for (let at = 0; at < length; at += size) view.append(text.slice(at, Math.min(at + size, length)));
        view.finish();
        return performance.now() - began;
      };
      time(text.length / 16);
      const least = (length) => Math.min(time(length), time(length));
      return [least(text.length / 4), least(text.length)];
    }
    """
    for pieces in (1, 200):
        for _ in range(3):  # other work on the machine may slow down one measurement
            quarter, whole = await bare.page.evaluate(script, [text, pieces])
            if whole <= 10 * quarter + 100:
                break
        else:
            pytest.fail(f"in {pieces} pieces: {quarter} ms for a quarter of the text, {whole} ms for the whole")
    assert await bare.faults() == []


async def test_a_fence_that_arrives_is_not_rendered_again(bare: Watched) -> None:
    """While the text of a code block arrives, the page keeps the block's element. So the block's copy button and a
    selection in the block are kept too."""
    script = """
    async () => {
      const { MarkdownView } = await import("/console/static/markdown.js");
      const element = document.createElement("div");
      const view = new MarkdownView(element);
      view.append("text\\n\\n```js\\nlet a");
      view.append(" = 1;\\n");
      const pre = element.querySelector("pre");
      for (let i = 0; i < 50; i += 1) view.append(`a += ${i};\\n`);
      return [pre === element.querySelector("pre"), element.querySelector("code").textContent.length];
    }
    """
    assert await bare.page.evaluate(script) == [True, len("let a = 1;\n") + sum(len(f"a += {i};\n") for i in range(50))]
