# shellcheck shell=bash
# What the launch scripts have in common; each sources this file first.

# shellcheck disable=SC2034 # the scripts use it
PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DRY_RUN=no
# Where a dry run prints: also the commands whose output the script reads.
exec 3>&1

# Prints the comment at the top of the script that runs: its usage.
usage() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"
}

# Ends with a sentence.
fail() {
  printf 'Error: %s\n' "$*" >&2
  exit 1
}

# Ends with the usage and a sentence: the command cannot be meant.
misused() {
  usage >&2
  printf '\nError: %s\n' "$*" >&2
  exit 2
}

# The arguments as one line that any shell reads back as these arguments.
quoted() {
  local word line='' quote="'" escaped="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=$quote${word//$quote/$escaped}$quote
    line+=" $word"
  done
  printf '%s' "${line# }"
}

# What is said beside commands is a comment, so that all of a dry run can be pasted.
say() {
  printf '# %s\n' "$*"
}

# Runs a command, or prints it in a dry run.
act() {
  if [[ $DRY_RUN == yes ]]; then
    printf '%s\n' "$(quoted "$@")" >&3
  else
    "$@" 3>&-
  fi
}

# Ends with a sentence unless a value is a whole number of at least 1.
need_count() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || misused "$1 is '$2': give a whole number of at least 1."
}
