#!/usr/bin/env bash
# Reproduces: the four models of LLaVA-OV-Manager 0.5B (TCSVT 2025, tables XI to XIII), through the
#   stages 1, 1.5 and 2.
# The paper:  mean of 20 datasets, zero-shot:  baseline 50.61, +manager 51.67, +grid 53.87,
#   +grid+manager 55.21. They are measured with lmms-eval, which this script does not run: it leaves
#   four checkpoints and prints their loss on held-out conversations.
# Needs:      SIGLIP (HF's siglip-so400m-patch14-384) and QWEN2 (Qwen2-0.5B-Instruct) as folders;
#   STAGE1, STAGE1_5, STAGE2, LLaVA's .json or a mixture of them (.yaml); IMAGES, the folder of
#   their pictures; NPROC GPUs of 80 GB.
# Hours:      about 260 on 16 A100 for all four, and twice as much on 8. An estimate: the samples of
#   the stages (558K, 4M, 3.2M) times the milliseconds a sample that the paper gives (11.84, 12.22,
#   51.95, 54.17); stage 1.5 is taken to cost as much a sample as stage 2.
# Run:        SIGLIP=S QWEN2=Q STAGE1=A STAGE1_5=B STAGE2=C IMAGES=I bash runs/llava.sh
#             MODELS="baseline grid_manager" ... bash runs/llava.sh      (only some of the four)
#             bash runs/llava.sh --demo [OUT]          (built-in scenes, a few steps on a CPU)
set -euo pipefail
. "$(dirname "$0")/common.sh"
read_arguments "$@"

INJECTION=() # where the small model of the demo has its managers
PINPOINTS=() # and its tiles in stage 1.5
if [ "$DEMO" = yes ]; then
  make_demo_inputs
  IMAGES=$OUT/inputs/chat
  STAGE1=$IMAGES/captions.json
  STAGE1_5=$IMAGES/conversations.json
  STAGE2=$IMAGES/conversations.json
  EXTRA+=("${SHORT[@]}")
  INJECTION=(--managed_layers 1,2 --inject_layers 0,2)
  PINPOINTS=(--grid_pinpoints "[[32,64],[64,32],[64,64],[96,32],[32,96]]")
fi
need SIGLIP "the folder of HF's siglip-so400m-patch14-384"
need QWEN2 "the folder of HF's Qwen2-0.5B-Instruct"
need STAGE1 "the captions of stage 1, such as blip_laion_cc_sbu_558k.json"
need STAGE1_5 "the conversations of stage 1.5, a .json or a mixture (.yaml)"
need STAGE2 "the conversations of stage 2, a .json or a mixture (.yaml)"
need IMAGES "the folder of the pictures"

# one stage: RECIPE DATA_PATH OUT_DIR FLAGS
stage() {
  launch train.py --recipe "$1" --data_path "$2" --image_folder "$IMAGES" --out_dir "$3" \
    "${@:4}" "${EXTRA[@]}"
}

for model in ${MODELS:-baseline manager grid grid_manager}; do
  case $model in
    baseline) manager=none grid=false ;;
    manager) manager=static grid=false ;;
    grid) manager=none grid=true ;;
    grid_manager) manager=static grid=true ;;
    *) fail "MODELS has $model; it must be some of baseline, manager, grid, grid_manager" ;;
  esac
  # stage 1 has no grid, so two models share it: the second time it is finished, and stays as it is
  aligned=$OUT/llava_stage1_$manager
  managers=(--manager_type "$manager")
  [ "$manager" = none ] || managers+=("${INJECTION[@]}")
  stage llava_stage1 "$STAGE1" "$aligned" --vision "$SIGLIP" --text "$QWEN2" "${managers[@]}"
  tiles=(--grid "$grid")
  [ "$grid" = false ] || tiles+=("${PINPOINTS[@]}")
  stage llava_stage1_5 "$STAGE1_5" "$OUT/llava_${model}_stage1_5" --init "$aligned" "${tiles[@]}"
  stage llava_stage2 "$STAGE2" "$OUT/llava_$model" --init "$OUT/llava_${model}_stage1_5" --grid "$grid"
done
[ "$DEMO" = no ] || echo "demo of the MLLM: the four models are in $OUT/llava_MODEL"
