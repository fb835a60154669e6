#!/usr/bin/env bash
# usage: benchmarks/gpu_suite.sh [--seconds N] [--rehearse] OUT [STAGE...]
#
# Measure on a GPU that is rented for a quarter of an hour, the most valuable first. Stages (all without STAGE):
#
#   ceilings     versions, and how fast the GPU copies and multiplies
#   smoke        a short training, step by step and as a CUDA graph
#   steps        captured steps of four trainings: images/s, memory, costliest kernels
#   candidates   changes that may make them faster, on and off in turns
#   tests        the tests that need a GPU
#   peers        end-to-end training, compared with other training loops
#   accuracy     trainings on CIFAR-10, in the remaining time
#
# Results are in the folder OUT, and all of them in OUT.tar (at most 16 MiB), which is rewritten after every stage and
# every training: a kill loses only work in progress. Data sets, packages and runs are beside it, in OUT.*.
#
#   --seconds N  end within N seconds (840 without it): stages that would take longer are cut or left out
#   --rehearse   small sizes and drawn images, to try this script anywhere, on a CPU too: NOTHING IS MEASURED THEN
#   PYTHON       a Python (else python3) with PyTorch; no network and no git are needed
#   WHEELS       a folder of wheels of packages that Python lacks (tomli_w, psutil, ...)
#   DATA         CIFAR-10: a folder of prepared data sets, an archive, or a pattern that matches the parts of a split
#                one ('cifar.tar.xz.part-*'). Without it accuracy is left out.
#
# Exit code: 0 if every stage passed, 1 if one did not, 2 on bad arguments.
set -uo pipefail

STAGES=(ceilings smoke steps candidates tests peers accuracy)
declare -A LIMITS=([ceilings]=30 [smoke]=90 [steps]=120 [candidates]=150 [tests]=150 [peers]=150 [accuracy]=86400)
TRAININGS=( # recipe, network, seed, options
  "speedrun speednet 0" "fast resnet20 0" "fast resnet20 0 --resolutions 32" "fast resnet56 0"
  "baseline resnet20 0" "paper resnet20 0"
  "fast resnet20 1" "fast resnet20 2" "fast resnet20 3" "fast resnet20 4"
  "fast resnet56 1" "fast resnet56 2"
  "baseline resnet32 0" "baseline resnet44 0" "baseline resnet56 0"
)
LARGEST_TAR=$((16 << 20)) LARGEST_LOG=$((1 << 20))
TO_KILL=5 TO_PACK=5 # seconds that are kept for the two

refuse() {
  echo "gpu_suite.sh: $1" >&2
  exit 2
}

# --- arguments --------------------------------------------------------------------------------------------------------

seconds=840 rehearse=() words=()
while (($#)); do
  case $1 in
    --seconds)
      [[ ${2:-} =~ ^[1-9][0-9]{0,5}$ ]] || refuse "--seconds ${2:-}: give a number of seconds."
      seconds=$2
      shift
      ;;
    --rehearse) rehearse=(--rehearse) ;;
    -h | --help)
      sed -n '2,/^set /{s/^# \{0,1\}//p;/^#$/p}' "$0"
      exit 0
      ;;
    -*) refuse "there is no option $1; see the top of $0." ;;
    *) words+=("$1") ;;
  esac
  shift
done
((${#words[@]})) || refuse "name a folder for the results; see the top of $0."
[[ ! -v "LIMITS[${words[0]}]" ]] || refuse "${words[0]} is a stage: name a folder for the results first."
out=$(realpath -m "${words[0]}") || exit 2
chosen=("${words[@]:1}")
((${#chosen[@]})) || chosen=("${STAGES[@]}")
for name in "${chosen[@]}"; do
  [[ -v "LIMITS[$name]" ]] || refuse "there is no stage $name. Stages: ${STAGES[*]}."
done
((seconds > TO_KILL + TO_PACK)) || refuse "--seconds $seconds: ending and packing take up to $((TO_KILL + TO_PACK))."
wheels=() parts=()
if [[ -n ${WHEELS:-} ]]; then
  mapfile -t wheels < <(compgen -G "$WHEELS/*.whl")
  ((${#wheels[@]})) || refuse "WHEELS=$WHEELS: no wheels there."
  mapfile -t wheels < <(realpath "${wheels[@]}")
fi
if [[ -n ${DATA:-} ]]; then
  mapfile -t parts < <(compgen -G "$DATA" | LC_ALL=C sort)
  ((${#parts[@]})) || refuse "DATA=$DATA: no such folder or file."
  mapfile -t parts < <(realpath "${parts[@]}")
fi

python=$(realpath -s "$(command -v "${PYTHON:-python3}")" 2>/dev/null) || refuse "PYTHON=${PYTHON:-python3}: no such program."
deadline=$((seconds - TO_KILL - TO_PACK)) # in SECONDS, which bash counts from the start
cd "$(dirname "$0")/.." && mkdir -p "$out/logs" || exit 1
export PYTHONPATH="$out.packages:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 FASTRESNET_DATA="$out.data"

# --- running and packing ----------------------------------------------------------------------------------------------

stage_end=$deadline child="" signal=TERM
exec 3>&2 # the terminal, while a stage's goes to its log

run() { # COMMAND...: within the time of the stage
  local left=$((stage_end - SECONDS))
  ((left > 0)) || return 124
  timeout --signal="$signal" --kill-after="$TO_KILL" "$left" "$@" 3>&- &
  child=$!
  wait "$child"
}

was_cut() { (($1 == 124 || $1 == 137)); }

pack() {
  find "$out/logs" -type f -size +"$LARGEST_LOG"c -exec sh -c 'tail -c "$0" "$1" >"$1.end" && mv "$1.end" "$1"' \
    "$LARGEST_LOG" {} \;
  tar -C "$(dirname "$out")" -cf "$out.tar.new" "$(basename "$out")"
  if (($(stat -c %s "$out.tar.new") > LARGEST_TAR)); then
    echo "gpu_suite.sh: $out.tar leaves out files of more than $LARGEST_LOG bytes, or it would be too large" >&2
    (cd "$(dirname "$out")" && find "$(basename "$out")" -type f ! -size +"$LARGEST_LOG"c -print0 |
      tar --null -T - -cf "$out.tar.new")
  fi
  mv -f "$out.tar.new" "$out.tar"
}

stop() { # CODE
  echo "gpu_suite.sh: stopped; what was finished is in $out.tar" >&3
  [[ -z $child ]] || { kill "$child" 2>/dev/null && wait "$child"; }
  pack
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM

# --- stages -----------------------------------------------------------------------------------------------------------

ceilings() {
  nvidia-smi
  run "$python" -m pip list --disable-pip-version-check
  run "$python" -m benchmarks.gpu_cases ceilings --json "$out/ceilings.json" "${rehearse[@]}"
}

draw() { # shapes10, once
  local images=()
  ((${#rehearse[@]})) && images=(--train-images 2000 --test-images 200)
  [[ -e $out.data/shapes10/meta.json ]] || run "$python" -m fastresnet prepare --data shapes10 "${images[@]}"
}

smoke() {
  local short=(smoke --data shapes10 --iterations 100)
  draw && train "${short[@]}" --compile off && train "${short[@]}" --compile "$captured"
}

steps() {
  draw && run "$python" -m benchmarks.gpu_cases steps --json "$out/steps.json" "${rehearse[@]}"
}

candidates() {
  draw && run "$python" -m benchmarks.gpu_cases candidates --json "$out/candidates.json" "${rehearse[@]}"
}

tests() {
  # At INT pytest writes what it has, once its workers have ended: it waits for them up to 10 seconds.
  local parallel=() code signal=INT TO_KILL=20
  stage_end=$((stage_end - TO_KILL))
  "$python" -c 'import xdist' 2>/dev/null && parallel=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  TORCHINDUCTOR_COMPILE_THREADS=2 run env --default-signal=INT \
    "$python" -m pytest -v -m gpu "${parallel[@]}" --junitxml "$out/tests.xml" tests
  code=$?
  note=$(grep -Eo '([0-9]+ (passed|failed|skipped|errors?),? )+' "$out/logs/tests.log" | tail -n 1)
  note=${note% } note=${note%,}
  return "$code"
}

peers() {
  local length=(--rounds 3 --seconds 1.5)
  ((${#rehearse[@]})) && length=(--quick --batch-size 16)
  draw && run "$python" -m benchmarks train --data shapes10 "${length[@]}" --json "$out/peers.json"
}

accuracy() {
  local training recipe model seed options code finished=0 failed=0 data=()
  local -x FASTRESNET_DATA=$out.data
  ((${#rehearse[@]})) && TRAININGS=("fast resnet20 0" "speedrun speednet 0")
  if ((${#parts[@]})); then
    find_cifar10 || return
  else
    data=(--data shapes10)
    draw || return
  fi
  for training in "${TRAININGS[@]}"; do
    read -r recipe model seed options <<<"$training"
    # shellcheck disable=SC2086  # options are words
    train "$recipe" --model "$model" --seed "$seed" $options "${data[@]}"
    code=$?
    if was_cut "$code"; then break; fi
    if ((code)); then ((failed += 1)); else ((finished += 1)); fi
    note="$finished of ${#TRAININGS[@]} trainings"
    pack
  done
  if ((failed)); then return 1; fi
  if ((!finished)); then return 124; fi
}

train() { # RECIPE OPTION...: a training whose summary, config and metrics are results if it finishes
  local name folder small=() code
  ((${#rehearse[@]})) && small=(--batch-size 16 --iterations 4)
  name=$(printf '%s' "$*" | tr -cs '[:alnum:]' -) folder=$out.runs/$name
  rm -rf "$folder"
  run "$python" -m fastresnet train "$@" "${small[@]}" --out "$folder"
  code=$?
  if ((code == 0)); then
    mkdir -p "$out/$stage/$name" && cp "$folder"/{summary.json,config.toml,metrics.csv} "$out/$stage/$name"
    code=$?
  fi
  rm -rf "$folder"
  return "$code"
}

find_cifar10() { # at DATA
  local archive=${parts[0]}
  if [[ -e $archive/cifar10/meta.json ]]; then
    FASTRESNET_DATA=$archive
    return
  fi
  if ((${#parts[@]} > 1)); then
    archive=$out.data/cifar10.joined
    mkdir -p "$out.data" && cat "${parts[@]}" >"$archive" || return
  fi
  run "$python" -m fastresnet prepare --source "$archive"
}

# --- all stages -------------------------------------------------------------------------------------------------------

say() { echo "$*" | tee -a "$out/stages.txt"; }

take() { # STAGE
  local began=$SECONDS code result note=
  stage=$1 stage_end=$((SECONDS + LIMITS[$1] * (${#rehearse[@]} ? 5 : 1)))
  ((stage_end < deadline)) || stage_end=$deadline
  if [[ $stage == accuracy ]] && ((${#parts[@]} + ${#rehearse[@]} == 0)); then
    say "accuracy    left out: DATA does not name CIFAR-10"
    return
  fi
  if ((stage_end <= SECONDS)); then
    code=124 result="left out: no time"
  else
    echo "=== $stage, for at most $((stage_end - SECONDS)) s"
    "$stage" >"$out/logs/$stage.log" 2>&1
    code=$?
    case $code in
      0) result=passed ;;
      124 | 137) result="cut" ;;
      *) result="failed (exit $code)" ;;
    esac
    ((code == 0)) || tail -n 5 "$out/logs/$stage.log"
  fi
  ((code == 0)) || failed+=("$stage")
  say "$(printf '%-11s %-45s %4d s' "$stage" "$result${note:+, $note}" "$((SECONDS - began))")"
  pack
}

if ((${#wheels[@]})); then
  run "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$out.packages" "${wheels[@]}" || exit 1
fi
find_gpu='
try:
    import torch
except ImportError as error:
    raise SystemExit(f"gpu_suite.sh: {error}. Name a Python that has PyTorch: PYTHON=.venv/bin/python.")
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
'
device=$(run "$python" -c "$find_gpu") || exit 2
captured=graph
if [[ -z $device ]]; then
  ((${#rehearse[@]})) || refuse "PyTorch sees no GPU. --rehearse tries this script on a CPU."
  captured=off device="a CPU"
  export OMP_NUM_THREADS=1 # on a machine with other work, threads wait for each other
fi
say_rehearsal() {
  ((!${#rehearse[@]})) || say "*** REHEARSAL, small sizes on $device: NOTHING OF THIS IS A MEASUREMENT ***"
}

say "$device, $(date -u +%FT%TZ), for at most $seconds s"
say_rehearsal
failed=()
for name in "${chosen[@]}"; do
  take "$name"
done
say_rehearsal
pack
echo
cat "$out/stages.txt"
echo "$out.tar: $(stat -c %s "$out.tar") bytes, after $SECONDS s"
((${#failed[@]} == 0)) || { echo "not passed: ${failed[*]}" >&2 && exit 1; }
