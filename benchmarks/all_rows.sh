#!/usr/bin/env bash
# Measures every row on a GPU machine and appends them to benchmarks/results, the most wanted parts first.
#
#     benchmarks/all_rows.sh [PART ...]      parts: int4 bf16 fp8 7b kernels head int8 server compare online
#
# PYTHON, REPEATS, TRACE (Azure's conversation trace) and OUT_DIR may be set. A row is stored when it is
# measured, so a run that is cut short keeps what it has. On one H200, from an empty cache, the first four
# parts take about eight minutes, the others about as long.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
repeats=${REPEATS:-3}
out=${OUT_DIR:-benchmarks/results}
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(int4 bf16 fp8 7b kernels head int8 server compare online)

bench() { "$python" -m sailfish.cli.main bench "$@" --repeats "$repeats"; }
engine() { bench engine --shape "$@" --out "$out/engine.jsonl"; }
replay=()
[ -z "${TRACE:-}" ] || replay=(--trace "$TRACE")
rows="decode,ttft 2048,tput 512,resident weights,host,gpu idle"

for part in "${parts[@]}"; do
    echo "== $part, after $SECONDS s"
    case $part in
        int4) engine llama-3.1-8b --weights int4 --only "$rows,prefill 64,start" ;;
        bf16) engine llama-3.1-8b "${replay[@]}" --only "$rows,prefill 64,generate B=16,generate B=64,generate B=256,prefix 90,replay 16,start" ;;
        fp8) engine llama-3.1-8b --weights fp8 --only "$rows" ;;
        7b) engine llama-2-7b --weights int4 --only "decode,resident weights" ;;
        kernels) bench kernels --out "$out/kernels.jsonl" ;;
        head)
            engine llama-3.1-8b --weights int4 --head int4 --embedding int8 --only "decode B=1*,resident weights" \
                --batches 1
            engine llama-2-7b --weights int4 --head int8 --embedding int8 --only "resident weights"
            ;;
        int8) engine llama-3.1-8b --weights int8 --only "decode,ttft 2048" ;;
        server)
            for processes in 1 8; do
                bench server --step-ms 15 --api-processes $processes --out "$out/server.jsonl"
            done
            ;;
        compare)
            PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
                "$python" benchmarks/compare_torch.py --repeats "$repeats" --out "$out/compare.jsonl"
            ;;
        online) engine llama-3.1-8b "${replay[@]}" --only "prefix 0,prefix 50,replay 8,replay 24" ;;
        *) echo "no part is called $part" >&2 && exit 2 ;;
    esac
done
