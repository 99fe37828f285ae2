# What the entry point and the watchdog have in common. No function here starts a program: the watchdog may have to
# work while every disk is frozen and whatever looks at programs before they run hangs.

mem=/run/stillframe # in memory: writable while disks are frozen
newline='
'
words=' '"	$newline"
set -f # names are never patterns
IFS=$words
umask 077

# Sets $now to hundredths of a second since the guest's start. Its clock may be set at any time; this is not.
now() {
    read -r up rest </proc/uptime
    now=$((${up%.*} * 100 + 1${up#*.} - 100))
}

# Sets $start to the time at which process $1 began; fails if it does not live. Process and start together are a name
# that is never given again.
started_at() {
    start=
    { read -r line <"/proc/$1/stat"; } 2>/dev/null || return 1
    set -- ${line##*) }
    case $1 in Z | X) return 1 ;; esac
    shift 19 2>/dev/null || return 1
    start=$1
}

# Whether process $1 that began at $2 lives.
alive() {
    case $1 in '' | *[!0-9]*) return 1 ;; esac
    started_at "$1" && [ "$start" = "$2" ]
}

# Sets $name to the mount point whose name is escaped in $1. printf's %b wants \0040 for the kernel's \040; the `x`
# saves newlines at the end from the shell.
decode() {
    name=$1
    case $1 in
        *\\*) ;;
        *) return ;;
    esac
    escaped=
    left=$1
    while :; do
        case $left in
            *\\*)
                escaped=$escaped${left%%\\*}'\0'
                left=${left#*\\}
                ;;
            *) break ;;
        esac
    done
    name=$(printf '%bx' "$escaped$left")
    name=${name%x}
}
