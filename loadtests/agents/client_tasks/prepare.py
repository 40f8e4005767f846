"""Program that writes the model for the part `clients` of the agents' load test.

    python -m loadtests.agents.client_tasks.prepare FILE FOLDER

FILE is a JSON object. `answers`: the text of each answer, by key. `deaths`: by key, the number of characters of the
answer after which the engine kills its worker. FOLDER gets `model` with Qwen 3's chat template, `bundle`,
`scripts.json`, `deaths.json` (numbers of tokens instead of characters) and, at the end, `models.json` with the model's
entry.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from loadtests.agents import prepare
from loadtests.agents.client_tasks.tasks import FAMILY
from loadtests.agents.families import TEMPLATES

MODEL, MAX_MODEL_TOKENS = "qwen3-scripted", 262_144


def main(file: Path, folder: Path) -> None:
    """Write the model, the tokenizer bundle and the scripts of the tasks into `folder`. `file`: JSON with the answers
    and the places where an engine dies. `models.json` is written last, as a sign that the other files are complete."""
    from cluster.worker.weights.tokenizer_bundle import build_bundle  # imports transformers

    given, model, bundle = json.loads(file.read_text()), folder / "model", folder / "bundle"
    tokenizer = prepare.write_model(FAMILY, model, MAX_MODEL_TOKENS)
    (model / "chat_template.jinja").write_text((TEMPLATES / "qwen3-training.jinja").read_text())
    (folder / "scripts.json").write_text(json.dumps(prepare.script_ids(tokenizer, given["answers"])))
    deaths = {
        key: len(tokenizer.encode(given["answers"][key][:characters], add_special_tokens=False).ids)
        for key, characters in given["deaths"].items()
    }
    (folder / "deaths.json").write_text(json.dumps(deaths))
    build_bundle(model).save(bundle)
    paths = {"folder": str(model), "bundle": str(bundle), "scripts": str(folder / "scripts.json")}
    entry = {"name": MODEL, "tools": FAMILY.tools, "reasoning": FAMILY.reasoning, **paths}
    (folder / "models.json.part").write_text(json.dumps([entry]))
    (folder / "models.json.part").rename(folder / "models.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
