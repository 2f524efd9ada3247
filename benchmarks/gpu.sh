#!/usr/bin/env bash
# benchmarks/gpu.sh [--smoke] [PART…]   what gpu.py measures; all parts by default
# A part that its time limit (LIMIT seconds, 540 by default) stops goes on in the next call.
# JSON=FILE is where results go; WORKDIR and DATA_DIR are for accuracy (CIFAR-10).
# With DATA_ROOT=DIR, which has a directory a dataset, the part "results" trains every row of
# docs/results.md that has no result yet.
set -uo pipefail
cd "$(dirname "$0")/.."
smoke=()
if [ "${1:-}" = --smoke ]; then smoke=(--smoke); shift; fi
if [ $# -eq 0 ]; then
    set -- environment parity steps-32 steps-224 dispatch accuracy ${DATA_ROOT:+results}
fi
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} XLA_PYTHON_CLIENT_PREALLOCATE=false  # PyTorch needs memory, too
status=0
for part in "$@"; do
    echo "== $part"
    command=(benchmarks/gpu.py "$part" "${smoke[@]}" --out "${JSON:-benchmarks/results/gpu.json}")
    if [ "$part" = results ]; then
        device=$(python -c 'import jax; print(jax.devices()[0].device_kind)')
        command=(benchmarks/train_results.py --missing --data-root "$DATA_ROOT" --hardware "$device")
    fi
    timeout --kill-after=20 "${LIMIT:-540}" python -W ignore "${command[@]}" ||
        { status=1; echo "$part: not whole"; }
done
exit $status
