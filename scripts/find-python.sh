#!/bin/sh
# Prints the Python with which to create the environment: $PYTHON if set, else the first of 3.11 ... 3.14 that has venv.
# Python 3.11 comes first, because the pinned packages are tested most with Python 3.11.
seen=""
for name in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3}; do
  # tries every match on PATH: the first may be a version manager's shim without an installed version
  for folder in $(printf '%s' "$PATH" | tr ':' ' '); do
    case "$name" in */*) candidate="$name" ;; *) candidate="$folder/$name" ;; esac
    [ -x "$candidate" ] || continue
    version=$("$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
    case "$version" in
      3.11.* | 3.12.* | 3.13.* | 3.14.*) ;;
      *) seen="$seen  $candidate is $version: too old or too new\n"; continue ;;
    esac
    if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
      # in a virtual environment: print its base Python
      "$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))'
      exit 0
    fi
    short=${version%.*}
    seen="$seen  $candidate is $version, without venv: apt-get install python$short-venv\n"
  done
done
{
  echo "No suitable Python was found; Headrace needs Python 3.11, 3.12, 3.13 or 3.14 with venv."
  [ -z "$seen" ] || printf "$seen"
  echo "  Debian, Ubuntu: apt-get install python3 python3-venv    elsewhere: uv python install 3.11, pyenv install 3.11"
  echo "  or give a path: make setup PYTHON=/path/to/python3.12"
} >&2
exit 1
