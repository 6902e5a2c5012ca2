#!/bin/bash
# usage: contract.sh [--list] [quick] [NUMBER...]
#
# Runs the tests of the contract (src/contract.md) and prints, for each assertion, the tests that prove it and whether it
# holds. A test proves SHM-35 when a comment inside it, or right above it, contains SHM-35. The program in tests/contract
# finds these tests by parsing the sources; this script builds and starts it.
#
#   NUMBER             only these assertions: first the whole text of each, then each with where its tests are:
#                      contract.sh 35 69
#   quick              only tests that need no Linux guest
#   --list             runs no test: only prints which tests there are
#
# An assertion is 'held' when all its tests passed, 'broken' when one failed or cargo does not know it, 'skipped' when
# one could not run here (it prints why), 'untested' when there is none, and 'not yet' when src/contract.md lists it as
# not built. The last line is 'N passed, N failed': held assertions, and those that are broken, skipped or untested. The
# exit status is 1 when there are any of these, or when a test cites a number that the contract does not have.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

case ${1-} in
-h | --help) usage && exit ;;
esac
command -v cargo >/dev/null || die "there is no cargo: install Rust, see https://rustup.rs"
cd "$PROJECT"
exec cargo run --quiet --locked --package hotslot-contract -- "$@"
