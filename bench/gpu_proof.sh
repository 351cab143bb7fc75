#!/usr/bin/env bash
# Everything that is to be run where there is a GPU, in stages of at most 9 minutes that may be
# interrupted, and without one a rehearsal (--dry-run). See docs/gpu_proof.md, or --help.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
exec "$python" -m bench.gpu.proof "$@"
