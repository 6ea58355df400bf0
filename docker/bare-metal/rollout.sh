#!/bin/bash
# Replaces the services of a cluster one at a time over ssh: new files, a restart that drains, and on to the next one only
# when this one is ready again. Stops at the first failure; the others go on serving as they are.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: rollout.sh --hosts FILE --config FILE [options] [-- OPTIONS OF install.sh]

  --hosts FILE         a line each: SSH-TARGET ROLE READY-URL [OPTIONS OF install.sh for it]
                       READY-URL as the host itself reaches it, http(s)://127.0.0.1:8001/readyz
                       the order is that of the file: decode nodes, prefill nodes, routers
  --config FILE        the cluster's TOML file
  --source DIR         the checkout that is installed [this one]
  --ready-s N          how long a service may take to be ready again [300]
  --restart COMMAND    on the host, with ROLE behind it [systemctl restart prfaas-]
  --install COMMAND    on the host, in the copied checkout [docker/bare-metal/install.sh --no-start]
  --dry-run            check that every host answers and say what would be done
  --help

environment: PRFAAS_SSH, the ssh command with its options [ssh -o BatchMode=yes -o ConnectTimeout=10]

example of hosts:
  root@d1.home.example  decode   https://127.0.0.1:8001/readyz  --name d1 --region home --certs /root/certs
  root@p1.dense.example prefill  https://127.0.0.1:8001/readyz  --name p1 --region dense --certs /root/certs
  root@r1.home.example  router   https://127.0.0.1:8000/readyz  --name r1 --certs /root/certs
TEXT
}

die() { echo "rollout.sh: $*" >&2; exit 2; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
hosts='' config='' source=$(cd "$here/../.." && pwd) ready_s=300 dry=''
restart='systemctl restart prfaas-' install='docker/bare-metal/install.sh --no-start'
while (($#)); do
  case $1 in
    --help) usage; exit 0 ;;
    --dry-run) dry=yes; shift ;;
    --) shift; break ;;
    --hosts | --config | --source | --ready-s | --restart | --install)
      (($# > 1)) || die "$1 needs a value; --help"
      case $1 in
        --hosts) hosts=$2 ;; --config) config=$2 ;; --source) source=$2 ;; --ready-s) ready_s=$2 ;;
        --restart) restart=$2 ;; --install) install=$2 ;;
      esac
      shift 2
      ;;
    *) die "unknown option $1; --help" ;;
  esac
done
[ -f "$hosts" ] || die "--hosts ${hosts:-is missing and must name a file}${hosts:+ is not there}; --help"
[ -f "$config" ] || die "--config ${config:-is missing and must name a file}${config:+ is not there}; --help"
[[ $ready_s =~ ^[0-9]+$ ]] || die "--ready-s must be a whole number of seconds, not $ready_s"
read -r -a ssh <<<"${PRFAAS_SSH:-ssh -o BatchMode=yes -o ConnectTimeout=10}"
common=("$@")

# Everything is checked before anything is touched.
targets=() roles=() urls=() options=()
number=0
while read -r target role url rest; do
  number=$((number + 1))
  case $target in '' | \#*) continue ;; esac
  case $role in router | prefill | decode) ;; *) die "$hosts line $number: the role must be router, prefill or decode, not '${role:-}'" ;; esac
  [[ $url =~ ^https?://[^/]+/ ]] || die "$hosts line $number: the URL must look like http://127.0.0.1:8001/readyz, not '${url:-}'"
  targets+=("$target") roles+=("$role") urls+=("$url") options+=("$rest")
done <"$hosts"
((${#targets[@]})) || die "$hosts names no host"

on() { # TARGET COMMAND...: each word arrives as it is.
  local target=$1
  shift
  "${ssh[@]}" "$target" "$(printf '%q ' "$@")"
}

for target in $(printf '%s\n' "${targets[@]}" | sort -u); do
  on "$target" true || { echo "rollout.sh: $target does not answer over ssh; nothing was changed" >&2; exit 1; }
done

ready() { # TARGET URL: the service's own word, from the host itself; its certificate is not the question here.
  on "$1" python3 -c 'import ssl, sys, urllib.request as u
u.urlopen(sys.argv[1], timeout=5, context=ssl._create_unverified_context())' "$2" >/dev/null 2>&1
}

for i in "${!targets[@]}"; do
  ready "${targets[i]}" "${urls[i]}" || echo "== ${targets[i]} ${roles[i]} is not ready now (a new one, or down)"
done

files=(pyproject.toml setup.py constraints.txt README.md LICENSE common transport services loadgen docker)
finished=()
for i in "${!targets[@]}"; do
  target=${targets[i]} role=${roles[i]}
  read -r -a own <<<"${options[i]}"
  echo "== $((i + 1)) of ${#targets[@]}: $target $role"
  if [ -n "$dry" ]; then
    echo "   copy, $install --role $role ${own[*]} ${common[*]}, $restart$role, wait for ${urls[i]}"
    continue
  fi
  if ! {
    folder=$(on "$target" mktemp -d /tmp/prfaas-rollout.XXXXXX) &&
      tar -C "$source" --exclude=__pycache__ -cf - "${files[@]}" | on "$target" tar -C "$folder" -xf - &&
      on "$target" tee "$folder/cluster.toml" <"$config" >/dev/null &&
      on "$target" sh -c "cd $folder && $install \"\$@\"" install --role "$role" --config "$folder/cluster.toml" "${own[@]}" "${common[@]}" &&
      on "$target" sh -c "$restart$role" &&
      on "$target" rm -rf "$folder"
  }; then
    echo "rollout.sh: $target $role failed; done before it: ${finished[*]:-none}; the rest is as it was" >&2
    exit 1
  fi
  until_s=$((SECONDS + ready_s))
  until ready "$target" "${urls[i]}"; do
    if ((SECONDS >= until_s)); then
      echo "rollout.sh: $target $role is not ready after $ready_s s; done before it: ${finished[*]:-none}; the rest is as it was" >&2
      exit 1
    fi
    sleep 1
  done
  finished+=("$target/$role")
done
[ -n "$dry" ] || echo "== done: ${finished[*]}"
