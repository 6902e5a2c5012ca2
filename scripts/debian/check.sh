#!/bin/bash
# usage: check.sh PROGRAM...
#
# What debian.sh types at the login of its guest: runs each check in /check/work/PROGRAM, prints `RESULT PROGRAM ok SECONDS`,
# `RESULT PROGRAM wrong REASON` or `RESULT PROGRAM - REASON` (there is no such thing here), and switches the guest off. A wrong
# check's output goes to the console, too.
#
# The checks with system calls of their own are in check.py.
set -uo pipefail

# Of one check. The slowest takes a fourth of this on the emulated host.
LIMIT=1200

main() {
    local program status start reason
    # Their lines would cut ours in two.
    dmesg -n 1
    TERMINAL=$(tty)
    export TERMINAL HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive GIT_CONFIG_NOSYSTEM=1
    for program; do
        start=$SECONDS status=0
        mkdir -p "/check/work/$program"
        echo "BEGIN $program"
        (cd "/check/work/$program" && timeout -k 10 "$LIMIT" bash "$0" --one "$program") \
            </dev/null >"/check/log.$program" 2>&1 || status=$?
        case $status in
        0) echo "RESULT $program ok $((SECONDS - start))" ;;
        77) echo "RESULT $program - $(tail -n 1 "/check/log.$program")" ;;
        *)
            tail -n 40 "/check/log.$program" | sed "s/^/LOG $program: /"
            reason=$(tail -n 2 "/check/log.$program" | paste -sd ' ' | cut -c 1-200)
            [[ $status != 124 ]] || reason="no end after $LIMIT s; $reason"
            echo "RESULT $program wrong $reason"
            ;;
        esac
    done
    echo END
    # It looks for D-Bus first, which is not here.
    systemctl poweroff 2>/dev/null
}

one() {
    set -eE
    # shellcheck disable=SC2154 # set in the trap
    trap 'status=$?; echo "line $LINENO: $BASH_COMMAND: status $status"; exit $status' ERR
    "check_$1"
}

# same EXPECTED ACTUAL
same() {
    [[ $1 == "$2" ]] || {
        echo "expected '$1', found '$2'"
        exit 1
    }
}
not_here() {
    echo "$*"
    exit 77
}
# tree_sums DIR: each file's checksum, in one order.
tree_sums() { (cd "$1" && find . -type f -print0 | sort -z | xargs -0 sha256sum); }
python() { python3 /check/check.py "$@"; }

# systemd at its end, this login included.
check_login() {
    same /dev/ttyS0 "$TERMINAL"
    systemctl is-system-running --wait || true
    systemctl --failed --no-legend
    same running "$(systemctl is-system-running)"
}

FIRST=(hello bc time tree ed)
SECOND=(jq libjq1 libonig5 zip unzip)

# debs PACKAGE...: their files.
debs() { printf '%s\n' "$@" | sed 's#.*#/check/debs/&_*.deb#'; }

installed() {
    same "" "$(dpkg --verify "$@")"
    same "" "$(dpkg --audit)"
}

check_dpkg() {
    # shellcheck disable=SC2046 # patterns
    dpkg -i $(debs "${FIRST[@]}")
    installed "${FIRST[@]}"
    same 'Hello, world!' "$(hello)"
    same 1267650600228229401496703205376 "$(bc <<<'2^100')"
    printf '%s\n' a one . w q | ed -s file && true
    # Removed and put back, with its configuration.
    dpkg --purge tree
    [[ ! -e /usr/bin/tree ]]
    dpkg -i /check/debs/tree_*.deb
    tree --version
}

check_apt() {
    # shellcheck disable=SC2046 # patterns
    apt-get install -y $(debs "${SECOND[@]}")
    installed "${SECOND[@]}"
    same 2 "$(jq '.a[1]' <<<'{"a":[1,2]}')"
    zip -qr usr.zip /usr/share/doc/apt /usr/share/doc/jq
    unzip -tq usr.zip
    apt-get remove -y zip
    [[ ! -e /usr/bin/zip ]]
}

# 10,000 files in a pack, checked out of a clone, changed, and packed again.
check_git() {
    git config --global user.name check
    git config --global user.email check@localhost
    git init -q --bare -b main origin.git
    python git_stream | git -C origin.git fast-import --quiet
    git clone -q file://"$PWD"/origin.git clone
    cd clone
    same 10000 "$(git ls-files | wc -l)"
    same 10000 "$(find . -path ./.git -prune -o -type f -print | wc -l)"
    same "" "$(git status --porcelain)"
    seq 100 | while read -r n; do echo "changed $n" >"d$n/new"; done
    git mv d7 moved
    git rm -q 'd8/f70?'
    git add .
    git commit -qm changes
    git gc --quiet --prune=now
    git fsck --full
    same "" "$(git status --porcelain)"
    same 0 "$(find .git/objects -type f -path '*/??/*' | wc -l)"
    git push -q origin HEAD:copy
    same "$(git rev-parse HEAD)" "$(git -C ../origin.git rev-parse copy)"
}

check_sqlite() {
    sqlite3 shell.db 'create table t(n); insert into t values (1), (2); vacuum;'
    same 3 "$(sqlite3 shell.db 'select sum(n) from t')"
    python sqlite
    same ok "$(sqlite3 wal.db 'pragma integrity_check')"
}

# pgbench's sums agree, also after the server was stopped without a checkpoint.
check_postgresql() {
    local query="select count(*) = 150 and sum(delta) = (select sum(abalance) from pgbench_accounts)
        and sum(delta) = (select sum(bbalance) from pgbench_branches) and sum(delta) = (select sum(tbalance) from pgbench_tellers)
        from pgbench_history"
    # By itself it would ask systemd, which knows one way to stop.
    server() { pg_ctlcluster --skip-systemctl-redirect "$(ls /usr/lib/postgresql)" main "$@"; }
    server start
    trap 'server stop -m fast &>/dev/null || true' EXIT
    as_postgres() { runuser -u postgres -- "$@"; }
    as_postgres createdb check
    as_postgres pgbench -q -i -s 1 check
    as_postgres pgbench -c 3 -t 50 check
    same t "$(as_postgres psql -Atc "$query" check)"
    server stop -m immediate
    server start
    same t "$(as_postgres psql -Atc "$query" check)"
    as_postgres psql -Atc 'create extension amcheck' \
        -c "select bt_index_check(oid, true) from pg_class where relname like 'pgbench%pkey'" check
}

check_cargo() {
    cargo init -q --vcs none --name program program
    cargo init -q --vcs none --lib --name library library
    echo 'pub fn answer() -> Vec<u64> { (1..=6).map(|n| n * 7).collect() }' >library/src/lib.rs
    cd program
    echo 'library = { path = "../library" }' >>Cargo.toml
    echo 'fn main() { println!("{:?}", library::answer()); }' >src/main.rs
    cargo build --offline
    same '[7, 14, 21, 28, 35, 42]' "$(target/debug/program)"
    echo 'fn main() { println!("{}", library::answer().len()); }' >src/main.rs
    cargo build --offline
    same 6 "$(target/debug/program)"
}

check_pip() {
    python wheel
    pip install --no-index --break-system-packages --root-user-action=ignore ./checked-1.0-py3-none-any.whl
    cd /
    same 200 "$(python3 -c 'import checked; print(checked.total())')"
    pip uninstall -y --break-system-packages --root-user-action=ignore checked
    ! python3 -c 'import checked' 2>/dev/null || exit 1
}

check_rsync() {
    local source=/usr/lib/python3/dist-packages/pip/_vendor
    rsync -aHAX "$source/" copy
    same "" "$(rsync -aHAXnc --delete --itemize-changes "$source/" copy)"
    rsync -aHAX --delete copy/ again
    find copy -name '*.py' -path '*r*' -exec sh -c 'for f; do echo "# changed" >>"$f"; done' sh {} +
    rm -r copy/rich
    ln -s nowhere copy/link
    rsync -aHAXc --inplace --delete copy/ again
    same "" "$(rsync -aHAXnc --delete --itemize-changes copy/ again)"
    same "$(tree_sums copy)" "$(tree_sums again)"
}

check_tar() {
    mkdir tree
    cp -a /usr/share/perl5 /usr/share/postgresql-common tree/
    ln tree/postgresql-common/server/postgresql.mk tree/hard 2>/dev/null || ln "$(find tree -type f -print -quit)" tree/hard
    ln -s /nowhere tree/soft
    truncate -s 3M tree/sparse
    echo end >>tree/sparse
    setfattr -n user.note -v text tree/hard
    chown -R 1234:5678 tree/postgresql-common
    tar --xattrs -cSf tree.tar tree
    tree_sums tree >sums
    tar --xattrs -df tree.tar
    mkdir out
    tar --xattrs -xpSf tree.tar -C out
    (cd out/tree && sha256sum --quiet -c ../../sums)
    tar --xattrs -df tree.tar -C out
    same text "$(getfattr --only-values -n user.note out/tree/hard)"
    same "$(stat -c '%a %u %g %s %Y' tree/postgresql-common)" "$(stat -c '%a %u %g %s %Y' out/tree/postgresql-common)"
    same 2 "$(stat -c %h out/tree/hard)"
    (($(stat -c %b out/tree/sparse) < 1000)) || same sparse "$(stat -c %b out/tree/sparse)"
}

# In a mounted overlay `merged`, of which `lower` has what fill_lower made.
change_overlay() {
    echo more >>merged/file
    rm merged/gone
    mv merged/dir merged/moved
    rm -r merged/other
    mkdir merged/other
    echo new >merged/other/new
    echo tmp >merged/tmp
    mv merged/tmp merged/renamed
    same $'file\nmoved\nother\nrenamed' "$(ls merged)"
    same $'text\nmore' "$(cat merged/file)"
    same inner "$(cat merged/moved/inner)"
    same new "$(ls merged/other)"
    same text "$(cat lower/file)"
}
fill_lower() {
    mkdir -p lower/dir lower/other merged
    echo text >lower/file
    echo inner >lower/dir/inner
    touch lower/gone lower/other/old
}

check_overlay_lower() {
    fill_lower
    mkdir over
    mount -t tmpfs over over
    mkdir over/upper over/work
    mount -t overlay -o lowerdir=lower,upperdir=over/upper,workdir=over/work,redirect_dir=on overlay merged
    change_overlay
    umount merged over
}

check_overlay_upper() {
    fill_lower
    mkdir upper work
    mount -t overlay -o "lowerdir=lower,upperdir=upper,workdir=work,redirect_dir=on" overlay merged
    change_overlay
    umount merged
    # What the upper layer keeps is there after another mount.
    mount -t overlay -o "lowerdir=lower,upperdir=upper,workdir=work,redirect_dir=on" overlay merged
    same $'file\nmoved\nother\nrenamed' "$(ls merged)"
    same inner "$(cat merged/moved/inner)"
    umount merged
}

check_overlay_userxattr() {
    fill_lower
    mkdir upper work
    mount -t overlay -o "lowerdir=lower,upperdir=upper,workdir=work,userxattr" overlay merged
    # Without redirect_dir, which userxattr does not go with, mv copies a directory.
    change_overlay
    umount merged
}

check_loop() {
    truncate -s 64M image
    mkfs.ext4 -q image
    mkdir inside
    mount -o loop image inside
    cp -a /usr/share/perl5 inside/
    tree_sums /usr/share/perl5 >sums
    umount inside
    e2fsck -fn image
    mount -o loop,ro image inside
    (cd inside/perl5 && sha256sum --quiet -c ../../sums)
    umount inside
}

# A process of 112 MiB that may have 64 MiB of memory. (Linux has no swap files on FUSE, nor on DAX.)
check_swap() {
    local disk
    for disk in /dev/vdb /dev/pmem1; do
        [[ ! -b $disk ]] || break
    done
    [[ -b $disk ]] || not_here "a directory has no swap"
    mkswap "$disk"
    swapon "$disk"
    echo +memory >/sys/fs/cgroup/cgroup.subtree_control
    mkdir /sys/fs/cgroup/swap
    echo 64M >/sys/fs/cgroup/swap/memory.max
    (
        echo "$BASHPID" >/sys/fs/cgroup/swap/cgroup.procs
        python memory 112
    )
    (($(awk '/^pswpout/ { print $2 }' /proc/vmstat) > 10000)) || same 'pages swapped' none
    swapoff "$disk"
}

check_open_files() { prlimit --nofile=20000 python3 /check/check.py open_files 10000; }
check_names() { python names; }
check_directory() { python directory 100000; }

# The second guest has this directory, too. debian.sh's host starts it at this line.
check_two() {
    [[ $(stat -f -c %T .) == fuse* ]] || not_here "a disk belongs to one guest"
    rm -rf /check/two
    mkdir /check/two
    cd /check/two
    # The check's own output is a file.
    python two 3>/dev/console
}

# What the second guest saw of a lock that this one held.
check_locks() {
    [[ -e /check/two/second ]] || not_here "a disk belongs to one guest"
    same 'flock: seen' "$(grep ^flock /check/two/second)"
}

case ${1-} in
--one) one "$2" ;;
*) main "$@" ;;
esac
