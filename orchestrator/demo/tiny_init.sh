#!/bin/sh
# First process of the small guests, from the initramfs. Without `root=` on the kernel's command line it is the whole
# guest: every ext4 disk under /data, the real guest agent, nothing else. With `root=` it loads the drivers (Debian's
# cloud kernel has virtio as modules) and hands over to the system on that disk.
export PATH=/bin:/sbin:/usr/sbin:/usr/bin HOME=/ LC_ALL=C
# The kernel makes the initramfs's root writable for all, as /tmp is.
/bin/busybox chmod 0755 /
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /var/run /data /new-root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t tmpfs tmpfs /tmp
/bin/busybox --install -s /bin

for module in $(cat /modules/order); do
    insmod "/modules/$module" || echo "stillframe-guest: $module did not load"
done

root= relay=
for word in $(cat /proc/cmdline); do
    case $word in
    root=*) root=${word#root=} ;;
    agent-relay) relay=yes ;;
    esac
done
if [ -n "$root" ]; then
    # virtio disks appear a moment after their driver.
    tries=100
    until [ -b "$root" ] || [ "$tries" -eq 0 ]; do tries=$((tries - 1)); usleep 100000; done
    mount -t ext4 -o rw,noatime "$root" /new-root || { echo "stillframe-guest: no system on $root"; poweroff -f; }
    umount /tmp
    mount -o move /dev /new-root/dev
    mount -o move /sys /new-root/sys
    mount -o move /proc /new-root/proc
    exec switch_root /new-root /sbin/init
fi

mount-data
mkdir -p /dev/virtio-ports
for port in /sys/class/virtio-ports/*; do
    [ -f "$port/name" ] && ln -sf "../${port##*/}" "/dev/virtio-ports/$(cat "$port/name")"
done
echo "stillframe-guest: ready"

# With the word agent-relay the agent is somebody else, on the host behind a second port: bytes are passed on both ways.
# Each port can be opened once only, so both directions share it. A port whose other side is away reads as ended.
if [ -n "$relay" ]; then
    exec 3<>/dev/virtio-ports/org.qemu.guest_agent.0 4<>/dev/virtio-ports/stillframe.relay
    while :; do cat <&3 >&4; usleep 50000; done &
    while :; do cat <&4 >&3; usleep 50000; done
fi

# The agent is all that there is: if it ends, begin again, with what /run/agent-options says.
while :; do
    # shellcheck disable=SC2046
    qemu-ga -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -t /run -f /run/qemu-ga.pid \
        $(cat /run/agent-options 2>/dev/null)
    sleep 1
done
