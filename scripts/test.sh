#!/bin/bash
# usage: test.sh [quick|long]
#
# Runs all tests: format, lints (of the VMM without its back-ends, too), documentation, shell scripts, dependencies
# (deny.toml), whether each assertion of the contract has a test; then the tests without a Linux guest (unit, protocol, and
# small guests on this machine's /dev/kvm), the tests that boot a stock kernel, on this machine's KVM or on the emulated host
# of lab.sh, and some seconds of each fuzz target. All programs are those of the debug build, whose assertions and checks for
# overflows are tested, too (with long, Linux runs those of the release build). Installs and builds what is missing; the
# first run builds cargo-deny and cargo-fuzz into target/tools, which takes some minutes.
#
#   quick              only what needs no Linux guest and no fuzzing
#   long               with what takes hours: a million random operations against the model, ten minutes of endurance for
#                      each kind of guest, 10,000 small machines, 100 of Linux and 100,000 starts of devices, all the
#                      mappings that one device can have, a file of 3 GiB through a window of 256 MiB, a quarter of an
#                      hour for each fuzz target
#
# A step that fails does not stop those after it. The last line is 'N passed, N failed', in which each step that is not a
# run of tests counts as one test, and so does a step that could not run; the exit status is 1 when anything failed. Known
# faults of dependencies are checked where the advisory database can be reached, otherwise a message says that they are
# not. REQUIRE_KVM=1 makes a failure of a test that finds no /dev/kvm.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

CARGO_DENY_VERSION=0.20.2

passed=0
failed=0
failures=()
# The process that builds ahead.
ahead=''

main() {
    local quick='' long='' linux=()
    # Without the sanitizer, which takes longer to build and finds little in some seconds.
    local fuzz=(--seconds 5 --sanitizer none)
    (($# <= 1)) || wrong "$2: not understood behind $1 (--help lists what is)"
    case ${1-} in
    -h | --help) usage && return ;;
    quick) quick=1 ;;
    long)
        long=1
        export HOTSLOT_MODEL_OPERATIONS=1000000 HOTSLOT_ENDURANCE_SECONDS=600 HOTSLOT_FS_FILE_MIB=3072
        export HOTSLOT_ENDURANCE_MACHINES=10000 HOTSLOT_ENDURANCE_STARTS=100000 HOTSLOT_ENDURANCE_BOOTS=100
        fuzz=(--seconds 900)
        # Worth a build of its own only where the tests take hours.
        linux=(--release)
        ;;
    '') ;;
    *) wrong "$1: not understood (--help lists what is)" ;;
    esac
    cd "$PROJECT"
    # `need` reports what is missing and cannot be installed; the steps that need it fail then.
    (need cc:gcc) || true
    command -v cargo >/dev/null || say "there is no cargo: install Rust, see https://rustup.rs"
    say "small guests: $(small_guests)"

    check "format" formatted
    check "lints" cargo clippy --workspace --all-targets --locked -- -D warnings
    check "lints without back-ends" cargo clippy --locked --no-default-features --bin hotslot -- -D warnings
    RUSTDOCFLAGS='-D warnings' check "documentation" cargo doc --workspace --no-deps --document-private-items --locked
    (need shellcheck:shellcheck) || true
    check "shell scripts" shellcheck -x scripts/*.sh scripts/*/*.sh scripts/interop/*/*.sh .ci/run benches/*.sh benches/*/*.sh tests/linux/*/*.sh
    check "dependencies" dependencies
    # Whether each assertion has a test. Whether the tests pass is seen below.
    check "contract" scripts/contract.sh --list
    local targets
    mapfile -t targets < <(test_targets)
    # Cargo builds them by itself only where no test is named.
    check "examples" cargo build --workspace --locked --examples
    if [[ -z $quick ]]; then
        # A process group of its own, which ends with this script.
        set -m
        build_ahead &
        set +m
        ahead=$!
        trap 'kill -- -"$ahead" 2>/dev/null || true' EXIT
    fi
    tests "tests without Linux" cargo test --workspace --locked --no-fail-fast --lib --bins "${targets[@]}"
    [[ -z $long ]] || tests "tests that take long" cargo test --release --locked --test small_guest -- --ignored
    if [[ -z $quick ]]; then
        [[ -z $long ]] || check "examples for Linux" cargo build --release --locked --examples
        say "Linux guests: $(linux_guests)"
        linux_tools
        # More at a time than processors: most of them only wait for a session.
        tests "tests with Linux" cargo test "${linux[@]}" --locked --test linux -- --test-threads=16
        wait "$ahead" || true
        check "fuzzing" scripts/fuzz.sh "${fuzz[@]}"
    fi

    ((failed == 0)) || say "failed: ${failures[*]}"
    echo "$passed passed, $failed failed"
    ((failed == 0))
}

# Builds the fuzz targets while the tests run, which often wait. A build that fails is reported by the step that needs it.
build_ahead() {
    renice -n 10 "$BASHPID"
    scripts/fuzz.sh "${fuzz[@]}" --build || true
} </dev/null &>/dev/null

# Licences, duplicates, sources, and known faults.
dependencies() {
    # In a debug build: quicker to build, quick enough to run.
    (CARGO_PROFILE_DEV_DEBUG=0 need_cargo deny "$CARGO_DENY_VERSION" --debug) || return 1
    PATH=$TARGET/tools/bin:$PATH
    cargo deny --offline check licenses bans sources || return 1
    if timeout 60 cargo deny fetch db >/dev/null 2>&1; then
        cargo deny check --disable-fetch advisories
    else
        say "the advisory database cannot be reached: known faults of dependencies are not checked"
    fi
}

# What the tests run on, in words.
small_guests() {
    if ! kvm_opens; then
        echo "no /dev/kvm that opens, their tests are skipped"
    elif [[ $(host_kind) == kvm ]]; then
        echo "this machine's KVM"
    else
        echo "this machine's KVM, which is software"
    fi
}

linux_guests() {
    case $(host_kind) in
    kvm) echo "this machine's KVM" ;;
    *) echo "an emulated host (scripts/lab.sh)" ;;
    esac
}

# The integration tests without the one that boots Linux, as options for cargo.
test_targets() {
    local path name
    for path in tests/*.rs tests/*/main.rs; do
        name=${path#tests/}
        name=${name%.rs}
        name=${name%/main}
        [[ $name == linux ]] || printf -- '--test=%s\n' "$name"
    done
}

# The fuzz targets are a workspace of their own.
formatted() { cargo fmt --all --check && cargo fmt --manifest-path fuzz/Cargo.toml --all --check; }

# A step that is one test: its name, its command.
check() {
    local name=$1
    shift
    say "$name"
    if "$@" </dev/null; then
        passed=$((passed + 1))
    else
        fail "$name"
    fi
}

# A step that is many tests, as cargo counts them.
tests() {
    local name=$1 log status=0 good bad
    shift
    say "$name"
    log=$(mktemp)
    "$@" </dev/null 2>&1 | tee "$log" || status=$?
    read -r good bad < <(awk '/^test result: / { good += $4; bad += $6 } END { print good + 0, bad + 0 }' "$log")
    rm "$log"
    passed=$((passed + good))
    if ((bad > 0)); then
        failed=$((failed + bad - 1))
        fail "$name"
    elif ((status != 0 || good == 0)); then
        # It did not build, for example.
        fail "$name"
    fi
}

fail() {
    say "FAILED: $1"
    failed=$((failed + 1))
    failures+=("$1")
}

main "$@"
