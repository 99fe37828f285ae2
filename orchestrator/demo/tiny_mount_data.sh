#!/bin/sh
# Mount every virtio disk with an ext4 file system at /data/<name>; again at any time, for disks that came later.
for disk in /dev/vd?; do
    name=${disk#/dev/}
    [ -b "$disk" ] || continue
    grep -q " /data/$name " /proc/mounts && continue
    mkdir -p "/data/$name"
    mount -t ext4 -o noatime "$disk" "/data/$name" 2>/dev/null || rmdir "/data/$name"
done
