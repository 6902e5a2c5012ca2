# shellcheck shell=sh
# Runs in a guest with a share that another machine had before, and whose back-end holds few files at a time.
set -e
mkdir -p /mnt
mount -t virtiofs -o dax=always share /mnt
echo "given: $(cat /mnt/given)"
probe sum /mnt/kept map

# Hundreds of files, moved and linked, of which the back-end forgets most again and again.
mkdir /mnt/many
cd /mnt/many
for dir in 1 2 3 4 5 6 7 8; do
    mkdir $dir
    for file in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25; do
        echo $dir/$file >$dir/$file
    done
done
# A working directory that moves, and open files that are removed.
cd 3
exec 5<./1 6<./2
mv /mnt/many/3 /mnt/many/5/moved
mv 4 /mnt/many/4/replaced
mv /mnt/many/4/replaced /mnt/many/4/4
ln 5 /mnt/many/6/linked
rm 1 2 5
find /mnt/many -type f -exec cat {} + >/dev/null
echo "many: $(find /mnt/many -type f | wc -l) files, $(cat ../../6/linked) $(cat ../../4/4) $(cat 6) $(cat <&5) $(cat <&6)"
cd /
exec 5<&- 6<&-
rm -r /mnt/many
echo "left: $(find /mnt/many 2>/dev/null | wc -l)"
