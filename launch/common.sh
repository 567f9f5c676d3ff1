# shellcheck shell=bash
# Functions shared by the launch scripts; each script sources this file first.

# shellcheck disable=SC2034 # used by the scripts
PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DRY_RUN=no
# Output of a dry run: a separate descriptor, so that commands whose output is captured appear too.
exec 3>&1

# Prints the usage: the comment at the top of the running script.
usage() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"
}

# Prints an error message and exits with status 1.
fail() {
  printf 'Error: %s\n' "$*" >&2
  exit 1
}

# Prints the usage and an error message and exits with status 2: wrong arguments.
misused() {
  usage >&2
  printf '\nError: %s\n' "$*" >&2
  exit 2
}

# Prints the arguments as one line, quoted so that any shell parses it back into these arguments.
quoted() {
  local word line='' quote="'" escaped="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=$quote${word//$quote/$escaped}$quote
    line+=" $word"
  done
  printf '%s' "${line# }"
}

# Prints a message as a comment, so that the whole output of a dry run can be pasted.
say() {
  printf '# %s\n' "$*"
}

# Runs a command; in a dry run prints it instead.
act() {
  if [[ $DRY_RUN == yes ]]; then
    printf '%s\n' "$(quoted "$@")" >&3
  else
    "$@" 3>&-
  fi
}

# Exits with an error message unless value $2 of option $1 is a whole number of at least 1.
need_count() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || misused "$1 is '$2': give a whole number of at least 1."
}
