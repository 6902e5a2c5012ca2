# shellcheck shell=sh
# Runs in a guest of host.sh, and on the emulated host for comparison: what programs do with files below DIR, each with
# its time. With OPTIONS, which are mount's, DIR is the share, mounted anew where nothing of it may be cached.
set -e
DIR=${1-/mnt}
again() {
    [ -n "$OPTIONS" ] || return 0
    # The first time nothing is mounted there.
    umount "$DIR" 2>/dev/null || true
    mount -t virtiofs -o "$OPTIONS" share "$DIR"
}
# gcc takes it badly where there is no such directory at all.
mkdir -p "$DIR" /usr/include
# What is used below is in memory then, and what the kernels put off at their start is done.
probe speed memory "$MEMORY" >/dev/null
for _ in 1 2 3 4 5 6 7 8; do probe speed memory 64 >/dev/null; done

if [ -n "$DISK" ]; then
    probe speed direct "$DISK"
    exit
fi
export GIT_AUTHOR_NAME=bench GIT_AUTHOR_EMAIL=bench GIT_COMMITTER_NAME=bench GIT_COMMITTER_EMAIL=bench
again
mkdir "$DIR/tree"
probe speed program untar tar -xf "${TREE:-/bench/tree.tar}" -C "$DIR/tree"
again
probe speed program list ls -lR "$DIR/tree"
# shellcheck disable=SC2016 # $1 is the shell's that runs there
probe speed program compile sh -ec 'for file in "$1"/source/*.c; do gcc -O1 -c "$file" -o "${file%c}o"; done' sh "$DIR/tree"
again
cd "$DIR/tree"
git init -q --template=
# Else commit leaves a program behind in this directory.
git config maintenance.auto false
# With DAX each of these files is mapped: more of them would take an emulated host minutes.
probe speed program 'git add' git add directory1 directory2 directory3
git commit -q -m tree
cd /
again
probe speed program 'git status' git -C "$DIR/tree" status
again
probe speed program remove rm -r "$DIR/tree"
again
probe speed read "$DIR/data"
again
probe speed pages "$DIR/data"
again
probe speed writes "$DIR/data"
again
probe speed direct "$DIR/data"
