#!/bin/bash
# usage: suites.sh [--seconds N] [--config NAME]... [pjdfstest|fsx|stress-ng]...
#
# Runs test suites of POSIX file calls in a guest, on a directory that `hotslot-backend fs` shares, and on the ext4 that the
# directory lies on; says where the results differ. All suites where none is named:
#
#   pjdfstest          398 cases of names, modes, owners, times and errors (the crate of that name). About five minutes
#   fsx                reads, writes, mappings and truncations at random, verified (the crate of that name): half of the
#                      time one, then two at once. Three times N seconds
#   stress-ng          each stressor of its class "filesystem" in turn (Debian's package). Three times N seconds, and up to
#                      ten minutes more: some finish a round of thousands of files first
#
#   --seconds N        how long fsx and stress-ng take in each configuration (default: 120); 3600 for an hour of fsx
#   --config NAME      only this configuration, and the one that it is compared with; may be given more than once
#
# A configuration is a way to the files, and a user:
#
#   ext4-*             no guest: the host's own ext4, with which the others are compared
#   dax-*              a guest that mounts with dax=always, and a window of 1 GiB
#   nodax-*            a guest without a window: files go through its page cache
#   *-root             the suite and the back-end run as root
#   *-user             the suite runs as an ordinary user, the back-end as root (only pjdfstest)
#   *-rootless         the suite runs as the guest's root, the back-end as an ordinary user of the host; compared with
#                      ext4-root (only pjdfstest)
#
# Everything runs on an emulated host (lab.sh), also where this machine has KVM: the suites mount file systems and switch
# users. Each configuration gets a new emulated host and a new ext4. The programs that are run lie on the share, too. The
# script installs and builds what is missing. Its logs are in target/suites.
#
# It prints a table of the results, and each case whose result is not the host's. scripts/suites/known lists the cases that
# must differ, with the reason. Exit status: 1 when a case differs that is not listed, or a listed one does not differ,
# or nothing was run on the host.
#
# Not among the suites: xfstests, and the original pjdfstest in C and sh. Debian has no package of them.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

PJDFSTEST_VERSION=0.2.2
FSX_VERSION=0.3.2
LOGS=$TARGET/suites
KNOWN=$PROJECT/scripts/suites/known
# Seconds that a guest may take beyond --seconds: on a busy machine an emulated one is slow.
EXTRA_SECONDS=3600

work=''
declare -A results=() counts=()
surprises=0

main() {
    local seconds=120 suites=() configs=() suite config
    while (($#)); do
        case $1 in
        -h | --help) usage && return ;;
        --seconds)
            seconds=$(whole_number "$@")
            shift
            ;;
        --config)
            (($# > 1)) || wrong "--config needs a value (--help describes it)"
            configs+=("$2")
            shift
            ;;
        -*) wrong "$1: unknown option (--help lists them)" ;;
        pjdfstest | fsx | stress-ng) suites+=("$1") ;;
        *) wrong "$1: there is no such suite (--help lists them)" ;;
        esac
        shift
    done
    ((${#suites[@]})) || suites=(pjdfstest fsx stress-ng)

    # Here, because in the loops below a refusal by `chosen` would end only its subshell.
    for suite in "${suites[@]}"; do chosen "$suite" ${configs[@]+"${configs[@]}"} >/dev/null; done

    mkdir -p "$LOGS"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    prepare
    for suite in "${suites[@]}"; do
        for config in $(chosen "$suite" ${configs[@]+"${configs[@]}"}); do
            run "$suite" "$config" "$seconds"
        done
        compare "$suite" ${configs[@]+"${configs[@]}"}
    done
    ((surprises == 0))
}

# chosen SUITE [CONFIG...]: the configurations of a suite; or those that were asked for, each behind the one that it is
# compared with.
chosen() {
    local suite=$1 all=(ext4-root dax-root nodax-root) config
    shift
    [[ $suite != pjdfstest ]] || all+=(ext4-user dax-user nodax-user dax-rootless nodax-rootless)
    if (($#)); then
        for config in "$@"; do
            [[ " ${all[*]} " == *" $config "* ]] || wrong "$config: $suite has no such configuration (it has ${all[*]})"
        done
        mapfile -t all < <(for config in "$@"; do native "$config" && echo "$config"; done | awk '!seen[$0]++')
    fi
    echo "${all[@]}"
}

# What a configuration is compared with.
native() {
    case $1 in
    *-user) echo ext4-user ;;
    *) echo ext4-root ;;
    esac
}

# Collects the programs, and packs the image of the guests.
prepare() {
    need cc:gcc stress-ng:stress-ng mkfs.ext4:e2fsprogs setpriv:util-linux sleep:coreutils
    need_crate pjdfstest "$PJDFSTEST_VERSION"
    need_crate fsx "$FSX_VERSION"
    need_programs --quiet --locked
    local program options=()
    mkdir "$work/bin"
    # Not busybox's sleep and setpriv: pjdfstest copies sleep and runs the copy under another name, and that setpriv cannot
    # change users.
    for program in pjdfstest fsx stress-ng setpriv sleep; do
        cp "$(command -v "$program")" "$work/bin/"
        options+=(--exec "$work/bin/$program:/suites/bin/$program")
    done
    "$PROJECT/scripts/image.sh" -o "$work/guest.cpio" --module virtio_mmio --file "$PROJECT/scripts/suites:/suites" \
        "${options[@]}"
}

# run SUITE CONFIG SECONDS: runs one, and adds what came of each case to results and counts.
run() {
    local suite=$1 config=$2 seconds=$3 log=$LOGS/$1.$2 kernel hotslot=$BUILT/hotslot role=root
    local backend=$BUILT/hotslot-backend host=$PROJECT/scripts/suites/host.sh name value
    kernel=$("$PROJECT/scripts/kernel.sh")
    [[ $config != *-user ]] || role=user
    local lab=("$PROJECT/scripts/lab.sh" --memory 4G --timeout $((seconds * 3 + EXTRA_SECONDS + 100)) --module loop
        --exec "$hotslot" --exec "$backend" --exec "$(command -v mkfs.ext4)" --file /etc/mke2fs.conf
        --file "$PROJECT/scripts/suites" --file "$kernel/vmlinux" --file "$work/guest.cpio")
    local program
    for program in "$work/bin/"*; do lab+=(--exec "$program"); done
    local variables=(SUITE="$suite" CONFIG="$config" SECONDS_ALL="$seconds" ROLE="$role" HOTSLOT="$hotslot"
        BACKEND="$backend" KERNEL="$kernel/vmlinux" IMAGE="$work/guest.cpio" BIN="$work/bin"
        LIMIT=$((seconds * 3 + EXTRA_SECONDS)))
    for value in "${variables[@]}"; do lab+=(--env "$value"); done
    say "$suite, $config"
    "${lab[@]}" -- /bin/sh "$host" </dev/null 2>&1 | sed -u 's/\r//g' >"$log" || say "the emulated host did not come to its end"
    while read -r _ name value; do
        results[$suite $config $name]=$value
        counts[$suite $config $value]=$((${counts[$suite $config $value]-0} + 1))
    done < <(grep '^case: ' "$log")
}

# compare SUITE [CONFIG...]: prints the table and the differences.
compare() {
    local suite=$1 config
    echo "$suite"
    printf '%-20s%8s%8s%9s\n' configuration passed failed skipped
    for config in $(chosen "$@"); do
        printf '%-20s%8d%8d%9d\n' "$config" "${counts[$suite $config ok]-0}" "${counts[$suite $config FAILED]-0}" \
            "${counts[$suite $config skipped]-0}"
    done
    for config in $(chosen "$@"); do
        if [[ $config != ext4-* ]]; then
            differences "$suite" "$config"
        elif ! grep -q '^case: ' "$LOGS/$suite.$config"; then
            # Without a case on the host, `differences` has nothing to compare.
            surprises=$((surprises + 1))
            echo "$config: NOTHING WAS RUN. The last lines:"
            tail -n 30 "$LOGS/$suite.$config" | sed 's/^/    /'
        fi
    done
}

# differences SUITE CONFIG: prints each case that differs from the host's, with its reason. A known one must differ.
differences() {
    local suite=$1 config=$2 name reason here there missing=()
    while read -r name; do
        here=${results[$suite $config $name]-missing} there=${results[$suite $(native "$config") $name]-ok}
        reason=$(reason_of "$suite" "$config" "$name")
        if [[ $here == missing ]]; then
            missing+=("$name")
        elif [[ $here != "$there" ]]; then
            echo "$config: $name: $here, on the host $there: ${reason:-NOT KNOWN}"
            if [[ -z $reason ]]; then
                surprises=$((surprises + 1))
                why "$suite" "$config" "$name"
            fi
        elif [[ -n $reason ]]; then
            surprises=$((surprises + 1))
            echo "$config: $name: $here, as on the host, AGAINST scripts/suites/known: $reason"
        fi
    done < <(printf '%s\n' "${!results[@]}" | sed -n "s/^$suite \($config\|$(native "$config")\) //p" | sort -u)
    if ((${#missing[@]})); then
        surprises=$((surprises + 1))
        echo "$config: DID NOT COME TO ITS END: ${#missing[@]} cases are missing, ${missing[0]} for one. The last lines:"
        tail -n 30 "$LOGS/$suite.$config" | sed 's/^/    /'
    fi
}

# reason_of SUITE CONFIG CASE: the reason in the first line of known that fits, or nothing.
reason_of() {
    local suite config name reason
    while read -r suite config name reason; do
        # shellcheck disable=SC2053 # they are patterns
        if [[ $1 == $suite && $2 == $config && $3 == $name ]]; then
            echo "$reason"
            return
        fi
    done < <(grep -v '^#' "$KNOWN")
}

# why SUITE CONFIG CASE: what the suite said of it. In the log that stands before the case.
why() {
    awk -v name="$3" '/^case: / { if ($2 == name) printf "%s", text; text = ""; next }
        { sub(/^why: /, ""); text = text "    " $0 "\n" }' "$LOGS/$1.$2" | tail -n 30
}

main "$@"
