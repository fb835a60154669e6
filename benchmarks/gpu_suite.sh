#!/usr/bin/env bash
# usage: benchmarks/gpu_suite.sh OUT [DATA_ROOT]
#
# On a machine with a GPU: the gpu tests, all benchmarks and a training of the paper's full length, in about 8 minutes.
# Writes gpu-tests.xml, loaders.json, step.json, train.json, their charts and paper/summary.json into OUT. Needs Python
# (PYTHON, else python3) with PyTorch, and CIFAR-10 prepared in DATA_ROOT (else ./data); no network and no git. Packages
# that Python lacks (tyro, rich, DALI, ...) can be given as wheels in WHEELS (else ./wheels): they are put beside OUT.
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/gpu_suite.sh OUT [DATA_ROOT]}")
root=$(realpath -m "${2:-data}")
wheels=$(realpath -m "${WHEELS:-wheels}")
python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out" || exit 1
export PYTHONPATH="$out.packages:$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()

stage() { # stage NAME SECONDS COMMAND...
  local name=$1 seconds=$2 began=$SECONDS
  shift 2
  echo "=== $name"
  timeout --signal=INT --kill-after=10 "$seconds" "$@" || failed+=("$name (exit $?)")
  echo "=== $name: $((SECONDS - began)) s"
}

if compgen -G "$wheels/*.whl" >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$out.packages" "$wheels"/*.whl || exit 1
fi
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "PyTorch sees no GPU" >&2; exit 2; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

stage "gpu tests" 150 "$python" -m pytest -q -m gpu --junitxml "$out/gpu-tests.xml" tests
stage "benchmarks" 200 "$python" -m benchmarks all --quick --root "$root" --out "$out"
stage "paper" 120 "$python" -m fastresnet train paper --model resnet20 --root "$root" --out "$out/paper"

if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi
