#!/usr/bin/env bash
# get-chromium.sh FOLDER: puts chromium there, that of PATH or else of Debian's packages with every library that this system
# lacks. Needs no root, installs nothing into the system.
set -euo pipefail
into=$(cd "$1" && pwd)

for name in chromium chromium-browser google-chrome chromium-headless-shell; do
  if command -v "$name" > /dev/null; then
    ln -sf "$(command -v "$name")" "$into/chromium"
    exit
  fi
done
if ! command -v apt-get > /dev/null || ! command -v dpkg > /dev/null; then
  echo "make test needs Chromium: put chromium on PATH." >&2
  exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
apt=(apt-get -qq -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User="$(id -un)"
  -o Debug::NoLocking=true)
"${apt[@]}" update
"${apt[@]}" install --yes --download-only --no-install-recommends chromium-headless-shell fonts-liberation
root=$into/chromium.d
rm -rf "$root"
mkdir "$root"
for package in "$work"/cache/archives/*.deb; do
  dpkg --extract "$package" "$root"
done
cat > "$root/fonts.conf" << END
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>$root/usr/share/fonts</dir><dir>/usr/share/fonts</dir><cachedir>$root/cache</cachedir></fontconfig>
END
libraries=$(find "$root" -name '*.so*' -printf '%h\n' | sort -u | paste -sd:)
cat > "$into/chromium" << END
#!/bin/sh
export LD_LIBRARY_PATH='$libraries' FONTCONFIG_FILE='$root/fonts.conf'
exec '$root/usr/lib/chromium/chromium-headless-shell' "\$@"
END
chmod 755 "$into/chromium"
