#!/bin/sh
# Install what the demo and the browser tests need beside Python: Orthanc with its DICOMweb plugin, Chromium, npm.
# What is there already is left alone; nothing is started.
set -eu

missing=""
[ -x /usr/sbin/Orthanc ] || command -v Orthanc > /dev/null || missing="$missing orthanc"
[ -e /usr/share/orthanc/plugins/libOrthancDicomWeb.so ] || missing="$missing orthanc-dicomweb"
command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null \
  || missing="$missing chromium"
command -v npm > /dev/null || missing="$missing npm"
[ -n "$missing" ] || exit 0

if ! command -v apt-get > /dev/null; then
  echo "Missing:$missing. Install them with this system's package manager; expected apt-get to do it here." >&2
  exit 1
fi
as_root=""
[ "$(id -u)" = 0 ] || as_root="sudo"
echo "Installing$missing ..."
# shellcheck disable=SC2086 # a list of names
{ $as_root apt-get update -qq && $as_root env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -qq --no-install-recommends $missing; } > /dev/null
