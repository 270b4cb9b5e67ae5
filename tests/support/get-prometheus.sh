#!/usr/bin/env bash
# get-prometheus.sh FOLDER: puts prometheus and promtool there, those of PATH or else of Debian's package. Needs no root,
# installs nothing into the system and starts no service.
set -euo pipefail
into=$(cd "$1" && pwd)

if command -v prometheus > /dev/null && command -v promtool > /dev/null; then
  ln -sf "$(command -v prometheus)" "$(command -v promtool)" "$into"
  exit
fi
if ! command -v apt-get > /dev/null || ! command -v dpkg > /dev/null; then
  echo "make test needs Prometheus: put prometheus and promtool on PATH." >&2
  exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
cd "$work"
apt=(apt-get -qq -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User="$(id -un)")
"${apt[@]}" update
"${apt[@]}" download prometheus
dpkg --extract prometheus_*.deb .
install usr/bin/prometheus usr/bin/promtool "$into"
