#!/usr/bin/env bash
# Measures everything that needs a GPU, in 8 minutes at most.
#
#     benchmarks/gpu.sh [ROOT] [--smoke]          # ROOT: the folder with cifar-10-batches-py, by default data
#
# Results go to the folder $OUT, by default benchmarks/results: gpu_*.json and gpu_*.png. A part that fails or takes too
# long does not keep the others from running; the exit status is then 1. What was measured in time counts.
cd "$(dirname "$0")/.." || exit 1
root=${1:-data}
shift || true
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
status=0
part() {
    echo "== $1, at most $2 s"
    # Less by what it takes to begin, and to write.
    timeout --kill-after=5 "$2" python -m benchmarks.gpu "$1" --root "$root" --timeout $(($2 - 12)) "${@:3}"
}
part time94 130 "$@" || status=1
part time96 150 "$@" || status=1
part images 50 "$@" || status=1
part live 40 "$@" || status=1
part user 45 "$@" || status=1
part sync 65 "$@" & # these two take no times: they may run side by side
part resume 65 "$@" || status=1
wait $! || status=1
exit $status
