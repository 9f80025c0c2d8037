#!/usr/bin/env bash
# Measures everything that needs a GPU, in 8 minutes at most.
#
#     benchmarks/gpu.sh [ROOT] [--smoke]          # ROOT: the folder with cifar-10-batches-py, by default data
#
# Results go to the folder $OUT, by default benchmarks/results: gpu_*.json and gpu_*.png. A part that fails or takes too
# long does not keep the others from running; the exit status is then 1. What was measured in time counts.
cd "$(dirname "$0")/.." || exit 1
python=$(command -v python || command -v python3)
root=${1:-data}
shift || true
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
status=0
part() {
    echo "== $1, at most $2 s"
    # Less by what it takes to begin, and to write.
    timeout --kill-after=5 "$2" "$python" -m benchmarks.gpu "$1" --root "$root" --timeout $(($2 - 12)) "${@:3}"
}
part time94 140 "$@" || status=1
# Sync and resume take no times: they run while the networks of time96 are compiled, whose runs wait until they are done.
busy=$(mktemp)
{
    part sync 65 "$@" &
    part resume 65 "$@"
    resumed=$?
    wait $!
    synced=$?
    rm "$busy"
    exit $((resumed | synced))
} &
HOLD=$busy part time96 215 "$@" || status=1
wait $! || status=1
part images 50 "$@" || status=1
part live 35 "$@" || status=1
part user 40 "$@" || status=1
exit $status
