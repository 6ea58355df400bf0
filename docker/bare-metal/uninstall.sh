#!/bin/bash
# Takes PrfaaS off this machine: services, package, kernel settings. /etc/prfaas and the user stay, unless --purge.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: uninstall.sh [--purge] [--root DIR]

  --purge      configuration, secret, keys, cache and the user too
  --root DIR   what install.sh --root DIR has put there
TEXT
}

purge='' root=''
while (($#)); do
  case $1 in
    --help) usage; exit 0 ;;
    --purge) purge=yes; shift ;;
    --root) (($# > 1)) || { echo "uninstall.sh: --root needs a value; --help" >&2; exit 2; }; root=${2%/}; shift 2 ;;
    *) echo "uninstall.sh: unknown option $1; --help" >&2; exit 2 ;;
  esac
done
if [ -z "$root" ] && [ "$(id -u)" != 0 ]; then
  echo "uninstall.sh: run it as root, or with --root DIR" >&2
  exit 2
fi

for role in router prefill decode; do
  unit=/etc/systemd/system/prfaas-$role.service
  [ -f "$root$unit" ] || continue
  echo "== remove prfaas-$role"
  [ -n "$root" ] || systemctl disable --now --quiet "prfaas-$role"
  rm -f "$root$unit" "$root$unit.old"
done
[ -n "$root" ] || systemctl daemon-reload
rm -f "$root"/etc/sysctl.d/90-prfaas.conf "$root"/etc/sysctl.d/90-prfaas.conf.old
rm -rf "$root/opt/prfaas"
if [ -n "$purge" ]; then
  echo "== remove configuration, keys and cache"
  rm -rf "$root/etc/prfaas" "$root/var/cache/prfaas"
  if [ -z "$root" ] && id prfaas >/dev/null 2>&1; then
    userdel prfaas
  fi
elif [ -d "$root/etc/prfaas" ]; then
  echo "== /etc/prfaas stays (--purge removes it)"
fi
