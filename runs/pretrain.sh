#!/usr/bin/env bash
# Reproduces: the vision-language pre-training (VLP) of ManagerTower on 4M pictures (ACL 2023,
#   section 4; TCSVT 2025, section III), from which tables III and VII of TCSVT 2025 start.
# The paper:  no number of its own; after fine-tuning, table III has 79.39 on VQAv2 test-dev, 82.81
#   on NLVR2 dev, 81.26 on SNLI-VE dev, 86.56 / 95.64 for IR@1 / TR@1 on Flickr30K: see the others.
# Needs:      COCO, Visual Genome, SBU and CC3M in DATA (or their downloads in RAW); the encoders
#   CLIP (HF's clip-vit-base-patch16) and ROBERTA (roberta-base) as folders; NPROC GPUs of 80 GB.
# Hours:      about 55 on 8 A100, about 22 on 8 H100. An estimate from counted FLOPs at 50% and 40%
#   of the peak, not a measurement; the README has the table.
# Run:        DATA=D CLIP=C ROBERTA=R bash runs/pretrain.sh [flags of train.py]
#             bash runs/pretrain.sh --demo [OUT]       (built-in scenes, a few steps on a CPU)
set -euo pipefail
. "$(dirname "$0")/common.sh"
read_arguments "$@"

if [ "$DEMO" = yes ]; then
  launch train.py --recipe demo --out_dir "$OUT/pretrain" "${SHORT[@]}" "${EXTRA[@]}"
else
  need_tower_encoders
  prepare coco vg sbu cc3m
  launch train.py --recipe pretrain --data_root "$DATA" --vision "$CLIP" --text "$ROBERTA" \
    --out_dir "$OUT/pretrain" "${EXTRA[@]}"
fi
