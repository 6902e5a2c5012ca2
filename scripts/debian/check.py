"""usage: check.py CHECK [ARGUMENT]: the checks of check.sh that need system calls of their own.

Each works in the current directory and ends with an AssertionError, or another exception, where something is wrong.
"""

import errno
import fcntl
import mmap
import os
import random
import sqlite3
import sys
import time
import zipfile


def git_stream():
    """A repository of 10,000 files for `git fast-import`."""
    out = sys.stdout
    out.write("commit refs/heads/main\ncommitter check <check@localhost> 1700000000 +0000\ndata 5\nfirst\n")
    for n in range(10000):
        text = "".join(f"file {n} line {line}\n" for line in range(n % 40 + 1))
        out.write(f"M 100644 inline d{n // 100 + 1}/f{n}\ndata {len(text)}\n{text}\n")


def children(count, work):
    """Runs work(number) in so many processes; each must end well."""
    pids = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                work(number)
                os._exit(0)
            except BaseException as error:
                print(f"process {number}: {type(error).__name__}: {error}", flush=True)
                os._exit(1)
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert statuses == [0] * count, f"processes ended with {statuses}"


def sqlite():
    """Three writers and a WAL, with the database mapped; each transaction keeps a sum."""

    def connect():
        db = sqlite3.connect("wal.db", timeout=300, isolation_level=None)
        db.execute("pragma journal_mode=wal")
        size = db.execute("pragma mmap_size=67108864").fetchone()[0]
        assert size == 67108864, f"mmap_size is {size}"
        db.execute("pragma wal_autocheckpoint=50")
        return db

    db = connect()
    assert db.execute("pragma journal_mode").fetchone()[0] == "wal"
    db.execute("create table rows(id integer primary key, writer, n, text)")
    db.execute("create table sums(writer primary key, total)")
    db.executemany("insert into sums values (?, 0)", [(writer,) for writer in range(3)])
    db.close()

    def write(writer):
        db = connect()
        for n in range(100):
            db.execute("begin immediate")
            db.execute("insert into rows(writer, n, text) values (?, ?, ?)", (writer, n, "x" * random.randrange(2000)))
            db.execute("update sums set total = total + ? where writer = ?", (n, writer))
            rows, total = db.execute("select (select sum(n) from rows), (select sum(total) from sums)").fetchone()
            assert rows == total, f"rows {rows}, sums {total}"
            db.execute("commit")

    children(3, write)
    db = connect()
    assert db.execute("select count(*), sum(n) from rows").fetchone() == (300, 3 * 4950)
    assert db.execute("pragma integrity_check").fetchone()[0] == "ok"


def wheel():
    """A wheel of 200 modules."""
    with zipfile.ZipFile("checked-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as out:
        names = []

        def add(name, text):
            out.writestr(name, text)
            names.append(name)

        body = "import importlib\ndef total():\n    return sum(importlib.import_module(f'checked.m{n}').one for n in range(200))\n"
        add("checked/__init__.py", body)
        for n in range(200):
            add(f"checked/m{n}.py", "one = 1\n")
        info = "checked-1.0.dist-info/"
        add(info + "METADATA", "Metadata-Version: 2.1\nName: checked\nVersion: 1.0\n")
        add(info + "WHEEL", "Wheel-Version: 1.0\nGenerator: check\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr(info + "RECORD", "".join(f"{name},,\n" for name in names) + info + "RECORD,,\n")


def memory(mib):
    """So much memory, written and verified."""
    pages = int(mib) * 256
    held = mmap.mmap(-1, pages * 4096)
    for turn in range(2):
        for page in range(pages):
            held[page * 4096 : page * 4096 + 8] = (page * 7 + turn).to_bytes(8, "little")
        for page in range(pages):
            found = int.from_bytes(held[page * 4096 : page * 4096 + 8], "little")
            assert found == page * 7 + turn, f"page {page}: {found}"


def open_files(count):
    """So many files open at once; each is written through its descriptor, and every fourth is read, which has no name."""
    count = int(count)
    files = []
    for n in range(count):
        files.append(os.open(f"f{n}", os.O_RDWR | os.O_CREAT | os.O_EXCL))
    for n in range(0, count, 2):
        os.unlink(f"f{n}")
    for n, file in enumerate(files):
        assert os.pwrite(file, b"file %d" % n, 0) > 0
    for n, file in enumerate(files):
        assert os.fstat(file).st_nlink == n % 2, n
        # With DAX each is a mapping, for which the emulated host takes milliseconds.
        if n % 4 == 0:
            assert os.pread(file, 100, 0) == b"file %d" % n, n
    for file in files:
        os.close(file)
    assert len(os.listdir(b".")) == count // 2
    assert open("f1", "rb").read() == b"file 1"


def names():
    """Each byte but NUL and /, alone and 255 times; names in no encoding; one byte too many."""
    wanted = {bytes([byte]) for byte in range(1, 256)} - {b"/", b"."}
    wanted |= {bytes([byte]) * 255 for byte in range(1, 256)} - {b"/" * 255}
    wanted |= {b"\xc3\x28", b"new\nline", b"-rf", b"*", b" ", b"...", b"\xff\xfe" * 127, "ä".encode() * 127, b"a" * 254 + b"\x80"}
    made = random.Random(1)
    letters = [byte for byte in range(1, 256) if byte != ord("/")]
    wanted |= {bytes(made.choices(letters, k=255)) for _ in range(50)}
    for name in wanted:
        with open(name, "xb") as file:
            file.write(name)
    found = os.listdir(b".")
    assert len(found) == len(wanted) and set(found) == wanted, "the directory's names differ"
    for name in wanted:
        with open(name, "rb") as file:
            assert file.read() == name, name
        to = name[::-1] if name[::-1] not in wanted else name[:254] + b"+"
        os.mkdir(b"to")
        os.rename(name, b"to/" + to)
        assert os.listdir(b"to") == [to], name
        os.symlink(to, b"to/link-" + to[:200])
        os.unlink(b"to/link-" + to[:200])
        os.unlink(b"to/" + to)
        os.rmdir(b"to")
    assert os.listdir(b".") == []
    try:
        open(b"n" * 256, "xb")
        raise AssertionError("a name of 256 bytes was taken")
    except OSError as error:
        assert error.errno == errno.ENAMETOOLONG, error


def directory(count):
    """A directory of so many entries, read while others come and go: what stays is seen once, what never was not at all."""
    count = int(count)
    os.mkdir("d")
    top = os.open("d", os.O_RDONLY)
    for n in range(count):
        os.mknod(f"stays-{n}", dir_fd=top)

    def change(_):
        made = random.Random(2)
        for n in range(2000):
            os.mknod(f"goes-{n}", dir_fd=top)
            if n > 50:
                os.unlink(f"goes-{n - 50}", dir_fd=top)
            if n % 10 == 0:
                os.rename(f"goes-{n}", f"moved-{made.randrange(10**9)}", dst_dir_fd=top, src_dir_fd=top)
                os.mknod(f"goes-{n}", dir_fd=top)

    changer = os.fork()
    if changer == 0:
        try:
            change(0)
            os._exit(0)
        except BaseException as error:
            print(f"change: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
    turns = 0
    while True:
        done = os.waitpid(changer, os.WNOHANG)
        stays = []
        others = set()
        for entry in os.scandir("d"):
            if entry.name.startswith("stays-"):
                stays.append(int(entry.name[6:]))
            else:
                assert entry.name.startswith(("goes-", "moved-")), entry.name
                others.add(entry.name)
        assert len(stays) == count, f"turn {turns}: {len(stays)} of {count} names"
        assert sorted(stays) == list(range(count)), f"turn {turns}: a name twice"
        turns += 1
        if done[0]:
            break
    assert done[1] == 0, f"the changer ended with {done[1]}"
    assert len(others) == len(os.listdir("d")) - count
    assert turns > 1, "the directory did not change while it was read"


def two():
    """This directory is the second guest's, too: see second.sh."""

    def write(name, text):
        with open(name, "w") as file:
            file.write(text)

    def answer(wanted):
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if os.path.exists("second"):
                with open("second") as file:
                    for line in file:
                        if line.startswith(wanted):
                            return line.strip()
            time.sleep(0.2)
        raise AssertionError(f"no '{wanted}' from the second guest")

    write("given", "one\n")
    write("old", "")
    write("removed", "")
    write("lock", "")
    os.write(3, b"now two\n")
    try:
        answer("given")
        os.rename("old", "renamed")
        answer("renamed")
        os.unlink("removed")
        answer("removed")
        with open("given", "r+b") as file:
            held = mmap.mmap(file.fileno(), 4)
            held[0:3] = b"TWO"
            held.flush()
        answer("stored")
        lock = open("lock", "r+")
        fcntl.flock(lock, fcntl.LOCK_EX)
        write("locked", "")
        # check.sh's `locks` looks at it.
        answer("flock")
    finally:
        write("over", "")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
