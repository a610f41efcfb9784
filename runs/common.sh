# What the scripts of this folder share. They source it; it is not run by itself.
#
# Environment of all scripts:
#   NPROC   processes, one for each GPU (default 8)
#   OUT     where the runs are written to (default out)
#   DATA    folder of the manifests that prepare.py writes, or of .arrow files of the ViLT family
#   RAW     folder of the downloads: if it is set, prepare.py first makes DATA's manifests from it
set -euo pipefail

RUNS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
HOUSE=$(dirname "$RUNS")
NPROC=${NPROC:-8}
OUT=${OUT:-out}
DEMO=no
INIT=
EXTRA=()

# a run of a few steps on a CPU
SHORT=(--max_steps 3 --batch_size 8 --micro_batch_size 8 --eval_size 16 --eval_every 0)
SHORT+=(--log_every 1 --num_workers 0)

fail() {
  echo "error: $1" >&2
  exit 1
}

# read_arguments "$@": --demo [OUT], --init WHAT, -h; all others go on to the training script
read_arguments() {
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
      --demo)
        DEMO=yes
        if [ $# -gt 1 ] && [[ $2 != --* ]]; then
          OUT=$2
          shift
        else
          OUT=$(mktemp -d)
        fi
        ;;
      --init)
        [ $# -gt 1 ] || fail "--init needs a value: a checkpoint folder, or unimodal"
        INIT=$2
        shift
        ;;
      *) EXTRA+=("$1") ;;
    esac
    shift
  done
}

# need NAME "what it is": an environment variable that has to name something that exists
need() {
  local value=${!1:-}
  [ -n "$value" ] || fail "set $1 to $2"
  [ -e "$value" ] || fail "$1 is $value, which does not exist; it must be $2"
}

# launch SCRIPT FLAGS: one process on each GPU; in the demo one process
launch() {
  echo "+ $*"
  if [ "$DEMO" = yes ]; then
    python "$HOUSE/$1" "${@:2}"
  else
    torchrun --standalone --nproc_per_node "$NPROC" "$HOUSE/$1" "${@:2}"
  fi
}

# prepare SET ...: the manifests of these sets, if RAW is set; otherwise DATA has to have them
prepare() {
  if [ -z "${RAW:-}" ]; then
    need DATA "the folder of the manifests or .arrow files, or set RAW too, to make them"
    return
  fi
  need RAW "the folder of the downloads"
  [ -n "${DATA:-}" ] || fail "set DATA to the folder that the manifests are to be written to"
  for set in "$@"; do
    echo "+ prepare.py $set"
    python "$HOUSE/prepare.py" "$set" --root "$RAW" --out "$DATA"
  done
}

# make_demo_inputs: small encoders and conversations below OUT, and the variables that name them
make_demo_inputs() {
  python "$RUNS/demo_inputs.py" "$OUT/inputs"
  CLIP=$OUT/inputs/clip
  ROBERTA=$OUT/inputs/roberta
  SIGLIP=$OUT/inputs/siglip
  QWEN2=$OUT/inputs/qwen2
}

need_tower_encoders() {
  need CLIP "the folder of HF's clip-vit-base-patch16"
  need ROBERTA "the folder of HF's roberta-base"
}

# finetune_and_evaluate TASK INIT FLAGS_OF_EVAL: in the latter FOLDER stands for the run's folder
finetune_and_evaluate() {
  local task=$1 init=$2 folder=$OUT/$1
  local where=(--data_root "${DATA:-}") begin=(--init "$init") short=() eval_flags=("${@:3}")
  if [ "$init" = unimodal ]; then
    folder=$OUT/${task}_unimodal
    begin+=(--vision "$CLIP" --text "$ROBERTA")
  fi
  if [ "$DEMO" = yes ]; then
    where=(--data demo)
    short=("${SHORT[@]}")
    eval_flags+=(--k_test 4)
    [ "$init" != unimodal ] || short+=(--model tiny)
  fi
  launch finetune.py --task "$task" "${where[@]}" "${begin[@]}" --out_dir "$folder" \
    "${short[@]}" "${EXTRA[@]}"
  launch eval.py --task "$task" "${where[@]}" --checkpoint "$folder" \
    "${eval_flags[@]//FOLDER/$folder}"
}

# downstream TASK FLAGS_OF_EVAL: prepare, fine-tune, evaluate; the demo with and without VLP
downstream() {
  if [ "$DEMO" = yes ]; then
    make_demo_inputs
    bash "$RUNS/pretrain.sh" --demo "$OUT"
    finetune_and_evaluate "$1" "$OUT/pretrain" "${@:2}"
    finetune_and_evaluate "$1" unimodal "${@:2}"
    echo "demo of $1: with VLP in $OUT/$1, without in $OUT/${1}_unimodal"
    return
  fi
  [ -n "$INIT" ] || fail "say what to start from: --init $OUT/pretrain, or --init unimodal (without VLP)"
  [ "$INIT" != unimodal ] || need_tower_encoders
  prepare "$1"
  finetune_and_evaluate "$1" "$INIT" "${@:2}"
}
