#!/usr/bin/env bash
# benchmarks/gpu.sh [--smoke] [PART…]   what gpu.py measures; all parts by default
# A part that its time limit (LIMIT seconds, 540 by default) stops goes on in the next call.
# JSON=FILE is where results go; WORKDIR and DATA_DIR are for accuracy (CIFAR-10).
set -uo pipefail
cd "$(dirname "$0")/.."
smoke=()
if [ "${1:-}" = --smoke ]; then smoke=(--smoke); shift; fi
if [ $# -eq 0 ]; then set -- environment parity steps-32 steps-224 dispatch accuracy; fi
export PYTHONPATH=. XLA_PYTHON_CLIENT_PREALLOCATE=false  # PyTorch needs memory, too
status=0
for part in "$@"; do
    echo "== $part"
    timeout --kill-after=20 "${LIMIT:-540}" python -W ignore benchmarks/gpu.py "$part" \
        "${smoke[@]}" --out "${JSON:-benchmarks/results/gpu.json}" || { status=1; echo "$part: not whole"; }
done
exit $status
