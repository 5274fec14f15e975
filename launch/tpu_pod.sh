#!/usr/bin/env bash
# Train on a Cloud TPU slice: the same `unclip train` on every host, started through gcloud.
#
#   launch/tpu_pod.sh --tpu my-pod --zone us-east5-a --setup      # on a new TPU, and after every change of the code
#   launch/tpu_pod.sh --tpu my-pod --zone us-east5-a --config configs/shapes/clip.py --workdir /mnt/runs/clip
#   launch/tpu_pod.sh --tpu my-pod --zone us-east5-a --stop       # every host saves a checkpoint and ends
#
#   --tpu NAME       the TPU VM or queued resource's node; it must exist
#   --zone ZONE      its zone
#   --project NAME   its project (default: gcloud's)
#   --setup          copy the committed tree (git HEAD) to ~/unclip_jax on every host and install it there
#   --python NAME    the hosts' Python 3.11 or newer, with venv, for --setup (default python3)
#   --stop           send SIGTERM to training on every host
#   --dry-run        print the commands and run nothing
#
# Everything else goes to `unclip train`. Hosts find each other through the TPU's own metadata
# (UNCLIP_COORDINATOR=auto), so no address or process number is given. The workdir must be one folder that all
# hosts see (a Filestore share, or a bucket mounted with gcsfuse at the same path); relative paths start at
# ~/unclip_jax. Ctrl-C here, or a lost connection, leaves the hosts training: --stop ends them. After it the same
# command continues from the last checkpoint. A preempted TPU does not come back: delete it, create it anew, and run
# --setup first. The hosts trust whoever reaches the coordinator's port: keep the slice on a private network.
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }
usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$0"; }
value() { [[ -n ${2-} && $2 != --* ]] || fail "$1 needs a value"; }

tpu="" zone="" project="" python=python3 action=train dry_run=0 args=()
while (($#)); do
  case $1 in
    --tpu) value "$@"; tpu=$2; shift 2 ;;
    --zone) value "$@"; zone=$2; shift 2 ;;
    --project) value "$@"; project=$2; shift 2 ;;
    --python) value "$@"; python=$2; shift 2 ;;
    --setup) action=setup; shift ;;
    --stop) action=stop; shift ;;
    --dry-run) dry_run=1; shift ;;
    -h | --help) usage; exit ;;
    *) args+=("$1"); shift ;;
  esac
done
[[ -n $tpu ]] || fail "no TPU named. Fix: --tpu NAME (see $0 --help)"
[[ -n $zone ]] || fail "no zone named. Fix: --zone ZONE"
if [[ $action == train ]]; then
  ((${#args[@]})) || fail "nothing to train. Fix: add --config FILE --workdir FOLDER, or --setup"
else
  ((${#args[@]} == 0)) || fail "--$action takes no training arguments, but got: ${args[*]}"
fi

run() {
  if ((dry_run)); then printf '%q ' "$@"; echo; else "$@"; fi
}
where=(--zone "$zone" --worker=all)
[[ -n $project ]] && where+=(--project "$project")
on_every_host() { run gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" --command "$1"; }

case $action in
  setup)
    here=$(cd "$(dirname "$0")/.." && pwd)
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    run git -C "$here" archive --format=tar.gz -o "$scratch/unclip_jax.tar.gz" HEAD
    run gcloud compute tpus tpu-vm scp "$scratch/unclip_jax.tar.gz" "$tpu:unclip_jax.tar.gz" "${where[@]}"
    on_every_host "set -e; mkdir -p unclip_jax; tar -xzf unclip_jax.tar.gz -C unclip_jax; cd unclip_jax;\
 $(printf %q "$python") -m venv .venv; .venv/bin/python -m pip install -q -e '.[tpu]'"
    ;;
  train)
    on_every_host "cd unclip_jax && exec env UNCLIP_COORDINATOR=auto .venv/bin/unclip train$(printf ' %q' "${args[@]}")"
    ;;
  stop)
    on_every_host "pkill -TERM -x unclip || true"
    ;;
esac
