# Which file systems are to be frozen. Sourced by ext.

# Prints the mount points, inner ones first: of block devices, writable, of a kind that can be frozen, each device once.
# A mount is later in the kernel's list than what it is mounted upon, or than the file that its loop device is in; so the
# list backwards has the inner ones first. Mount points of skipped disks go to $JOB/left-out.
find_mounts() {
    : >"$JOB/left-out"
    seen=' ' points=
    while read -r _ _ device _ point options rest; do
        details=${rest#*- }
        type=${details%% *}
        super=${details##* }
        case $type in
            iso9660 | squashfs | udf | erofs | cramfs | romfs | vfat | msdos | exfat | ntfs* | fuse*) continue ;;
            btrfs | bcachefs) ;;
            *) case $device in 0:*) continue ;; esac ;;
        esac
        case ",$super," in *,ro,*) continue ;; esac
        case $seen in *" $device "*) continue ;; esac
        seen="$seen$device "
        point=$(decoded "$point")
        if [ -n "$skip_disks" ] && skipped "$device"; then
            printf '%s\n' "$point" >>"$JOB/left-out"
        else
            points="$point
$points"
        fi
    done </proc/self/mountinfo
    printf '%s' "$points"
}

# The kernel writes space, tab, newline and backslash as \ooo.
decoded() {
    case $1 in
        *\\*) printf '%b' "$(printf '%s' "$1" | sed 's/\\\([0-7][0-7][0-7]\)/\\0\1/g')" ;;
        *) printf '%s' "$1" ;;
    esac
}

# Whether all disks below the block device $1 (major:minor) are skipped. A device whose disk is not known is not.
skipped() {
    below=$(addresses "$(readlink -f "/sys/dev/block/$1")")
    [ -n "$below" ] || return 1
    for address in $below; do
        case $skip_disks in *" $address "*) ;; *) return 1 ;; esac
    done
}

# Prints the addresses of the disks that the block device at $1 in /sys lies on; `unknown` among them for others.
addresses() {
    case $1 in '' | */loop*) echo unknown; return ;; esac
    [ -e "$1/partition" ] && set -- "${1%/*}"
    for slave in "$1"/slaves/*; do
        if [ -e "$slave" ]; then
            slaves=yes
            (addresses "$(readlink -f "$slave")")
        fi
    done
    [ "${slaves:-}" != yes ] || return 0
    case $1 in
        */virtio[0-9]*/host*/*/block/*)
            unit=${1%/block/*}
            unit=${unit##*/}
            pci=${1%%/virtio*}
            echo "pci:${pci##*/}/${unit#*:}"
            ;;
        */virtio[0-9]*/block/*)
            pci=${1%%/virtio*}
            echo "pci:${pci##*/}"
            ;;
        *) echo unknown ;;
    esac
}
