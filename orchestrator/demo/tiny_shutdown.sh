#!/bin/sh
# The guest agent runs `shutdown` with `-P`, `-H` or `-r` for guest-shutdown: leave clean file systems behind.
sync
for mounted in /data/*; do umount "$mounted" 2>/dev/null; done
case "$*" in *-r*) exec reboot -f ;; *) exec poweroff -f ;; esac
