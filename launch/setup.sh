#!/usr/bin/env bash
# Sets up everything that the demo and the tests need; quick where that is done already.
# Uses the active virtual environment, or else makes .venv here. Leaves the interpreter in $python
# for a script that sources this one. PYTHON=... picks the interpreter that makes .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "${VIRTUAL_ENV:-}" ]; then
  python="$VIRTUAL_ENV/bin/python"
else
  python="$PWD/.venv/bin/python"
  if [ ! -x "$python" ]; then
    base="${PYTHON:-python3}"
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "set-up: $base is older than Python 3.11; name a newer one: PYTHON=python3.12 $0" >&2
      exit 1
    fi
    echo "set-up: making .venv with $("$base" --version)"
    "$base" -m venv .venv
  fi
fi

# The distribution's name, because "import lhcp" works from this folder without an installation.
ready='import importlib.metadata as m; [m.version(n) for n in ("lhcp", "torch", "tyro", "rich", "safetensors", "matplotlib", "pytest", "hypothesis", "ruff", "mypy", "tabulate", "types-tabulate", "transformers", "accelerate")]'
if ! "$python" -c "$ready" 2>/dev/null; then
  if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    echo "set-up: a GPU is there, torch is chosen by pip"
  elif ! "$python" -c 'import torch' 2>/dev/null; then
    echo "set-up: no GPU seen, installing torch==2.13.0"
    "$python" -m pip install --quiet torch==2.13.0
  fi
  echo "set-up: installing lhcp with its training, benchmark and test tools"
  "$python" -m pip install --quiet -e ".[train,dev]"
fi
echo "set-up: ready, $("$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)')"
