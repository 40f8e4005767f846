#!/bin/sh
# Prints the Python that makes the environment: $PYTHON if set, else the first of 3.11 ... 3.14 that can make one.
# 3.11 comes first because it is the version that the pinned set is tested with most.
seen=""
for name in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3}; do
  # every one on PATH: the first of a name may be a version manager's shim without a version behind it
  for folder in $(printf '%s' "$PATH" | tr ':' ' '); do
    case "$name" in */*) candidate="$name" ;; *) candidate="$folder/$name" ;; esac
    [ -x "$candidate" ] || continue
    version=$("$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
    case "$version" in
      3.11.* | 3.12.* | 3.13.* | 3.14.*) ;;
      *) seen="$seen  $candidate is $version: too old or too new\n"; continue ;;
    esac
    if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
      # inside somebody's virtual environment: the Python behind it
      "$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))'
      exit 0
    fi
    short=${version%.*}
    seen="$seen  $candidate is $version, without venv: apt-get install python$short-venv\n"
  done
done
{
  echo "No Python that can make the environment was found; Headrace needs Python 3.11, 3.12, 3.13 or 3.14 with venv."
  [ -z "$seen" ] || printf "$seen"
  echo "  Debian, Ubuntu: apt-get install python3 python3-venv    elsewhere: uv python install 3.11, pyenv install 3.11"
  echo "  or name one:    make setup PYTHON=/path/to/python3.12"
} >&2
exit 1
