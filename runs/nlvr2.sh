#!/usr/bin/env bash
# Reproduces: NLVR2 with the base model (TCSVT 2025, table III).
# The paper:  with VLP     82.81 dev, 83.34 test-P (here: test1)
#             without VLP  no number
# Needs:      NLVR2 with its pictures in DATA (or the downloads in RAW); with VLP a checkpoint of
#   pretrain.sh; without VLP the encoders CLIP (HF's clip-vit-base-patch16) and ROBERTA
#   (roberta-base) as folders; NPROC GPUs.
# Hours:      about 0.12 on 8 A100. An estimate, not a measurement: 5 epochs of 86,373 statements
#   about two pictures at 1,262 counted GFLOP, at 50% of the peak, without the loading of pictures.
# Run:        DATA=D bash runs/nlvr2.sh --init out/pretrain [flags of finetune.py]
#             DATA=D CLIP=C ROBERTA=R bash runs/nlvr2.sh --init unimodal
#             bash runs/nlvr2.sh --demo [OUT]          (built-in scenes, a few steps on a CPU)
set -euo pipefail
. "$(dirname "$0")/common.sh"
read_arguments "$@"
downstream nlvr2
