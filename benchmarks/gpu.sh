#!/usr/bin/env bash
# Measures everything that needs a GPU, in under 9 minutes; not measured on a GPU so far.
#
#     benchmarks/gpu.sh [ROOT] [--smoke]          # ROOT: the folder with cifar-10-batches-py, by default data
#
# Results go to the folder $OUT, by default benchmarks/results: gpu_*.json and gpu_*.png. A part that fails or takes too
# long does not keep the others from running; the exit status is then 1.
cd "$(dirname "$0")/.." || exit 1
root=${1:-data}
shift || true
export PYTHONPATH=$PWD
status=0
for part in "time94 130" "time96 110" "images 105" "sync 30" "user 40" "resume 30" "live 50"; do
    read -r name seconds <<<"$part"
    echo "== $name, at most $seconds s"
    timeout --kill-after=5 "$seconds" python -m benchmarks.gpu "$name" --root "$root" --timeout $((seconds - 5)) "$@" || status=1
done
exit $status
