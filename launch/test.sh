#!/usr/bin/env bash
# Sets up, then runs the tests. Arguments go to pytest: launch/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec "$python" -m pytest "$@"
