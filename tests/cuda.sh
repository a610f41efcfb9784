#!/usr/bin/env bash
# What only a GPU shows, in about 12 minutes: numbers, training, kills, and speed at base size.
#
#     bash tests/cuda.sh [FOLDER]     # FOLDER gets every log and the numbers of bench.py as JSON
#
# Without a GPU the same commands run on the CPU with tiny models, as a test of this script.
# A part that fails does not stop the others; the last line says how many failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/cuda}
mkdir -p "$out"
failed=()

part() {  # part NAME COMMAND...: run it, keep what it prints, remember whether it failed
  local name=$1
  shift
  echo "== $name: $*"
  local start=$SECONDS
  "$@" >"$out/$name.txt" 2>&1
  local status=$?
  echo "   exit status $status after $((SECONDS - start)) s"
  if [ "$status" -ne 0 ]; then
    failed+=("$name")
    echo "   FAILED; the end of $out/$name.txt:"
    tail -n 15 "$out/$name.txt"
  fi
}

if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  size=base
  rows=(--batch_size 32)
  compile=(--compile true)
  steps=200
  python -c 'import torch; print(torch.cuda.get_device_name(), torch.version.cuda, torch.__version__)'
else
  echo "there is no CUDA device: the commands are tried on the CPU with tiny models"
  size=tiny
  rows=(--batch_size 2)
  compile=(--compile false)
  steps=4
fi

# numbers: float32 and bf16 against the CPU in float64, NCCL, fused AdamW, GradScaler, generation
part tests python -m pytest -q -m "slow or not slow" tests/test_device.py
part models python -m pytest -q tests/test_manager.py tests/test_model.py

# training: eager and compiled, and the MLLM
demo=(--max_steps "$steps" --eval_size 64 --log_every 10)
part train python train.py "${demo[@]}" --compile false --out_dir "$out/train"
part train_compiled python train.py "${demo[@]}" "${compile[@]}" --out_dir "$out/train_compiled"
part llava python train.py --recipe llava_demo "${demo[@]}" --out_dir "$out/llava"

# a kill: the same command goes on (on the CPU to the same bits; CUDA adds in no fixed order)
killed_and_resumed() {
  local run=(python train.py --max_steps 100000 --save_every 2 --eval_size 64 --out_dir "$out/killed")
  timeout --signal KILL 40 "${run[@]}" &>/dev/null
  timeout --signal INT 40 "${run[@]}"
  grep -q "resuming after step" "$out/kill.txt"
}
part kill killed_and_resumed

# speed
part bench_towers python bench.py towers --model "$size" "${rows[@]}" --json "$out/towers.json"
part bench_towers_compiled python bench.py towers --model "$size" "${rows[@]}" "${compile[@]}" \
  --json "$out/towers_compiled.json"
part bench_retrieval python bench.py retrieval --rounds 3 --json "$out/retrieval.json"
part bench_llava python bench.py llava --rounds 3 --json "$out/llava.json"
tail -n 8 "$out"/bench_*.txt

echo "${#failed[@]} parts failed ${failed[*]:-}"
[ "${#failed[@]}" -eq 0 ]
