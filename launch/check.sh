#!/usr/bin/env bash
# The static checks: lint, format, types. CI (.ci/run) and the commit hook (.pre-commit-config.yaml)
# both run this file, so they cannot differ. It changes nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
