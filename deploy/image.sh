#!/usr/bin/env bash
# Builds the image (deploy/image.sh [cpu|gpu]) with the engine that is here, starts it as locked up as in production,
# asks it for everything once, and stops it. Without a GPU the gpu image must refuse to serve.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-cpu}
tag=tissue:$target
fail() { echo "$*" >&2 && exit 1; }

engine=
for candidate in docker podman buildah; do
  if "$candidate" info >/dev/null 2>&1; then engine=$candidate && break; fi
done
[[ $engine ]] || fail "no engine runs here: docker, podman and buildah were tried"

options=(--target "$target" --tag "$tag" --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)")
[[ $engine == docker ]] || options+=(--format docker) # the other format has no HEALTHCHECK
"$engine" build "${options[@]}" .

name=tissue-smoke-$$
port=$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
gpu=()
if [[ $engine == buildah ]]; then # it can run a command, but not stop it: a line on the lever does
  container=$(buildah from --pull-never "localhost/$tag")
  lever=$(mktemp --dry-run) && mkfifo "$lever" && exec 3<>"$lever" && rm "$lever"
  trap 'buildah rm "$container" >/dev/null' EXIT
  serve() {
    buildah run --network host --env "TISSUE_PORT=$port" "$container" -- \
      sh -c 'exec 3<&0; tissue serve & service=$!; (read -r _ <&3 && kill -TERM $service) & wait $service'
  }
  stop() { echo stop >&3; }
else
  serve() {
    "$engine" run --rm --name "$name" --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
      --publish "127.0.0.1:$port:8000" "${gpu[@]}" "$tag"
  }
  stop() { "$engine" stop --time 20 "$name" >/dev/null; }
  exec 3</dev/null
fi

if [[ $target == gpu ]] && ! command -v nvidia-smi >/dev/null; then
  serve </dev/null && fail "the gpu image served without a GPU"
  echo "$tag is built, and refuses to serve without a GPU" && exit
fi
[[ $target == gpu ]] && gpu=(--gpus all)
serve <&3 &
service=$!
python3 deploy/smoke.py "http://127.0.0.1:$port" || { stop; fail "$tag doesn't answer as it should"; }
stop
wait "$service" || fail "$tag ended with status $? when it was stopped"
echo "$tag is built, answers, and stops when it is told to"
