"""Small built-in text in several scripts. The tests train their tokenizers on this text in under a second.

Some scripts are rare in the text on purpose. A tokenizer of a few hundred pieces then splits each character of a rare
script over several tokens. The tests of the detokenizer need such tokens.
"""

from __future__ import annotations

ENGLISH = """The river turns the wheel, and the wheel turns the stones that grind the corn.
A headrace is the channel which carries water to a mill; a gate at its mouth decides how much may pass.
What is the capital of France? The capital of France is Paris, and the capital of Germany is Berlin.
Once upon a time there was a small village by the sea where nobody had ever seen a train.
You are a helpful assistant. Please answer the question as well as you can, step by step.
def add(a: int, b: int) -> int:
    return a + b
for i in range(10):
    print(f"{i} squared is {i * i}")
{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius", "days": 3}}
In 2026 there were 1,234,567 requests and 98.7 percent of them were answered within 0.5 seconds.
It's been a long day; they've said they'll come, but I don't know whether we'd have waited.
"""

LATIN = """Où est la bibliothèque? L'été dernier, les élèves ont préféré le café près de l'église.
Der große Fluß fließt über die Brücke; können Sie mir bitte den Weg zum Bahnhof erklären?
El niño pequeño comió una piña mañana y después soñó con montañas, corazón y año nuevo.
Příliš žluťoučký kůň úpěl ďábelské ódy. Zażółć gęślą jaźń. Árvíztűrő tükörfúrógép.
"""

OTHER = """Москва - столица России, а река течёт через весь город и впадает в другую реку.
今天天气很好，我们一起去公园吧。人工智能正在改变世界。
東京は日本の首都です。こんにちは、世界。ありがとうございます。
안녕하세요 세계. 오늘 날씨가 정말 좋습니다.
مرحبا بالعالم، كيف حالك اليوم؟
नमस्ते दुनिया, आप कैसे हैं?
😀 😃 🎉 🚀 ❤️ 👩‍💻 👨‍👩‍👧‍👦 🇫🇷 🇩🇪 ✨
"""

SENTENCES: tuple[str, ...] = tuple(
    line for block, weight in ((ENGLISH, 8), (LATIN, 3), (OTHER, 1)) for line in block.splitlines() * weight
)
"""Text on which the tokenizers are trained: mostly English, other scripts seldom."""

SAMPLES: tuple[str, ...] = tuple((ENGLISH + LATIN + OTHER).splitlines())
"""Every line once, for tests that need text in all scripts."""
