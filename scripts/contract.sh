#!/bin/bash
# usage: contract.sh [--list] [quick] [NUMBER...]
#
# Runs the tests of the contract (src/contract.md) and prints, for each assertion, the tests that prove it and whether it
# was held. Tests are found by the numbers that they cite: a test belongs to SHM-35 when a comment in it, or right above
# it, says SHM-35.
#
#   NUMBER             only these assertions, each with its whole text and where its tests are: contract.sh 35 69
#   quick              only tests that need no Linux guest
#   --list             runs nothing: only says which tests there are
#
# An assertion is 'held' when all its tests passed, 'broken' when one failed, 'skipped' when one could not run here (it
# says why), 'untested' when there is none, and 'not yet' when src/contract.md says that it is not built. The last line is
# 'N passed, N failed': held assertions, and those that are broken, skipped or untested; the exit status is 1 when there
# are any of these, or when a test cites a number that the contract does not have.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

CONTRACT=src/contract.md
LINUX=linux # the test program that boots Linux

main() {
    local list='' quick='' numbers=()
    while (($# > 0)); do
        case $1 in
        -h | --help) usage && return ;;
        --list) list=1 ;;
        quick) quick=1 ;;
        *[!0-9]* | '') die "$1: not understood (--help says what is)" ;;
        *) numbers+=("$1") ;;
        esac
        shift
    done
    cd "$PROJECT"
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
    assertions >"$WORK/assertions"
    citations >"$WORK/citations"
    local unknown number
    unknown=$(awk 'NR == FNR { known[$1]; next } !($1 in known)' "$WORK/assertions" "$WORK/citations")
    [[ -z $unknown ]] || die "cited, but not in $CONTRACT (number, test program, test, place):"$'\n'"$unknown"
    for number in "${numbers[@]}"; do
        grep -q "^$number " "$WORK/assertions" || die "there is no SHM-$number in $CONTRACT"
    done
    if ((${#numbers[@]} > 0)); then
        only "$WORK/assertions" "${numbers[@]}"
        only "$WORK/citations" "${numbers[@]}"
    fi
    [[ -z $quick ]] || sed -i "/^[0-9]* $LINUX /d" "$WORK/citations"

    : >"$WORK/results"
    [[ -n $list ]] || run
    table "${list:+list}" "$((${#numbers[@]} > 0))"
}

# The contract: lines of NUMBER, 'built' or 'not-yet', TEXT.
assertions() {
    awk '
        function number(text) { match(text, /SHM-[0-9]+/); return substr(text, RSTART + 4, RLENGTH - 4) }
        FNR == 1 { pass++ }
        /^## / { unbuilt = /^## Not built yet/ }
        pass == 1 && unbuilt && /^\| SHM-/ {
            split($0, cells, "|")
            while (match(cells[2], /SHM-[0-9]+/)) {
                not_yet[number(cells[2])]
                cells[2] = substr(cells[2], RSTART + RLENGTH)
            }
        }
        pass == 2 && /^- \*\*SHM-[0-9]+\*\* / {
            text = $0
            sub(/^- \*\*SHM-[0-9]+\*\* \([SVDP]\) /, "", text)
            print number($0), (number($0) in not_yet ? "not-yet" : "built"), text
        }' "$CONTRACT" "$CONTRACT"
}

# What the tests cite: lines of NUMBER, test program ('lib', or a name in tests/), test, FILE:LINE.
citations() {
    local path program module
    while read -r path; do
        module=${path%.rs}
        module=${module%/mod}
        case $path in
        src/*) program=lib module=${module#src/} ;;
        tests/*/*) program=${module#tests/} program=${program%%/*} module=${module#"tests/$program/"} ;;
        tests/*) program=${module#tests/} module='' ;;
        esac
        [[ $module != main ]] || module=''
        awk -v program="$program" -v module="${module//\//::}" -v path="$path" "$CITATIONS" "$path"
    done < <(find src tests -name '*.rs' -not -path 'src/bin/*' -not -path 'src/main.rs' | sort) |
        sort -u | sort -k1,1n -k2
}

# For one source file, as rustfmt formats it: a function that is a test, with the comments and attributes right above it,
# ends with the brace in the column where it starts.
# shellcheck disable=SC2016 # the dollars are awk's
CITATIONS='
    function cite(line) {
        while (match(line, /SHM-[0-9]+/)) {
            cited[substr(line, RSTART + 4, RLENGTH - 4)]
            line = substr(line, RSTART + RLENGTH)
        }
    }
    function forget() { for (number in cited) delete cited[number] }
    end != "" {
        if (/\/\//) cite($0)
        if ($0 == end) {
            for (number in cited) print number, program, name, path ":" start
            forget()
            end = ""
        }
        next
    }
    /^mod [a-z_]+ \{$/ { inner = $2; next }
    /^}$/ { inner = "" }
    /^ *\/\// { cite($0); next }
    /^ *#\[test\]$/ { is_test = 1; next }
    /^ *#\[/ { next }
    is_test && match($0, /fn [a-z0-9_]+/) {
        name = substr($0, RSTART + 3, RLENGTH - 3)
        if (inner != "") name = inner "::" name
        if (module != "") name = module "::" name
        start = FNR
        end = substr($0, 1, match($0, /[^ ]/) - 1) "}"
        is_test = 0
        next
    }
    { forget(); is_test = 0 }'

# Keeps only the lines of a file that start with one of the numbers.
only() {
    local file=$1
    shift
    awk -v numbers="$*" '
        BEGIN { split(numbers, list); for (i in list) wanted[list[i]] }
        $1 in wanted' "$file" >"$file.new"
    mv "$file.new" "$file"
}

# Runs the cited tests; what became of each goes to 'results', in lines of test program, test, 'ok', 'FAILED' or 'skipped'.
run() {
    local program tests select options
    while read -r program; do
        mapfile -t tests < <(awk -v program="$program" '$2 == program { print $3 }' "$WORK/citations" | sort -u)
        say "$program: ${#tests[@]} tests"
        select=("--test=$program") options=()
        case $program in
        lib) select=(--lib) ;;
        "$LINUX")
            linux_tools
            # More at a time than processors: most of them only wait for a session.
            select+=(--release) options+=(--test-threads=16)
            ;;
        esac
        cargo test --quiet --locked --no-run "${select[@]}" </dev/null >&2 || die "$program: it does not build"
        cargo test --quiet --locked "${select[@]}" -- --format=pretty --exact "${options[@]}" "${tests[@]}" \
            </dev/null >"$WORK/out" 2> >(tee "$WORK/err" >&2) || cat "$WORK/out" >&2
        awk -v program="$program" '
            FILENAME ~ /err$/ { if (/^SKIPPED: /) { sub(/:$/, "", $2); skipped[$2] } next }
            /^test .* \.\.\. / { print program, $2, ($2 in skipped ? "skipped" : $NF) }' \
            "$WORK/err" "$WORK/out" >>"$WORK/results"
    done < <(awk '{ print $2 }' "$WORK/citations" | sort -u)
}

# The table, and the sum.
table() {
    local list=$1 whole=$2
    awk -v list="$list" -v whole="$whole" '
        FILENAME ~ /results$/ { result[$1 " " $2] = $3; next }
        FILENAME ~ /citations$/ {
            test = $2 " " $3
            what = list ? "" : test in result ? result[test] : "not run"
            if (what == "FAILED" || what == "not run") broken[$1]
            if (what == "skipped") skipped[$1]
            count[$1]++
            shown = test
            sub(/ /, ": ", shown)
            lines[$1] = lines[$1] sprintf("      %s%s%s\n", shown, whole ? "  (" $4 ")" : "", what == "" || what == "ok" ? "" : "  " what)
            next
        }
        {
            number = $1
            text = $0
            sub(/^[0-9]+ [a-z-]+ /, "", text)
            state = number in broken ? "broken" : number in skipped ? "skipped" : list ? "tested" : "held"
            if (!(number in count)) state = $2 == "not-yet" ? "not yet" : "untested"
            sum[state]++
            if (!whole && length(text) > 96) { text = substr(text, 1, 95); sub(/ [^ ]*$/, " ...", text) }
            printf "%-9s %-8s %s\n%s", "SHM-" number, state, text, lines[number]
        }
        END {
            for (state in sum) said = said (said ? ", " : "") sum[state] " " state
            bad = sum["broken"] + sum["skipped"] + sum["untested"]
            printf "%s\n%d passed, %d failed\n", said, sum["held"] + sum["tested"], bad
            exit bad > 0
        }' "$WORK/results" "$WORK/citations" "$WORK/assertions"
}

main "$@"
