#!/bin/bash
# Recompiles the pinned files. Pins that are there stay unless --upgrade is given.
# cpu.txt: engine, tools and demo model, without CUDA builds (requirements/never.txt says what is left out and why).
# peers.txt: the servers that the load tests put beside ours.
# base.txt: what the gateway, the client and the command line need, at the same versions.
set -euo pipefail
cd "$(dirname "$0")/.."
compile=(.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate
  --custom-compile-command "make requirements")
"${compile[@]}" "$@" --override requirements/never.txt --extra cpu --extra dev --extra bench pyproject.toml requirements/demo.in \
  --output-file requirements/cpu.txt
"${compile[@]}" --constraints requirements/cpu.txt pyproject.toml --output-file requirements/base.txt
"${compile[@]}" "$@" requirements/peers.in --output-file requirements/peers.txt
if grep -n '+' requirements/cpu.txt requirements/base.txt requirements/peers.txt; then
  echo "a local version crept in: other machines cannot install it" >&2
  exit 1
fi
