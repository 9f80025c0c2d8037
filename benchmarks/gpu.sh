#!/usr/bin/env bash
# Measures everything that needs a GPU, in about 8 minutes.
#
#     benchmarks/gpu.sh [ROOT] [--smoke]          # ROOT: the folder with cifar-10-batches-py, by default data
#
# Results go to the folder $OUT, by default benchmarks/results: gpu_*.json and gpu_*.png. A part that fails or takes too
# long does not keep the others from running; the exit status is then 1. Of recipes those
# runs count that were done in time.
cd "$(dirname "$0")/.." || exit 1
root=${1:-data}
shift || true
export PYTHONPATH=$PWD
status=0
for part in "time94 190" "images 90" "time96 120" "sync 45" "resume 75" "live 50" "user 40"; do
    read -r name seconds <<<"$part"
    echo "== $name, at most $seconds s"
    timeout --kill-after=5 "$seconds" python -m benchmarks.gpu "$name" --root "$root" --timeout $((seconds - 5)) "$@" || status=1
done
exit $status
