#!/bin/bash
# usage: fuzz.sh [--seconds N | --build] [--sanitizer address|none] [TARGET...]
#
# Builds and runs the fuzz targets, one after the other: backend_channel, main_socket, registers, device_strings, or
# those that are named. The input of each and what must hold are described in its file in fuzz/fuzz_targets.
#
#   --seconds N        how long each runs (default: 10)
#   --build            builds them only
#   --sanitizer WHICH  address: what unsafe code does wrong is found, too; none: a third less to build, on the usual
#                      toolchain (default: address where there is a nightly toolchain, which it needs)
#
# Installs what is missing (cargo-fuzz goes into target/). Each starts from fuzz/seeds and what it found worth keeping
# in earlier runs, fuzz/corpus.
#
# It prints one line for each target; the last line is 'N passed, N failed'. The exit status is 1 when anything failed:
# then the input is in fuzz/artifacts, and a message shows the command that runs it again.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

CARGO_FUZZ_VERSION=0.13.2
FUZZ=$PROJECT/fuzz
TRIPLE=x86_64-unknown-linux-gnu
BINARIES=$TARGET/fuzz/$TRIPLE/release
LOGS=$TARGET/fuzz/logs

# The most bytes of an input: enough for the longest conversations, and short ones are found sooner.
MAX_LEN=2048
# Seconds for one input: longer than all deadlines of the VMM together, so that a target which waits for one sees its end, even
# on a busy machine.
INPUT_TIMEOUT=120

main() {
    local seconds=10 only_build='' sanitizer='' targets=() target passed=0 failed=0
    while (($#)); do
        case $1 in
        -h | --help) usage && return ;;
        --seconds)
            seconds=$(whole_number "$@")
            shift
            ;;
        --build) only_build=1 ;;
        --sanitizer)
            [[ ${2-} == address || ${2-} == none ]] || wrong "--sanitizer takes address or none"
            sanitizer=$2
            shift
            ;;
        -*) wrong "$1: unknown option (--help lists them)" ;;
        *)
            [[ -e $FUZZ/fuzz_targets/$1.rs ]] || wrong "$1: there is no such target (--help lists them)"
            targets+=("$1")
            ;;
        esac
        shift
    done
    if ((${#targets[@]} == 0)); then
        targets=(backend_channel main_socket registers device_strings)
    fi

    [[ -n $sanitizer ]] || sanitizer=$(has_nightly && echo address || echo none)

    need cc:gcc c++:g++
    # In a debug build: quicker to build, and it only calls cargo.
    CARGO_PROFILE_DEV_DEBUG=0 need_cargo fuzz "$CARGO_FUZZ_VERSION" --debug
    mkdir -p "$LOGS"
    for target in "${targets[@]}"; do
        if build "$target" "$sanitizer" && { [[ -n $only_build ]] || run "$target" "$seconds"; }; then
            passed=$((passed + 1))
        else
            failed=$((failed + 1))
        fi
    done
    echo "$passed passed, $failed failed"
    ((failed == 0))
}

has_nightly() { rustup toolchain list 2>/dev/null | grep -q '^nightly-'; }

# build TARGET SANITIZER
build() {
    local cargo=(cargo) options=(--fuzz-dir "$FUZZ" --target-dir "$TARGET/fuzz" --target "$TRIPLE" --sanitizer "$2")
    [[ $2 == none ]] || cargo+=(+nightly)
    "${cargo[@]}" fuzz build "${options[@]}" "$1" </dev/null >"$LOGS/$1.build" 2>&1 && return
    grep -A 20 '^error' "$LOGS/$1.build" >&2 || tail -n 20 "$LOGS/$1.build" >&2
    echo "$1: did not build"
    return 1
}

# Prints the result in one line, and some more when there is a finding.
run() {
    local target=$1 seconds=$2 log=$LOGS/$1.run status=0 counts found
    local corpus=$FUZZ/corpus/$target artifacts=$FUZZ/artifacts/$target
    mkdir -p "$corpus" "$artifacts"
    # The search for leaks is off: it reports the list of destructors of a thread that is ending, which is none. The
    # targets themselves count file descriptors and mappings.
    "$BINARIES/$target" -max_total_time="$seconds" -max_len="$MAX_LEN" -timeout="$INPUT_TIMEOUT" -detect_leaks=0 -print_final_stats=1 \
        -artifact_prefix="$artifacts/" "$corpus" "$FUZZ/seeds/$target" </dev/null >"$log" 2>&1 || status=$?
    counts=$(awk '/^stat::number_of_executed_units/ { runs = $2 } /^stat::new_units_added/ { new = $2 }
        END { printf "%d executions, %d new inputs", runs, new }' "$log")
    if [[ $status == 0 && $counts != "0 executions"* ]]; then
        echo "$target: $counts, no finding"
        return
    fi
    echo "$target: $counts, FAILED (exit status $status)"
    grep -aE -A 3 'panicked at|ERROR: |^SUMMARY' "$log" >&2 || tail -n 20 "$log" >&2
    found=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
    if [[ -n $found ]]; then
        say "the input is $found; to run it again: $BINARIES/$target $found"
    fi
    say "its whole output is in $log"
    return 1
}

main "$@"
