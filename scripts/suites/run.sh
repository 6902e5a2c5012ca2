# shellcheck shell=sh
# Runs one suite in the directory DIR, for guest.sh in a guest and for host.sh on the emulated host. The shell of both is
# busybox.
#
# In the environment: BIN (where the programs are); from suites.sh SUITE, SECONDS_ALL (how long it takes) and ROLE (root or
# user).
#
# For each case it prints what the suite says of a failure, as lines `why: TEXT`, and then `case: NAME RESULT`, in which the
# result is ok, FAILED or skipped.
export PATH="$BIN:$PATH" NO_COLOR=1

cat >>/etc/passwd <<END
user:x:1000:1000::/:/bin/sh
tests:x:1001:1001::/:/bin/sh
nobody:x:65534:65534::/:/bin/sh
END
cat >>/etc/group <<END
user:x:1000:
tests:x:1001:
nogroup:x:65534:
END

# The program is run out of the directory that it tests: its text and its constants are mapped files of the share.
mkdir "$DIR/work" "$DIR/bin"
cp "$BIN/$SUITE" "$DIR/bin/"
program=$DIR/bin/$SUITE
cd "$DIR/work" || exit 1
as=
if [ "$ROLE" = user ]; then
    chown 1000:1000 "$DIR/work"
    as="$BIN/setpriv --reuid 1000 --regid 1000 --clear-groups --"
fi

pjdfstest() {
    # The other file system, for EXDEV.
    mkdir -m 1777 /tmp/other
    mount -t tmpfs other /tmp/other
    # Cases named erofs mount the file system read-only. They need a process of their own: after others, which leave removed
    # files open, that fails with EBUSY.
    cases false | grep -v ::erofs_
    cases true erofs
}

# cases ALLOW-REMOUNT [PATTERN]: runs all cases, or those that fit. pjdfstest explains a failure behind the case.
cases() {
    cat >/tmp/pjdfstest.toml <<END
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
allow_remount = $1
[dummy_auth]
entries = [["nobody", "nogroup"], ["tests", "tests"]]
END
    shift
    $as "$program" -c /tmp/pjdfstest.toml -p "$DIR/work" -s /tmp/other "$@" | awk '
        function flush() { if (name) print why "case: " name " " result; name = why = ""; fflush() }
        /^[a-z_0-9:]+ +(ok|FAILED|skipped)$/ { flush(); name = $1; result = $2; next }
        result == "FAILED" && NF { why = why "why: " $0 "\n" }
        END { flush() }'
}

fsx() {
    cat >/tmp/fsx.toml <<END
flen = 1048576
[weights]
close_open = 1
invalidate = 1
truncate = 3
fsync = 0.3
fdatasync = 0.3
posix_fallocate = 1
punch_hole = 1
sendfile = 1
posix_fadvise = 1
copy_file_range = 1
END
    one alone $((SECONDS_ALL / 2))
    one first $((SECONDS_ALL / 2)) &
    one second $((SECONDS_ALL / 2))
    wait
}

# one NAME SECONDS: an fsx that finds no fault goes on until it is stopped.
one() {
    status=0
    timeout "$2" "$program" -f /tmp/fsx.toml -P /tmp "$DIR/work/$1" >"/tmp/$1.out" 2>&1 || status=$?
    case $status in
    124 | 143) echo "case: $1 ok" ;;
    *)
        tail -n 40 "/tmp/$1.out" | sed 's/^/why: /'
        echo "case: $1 FAILED"
        ;;
    esac
}

stress() {
    # "class 'filesystem' stressors: access bind-mount ..."
    all=$("$program" --class 'filesystem?' | sed 's/.*: //')
    # Some finish a round of thousands of files first, however long it takes.
    each=$((SECONDS_ALL / $(echo "$all" | wc -w)))
    for stressor in $all; do
        status=0
        timeout -s KILL $((each + 600)) "$program" --"$stressor" 1 --timeout $((each + 1)) --verify \
            --temp-path "$DIR/work" >/tmp/stressor.out 2>&1 || status=$?
        # Of its statuses, 3 is a lack of resources and 4 a lack in the kernel.
        case $status in
        0) result=ok ;;
        3 | 4) result=skipped ;;
        *) result=FAILED ;;
        esac
        if grep -qE 'skipping stress test|No stress workers invoked' /tmp/stressor.out; then result=skipped; fi
        [ $result = ok ] || sed "s/^/why: status $status: /" /tmp/stressor.out
        echo "case: $stressor $result"
        rm -rf "$DIR/work/"*
    done
}

case $SUITE in
stress-ng) stress ;;
*) $SUITE ;;
esac
