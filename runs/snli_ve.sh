#!/usr/bin/env bash
# Reproduces: SNLI-VE with the base model (TCSVT 2025, table III).
# The paper:  with VLP     81.26 dev, 81.44 test
#             without VLP  no number
# Needs:      SNLI-VE with Flickr30K's pictures in DATA (or the downloads in RAW); with VLP a
#   checkpoint of pretrain.sh; without VLP the encoders CLIP (HF's clip-vit-base-patch16) and
#   ROBERTA (roberta-base) as folders; NPROC GPUs.
# Hours:      about 0.3 on 8 A100. An estimate, not a measurement: 4 epochs of 529,527 hypotheses at
#   631 counted GFLOP each, at 50% of the peak, without the loading of the pictures.
# Run:        DATA=D bash runs/snli_ve.sh --init out/pretrain [flags of finetune.py]
#             DATA=D CLIP=C ROBERTA=R bash runs/snli_ve.sh --init unimodal
#             bash runs/snli_ve.sh --demo [OUT]        (built-in scenes, a few steps on a CPU)
set -euo pipefail
. "$(dirname "$0")/common.sh"
read_arguments "$@"
downstream snli_ve
