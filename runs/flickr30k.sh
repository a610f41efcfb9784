#!/usr/bin/env bash
# Reproduces: Flickr30K retrieval with the base model (TCSVT 2025, table III with VLP, tables I and V
#   without).
# The paper:  with VLP     IR@1 86.56, TR@1 95.64
#             without VLP  RMEAN 93.97 (the mean of the six recalls)
# Needs:      Flickr30K with Karpathy's split in DATA (or the downloads in RAW); with VLP a
#   checkpoint of pretrain.sh; without VLP the encoders CLIP (HF's clip-vit-base-patch16) and
#   ROBERTA (roberta-base) as folders; NPROC GPUs.
# Hours:      about 0.8 on 8 A100. An estimate, not a measurement: 20 epochs of 150,070 captions at
#   1,157 counted GFLOP each (three passes of the cross-modal part), at 50% of the peak, without the
#   loading of the pictures.
# Run:        DATA=D bash runs/flickr30k.sh --init out/pretrain [flags of finetune.py]
#             DATA=D CLIP=C ROBERTA=R bash runs/flickr30k.sh --init unimodal
#             bash runs/flickr30k.sh --demo [OUT]      (built-in scenes, a few steps on a CPU)
set -euo pipefail
. "$(dirname "$0")/common.sh"
read_arguments "$@"
downstream flickr30k
