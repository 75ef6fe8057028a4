#!/bin/bash
# Written by jaxmed launch tpu-vm. Run it on a machine that stays on; it may be run again at any time.
set -u
NAME=jaxmed-mae-b-ebcf
WHERE=(--zone=us-west4-a --project=lab --quiet)

say() { echo "$(date -Is) $*"; }
show() { gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" "$@"; }
# Its state; NONE where there is none, UNKNOWN where that cannot be asked.
state() {
  local said
  if said=$(show '--format=value(state.state)' 2>&1); then echo "${said##*$'\n'}"
  elif [[ $said == *NOT_FOUND* ]]; then echo NONE
  else echo UNKNOWN; say "$said" >&2; fi
}
delete() { say "giving $NAME back"; gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force; }
create() {
  say "asking for v5litepod-16"
  gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" --node-id="$NAME" \
    --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot
}

# Waits for the slice; one that was taken away is asked for again, a request that failed is not.
ready() {
  local unknown=0
  while true; do
    case "$(state)" in
      ACTIVE) return 0 ;;
      NONE) create || return 1 ;;
      UNKNOWN) unknown=$((unknown + 1)); [ $unknown -lt 20 ] || return 1 ;;
      SUSPENDED) delete || return 1 ;;
      FAILED) show; return 1 ;;
    esac
    sleep "${POLL:-30}"
  done
}

# Whatever happens, the bill ends with this script.
trap delete EXIT

code=1
for attempt in $(seq 0 100); do
  [ ! -e /home/me/MAE_b.launch/stop ] || { say "stopped by jaxmed stop"; break; }
  ready || break
  say "attempt $attempt"
  gcloud compute tpus tpu-vm scp /home/me/experiments/mae.py "$NAME:config.py" "${WHERE[@]}" --worker=all || continue
  gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all --command='set -e
export JAX_COMPILATION_CACHE_DIR=/mnt/lab/cache
export JAX_NUM_PROCESSES=4
module load '"'"'cuda 13'"'"'
exec flock --wait 600 --conflict-exit-code 75 /tmp/jaxmed-mae-b-ebcf.lock /opt/bin/python -m jaxmed train config.py:laptop batch_size=4096 --data /mnt/lab/corpus --out /mnt/lab/runs/MAE_b --auto-resume'
  code=$?
  say "ended with code $code"
  [ $code != 0 ] || break
  # 75: saved and stopped; 69: a process did not answer; 255: the connection broke.
  case $code in 75 | 69 | 255) continue ;; esac
  [ "$(state)" = ACTIVE ] && break
done
exit $code
