# shellcheck shell=sh
# Tests that bring their own guests, on this host's KVM: ENDURANCE and SMALL_GUEST are their programs.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

# tests NAME PROGRAM OPTION...
tests() {
    name=$1
    shift
    REQUIRE_KVM=1 "$@" --nocapture --test-threads=1 >"$OUT/$name.out" 2>"$OUT/$name.err"
    echo $? >"$OUT/$name.status"
}

tests truncation "$ENDURANCE" truncation::
tests faults "$SMALL_GUEST" faults::
tests unavailable "$SMALL_GUEST" unavailable::
tests huge "$SMALL_GUEST" huge_pages::
tests prefault "$SMALL_GUEST" prefault::
tests stats "$SMALL_GUEST" stats::
tests linux "$ENDURANCE" --ignored a_linux_guest
