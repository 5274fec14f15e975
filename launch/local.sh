#!/usr/bin/env bash
# Train on this machine: on its own devices, or as several simulated hosts on the CPU.
#
#   launch/local.sh --config configs/shapes/clip.py:tiny --workdir runs/clip
#   launch/local.sh --processes 2 --devices 4 --config configs/shapes/clip.py:tiny --workdir runs/clip
#
# The first line is just `unclip train` with these arguments. The second starts two processes of four CPU
# devices each, which talk over the loopback interface (gloo), the way hosts of a pod do: what runs here with
# N processes runs unchanged on N machines. It is for testing, and slower than one process.
#
#   --processes N   number of processes, "hosts" (default 1)
#   --devices M     simulated CPU devices in each process (default: the machine's own devices if N = 1, else 1)
#   --port P        port of the coordinator, process 0 (default: a free one)
#   --dry-run       print the commands, one for each process, and run nothing
#
# Everything else goes to `unclip train`. At Ctrl-C or SIGTERM every process saves a checkpoint and ends, and the
# same command continues from there; a second Ctrl-C kills them. When one process fails, the others are stopped
# and its exit code is returned; 75 is a stop after which all have saved. Lines of processes 1, 2, ... begin with [1],
# [2], ...
# The environment variable UNCLIP names the command to run (default: .venv/bin/unclip of this repository, else the
# one on PATH).
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }
usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$0"; }
count() { [[ ${2-} =~ ^[1-9][0-9]*$ ]] || fail "$1 needs a whole number above 0, not '${2-}'"; }

processes=1 devices="" port="" dry_run=0 args=()
while (($#)); do
  case $1 in
    --processes) count "$@"; processes=$2; shift 2 ;;
    --devices) count "$@"; devices=$2; shift 2 ;;
    --port) count "$@"; port=$2; shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    -h | --help) usage; exit ;;
    *) args+=("$1"); shift ;;
  esac
done
((${#args[@]})) || fail "nothing to train. Fix: add --config FILE --workdir FOLDER (see $0 --help)"

here=$(cd "$(dirname "$0")/.." && pwd)
if [[ -z ${UNCLIP-} ]]; then
  UNCLIP=unclip
  [[ -x $here/.venv/bin/unclip ]] && UNCLIP=$here/.venv/bin/unclip
fi
train=("$UNCLIP" train "${args[@]}")

if ((processes == 1)) && [[ -z $devices ]]; then
  ((dry_run)) && { printf '%q ' "${train[@]}"; echo; exit; }
  exec "${train[@]}"
fi

if [[ -z $port ]]; then
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi
common=(
  JAX_PLATFORMS=cpu
  JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
  "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=${devices:-1}"
  "UNCLIP_COORDINATOR=127.0.0.1:$port"
  "UNCLIP_PROCESSES=$processes"
)
if ((dry_run)); then
  for ((i = 0; i < processes; i++)); do
    printf '%q ' env "${common[@]}" "UNCLIP_PROCESS_ID=$i" "${train[@]}"; echo
  done
  exit
fi

pids=()
stop() { for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done; }
asked=TERM
trap 'stop $asked; asked=KILL' INT TERM
for ((i = 0; i < processes; i++)); do
  if ((i == 0)); then
    env "${common[@]}" UNCLIP_PROCESS_ID=0 "${train[@]}" &
  else
    env "${common[@]}" "UNCLIP_PROCESS_ID=$i" "${train[@]}" > >(trap '' INT TERM; exec sed -u "s/^/[$i] /") 2>&1 &
  fi
  pids+=($!)
done

# Polled rather than `wait -n`, which an arriving signal would cut short.
status=0 left=("${pids[@]}")
while ((${#left[@]})); do
  sleep 0.2 || true
  running=()
  for pid in "${left[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
    else
      code=0
      wait "$pid" || code=$?
      if ((code && (!status || status == 75))); then
        status=$code
        ((code == 75)) || stop TERM
      fi
    fi
  done
  left=(${running[@]+"${running[@]}"})
done
exit "$status"
