# Which file systems are to be frozen. The kernel's own table says what is mounted; /sys leads from a file system
# through partitions, LVM, RAID and loop devices to the disks that the hypervisor knows.

# What lies on block devices and cannot be frozen: the guest agent tries all and passes these over, so does this.
# Others, known or not yet known, can.
CANNOT_FREEZE=' squashfs erofs cramfs romfs iso9660 udf vfat msdos exfat ntfs ntfs3 fuseblk hfs hfsplus ufs minix sysv '

# Sets $table to what is mounted and, with $1 = sockets, $listening to the lines of /proc/net/unix of sockets with a
# name that somebody listens at. One program reads both: starting it costs more than all that is done with them.
read_tables() {
    listening=
    if [ "$1" != sockets ]; then
        table=$(cat /proc/self/mountinfo)
        return
    fi
    table=$(cat /proc/self/mountinfo /proc/net/unix 2>/dev/null)
    case $table in *"${newline}Num "*) ;; *) return ;; esac
    IFS=$newline
    set -- ${table#*"${newline}Num "}
    IFS=$words
    table=${table%%"${newline}Num "*}
    for line; do
        case $line in *' 00010000 '*' /'*) listening=$listening$line$newline ;; esac
    done
}

# Sets $inner_first to the mount points (escaped as in mountinfo) that can be frozen, each device once, by its first
# mount: later ones may be bind mounts. What is mounted upon another one is mounted later, and a loop device after the
# file system with its file, so that order backwards is inner ones first. Sets $partial if some are left out, because
# all of their disks are in $skip; and $beneath.
find_mounts() {
    inner_first=
    partial=false
    devices=' '
    above=
    beneath= # the kind of file system that $mem is in
    places= # `POINT DEVICE SOURCE` of all file systems on block devices, in the order of mounting
    IFS=$newline
    set -- $table
    IFS=$words
    for line; do
        end=${line#* - }
        type=${end%% *}
        set -- $line
        case $mem/ in "${5%/}"/*) [ ${#5} -ge ${#above} ] && above=$5 beneath=$type ;; esac
        case $3:$type in
            0:*:btrfs | 0:*:bcachefs) ;; # on block devices, under a number of their own
            0:*) continue ;;             # network, memory, overlay
        esac
        device=$3
        point=$5
        set -- $end
        places="$places $point $device $2"
        case $CANNOT_FREEZE in *" $type "*) continue ;; esac
        case ${end##* } in ro | ro,*) continue ;; esac
        case $devices in *" $device "*) continue ;; esac
        # A file that another one is bound upon.
        decode "$point"
        [ -d "$name" ] || continue
        devices="$devices$device "
        inner_first="$point $device $2 $inner_first"
    done
    leave_out_skipped
}

# Reduces $inner_first from `POINT DEVICE SOURCE` to the points that are to be frozen.
leave_out_skipped() {
    set -- $inner_first
    inner_first=
    while [ $# -gt 0 ]; do
        if [ -n "$skip" ] && is_skipped "$2" "$3"; then
            partial=true
        else
            inner_first="$inner_first $1"
        fi
        shift 3
    done
}

# Whether all disks under the file system with device $1 and source $2 are known and skipped.
is_skipped() {
    find_disks "$1" "$2"
    [ -n "$disks" ] || return
    for disk in $disks; do
        case " $skip " in *" $disk "*) ;; *) return 1 ;; esac
    done
}

# Sets $disks to the addresses of all disks under a file system, `?` for one that has none.
find_disks() {
    disks=
    todo=
    look_under "$1" "$2"
    while [ -n "$todo" ]; do
        set -- $todo
        next=$1
        shift
        todo=$*
        path=$(readlink -f "/sys/dev/block/$next")
        [ -e "$path/partition" ] && path=${path%/*}
        case $path in
            */virtual/block/*) look_below "$path" ;;
            *) add_address "$path" ;;
        esac
    done
}

# Adds the block devices of the file system with device $1 and source $2 to $todo.
look_under() {
    case $1 in
        0:*) ;;
        *)
            todo="$todo $1"
            return
            ;;
    esac
    decode "$2"
    name=$(readlink -f "$name")
    set +f
    set -- /sys/fs/btrfs/*/devices/"${name##*/}"
    [ -e "$1" ] && set -- "${1%/*}"/* || set -- /sys/class/block/"${name##*/}"
    set -f
    add_devices "$@"
}

add_devices() {
    for one; do
        number=
        { read -r number <"$one/dev"; } 2>/dev/null
        if [ -n "$number" ]; then todo="$todo $number"; else disks="$disks ?"; fi
    done
}

# A virtual block device: what it is made of, or where the file of a loop device lies.
look_below() {
    file=
    { read -r file <"$1/loop/backing_file"; } 2>/dev/null
    case $file in
        /dev/*) set -- /sys/class/block/"${file##*/}" ;;
        /*)
            look_for_file "$file"
            return
            ;;
        *)
            set +f
            set -- "$1"/slaves/*
            set -f
            ;;
    esac
    add_devices "$@"
}

# Adds the devices of the file system in which the file $1 lies: the one with the longest mount point above it, and of
# those the last.
look_for_file() {
    best=
    set -- "$1" $places
    file=$1
    shift
    while [ $# -gt 2 ]; do
        decode "$1"
        case $file in
            "${name%/}"/*) [ ${#name} -ge ${#best} ] && best=$name best_device=$2 best_source=$3 ;;
        esac
        shift 3
    done
    if [ -n "$best" ]; then look_under "$best_device" "$best_source"; else disks="$disks ?"; fi
}

# The address of the disk at the path $1 in /sys/devices: its last PCI device, and behind it bus:target:unit on SCSI.
# Disks on SATA and IDE have none that the hypervisor would know.
add_address() {
    pci= unit=
    IFS=/
    set -- $1
    IFS=$words
    for part; do
        case $part in
            [0-9a-f][0-9a-f][0-9a-f][0-9a-f]:[0-9a-f][0-9a-f]:[0-9a-f][0-9a-f].[0-7]) pci=$part ;;
            [0-9]*:[0-9]*:[0-9]*:[0-9]*) unit=/${part#*:} ;;
            ata[0-9]*) pci=none ;;
        esac
    done
    case $pci in
        '' | none) disks="$disks ?" ;;
        *) disks="$disks pci:$pci$unit" ;;
    esac
}

# Sets $mounts to the JSON list of the points in $inner_first, and writes them to the file $1, one per line. What is
# not UTF-8 cannot be said in JSON and is left out.
list_mounts() {
    mounts=
    : >"$1"
    for point in $inner_first; do
        decode "$point"
        if ! is_utf8 "$name"; then
            partial=true
            note "a mount point whose name is not UTF-8 is not frozen: $name"
            continue
        fi
        printf '%s\n' "$name" >>"$1"
        escape "$name" exact
        mounts=${mounts:+$mounts,}$json
    done
}

is_utf8() {
    case $1 in *[!\ -~]*) ;; *) return 0 ;; esac
    due= # what the next byte may be, and how many of its kind follow
    for byte in $(printf '%s' "$1" | od -An -tx1); do
        case $due:$byte in
            :[0-7]?) ;;
            :c[2-9a-f] | :d?) due=1 ;;
            :e0) due=e0 ;;
            :ed) due=ed ;;
            :e?) due=2 ;;
            :f0) due=f0 ;;
            :f[1-3]) due=3 ;;
            :f4) due=f4 ;;
            1:[89ab]?) due= ;;
            2:[89ab]? | e0:[ab]? | ed:[89]?) due=1 ;;
            3:[89ab]? | f0:[9ab]? | f4:8?) due=2 ;;
            *) return 1 ;;
        esac
    done
    [ -z "$due" ]
}
