#!/bin/bash
# Regenerates the Python code for protos/ in place. With --check, the script only compares the code.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
readarray -t protos < <(find protos -name '*.proto' | sort)

generate() {
  python -m grpc_tools.protoc -Iprotos --python_out="$1" --grpc_python_out="$1" --mypy_out="quiet:$1" --mypy_grpc_out="quiet:$1" "${protos[@]}"
}

if [ "${1:-}" != --check ]; then
  generate .
  exit
fi
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
generate "$fresh"
stale=0
while read -r file; do
  if ! cmp -s "$fresh/$file" "$file"; then
    echo "$file differs from what protos/ generates"
    stale=1
  fi
done < <({ (cd "$fresh" && find cluster -type f); find cluster -name '*_pb2*.py*' -not -path '*/__pycache__/*'; } | sort -u)
if [ "$stale" = 1 ]; then
  echo "generated code is stale: run \`make protos\` and commit the changes"
  exit 1
fi
echo "generated code is up to date"
