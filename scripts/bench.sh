#!/bin/bash
# usage: bench.sh
#
# Measures how long requests to one device take while the back-end of another misbehaves, with small guests on this
# machine's /dev/kvm. Says for each kind of misbehaviour the median, the 99th percentile, and its ratio to that of the
# rounds in which the other back-end does nothing. Use a machine that does nothing else.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

case ${1-} in
-h | --help) usage && exit ;;
'') ;;
*) die "$1: not understood (--help says what is)" ;;
esac
cd "$PROJECT"
need cc:gcc
exec cargo bench --quiet --locked --bench neighbour
