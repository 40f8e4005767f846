"""Text that other parties chose, made safe for a terminal; every command prints through this module.

Names, reasons, subjects of tokens, error messages and model output reach an operator's terminal. Control characters in
them would move the cursor, rewrite lines, set the window's title or answer for the user; directional marks would show
another order than is there. Such characters are shown as escapes, in JSON as its own: \\x1b, \\u202e.
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
"""C0 and C1 controls but tab and line ends, directional and invisible marks, line separators, lone surrogates, tags."""


def safe(text: str) -> str:
    """The text with each unsafe character as an escape."""
    return _UNSAFE.sub(_escaped, text)


def safe_json(text: str) -> str:
    """The same of a JSON text, which means the same to a program."""
    return _UNSAFE.sub(lambda found: json.dumps(found[0])[1:-1], text)


def write(text: str) -> None:
    """Write to standard output, at once: safe on a terminal, byte for byte into a file or a pipe."""
    sys.stdout.write(safe(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """A value as JSON on standard output."""
    sys.stdout.write(safe_json(json.dumps(value, indent=2, ensure_ascii=False)) + "\n")


def say(text: str, *, error: bool = False) -> None:
    """A line for people, on standard output or standard error."""
    stream = sys.stderr if error else sys.stdout
    stream.write(safe(text) + "\n")
    stream.flush()


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
