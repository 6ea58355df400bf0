#!/bin/bash
# Installs one PrfaaS service on this machine. Run it again to update: what is as it should be stays untouched.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: install.sh --role router|prefill|decode --config FILE [options]

  --role ROLE          router, prefill or decode; a machine may have several
  --config FILE        the cluster's TOML file, the same on all machines
  --name NAME          this service's name [ROLE-<host>]
  --region REGION      of a node [local]
  --advertise URL      of a node: where routers reach it, http(s)://host:8001
  --kv-advertise H:P   of a node: where other nodes reach its KV port
  --secret FILE        the cluster secret [/etc/prfaas/secret, if it is there]
  --certs DIR          ca.pem, NAME.pem and NAME.key (prfaas certs init)
  --source DIR         a checkout or a wheel to install [this checkout]
  --extras LIST        Python extras [torch for nodes, none for routers]
  --python PROGRAM     3.11 or newer [python3]
  --root DIR           install below DIR, and start nothing (images, tests)
  --no-start           install, but neither enable nor start
  --dry-run            say what would be done
  --help

example:
  sudo ./install.sh --role decode --config cluster.toml --secret secret --region home \
       --certs certs --name d1 --advertise https://d1.home.example:8001 --kv-advertise d1.home.example:9001
TEXT
}

die() { echo "install.sh: $*" >&2; exit 2; }
note() { echo "== $*"; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
role='' config='' name='' region='' advertise='' kv_advertise='' secret='' certs='' source=$(cd "$here/../.." && pwd)
extras=unset python=python3 root='' start=yes dry=''
while (($#)); do
  case $1 in
    --help) usage; exit 0 ;;
    --no-start) start=''; shift; continue ;;
    --dry-run) dry=yes; shift; continue ;;
    --role | --config | --name | --region | --advertise | --kv-advertise | --secret | --certs | --source | --extras | --python | --root)
      (($# > 1)) || die "$1 needs a value; --help"
      ;;
    *) die "unknown option $1; --help" ;;
  esac
  case $1 in
    --role) role=$2 ;; --config) config=$2 ;; --name) name=$2 ;; --region) region=$2 ;;
    --advertise) advertise=$2 ;; --kv-advertise) kv_advertise=$2 ;; --secret) secret=$2 ;; --certs) certs=$2 ;;
    --source) source=$2 ;; --extras) extras=$2 ;; --python) python=$2 ;; --root) root=${2%/} ;;
  esac
  shift 2
done

case $role in router | prefill | decode) ;; '') die "--role is missing; --help" ;; *) die "--role must be router, prefill or decode, not $role" ;; esac
[ -n "$config" ] || die "--config is missing; --help"
[ -f "$config" ] || die "--config $config is not there"
[ -z "$secret" ] || [ -f "$secret" ] || die "--secret $secret is not there"
[ -n "$secret" ] || [ -f "$root/etc/prfaas/secret" ] || die "no cluster secret yet: make one (openssl rand -hex 32 > secret) and name it with --secret on every machine"
name=${name:-$role-$(uname -n)}
if [ -n "$certs" ]; then
  for file in ca.pem "$name.pem" "$name.key"; do
    [ -f "$certs/$file" ] || die "--certs $certs has no $file; prfaas certs init --dir $certs --nodes $name:$role"
  done
fi
[ -e "$source" ] || die "--source $source is not there"
"$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || die "--python $python is not Python 3.11 or newer with venv (Debian: apt install python3-venv)"
if [ -z "$root" ] && [ -z "$dry" ]; then
  [ "$(id -u)" = 0 ] || die "run it as root, or with --root DIR"
fi
if [ "$extras" = unset ]; then
  if [ "$role" = router ]; then extras=''; else extras=torch; fi
fi

prefix=/opt/prfaas
changed=''

# put SOURCE TARGET MODE: only when it differs; the old one is kept as .old.
put() {
  local target=$root$2
  if [ -f "$target" ] && cmp -s "$1" "$target"; then
    return
  fi
  changed=yes
  note "write $2"
  [ -z "$dry" ] || return 0
  mkdir -p "$(dirname "$target")"
  [ ! -f "$target" ] || cp -p "$target" "$target.old"
  install -m "$3" "$1" "$target.new"
  [ -n "$root" ] || chgrp prfaas "$target.new"
  mv "$target.new" "$target"
}

if [ -z "$root" ] && ! id prfaas >/dev/null 2>&1; then
  note "user prfaas"
  [ -n "$dry" ] || useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin prfaas
fi

# The package: when the source is another one than last time.
stamp=$root$prefix/installed-from
if [ -d "$source" ]; then
  mark="$source $extras $(cd "$source" && find pyproject.toml constraints.txt common transport services loadgen -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)"
else
  mark="$source $extras $(sha256sum <"$source")"
fi
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$mark" ]; then
  changed=yes
  note "package into $prefix/venv"
  if [ -z "$dry" ]; then
    mkdir -p "$root$prefix"
    [ -x "$root$prefix/venv/bin/python" ] || "$python" -m venv "$root$prefix/venv"
    constraints=()
    [ ! -f "$source/constraints.txt" ] || constraints=(-c "$source/constraints.txt")
    "$root$prefix/venv/bin/python" -m pip install --quiet --disable-pip-version-check "${constraints[@]}" "$source${extras:+[$extras]}"
    printf '%s\n' "$mark" >"$stamp"
  fi
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
put "$config" /etc/prfaas/cluster.toml 640
[ -z "$secret" ] || put "$secret" /etc/prfaas/secret 640
if [ -n "$certs" ]; then
  put "$certs/ca.pem" /etc/prfaas/tls/ca.pem 644
  put "$certs/$name.pem" "/etc/prfaas/tls/$name.pem" 644
  put "$certs/$name.key" "/etc/prfaas/tls/$name.key" 640
fi
{
  echo "# What is this machine's alone; cluster.toml has the rest. Made by install.sh."
  if [ "$role" = router ]; then
    echo "PRFAAS_ROUTER_NAME=$name"
  else
    echo "PRFAAS_NODE_NAME=$name"
    [ -z "$region" ] || echo "PRFAAS_NODE_REGION=$region"
    [ -z "$advertise" ] || echo "PRFAAS_NODE_ADVERTISE=$advertise"
    [ -z "$kv_advertise" ] || echo "PRFAAS_TRANSPORT_ADVERTISE=$kv_advertise"
  fi
  if [ -n "$certs" ]; then
    echo "PRFAAS_TLS_CA_FILE=/etc/prfaas/tls/ca.pem"
    echo "PRFAAS_TLS_CERT_FILE=/etc/prfaas/tls/$name.pem"
    echo "PRFAAS_TLS_KEY_FILE=/etc/prfaas/tls/$name.key"
  fi
} >"$work/env"
put "$work/env" "/etc/prfaas/$role.env" 640

# A router needs no device; nodes may have GPUs.
devices='PrivateDevices=yes'
[ "$role" = router ] || devices='# PrivateDevices stays off: accelerators are devices.'
drain=$(sed -n 's/^ *drain_s *= *\([0-9]*\).*/\1/p' "$config" | sort -n | tail -1)
sed -e "s|@ROLE@|$role|g" -e "s|@PREFIX@|$prefix|g" -e "s|@DEVICES@|$devices|" -e "s|@STOP_S@|$((${drain:-30} + 30))|" \
  "$here/prfaas.service.in" >"$work/unit"
put "$work/unit" "/etc/systemd/system/prfaas-$role.service" 644
put "$here/90-prfaas.conf" /etc/sysctl.d/90-prfaas.conf 644

if [ -z "$changed" ]; then
  note "nothing to do: prfaas-$role is as it should be"
  exit 0
fi
if [ -n "$root" ] || [ -z "$start" ] || [ -n "$dry" ]; then
  note "installed; not started"
  exit 0
fi
sysctl --quiet --load /etc/sysctl.d/90-prfaas.conf || note "some kernel settings could not be set; prfaas doctor says what that costs"
systemctl daemon-reload
systemctl enable --quiet "prfaas-$role"
note "restart prfaas-$role"
systemctl restart "prfaas-$role"
