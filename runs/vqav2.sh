#!/usr/bin/env bash
# Reproduces: VQAv2 with the base model (TCSVT 2025, table III with VLP, tables I and V without).
# The paper:  with VLP     79.39 test-dev, 79.15 test-std
#             without VLP  76.65 test-dev
# Needs:      VQAv2 with COCO's pictures in DATA (or the downloads in RAW); with VLP a checkpoint of
#   pretrain.sh; without VLP the encoders CLIP (HF's clip-vit-base-patch16) and ROBERTA
#   (roberta-base) as folders; NPROC GPUs. The papers' numbers come from the server of EvalAI:
#   upload submission.json, which this script writes beside the checkpoint.
# Hours:      about 2.2 on 8 A100. An estimate, not a measurement: 10 epochs of 645,381 questions at
#   1,516 counted GFLOP each, at 50% of the peak, without the loading of the pictures.
# Run:        DATA=D bash runs/vqav2.sh --init out/pretrain [flags of finetune.py]
#             DATA=D CLIP=C ROBERTA=R bash runs/vqav2.sh --init unimodal
#             bash runs/vqav2.sh --demo [OUT]          (built-in scenes, a few steps on a CPU)
set -euo pipefail
. "$(dirname "$0")/common.sh"
read_arguments "$@"
downstream vqav2 --split test --submit FOLDER/submission.json
