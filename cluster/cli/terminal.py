"""Terminal output in which untrusted text is made safe. Every command prints through this module.

Names, reasons, token subjects, error messages and model output reach an operator's terminal. Control characters in such
texts could move the cursor, rewrite lines, set the window's title or enter commands. Directional marks could reorder
the displayed text. Therefore both kinds are printed as escapes, e.g. \\x1b and \\u202e; in JSON, as JSON escapes.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

_UNSAFE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]|\r(?!\n)"
)
"""Pattern of unsafe characters.

The unsafe characters are C0 and C1 controls except tab and line ends, directional and invisible marks, line
separators, surrogates and tags.
"""


def safe(text: str) -> str:
    """Replace each unsafe character of a text by an escape."""
    return _UNSAFE.sub(_escaped, text)


def safe_json(text: str) -> str:
    """Replace each unsafe character of a JSON text by a JSON escape. The parsed value of the text stays the same."""
    return _UNSAFE.sub(lambda match: json.dumps(match[0])[1:-1], text)


def write(text: str) -> None:
    """Write a text to standard output and flush.

    On a terminal, unsafe characters are escaped. Into a file or a pipe, the text is written unchanged.
    """
    sys.stdout.write(safe(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """Write a value as JSON to standard output."""
    sys.stdout.write(safe_json(json.dumps(value, indent=2, ensure_ascii=False)) + "\n")


def say(text: str, *, error: bool = False) -> None:
    """Write a line of text to standard output, or to standard error with `error`. Unsafe characters are escaped."""
    stream = sys.stderr if error else sys.stdout
    stream.write(safe(text) + "\n")
    stream.flush()


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
