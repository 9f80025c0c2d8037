#!/usr/bin/env bash
# Measures everything that needs a GPU, in 8 minutes at most.
#
#     benchmarks/gpu.sh [ROOT] [--smoke]          # ROOT: the folder with cifar-10-batches-py, by default data
#
# Results go to the folder $OUT, by default benchmarks/results: gpu_*.json and gpu_*.png. A part that fails or takes too
# long does not keep the others from running; the exit status is then 1. What was measured in time counts.
#
# To start and to compile takes most of the time, so what can start at once does; times are taken by one process at a
# time, when no other starts or compiles any more (my_turn in paired.py, by a lock on the file $TURN).
cd "$(dirname "$0")/.." || exit 1
python=$(command -v python || command -v python3)
root=${1:-data}
shift || true
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
TURN=$(mktemp)
export TURN
trap 'kill $(jobs -p) 2>/dev/null; rm -f "$TURN"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
status=0
part() { # in the background alone
    echo "== $1, at most $2 s"
    # Less by what it takes to begin, and to write.
    exec timeout --kill-after=5 "$2" "$python" -m benchmarks.gpu "$1" --root "$root" --timeout $(($2 - 15)) "${@:3}"
}
together() { # parts and their seconds, in pairs
    local jobs=()
    while [ $# -gt 0 ]; do
        part "$1" "$2" "${more[@]}" &
        jobs+=($!)
        shift 2
    done
    for job in "${jobs[@]}"; do
        wait "$job" || status=1
    done
}
more=("$@")
together sync 120 resume 120 time94 235 time96 290
together images 100 live 100
together user 85
exit $status
